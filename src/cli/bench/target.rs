//! What is measured: a server with a queue of our own on it, which nobody else has and which goes at the end.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::Value;
use tokio::time::{sleep, timeout};

use super::QUEUE;
use super::connection::{Base, Connection};
use super::generator::PATIENCE;
use super::place::Where;
use super::server::Server;

/// How often something is looked at that is to come.
pub(super) const POLL: Duration = Duration::from_millis(5);
/// How long something that is to come may stand still.
pub(super) const STANDSTILL_MAX: Duration = Duration::from_secs(30);
/// How long it may take to delete a queue with all that is in it.
const DELETE_MAX: Duration = Duration::from_secs(600);
/// How long a program that was named may take to listen.
const CONNECT_MAX: Duration = Duration::from_secs(30);

/// Which server to measure.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct Which {
    /// Measure the server that answers there, instead of starting one. The queue `bench` is made there and
    /// deleted afterwards; where there is one already, nothing is done
    #[arg(long, value_name = "URL", value_parser = Base::parse)]
    url: Option<Base>,
    /// Where that server answers operators, if not at the same place
    #[arg(long, value_name = "URL", requires = "url", value_parser = Base::parse)]
    admin_url: Option<Base>,
    /// The program there takes messages and has no queues to be made: send, and count what arrives at the
    /// sink. Waits 30 s for it to listen
    #[arg(long, requires = "url")]
    pub(super) bare: bool,
    #[command(flatten)]
    pub(super) place: Where,
}

impl Which {
    /// Whether a server was named.
    pub(super) fn is_remote(&self) -> bool {
        self.url.is_some()
    }

    /// Checks what clap cannot see: a place is for a server that is started here.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        match self.is_remote() && self.place.is_said() {
            true => {
                Err("--url names a server that has its database: leave out --database and --dir")
            }
            false => Ok(()),
        }
    }
}

/// A server that answers, and whether a queue of ours is on it.
#[derive(Debug)]
pub(super) struct Target {
    /// Where messages go.
    pub(super) base: Base,
    /// What it is, for people.
    pub(super) what: String,
    /// Whether it has no queues to be made.
    pub(super) bare: bool,
    admin: Base,
    own: Option<Own>,
    /// The ETag of the queue that we made.
    made: Option<String>,
}

#[derive(Debug)]
struct Own {
    server: Server,
    /// Kept until the server has ended.
    place: super::place::Place,
}

/// How many messages of the queue are where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Depth {
    pub(super) ready: u64,
    pub(super) scheduled: u64,
    pub(super) in_flight: u64,
    pub(super) dead: u64,
}

impl Target {
    /// Finds it or starts it. Nothing has been changed on it yet.
    pub(super) async fn open(which: &Which) -> Result<Self> {
        let Some(base) = which.url.clone() else { return Self::start(&which.place).await };
        let admin = which.admin_url.clone().unwrap_or_else(|| base.clone());
        let what = base.to_string();
        let target = Self { base, what, bare: which.bare, admin, own: None, made: None };
        match target.bare {
            true => target.connects().await?,
            false => target.is_ready().await?,
        }
        Ok(target)
    }

    async fn start(place: &Where) -> Result<Self> {
        let place = place.open()?;
        if !place.temporary && place.database.scheme() != "memory" {
            place.store().await?.close().await;
        }
        let server = Server::start(&place).await?;
        let (base, what) = (server.base.clone(), format!("own server, {}", place.what));
        let admin = base.clone();
        let own = Some(Own { server, place });
        let target = Self { base, what, bare: false, admin, own, made: None };
        target.is_ready().await?;
        Ok(target)
    }

    async fn connects(&self) -> Result<()> {
        let start = Instant::now();
        loop {
            match Connection::open(&self.base).await {
                Ok(_) => return Ok(()),
                Err(error) if start.elapsed() > CONNECT_MAX => return Err(error),
                Err(_) => sleep(POLL * 10).await,
            }
        }
    }

    async fn is_ready(&self) -> Result<()> {
        let (status, _, body) = self.ask(Method::GET, "/readyz", &[], "").await?;
        if !status.is_success() {
            bail!("{} is not ready: {status}\n{}", self.admin, String::from_utf8_lossy(&body));
        }
        Ok(())
    }

    /// Makes the queue. Fails, and changes nothing, where there is one of this name.
    pub(super) async fn make_queue(&mut self, settings: &Value) -> Result<()> {
        if self.bare {
            return Ok(());
        }
        let headers = [("content-type", "application/json"), ("if-none-match", "*")];
        let path = format!("/admin/v1/queues/{QUEUE}");
        let put = self.ask(Method::PUT, &path, &headers, &settings.to_string()).await;
        let (status, headers, body) = put.context("cannot make a queue to measure with")?;
        match status {
            StatusCode::CREATED => {
                let etag = headers.get("etag").and_then(|etag| etag.to_str().ok());
                self.made = Some(etag.unwrap_or("*").to_owned());
                Ok(())
            }
            StatusCode::PRECONDITION_FAILED => Err(anyhow!(
                "{} has a queue {QUEUE} already, and this command touches only what it made itself. \
                 See whose it is: pumphouse queues show {QUEUE} --url {}. If a bench that was killed left \
                 it behind: pumphouse queues delete {QUEUE} --force --url {}",
                self.admin,
                self.admin,
                self.admin
            )),
            StatusCode::NOT_FOUND => Err(anyhow!(
                "nobody answers operators at {}: say --admin-url, or --bare for a program without queues",
                self.admin
            )),
            _ => Err(refused(&format!("PUT {path}"), status, &body)),
        }
    }

