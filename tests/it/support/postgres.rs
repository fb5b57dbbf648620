//! A private Postgres for the tests: found, started, and gone with the test process.
//!
//! [`fresh_database`] is what most tests want. `PUMPHOUSE_TEST_POSTGRES` names a server to use instead
//! (its databases are left behind). It never skips: without a server the test fails and says what to install.

use std::fs;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;

use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

/// The URL of a database that is new, empty and nobody else's.
pub(crate) async fn fresh_database() -> String {
    let server = match std::env::var("PUMPHOUSE_TEST_POSTGRES") {
        Ok(url) => url,
        Err(_) => shared_cluster().await.url(),
    };
    new_database(&server).await
}

/// A server of its own, for tests that stop it; durable, as in production.
pub(crate) async fn start_cluster() -> Cluster {
    blocking(|| Cluster::make(DURABLE)).await
}

/// Settings that make tests fast and forgetful.
const FAST: &str = "-c fsync=off -c full_page_writes=off -c max_connections=300";
const DURABLE: &str = "-c max_connections=100";
const PREFIX: &str = "pumphouse-pg-";

/// One server with its data, in a directory that goes when this value or the process does.
#[derive(Debug)]
pub(crate) struct Cluster {
    programs: Programs,
    dir: PathBuf,
    port: u16,
    settings: &'static str,
    /// While this pipe is open the watchdog waits. The kernel closes it however the process ends.
    _alive: ChildStdin,
}

impl Cluster {
    /// Where its first database is.
    pub(crate) fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// Pulls the plug: every connection breaks, nothing is flushed. Twice does no harm.
    pub(crate) async fn stop_hard(&self) {
        let (programs, data) = (self.programs.clone(), self.data());
        blocking(move || {
            let mut stop = programs.command("pg_ctl", data.parent().expect("data has a parent"));
            stop.args(["stop", "-w", "-m", "immediate", "-D"]).arg(&data);
            stop.status().expect("pg_ctl can be run");
        })
        .await;
    }

    /// Starts it again, on the same port and with the same data.
    pub(crate) async fn start(&self) {
        let (programs, data) = (self.programs.clone(), self.data());
        let (port, settings) = (self.port, self.settings);
        blocking(move || {
            assert!(serve(&programs, &data, port, settings), "the server starts again")
        })
        .await;
    }

    fn make(settings: &'static str) -> Self {
        let programs = Programs::find();
        let mut dir = tempfile::Builder::new();
        let dir = match memory_disk().filter(|_| settings == FAST) {
            Some(memory) => dir.prefix(PREFIX).tempdir_in(memory),
            None => dir.prefix(PREFIX).tempdir(),
        };
        let dir = dir.expect("a temporary directory can be made").keep();
        if let Some((uid, gid)) = programs.user {
            chown(&dir, Some(uid), Some(gid)).expect("root can give a directory away");
        }
        let data = dir.join("data");
        let alive = watch(&programs, &dir);
        let mut initdb = programs.command("initdb", &dir);
        initdb.args(["-N", "-A", "trust", "--no-locale", "-E", "UTF8", "-U", "postgres", "-D"]);
        let status = initdb.arg(&data).status().expect("initdb can be run");
        assert!(status.success(), "initdb failed: {}", log(&dir));
        // Between finding a free port and using it somebody else may take it.
        let port =
            (0..5).map(|_| free_port()).find(|&port| serve(&programs, &data, port, settings));
        let port = port.unwrap_or_else(|| panic!("Postgres does not start: {}", log(&dir)));
        Self { programs, dir, port, settings, _alive: alive }
    }

    /// What the server has said so far.
    pub(crate) fn log(&self) -> String {
        log(&self.dir)
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }
}

async fn shared_cluster() -> &'static Cluster {
    static SHARED: OnceLock<Cluster> = OnceLock::new();
    blocking(|| SHARED.get_or_init(|| Cluster::make(FAST))).await
}

async fn new_database(server: &str) -> String {
    let name = format!("pumphouse_{}", uuid::Uuid::now_v7().simple());
    let mut connection = PgConnection::connect(server).await.expect("the test server answers");
    let create = AssertSqlSafe(format!("create database {name}"));
    connection.execute(create).await.expect("the test server lets us create databases");
    connection.close().await.expect("a connection can be closed");
    let mut url = url::Url::parse(server).expect("PUMPHOUSE_TEST_POSTGRES is a URL");
    url.set_path(&name);
    url.into()
}

/// A shell that waits until our end of its standard input is closed, and then cleans up.
///
/// It is the first process of a cluster, so that a test that is killed while the server starts leaves
/// nothing either: a server whose data directory is gone ends itself.
fn watch(programs: &Programs, dir: &Path) -> ChildStdin {
    // A server that is only just starting cannot be stopped yet, so that it is tried more than once.
    let script = r#"cat; for try in 1 2 3 4 5; do "$0" stop -w -m fast -D "$1/data" && break; sleep 1; done; cd /; rm -rf "$1""#;
    let mut shell = programs.command("sh", dir);
    let pg_ctl = programs.dir.join("pg_ctl");
    shell.args(["-c", script]).arg(pg_ctl).arg(dir).stdin(Stdio::piped());
    // A group of its own, so that Ctrl-C reaches the tests and not the one who cleans up after them.
    let watchdog: io::Result<Child> = shell.process_group(0).spawn();
    watchdog.expect("sh can be run").stdin.take().expect("its standard input is a pipe")
}

