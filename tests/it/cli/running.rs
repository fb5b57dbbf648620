//! A command that runs beside a test: fed bit by bit, and heard while it still goes on.

use std::process::Stdio;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use crate::support::PATIENCE;

/// A command with pipes for all that it reads and says. Dropped, it is killed.
pub(super) struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    printed: Heard,
    said: Heard,
    ears: TaskTracker,
}

/// What came from a pipe so far.
type Heard = Arc<Mutex<String>>;

/// How a command ended.
#[derive(Debug)]
pub(super) struct End {
    /// Its exit code.
    pub(super) code: Option<i32>,
    /// What it printed on standard output.
    pub(super) printed: String,
    /// What it said on standard error.
    pub(super) said: String,
}

impl Running {
    /// Starts a command that talks to the server at this address.
    pub(super) fn start(server: impl std::fmt::Display, arguments: &[&str]) -> Self {
        let (mut running, stdout) = Self::with_stdout(server, arguments);
        running.printed = running.hear(stdout);
        running
    }

    /// The same with its standard output for the test to read, or to close.
    pub(super) fn with_stdout(
        server: impl std::fmt::Display,
        arguments: &[&str],
    ) -> (Self, ChildStdout) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pumphouse"));
        command.args(arguments).env("PUMPHOUSE_URL", format!("http://{server}"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().expect("the program can be started");
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("it is a pipe");
        let stderr = child.stderr.take().expect("it is a pipe");
        let ears = TaskTracker::new();
        let (printed, said) = (Heard::default(), Heard::default());
        let mut running = Self { child, stdin, printed, said, ears };
        running.said = running.hear(stderr);
        (running, stdout)
    }

    fn hear(&self, mut from: impl AsyncRead + Unpin + Send + 'static) -> Heard {
        let heard = Heard::default();
        let text = heard.clone();
        self.ears.spawn(async move {
            let mut some = vec![0; 64 * 1024];
            while let Ok(count @ 1..) = from.read(&mut some).await {
                let more = String::from_utf8_lossy(&some[..count]);
                text.lock().expect("no test panics with it").push_str(&more);
            }
        });
        heard
    }

    /// Puts this into its standard input. One that has ended already reads no more, and that is its own affair.
    pub(super) async fn feed(&mut self, input: impl AsRef<[u8]>) {
        let stdin = self.stdin.as_mut().expect("it was not closed");
        let _ = stdin.write_all(input.as_ref()).await;
    }

    /// What it has printed so far.
    pub(super) fn printed(&self) -> String {
        self.printed.lock().expect("no test panics with it").clone()
    }

    /// What it has said so far.
    pub(super) fn said(&self) -> String {
        self.said.lock().expect("no test panics with it").clone()
    }

    /// Closes its standard input, and waits for its end.
    pub(super) async fn end(mut self) -> End {
        drop(self.stdin.take());
        let Ok(status) = timeout(PATIENCE, self.child.wait()).await else {
            panic!("it did not end within {PATIENCE:?}; it said:\n{}", self.said());
        };
        self.ears.close();
        self.ears.wait().await;
        let code = status.expect("a child can be waited for").code();
        End { code, printed: self.printed(), said: self.said() }
    }
}

impl End {
    /// A number of the summary that it printed.
    #[track_caller]
    pub(super) fn count(&self, name: &str) -> u64 {
        let summary = serde_json::from_str::<Value>(&self.printed);
        let summary = summary.unwrap_or_else(|error| panic!("{error}: {self:?}"));
        summary[name].as_u64().unwrap_or_else(|| panic!("no {name}: {self:?}"))
    }

    /// How often it said this.
    pub(super) fn times(&self, what: &str) -> usize {
        self.said.matches(what).count()
    }
}
