//! The file: which one a URL names, who may have it, and how it is opened and migrated.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::sqlite::{
    SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use sqlx::{ConnectOptions, SqliteConnection, query, query_scalar};

use super::super::{CEILING_DEFAULT, Error, Result};
use super::fault::of_one;

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// The first SQLite without the WAL-reset corruption.
const VERSION_MIN: (u32, u32, u32) = (3, 51, 3);
/// How many connections read at once; each is short.
const READERS_MAX: u32 = 4;

/// A database that this process has for itself, with today's schema.
pub(super) struct Opened {
    pub(super) connection: SqliteConnection,
    pub(super) options: SqliteConnectOptions,
    pub(super) lock: File,
}

/// Opens the database that a URL names, making it if there is none, and migrates it.
pub(super) async fn open(url: &str) -> Result<Opened> {
    let path = path(url)?;
    let lock = lock(&path)?;
    create(&path)?;
    let options = options(&path);
    // For a new file, and so only here: on a connection that only reads it is a forbidden write.
    let first = options.clone().auto_vacuum(SqliteAutoVacuum::Incremental);
    let mut connection = first.connect().await.map_err(of_one)?;
    check_version(&mut connection).await?;
    migrate(&mut connection).await?;
    Ok(Opened { connection, options, lock })
}

/// Connections that only read, made when they are needed.
pub(super) fn readers(writing: &SqliteConnectOptions) -> SqlitePool {
    let reading = for_all(writing.get_filename()).read_only(true).pragma("cache_size", "-4096");
    SqlitePoolOptions::new()
        .max_connections(READERS_MAX)
        .acquire_timeout(Duration::from_secs(5))
        .connect_lazy_with(reading)
}

/// Whether the schema is the one that this program knows.
pub(super) fn is_current(version: i64) -> bool {
    MIGRATIONS.iter().map(|migration| migration.version).max() == Some(version)
}

/// The file that a URL names.
fn path(url: &str) -> Result<PathBuf> {
    let what = |what: &str| Error::Refused { what: format!("{what}, as in sqlite://pumphouse.db") };
    let rest = url.strip_prefix("sqlite:").ok_or_else(|| what("its URL starts with sqlite://"))?;
    let rest = rest.strip_prefix("//").unwrap_or(rest);
    if rest.is_empty() || rest.contains(":memory:") {
        return Err(what("SQLite needs a file, because memory is lost with the process"));
    }
    if rest.contains('?') {
        return Err(what("nothing can be set in its URL, only a file named"));
    }
    Ok(PathBuf::from(rest))
}

/// Takes the lock that one process has on a database. It ends with the process, however that ends.
fn lock(path: &Path) -> Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = private_file().truncate(false).create(true).open(&name);
    let file = file.map_err(|error| unusable(path, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let what = format!(
                "another process has {} open; stop that one first, or use postgres:// for several",
                path.display()
            );
            Err(Error::Refused { what })
        }
        Err(TryLockError::Error(error)) => Err(unusable(path, &error)),
    }
}

/// Makes the file, readable for nobody else, unless it is there.
fn create(path: &Path) -> Result<()> {
    match private_file().create_new(true).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(unusable(path, &error)),
    }
}

fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

fn unusable(path: &Path, error: &io::Error) -> Error {
    Error::Refused { what: format!("the file {} cannot be opened: {error}", path.display()) }
}

fn options(path: &Path) -> SqliteConnectOptions {
    for_all(path)
        .page_size(4096)
        .journal_mode(SqliteJournalMode::Wal)
        // What was answered is on the disk.
        .synchronous(SqliteSynchronous::Full)
        // A commit may walk it whole (whenever pages of an index changed places in it), so that a larger one
        // costs more than the reads it saves, which the system has in its own cache.
        .pragma("cache_size", "-8192")
        // Everybody waits while the log is copied back: often and short rather than seldom and long.
        .pragma("wal_autocheckpoint", "500")
        .pragma("journal_size_limit", "134217728")
}

fn for_all(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(Duration::from_secs(5))
        .foreign_keys(false)
        .pragma("temp_store", "memory")
        // The writer has an insert for every number of rows that is usual in a transaction.
        .statement_cache_capacity(512)
        // Lists come in one go, and not in portions for which two threads wait for each other.
        .row_buffer_size(1024)
        // A log line for each statement would cost as much as the statement.
        .disable_statement_logging()
}

async fn check_version(connection: &mut SqliteConnection) -> Result<()> {
    let version: String =
        query_scalar("select sqlite_version()").fetch_one(connection).await.map_err(of_one)?;
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    let mut number = || numbers.next().unwrap_or(0);
    let found = (number(), number(), number());
    if found < VERSION_MIN {
        let (major, minor, patch) = VERSION_MIN;
        let what = format!(
            "SQLite {version} can lose what is written; this program needs {major}.{minor}.{patch} or newer"
        );
        return Err(Error::Refused { what });
    }
    Ok(())
}

// Lives on: the primary key of pump.
const FIRST_PUMP: &str = "\
insert or ignore into pump (id, state, ceiling, revision, incarnation)
values (1, '{\"state\":\"running\"}', ?, 1, 0)";

async fn migrate(connection: &mut SqliteConnection) -> Result<()> {
    MIGRATIONS.run_direct(None, connection, false).await.map_err(|error| match error {
        MigrateError::VersionMissing(_) => Error::Refused {
            what: "its schema is newer than this program; run the newer program".to_owned(),
        },
        MigrateError::VersionMismatch(version) => {
            let what = format!("its schema was made by another migration {version} than this one");
            Error::Refused { what }
        }
        MigrateError::Execute(error) => of_one(error),
        other => Error::Corrupt {
            what: "its schema cannot be brought up to date".to_owned(),
            source: Some(Box::new(other)),
        },
    })?;
    let first = query(FIRST_PUMP).bind(CEILING_DEFAULT).execute(connection).await;
    first.map(|_| ()).map_err(of_one)
}

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[FIRST_PUMP];