    /// Stops the queue; it goes on accepting.
    pub(super) async fn stop_queue(&self) -> Result<()> {
        let headers = [("content-type", "application/json")];
        let reason = r#"{"reason": "a bench fills it"}"#;
        self.expect(Method::POST, &format!("/admin/v1/queues/{QUEUE}/stop"), &headers, reason).await
    }

    /// Starts the queue; returns when it delivers.
    pub(super) async fn start_queue(&self) -> Result<()> {
        self.expect(Method::POST, &format!("/admin/v1/queues/{QUEUE}/start"), &[], "").await
    }

    /// How much waits.
    pub(super) async fn depth(&self) -> Result<Depth> {
        let mut connection = Connection::open(&self.admin).await?;
        self.depth_over(&mut connection).await
    }

    async fn depth_over(&self, connection: &mut Connection) -> Result<Depth> {
        let path = format!("/admin/v1/queues/{QUEUE}");
        let uri = self.admin.path(&path)?;
        let asked = timeout(PATIENCE, connection.ask(Method::GET, &uri, &[], Bytes::new())).await;
        let (status, _, body) = asked.context("the server does not say how much waits")??;
        if !status.is_success() {
            return Err(refused(&format!("GET {path}"), status, &body));
        }
        let queue: Value =
            serde_json::from_slice(&body).context("the server's answer is no JSON")?;
        let count = |state: &str| queue["stats"][state].as_u64().unwrap_or_default();
        Ok(Depth {
            ready: count("ready"),
            scheduled: count("scheduled"),
            in_flight: count("in_flight"),
            dead: count("dead"),
        })
    }

    /// Waits until nothing waits any more, and says when that was seen. Fails where a message died, or
    /// nothing moves.
    pub(super) async fn settled(&self) -> Result<Instant> {
        let mut connection = Connection::open(&self.admin).await?;
        let mut before = (Depth::default(), Instant::now());
        loop {
            let depth = self.depth_over(&mut connection).await?;
            if depth.dead > 0 {
                bail!(
                    "{} messages are dead letters: the server did not reach the sink",
                    depth.dead
                );
            }
            if depth == Depth::default() {
                return Ok(Instant::now());
            }
            if depth != before.0 {
                before = (depth, Instant::now());
            } else if before.1.elapsed() > STANDSTILL_MAX {
                bail!("nothing was settled for {STANDSTILL_MAX:?}; what waits: {depth:?}");
            }
            sleep(POLL).await;
        }
    }

    /// What the server that was started here last said, if it said anything.
    pub(super) fn last_words(&self) -> Option<String> {
        let said = self.own.as_ref().map(|own| own.server.last_words());
        said.filter(|said| !said.is_empty())
    }

    /// Deletes the queue if we made it, and ends the server if we started it.
    pub(super) async fn close(mut self) -> Result<()> {
        let throw_away = self.own.as_ref().is_some_and(|own| own.place.temporary);
        let deleted = match self.made.take() {
            Some(etag) if !throw_away => self.delete_queue(&etag).await,
            _ => Ok(()),
        };
        if let Some(own) = self.own.take() {
            own.server.stop().await?;
        }
        deleted
    }

    async fn delete_queue(&self, etag: &str) -> Result<()> {
        let headers = [("if-match", etag)];
        let path = format!("/admin/v1/queues/{QUEUE}?force=true");
        self.expect(Method::DELETE, &path, &headers, "").await.with_context(|| {
            format!("cannot delete the queue {QUEUE} at {}; it is still there", self.admin)
        })
    }

    async fn expect(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Result<()> {
        let what = format!("{method} {path}");
        let (status, _, body) = self.ask(method, path, headers, body).await?;
        if status.is_success() { Ok(()) } else { Err(refused(&what, status, &body)) }
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> Result<(StatusCode, http::HeaderMap, Bytes)> {
        let patience = if method == Method::DELETE { DELETE_MAX } else { PATIENCE };
        let asked = timeout(patience, async {
            let mut connection = Connection::open(&self.admin).await?;
            let body = Bytes::copy_from_slice(body.as_bytes());
            connection.ask(method, &self.admin.path(path)?, headers, body).await
        });
        let answer = asked.await.map_err(|_| anyhow!("no answer within {patience:?} to {path}"))?;
        answer.with_context(|| format!("no answer from {}", self.admin))
    }
}

fn refused(what: &str, status: StatusCode, body: &[u8]) -> anyhow::Error {
    let text = String::from_utf8_lossy(body);
    anyhow!("{}", format!("{what} was answered with {status}\n{text}").trim_end().to_owned())
}