/// Starts a server and waits until it answers; `false` if it does not.
fn serve(programs: &Programs, data: &Path, port: u16, settings: &str) -> bool {
    let dir = data.parent().expect("data has a parent");
    let listen = format!("-c listen_addresses=127.0.0.1 -p {port} -k {}", dir.display());
    let mut start = programs.command("pg_ctl", dir);
    start.args(["start", "-w", "-t", "60", "-o"]).arg(format!("{listen} {settings}"));
    start.arg("-l").arg(dir.join("server.log")).arg("-D").arg(data);
    start.process_group(0).status().expect("pg_ctl can be run").success()
}

/// Where files need no disk, if there is room for a database for every test.
pub(crate) fn memory_disk() -> Option<&'static Path> {
    const ROOM_KILOBYTES: u64 = 4 << 20;
    let memory = Path::new("/dev/shm");
    let free = Command::new("df").arg("-Pk").arg(memory).output().ok()?;
    let free = String::from_utf8_lossy(&free.stdout)
        .lines()
        .nth(1)?
        .split(' ')
        .filter(|word| !word.is_empty())
        .nth(3)?
        .parse::<u64>();
    (free.ok()? > ROOM_KILOBYTES).then_some(memory)
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

fn log(dir: &Path) -> String {
    let read = |name| fs::read_to_string(dir.join(name)).unwrap_or_default();
    format!("{}{}", read("tests.log"), read("server.log"))
}

/// The server's programs, and who may run them.
#[derive(Debug, Clone)]
struct Programs {
    dir: PathBuf,
    /// User and group to become: the server refuses to run as root.
    user: Option<(u32, u32)>,
}

impl Programs {
    fn find() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let on_path = std::env::split_paths(&path).collect::<Vec<_>>();
        // The distribution's own directories first: what is on the PATH may be a wrapper.
        let dir = newest_installed().into_iter().chain(on_path);
        let dir = dir.into_iter().find(|dir| {
            ["initdb", "pg_ctl", "postgres"].iter().all(|program| dir.join(program).is_file())
        });
        let dir = dir.expect(
            "these tests need a PostgreSQL server: install one (Debian: apt install postgresql), put its \
             initdb on the PATH, or set PUMPHOUSE_TEST_POSTGRES to the URL of a running one",
        );
        Self { dir, user: other_user() }
    }

    /// A command that runs in `dir` as the right user, says nothing on our own output, and knows nothing
    /// of our environment.
    fn command(&self, program: &str, dir: &Path) -> Command {
        let own = self.dir.join(program);
        let mut command = if own.is_file() { Command::new(own) } else { Command::new(program) };
        let log = fs::OpenOptions::new().create(true).append(true).open(dir.join("tests.log"));
        let log = log.expect("the cluster's directory can be written");
        let also = log.try_clone().expect("a file can be opened twice");
        command.current_dir(dir).stdin(Stdio::null()).stdout(log).stderr(also);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }
}

fn newest_installed() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?.filter_map(Result::ok);
    let number = |path: &PathBuf| path.file_name()?.to_str()?.parse::<u32>().ok();
    let newest = versions.map(|entry| entry.path()).max_by_key(number)?;
    Some(newest.join("bin"))
}

fn other_user() -> Option<(u32, u32)> {
    let uid = |path: &str| std::os::unix::fs::MetadataExt::uid(&fs::metadata(path).expect(path));
    // The owner of this process' own entry is who we are; the standard library has no getuid.
    if uid("/proc/self") != 0 {
        return None;
    }
    let users = fs::read_to_string("/etc/passwd").expect("root can read /etc/passwd");
    let user = |name: &str| {
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut numbers = line.split(':').skip(2).map(|field| field.parse().ok());
        Some((numbers.next()??, numbers.next()??))
    };
    user("postgres").or_else(|| user("nobody"))
}

/// Runs a script as `psql` does for a person who wants it to stop at the first error.
pub(crate) async fn psql(url: &str, script: &str) -> std::process::Output {
    let beside = Programs::find().dir.join("psql");
    let psql = if beside.is_file() { beside } else { PathBuf::from("psql") };
    let (url, script) = (url.to_owned(), script.to_owned());
    let run = move || {
        let mut command = Command::new(psql);
        command.args([
            "-X",
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-c",
            "set client_min_messages = error",
        ]);
        command.arg("-f").arg("-").arg(url);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("psql comes with the server");
        let mut stdin = child.stdin.take().expect("its input is a pipe");
        stdin.write_all(script.as_bytes()).expect("it reads");
        drop(stdin);
        child.wait_with_output().expect("it ends")
    };
    blocking(run).await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("the cluster can be handled")
}

/// Processes of a server that do nothing until this value goes.
pub(crate) struct Frozen(Vec<String>);

impl Frozen {
    /// Stops these.
    pub(crate) fn new(processes: Vec<String>) -> Self {
        let frozen = Self(processes);
        frozen.signal("-STOP");
        frozen
    }

    /// Stops the whole server that is at the other end.
    pub(crate) async fn whole(connection: &mut PgConnection) -> Self {
        let all = "select split_part(pg_read_file('postmaster.pid'), E'\\n', 1)
                   union all select pid::text from pg_stat_activity";
        let all = sqlx::query_scalar(all).fetch_all(connection).await;
        Self::new(all.expect("a superuser may read that"))
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").arg(signal).args(&self.0).status();
        assert!(sent.expect("kill can be run").success());
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.signal("-CONT");
    }
}
