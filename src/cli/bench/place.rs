//! Where the measured database stands: a temporary file on a disk that is known, or what was named.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{env, fs};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::cli::config::DatabaseUrl;
use crate::clock::SystemClock;
use crate::store::{self, Store};

use super::QUEUE;

/// A database to measure on, and what to know of it.
#[derive(Debug)]
pub(super) struct Place {
    /// Holds what is temporary, and goes with it.
    home: TempDir,
    /// The database's URL.
    pub(super) database: DatabaseUrl,
    /// Whether the database goes with its directory.
    pub(super) temporary: bool,
    /// What it is, for people.
    pub(super) what: String,
}

/// Where a database is to stand.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Where {
    /// A database for the server that is started: it must hold no queues, because a server delivers what is
    /// in its database. Its schema is brought up to date [default: a temporary SQLite file]
    #[arg(long, value_name = "URL", value_parser = crate::cli::config::parse_database)]
    database: Option<DatabaseUrl>,
    /// The directory for the temporary SQLite file. Its disk is what is measured: say the one that the
    /// real database will have [default: the current directory]
    #[arg(long, value_name = "PATH", conflicts_with = "database")]
    dir: Option<PathBuf>,
}

impl Where {
    /// Whether anything was said.
    pub(super) fn is_said(&self) -> bool {
        self.database.is_some() || self.dir.is_some()
    }

    /// What a reader must know of it.
    pub(super) fn notes(&self) -> Vec<String> {
        let file = match &self.database {
            None => self.dir.clone().or_else(|| env::current_dir().ok()),
            Some(url) if url.scheme() == "memory" => {
                return vec!["memory: keeps nothing, so this is no durable figure".to_owned()];
            }
            Some(url) => folder_of(url.secret()),
        };
        match file {
            Some(path) if is_memory(&path) => vec![format!(
                "{} lies in memory, so no disk was measured and a crash of the machine loses it",
                path.display()
            )],
            _ => Vec::new(),
        }
    }

    /// Makes it. Fails where it would measure memory without having been told to.
    pub(super) fn open(&self) -> Result<Place> {
        if let Some(database) = &self.database {
            let home = tempfile::tempdir().context("cannot make a temporary directory")?;
            let (database, what) = (database.clone(), database.to_string());
            return Ok(Place { home, database, temporary: false, what });
        }
        let dir = match &self.dir {
            Some(dir) => dir.clone(),
            None => env::current_dir().context("there is no current directory; say --dir")?,
        };
        if self.dir.is_none() && is_memory(&dir) {
            bail!(
                "the current directory {} lies in memory, and it is the disk that is measured: \
                 say --dir with a directory on the disk that the database will have",
                dir.display()
            );
        }
        let cannot = || format!("cannot make a temporary directory in {}", dir.display());
        let dir = dir.canonicalize().with_context(cannot)?;
        let home = tempfile::Builder::new().prefix("pumphouse-bench-").tempdir_in(&dir);
        let home = home.with_context(cannot)?;
        let file = home.path().join("bench.db");
        let database = crate::cli::config::parse_database(&format!("sqlite://{}", file.display()));
        let database = database.map_err(anyhow::Error::msg)?;
        let what = format!("SQLite in {}", dir.display());
        Ok(Place { home, database, temporary: true, what })
    }
}

impl Place {
    /// An empty configuration file, so that a server reads nobody's settings.
    pub(super) fn no_settings(&self) -> Result<PathBuf> {
        let path = self.home.path().join("none.toml");
        fs::write(&path, "").with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// Opens the store. Fails where somebody else's queues are in it, and touches none of them.
    pub(super) async fn store(&self) -> Result<Arc<dyn Store>> {
        let opened = store::open(self.database.secret(), Arc::new(SystemClock)).await;
        let store = opened.with_context(|| format!("cannot open {}", self.database))?;
        let queues = store.queues().await;
        let names = queues.map(|all| all.iter().map(|q| q.name.to_string()).collect::<Vec<_>>());
        let names = match names {
            Ok(names) if names.is_empty() => return Ok(store),
            names => names,
        };
        store.close().await;
        let names = names.with_context(|| format!("cannot look at {}", self.database))?;
        let left_behind = match names.iter().any(|name| name == QUEUE) {
            true => {
                format!("; if {QUEUE} was left behind by a bench that was killed, delete it first")
            }
            false => String::new(),
        };
        bail!(
            "{} has queues ({}), and a server started on it would deliver their messages: name an empty \
             database, or measure the server that runs on it with --url{left_behind}",
            self.database,
            names.join(", ")
        )
    }
}

/// The directory of the file that a SQLite URL names.
fn folder_of(url: &str) -> Option<PathBuf> {
    let path = url.strip_prefix("sqlite:")?;
    let path = path.strip_prefix("//").unwrap_or(path).split('?').next()?;
    let parent = Path::new(path).parent()?;
    Some(if parent.as_os_str().is_empty() { PathBuf::from(".") } else { parent.to_owned() })
}

/// Whether a directory is on a file system without a disk.
fn is_memory(path: &Path) -> bool {
    const TMPFS: u32 = 0x0102_1994;
    const RAMFS: u32 = 0x8584_58f6;
    rustix::fs::statfs(path).is_ok_and(|found| matches!(found.f_type as u32, TMPFS | RAMFS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folder_of_a_file_is_found() {
        for (url, folder) in [
            ("sqlite:///var/lib/pump.db?mode=rwc", Some("/var/lib")),
            ("sqlite://pump.db", Some(".")),
            ("sqlite:a/pump.db", Some("a")),
            ("postgres://h/db", None),
        ] {
            assert_eq!(folder_of(url), folder.map(PathBuf::from), "{url}");
        }
    }
}
