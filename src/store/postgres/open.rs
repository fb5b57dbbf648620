//! Connections: how they are made, what holds on them, and whether the database is one to use.

use std::str::FromStr;
use std::time::Duration;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, Executor, PgConnection, PgPool, Row, query};

use super::super::{Error, Result};
use super::Postgres;
use super::fault::Trouble;
use super::transact::{CONNECT_MAX, IDLE, connect, stands};

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/postgres");

/// Where our tables are, apart from those of others in the same database.
const SCHEMA: &str = "pumphouse";
/// The advisory lock under which the schema is made.
const LOCK: i64 = 0x7075_6d70_6f70_656e;

/// What holds for planning on every connection of ours.
///
/// The hot tables swing between empty and huge, so that statistics are always wrong, and a plan that suits
/// an empty table is kept for a full one. So the ways to read a table whole are closed, and statements
/// are written so that no join can be turned around: rows are looked up one by one in a `lateral` that is
/// not flattened (because of its `limit` or lock), or with a list of numbers or `ctid`s.
pub(super) const PLANNING: &[(&str, &str)] = &[
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_hashjoin", "off"),
    ("enable_mergejoin", "off"),
];

/// How to connect.
#[derive(Debug)]
pub(super) struct Options {
    /// A commit is on the disk when it returns.
    pub(super) durable: PgConnectOptions,
    /// A commit may be forgotten if the server crashes: for hints only.
    pub(super) relaxed: PgConnectOptions,
}

// Lives on: no table.
const SERVER: &str = "\
select current_setting('server_version_num')::integer as version,
    current_setting('fsync') as fsync,
    current_setting('full_page_writes') as full_page_writes,
    current_setting('synchronous_commit') as synchronous_commit";

// Made first, because the table of migrations lies in it as well.
const MAKE_SCHEMA: &str = "\
create schema if not exists pumphouse";

const LOCK_SCHEMA: &str = "\
select pg_advisory_lock($1)";

// Lives on: the primary key of _sqlx_migrations.
const SCHEMA_VERSION: &str = "\
select max(version)
from _sqlx_migrations
where success";

// Lives on: the primary key of pump. Fails where nothing can be written.
const WRITE: &str = "\
update pump
set checked_at = now_micros()
where id = 1";

/// The statements of this file, but for the one that makes the schema.
pub(super) const STATEMENTS: &[&str] = &[SERVER, LOCK_SCHEMA, SCHEMA_VERSION, WRITE];

/// Finds out how to connect, and brings the schema up to date, on a connection that is closed afterwards.
pub(super) async fn prepare(url: &str) -> Result<Options> {
    let options = PgConnectOptions::from_str(url).map_err(Trouble::from)?;
    let options = options
        .application_name("pumphouse")
        .options([("search_path", SCHEMA), ("default_transaction_isolation", "read committed")])
        .disable_statement_logging();
    let mut connection = connect(&options).await.map_err(Trouble::from)?;
    let server = Server::ask(&mut connection).await.map_err(Trouble::from)?;
    server.warn();
    migrate(&mut connection).await?;
    // What was written is committed; how the connection ends matters to nobody.
    let _ = connection.close().await;
    Ok(server.options(options))
}

/// How long a statement waits for a lock.
pub(super) const LOCK_TIMEOUT: &str = "3s";

/// What a server says of itself.
#[derive(Debug)]
struct Server {
    version: i32,
    fsync: String,
    full_page_writes: String,
    synchronous_commit: String,
}

impl Server {
    async fn ask(connection: &mut PgConnection) -> sqlx::Result<Self> {
        let row = query(SERVER).fetch_one(connection).await?;
        Ok(Self {
            version: row.try_get("version")?,
            fsync: row.try_get("fsync")?,
            full_page_writes: row.try_get("full_page_writes")?,
            synchronous_commit: row.try_get("synchronous_commit")?,
        })
    }

    fn warn(&self) {
        if self.fsync == "off" {
            tracing::warn!(
                "the database runs with fsync=off: a crash of its machine loses what was acknowledged"
            );
        }
        if self.full_page_writes == "off" {
            tracing::warn!(
                "the database runs with full_page_writes=off: a crash of its machine can tear pages \
                 that hold what was acknowledged, unless its file system never does"
            );
        }
    }

    fn options(&self, options: PgConnectOptions) -> Options {
        let options = options.options([
            ("statement_timeout", "30s"),
            ("lock_timeout", LOCK_TIMEOUT),
            ("idle_in_transaction_session_timeout", "30s"),
        ]);
        let options = options.options(PLANNING.iter().copied());
        // Reading a small table whole counts as very expensive now, which must not make it be compiled.
        let options =
            if self.version >= 110_000 { options.options([("jit", "off")]) } else { options };
        // Left to itself, the server plans most statements again at each call, which takes longer than to execute
        // them for a few messages.
        let generic = [("plan_cache_mode", "force_generic_plan")];
        let options = if self.version >= 120_000 { options.options(generic) } else { options };
        let relaxed = options.clone().options([("synchronous_commit", "off")]);
        // What the administrator chose stands, unless it would break what we promise.
        let broken = self.synchronous_commit == "off";
        let durable =
            if broken { options.options([("synchronous_commit", "on")]) } else { options };
        Options { durable, relaxed }
    }
}

async fn migrate(connection: &mut PgConnection) -> Result<()> {
    query(LOCK_SCHEMA).bind(LOCK).execute(&mut *connection).await.map_err(Trouble::from)?;
    connection.execute(MAKE_SCHEMA).await.map_err(Trouble::from)?;
    let refused = |what: String| Err(Error::Refused { what });
    match MIGRATIONS.run_direct(None, connection, false).await {
        Ok(()) => Ok(()),
        Err(MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) => {
            Err(Trouble::from(error).into())
        }
        Err(MigrateError::VersionMissing(version)) => refused(format!(
            "its schema has version {version}, which is newer than this program; update the program"
        )),
        Err(other) => refused(other.to_string()),
    }
}

/// A pool of connections that are asked whether they still stand only after they were idle for a while:
/// asking each time would double the price of a small statement.
pub(super) fn pool(options: PgConnectOptions, max: u32) -> PgPool {
    PgPoolOptions::new()
        .max_connections(max)
        .acquire_timeout(CONNECT_MAX)
        .idle_timeout(Duration::from_secs(300))
        .test_before_acquire(false)
        .before_acquire(|connection, meta| {
            Box::pin(async move { Ok(meta.idle_for < IDLE || stands(connection).await) })
        })
        .connect_lazy_with(options)
}

/// Whether the database answers, can be written, and has the schema this program knows.
pub(super) async fn check(store: &Postgres) -> Result<()> {
    store
        .hands
        .run(|connection| {
            Box::pin(async move {
                let version: Option<i64> =
                    sqlx::query_scalar(SCHEMA_VERSION).fetch_one(&mut *connection).await?;
                let known = MIGRATIONS.iter().map(|migration| migration.version).max();
                if version != known {
                    let what = "its schema is of another version than this program".to_owned();
                    return Err(Trouble::Ours(Error::Refused { what }));
                }
                query(WRITE).execute(connection).await?;
                Ok(())
            })
        })
        .await
}
