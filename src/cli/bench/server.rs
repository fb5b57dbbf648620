//! A server of our own: this very program as another process, on a free port, with nobody's settings.

use std::collections::VecDeque;
use std::env;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use crate::cli::settings::ENVIRONMENT_PREFIX;

use super::connection::Base;
use super::place::Place;

/// How long it may take to listen: a schema is made by then.
const START_MAX: Duration = Duration::from_secs(60);
/// How long it may take to end before it is killed.
const STOP_MAX: Duration = Duration::from_secs(15);
/// How many of its last words are kept.
const LINES_MAX: usize = 20;

/// A running server. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    /// Where it answers.
    pub(super) base: Base,
    said: Said,
}

type Said = Arc<Mutex<VecDeque<String>>>;

impl Server {
    /// Starts one on this database and waits until it listens.
    pub(super) async fn start(place: &Place) -> Result<Self> {
        let mut child = command(place)?.spawn().context("cannot start a server")?;
        let said = Said::default();
        let stderr = child.stderr.take().context("its standard error is a pipe")?;
        let (tell, address) = oneshot::channel();
        TaskTracker::new().spawn(listen(stderr, tell, Arc::clone(&said)));
        let address = timeout(START_MAX, address).await;
        let Ok(Ok(address)) = address else {
            return Err(anyhow!("{}", last_words(&said)).context("the server did not start"));
        };
        let base = Base::parse(&format!("http://{address}")).map_err(anyhow::Error::msg)?;
        Ok(Self { child, base, said })
    }

    /// Asks it to end, and kills it if it does not.
    pub(super) async fn stop(mut self) -> Result<()> {
        let pid = self.child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
        if let Some(pid) = pid {
            // It may just have ended; the wait below tells.
            let _ = kill_process(pid, Signal::TERM);
        }
        if timeout(STOP_MAX, self.child.wait()).await.is_err() {
            self.child.kill().await.context("cannot kill the server")?;
        }
        Ok(())
    }

    /// The last lines of its log, for whoever wants to know why it failed.
    pub(super) fn last_words(&self) -> String {
        last_words(&self.said)
    }
}

fn command(place: &Place) -> Result<Command> {
    let program = env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(program);
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with(ENVIRONMENT_PREFIX) {
            command.env_remove(name);
        }
    }
    command.args(["serve", "--listen", "127.0.0.1:0", "--log-format", "json"]);
    command.args(["--log", "warn,pumphouse::cli::serve=info"]);
    command.arg("--config").arg(place.no_settings()?);
    // Not as a flag: a password would stand in the list of processes.
    command.env(format!("{ENVIRONMENT_PREFIX}DATABASE"), place.database.secret());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // A group of its own, so that Ctrl-C does not end it before its queue was deleted.
    command.process_group(0).kill_on_drop(true);
    Ok(command)
}

/// Reads its log to the end: says where it listens, and keeps its last words.
async fn listen(stderr: ChildStderr, tell: oneshot::Sender<String>, said: Said) {
    let mut tell = Some(tell);
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let event = serde_json::from_str::<Value>(&line).unwrap_or_default();
        if let Some(address) = event["address"].as_str()
            && let Some(tell) = tell.take()
        {
            // Who no longer waits has given up on it.
            let _ = tell.send(address.to_owned());
            continue;
        }
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() == LINES_MAX {
            said.pop_front();
        }
        said.push_back(words(&event).unwrap_or(line));
    }
}

fn words(event: &Value) -> Option<String> {
    let message = event["message"].as_str()?;
    let cause = event["error"].as_str().or(event["why"].as_str());
    Some(cause.map_or_else(|| message.to_owned(), |cause| format!("{message}: {cause}")))
}

fn last_words(said: &Said) -> String {
    let said = said.lock().unwrap_or_else(PoisonError::into_inner);
    said.iter().cloned().collect::<Vec<_>>().join("\n")
}
