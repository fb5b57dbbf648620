//! The command line: owns the process, its flags and its configuration, and wires everything else.
//!
//! ```text
//!   settings   the list of what can be set
//!   layers     defaults < file < environment < flags, each value with its origin
//!   config     what the values mean
//!   serve      from a configuration to a running server, and back down
//! ```
//!
//! No decision about messages is made here.

mod settings;
mod layers;
mod size;
mod config;
mod log;
mod signals;
mod serve;
mod migrate;
mod client;
mod again;
mod send;
mod input;
mod lines;
mod reader;
mod receive;
mod queues;
mod bench;

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory, Parser, Subcommand};
use http::Method;
use rustls::crypto::ring;
use tokio::runtime;

use crate::api;

use client::{Call, PATIENCE, call};
use config::Config;

use settings::Flags;

/// How long what still runs may hold up the end of the process.
const LAST_WORDS: Duration = Duration::from_secs(1);

#[derive(Debug, Parser)]
#[command(name = "pumphouse", version, about = ABOUT, after_help = EXAMPLES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const ABOUT: &str = "A durable message pump: POST a message and go on; Pumphouse delivers it.";

const EXAMPLES: &str = "\
Examples:
  pumphouse serve --queue hello=log:          a server with a queue that shows its messages
  pumphouse send hello 'Good morning'         send it one
  pumphouse queues list                       see what became of it
  pumphouse tail                              watch messages come in
  pumphouse bench enqueue                     how much this machine can take
  pumphouse help serve                        every setting, and what it is without being set

Settings come from defaults, then ./pumphouse.toml (or --config FILE), then PUMPHOUSE_* variables,
then flags; `pumphouse config` shows the result. Exit codes: 0 done, 1 failed, 2 wrong usage.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server: takes messages over HTTP and delivers them, until SIGTERM
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(Settings),
    /// Bring the database's schema up to date, and end
    ///
    /// `serve` does the same when it starts; this is for those who want it as a step of its own.
    #[command(after_help = "Example:\n  pumphouse migrate --database postgres://pump@db/pumphouse")]
    Migrate(Settings),
    /// Print every setting with its value and where that comes from
    #[command(after_help = "Example:\n  PUMPHOUSE_LOG=warn pumphouse config --body-limit 4MiB")]
    Config(Settings),
    /// Print the OpenAPI document of the HTTP interface
    #[command(after_help = "Example:\n  pumphouse openapi > pumphouse.json")]
    Openapi,
    /// Send one message, or many, to a queue of a running server
    #[command(after_help = SEND_EXAMPLES)]
    Send(send::Send),
    /// Publish one message, or many, to a topic of a running server
    #[command(after_help = PUBLISH_EXAMPLES)]
    Publish(send::Publish),
    /// Take messages of a queue, print them, and ack them
    #[command(after_help = RECEIVE_EXAMPLES)]
    Receive(receive::Receive),
    /// Watch messages come in
    #[command(after_help = "Examples:\n  pumphouse tail\n  pumphouse tail emails --type welcome")]
    Tail(receive::Tail),
    /// Print a script that completes this program's commands and flags in a shell
    #[command(
        after_help = "Example:\n  pumphouse completion bash > /etc/bash_completion.d/pumphouse"
    )]
    Completion {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Show and change the queues of a running server
    #[command(after_help = "Examples:\n  pumphouse queues list\n  pumphouse queues put \
        emails=http://127.0.0.1:9000/emails\n  pumphouse queues stop emails --reason 'mail server moves'")]
    Queues(queues::Queues),
    /// Ask a running server whether it is ready; exits 0 if it is, 1 if not
    #[command(after_help = "Example:\n  pumphouse health --url http://127.0.0.1:8080")]
    Health(Server),
    /// Measure what this machine can do, or a server that runs
    #[command(after_help = bench::EXAMPLES)]
    Bench(bench::Bench),
}

const SERVE_EXAMPLES: &str = "\
Examples:
  pumphouse serve --queue emails=http://127.0.0.1:9000/emails
  pumphouse serve --database postgres://pump@db/pumphouse --replica pump-1
  pumphouse serve --listen 0.0.0.0:8080 --admin-listen 127.0.0.1:8081 --insecure

SIGTERM (or Ctrl-C) takes no more messages, lets open deliveries end for --drain-deadline, and exits 0.
A second one ends the process at once; no message is lost, what was open is delivered again.";

const SEND_EXAMPLES: &str = "\
Examples:
  pumphouse send emails '{\"to\": \"ada@example.com\"}' --type welcome --key welcome-ada
  pumphouse send emails --delay 10m < letter.txt
  pumphouse send emails hello --header x-tenant=acme
  pumphouse send emails hello --wait 30s                     print what became of it
  pumphouse send emails --lines < envelopes.ndjson           many, with progress

