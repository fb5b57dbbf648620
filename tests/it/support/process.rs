//! The running program as a test sees it: started, terminated, killed, and started again.
//!
//! It knows nothing of what the program does; `client` asks it.

use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::client::Client;
use super::{PATIENCE, postgres};

/// A database that outlives the processes on it.
pub(crate) enum Database {
    /// A file in a directory that goes with it.
    Sqlite(TempDir),
    /// A database of its own in the tests' cluster.
    Postgres(String),
}

impl Database {
    /// An empty SQLite database.
    pub(crate) fn sqlite() -> Self {
        Self::Sqlite(tempfile::tempdir().expect("a temporary directory can be made"))
    }

    /// An empty Postgres database.
    pub(crate) async fn postgres() -> Self {
        Self::Postgres(postgres::fresh_database().await)
    }

    /// The same where no disk is needed, for what is said of the pump and not of a disk: behind the syncs of
    /// other tests a commit takes up to a second. Postgres' cluster stands there already.
    pub(crate) fn off_the_disk(self) -> Self {
        let Self::Sqlite(directory) = self else { return self };
        let Some(memory) = postgres::memory_disk() else { return Self::Sqlite(directory) };
        Self::Sqlite(tempfile::tempdir_in(memory).expect("a temporary directory can be made"))
    }

    /// What `--database` is to be.
    pub(crate) fn url(&self) -> String {
        match self {
            Self::Sqlite(directory) => {
                format!("sqlite://{}", directory.path().join("pump.db").display())
            }
            Self::Postgres(url) => url.clone(),
        }
    }
}

/// One process of `pumphouse serve`. Dropped, it is killed.
pub(crate) struct Process {
    child: Child,
    address: SocketAddr,
    log: watch::Receiver<Vec<String>>,
    _home: TempDir,
}

impl Process {
    /// Starts one, and returns once it listens: on a free port, if no flag says where.
    pub(crate) async fn start(database: &Database, flags: &[&str]) -> Self {
        Self::start_with_stdout(database, flags, Stdio::null()).await
    }

    /// The same with another place for its standard output. Nobody reads a pipe.
    pub(crate) async fn start_with_stdout(
        database: &Database,
        flags: &[&str],
        stdout: Stdio,
    ) -> Self {
        let (mut child, home) = spawn(database, flags, stdout);
        let stderr = child.stderr.take().expect("its standard error is a pipe");
        let log = read_log(stderr);
        let address = address_in(log.clone()).await;
        Self { child, address, log, _home: home }
    }

    /// Starts one that is killed after so long, whether it listens by then or not.
    pub(crate) async fn start_and_kill(database: &Database, flags: &[&str], after: Duration) {
        let (mut child, _home) = spawn(database, flags, Stdio::null());
        tokio::time::sleep(after).await;
        child.kill().await.expect("a child can be killed");
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// A client of it.
    pub(crate) fn client(&self) -> Client {
        Client::new(self.address)
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        self.log.borrow().join("\n")
    }

    /// Its number.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id().expect("the process was not waited for yet")
    }

    /// Kills it on the spot, as `kill -9` does, and waits until it is gone.
    pub(crate) async fn kill_hard(&mut self) {
        self.child.kill().await.expect("a child can be killed");
    }

    /// Sends SIGTERM, and returns at once.
    pub(crate) async fn terminate(&self) {
        self.signal("TERM").await;
    }

    /// Sends the signal of this name.
    pub(crate) async fn signal(&self, name: &str) {
        let script = format!("kill -{name} {}", self.pid());
        let status = Command::new("sh").args(["-c", &script]).status().await;
        assert!(status.expect("a shell can be started").success(), "{script}");
    }

    /// Whether it still runs.
    pub(crate) fn runs(&mut self) -> bool {
        self.child.try_wait().expect("a child can be asked").is_none()
    }

    /// Waits for its end, at most so long.
    pub(crate) async fn exit_within(&mut self, limit: Duration) -> ExitStatus {
        match timeout(limit, self.child.wait()).await {
            Ok(status) => status.expect("a child can be waited for"),
            Err(_) => panic!("the process did not end within {limit:?}; its log:\n{}", self.log()),
        }
    }
}

fn spawn(database: &Database, flags: &[&str], stdout: Stdio) -> (Child, TempDir) {
    // A directory of its own, so that it finds nobody else's configuration file.
    let home = tempfile::tempdir().expect("a temporary directory can be made");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pumphouse"));
    command.args(["serve", "--database", &database.url()]).args(flags);
    if !flags.contains(&"--listen") {
        command.args(["--listen", "127.0.0.1:0"]);
    }
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PUMPHOUSE_") {
            command.env_remove(name);
        }
    }
    command.current_dir(home.path()).kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped());
    (command.spawn().expect("the program can be started"), home)
}

/// Reads what the process says until it closes its standard error.
fn read_log(stderr: ChildStderr) -> watch::Receiver<Vec<String>> {
    let (sender, receiver) = watch::channel(Vec::new());
    let read = async move {
        let mut lines = BufReader::new(stderr).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            sender.send_modify(|log: &mut Vec<String>| log.push(line));
        }
    };
    TaskTracker::new().spawn(read);
    receiver
}

async fn address_in(mut log: watch::Receiver<Vec<String>>) -> SocketAddr {
    let said = |lines: &Vec<String>| lines.iter().find_map(|line| address_of(line));
    // It ends early when the log does, and with it the process.
    let spoken = timeout(PATIENCE, log.wait_for(|lines| said(lines).is_some())).await.is_ok();
    let lines = log.borrow().clone();
    said(&lines).filter(|_| spoken).unwrap_or_else(|| {
        panic!("the process did not say where it listens; its log:\n{}", lines.join("\n"))
    })
}

fn address_of(line: &str) -> Option<SocketAddr> {
    let (_, after) = line.split_once("address=")?;
    after.split_whitespace().next()?.trim_matches('"').parse().ok()
}