With --lines each line is an envelope, as in {\"payload\": {\"to\": \"ada\"}, \"type\": \"welcome\"}. A
batch whose answer was lost is sent again under its key, and taken once, while the queue remembers keys (dedup_window); lines that a full queue
has no room for are sent again for a while. Every line that is refused is named with its number.
With --key the same input again is the same messages; lines then wait until 500 of them, or
4 MiB, are there or the input ends.";

const PUBLISH_EXAMPLES: &str = "\
Examples:
  pumphouse publish orders '{\"id\": 17}' --type orders.placed
  pumphouse publish orders --lines < orders.ndjson

Who has subscribed: GET /admin/v1/topics/orders/subscriptions";

const RECEIVE_EXAMPLES: &str = "\
Examples:
  pumphouse receive jobs                                     take one, if there is one
  pumphouse receive jobs --max 100 --verdict release         look at what is there
  pumphouse receive jobs --follow | while read -r job; do …

Prints each message as a line of JSON, and settles it then: what was not printed comes back. With
--follow a server that is away or busy is asked again until it answers, as `tail` does too.";

#[derive(Debug, Args)]
struct Settings {
    /// The file to read settings from [env: PUMPHOUSE_CONFIG] [default: ./pumphouse.toml if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<String>,
    #[command(flatten)]
    flags: Flags,
}

impl Settings {
    fn read(&self) -> Result<Config> {
        Config::read(&config::layers(self.config.as_deref(), &self.flags)?)
    }
}

/// Where the server is that a command talks to.
#[derive(Debug, Args)]
struct Server {
    /// Where the server answers; for queues: where it answers operators
    #[arg(
        long,
        value_name = "URL",
        env = "PUMPHOUSE_URL",
        default_value = "http://127.0.0.1:8080",
        value_parser = client::parse_url
    )]
    url: String,
}

/// Does what the arguments of this process say. Failures are printed with all their causes.
pub fn run() -> ExitCode {
    match begin(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(usage) = error.downcast_ref::<clap::Error>() {
                usage.exit();
            }
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

/// Says what went wrong, with all its causes, on standard error.
fn complain(error: &anyhow::Error) {
    tell(&format!("pumphouse: {}\n", causes(error).join("\n  because: ")));
}

/// Says something on standard error. Where that is closed there is nobody left to tell; the exit code says it too.
fn tell(text: &str) {
    let mut to = io::stderr().lock();
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}

/// What went wrong and why, from the outside in. Some libraries repeat the cause in their own words; what
/// was said already is left out.
fn causes(error: &anyhow::Error) -> Vec<String> {
    let mut said: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        if !said.iter().any(|before| before.contains(&cause)) {
            said.push(cause);
        }
    }
    said
}

fn begin(command: Command) -> Result<()> {
    // Only the first one counts, and this is the first: two providers would be a panic later.
    let _ = ring::default_provider().install_default();
    let mut builder = runtime::Builder::new_multi_thread();
    if let Command::Bench(bench) = &command
        && let Some(threads) = bench.threads()
    {
        builder.worker_threads(threads);
    }
    let runtime =
        builder.enable_all().build().context("cannot start the threads that do the work")?;
    let done = runtime.block_on(execute(command));
    runtime.shutdown_timeout(LAST_WORDS);
    done
}

async fn execute(command: Command) -> Result<()> {
    match command {
        Command::Serve(settings) => serve::run(settings.read()?).await,
        Command::Migrate(settings) => migrate::run(&settings.read()?.database).await,
        Command::Config(settings) => {
            let layers = config::layers(settings.config.as_deref(), &settings.flags)?;
            print(config::describe(&layers).trim_end())?;
            Config::read(&layers).map(|_| ())
        }
        Command::Openapi => print(&api::openapi_json()),
        Command::Send(message) => send::run(message).await,
        Command::Publish(message) => send::publish(message).await,
        Command::Receive(what) => receive::receive(what).await,
        Command::Tail(what) => receive::tail(what).await,
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "pumphouse", &mut script);
            print(String::from_utf8(script).context("a script is text")?.trim_end())
        }
        Command::Queues(action) => queues::run(action).await,
        Command::Health(server) => health(&server).await,
        Command::Bench(bench) => bench::run(bench).await,
    }
}

async fn health(server: &Server) -> Result<()> {
    let ready = call(Call {
        method: Method::GET,
        base: &server.url,
        path: "/readyz",
        headers: Vec::new(),
        body: Default::default(),
        patience: PATIENCE,
    });
    ready.await.context("not ready")?;
    print("ready")
}

/// The whole command line as a value, for whoever wants to show or to check it.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Prints a text and a line break; nothing for no text. A reader that has gone, as in
/// `pumphouse … | head`, is no failure.
fn print(text: &str) -> Result<()> {
    show(text).map(|_| ())
}

/// The same, for those who have to know: false where the reader has gone. What was shown is flushed.
fn show(text: &str) -> Result<bool> {
    if text.is_empty() {
        return Ok(true);
    }
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot print"),
    }
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write NAME=VALUE, as in x-tenant=acme".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn a_switch_can_be_said_and_taken_back() {
        let insecure = |arguments: &[&str]| {
            let command = Cli::try_parse_from(arguments).unwrap().command;
            let Command::Serve(settings) = command else { panic!("serve was asked for") };
            settings.flags.0.get("insecure").cloned()
        };
        let said = |text: &str| Some(vec![text.to_owned()]);
        assert_eq!(insecure(&["pumphouse", "serve"]), None);
        assert_eq!(insecure(&["pumphouse", "serve", "--insecure"]), said("true"));
        assert_eq!(insecure(&["pumphouse", "serve", "--insecure=false"]), said("false"));
    }
}
