//! A load of HTTP requests: each connection sends its next POST when the last one was answered.

use std::time::{Duration, Instant};

use anyhow::ensure;
use bytes::Bytes;
use clap::{Args, ValueEnum};
use hdrhistogram::Histogram;
use http_body_util::{BodyExt as _, Full};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::json;
use tokio::runtime::Builder;
use tokio::task::JoinSet;

use crate::http::Connection;
use crate::report;

#[derive(Args)]
pub struct Client {
    /// Where to POST to
    #[arg(long)]
    url: Uri,
    /// How many requests are open at once
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// How long to measure
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// How long to send before that
    #[arg(long, default_value_t = 0.5)]
    warm_up: f64,
    /// Which client sends
    #[arg(long, value_enum, default_value_t = How::Raw)]
    how: How,
    /// How many bytes each request carries
    #[arg(long, default_value_t = 256)]
    payload: usize,
    /// How long each connection waits before its next request, in milliseconds
    #[arg(long, default_value_t = 0)]
    pause: u64,
    /// How many threads send
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum How {
    /// One hyper HTTP/1.1 connection for each task
    Raw,
    /// The pool of hyper-util
    Pool,
    /// Reqwest
    Reqwest,
}

impl Client {
    pub fn run(self) -> anyhow::Result<()> {
        let runtime = match self.threads {
            0 | 1 => Builder::new_current_thread().enable_all().build()?,
            threads => Builder::new_multi_thread().worker_threads(threads).enable_all().build()?,
        };
        runtime.block_on(self.load())
    }

    async fn load(self) -> anyhow::Result<()> {
        let payload = payload(self.payload);
        let begin = Instant::now() + Duration::from_secs_f64(self.warm_up);
        let end = begin + Duration::from_secs_f64(self.seconds);
        let pause = Duration::from_millis(self.pause);
        let pool = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(self.connections)
            .build({
                let mut connector = HttpConnector::new();
                connector.set_nodelay(true);
                connector
            });
        let reqwest = reqwest::Client::builder()
            .no_proxy()
            .tcp_nodelay(true)
            .pool_max_idle_per_host(self.connections)
            .build()?;
        let mut tasks = JoinSet::new();
        for _ in 0..self.connections {
            let sender = match self.how {
                How::Raw => Sender::Raw(Connection::open(&self.url).await?),
                How::Pool => Sender::Pool(pool.clone(), self.url.clone()),
                How::Reqwest => Sender::Reqwest(reqwest.clone(), self.url.to_string()),
            };
            tasks.spawn(one_after_another(sender, payload.clone(), pause, begin, end));
        }
        let mut times = report::histogram();
        while let Some(done) = tasks.join_next().await {
            times.add(done??)?;
        }
        let how = self.how.to_possible_value().expect("no way is hidden");
        report::say(
            "client",
            times.len(),
            end - begin,
            json!({
                "how": how.get_name(),
                "connections": self.connections,
                "p50_ms": report::milliseconds(&times, 0.5),
                "p99_ms": report::milliseconds(&times, 0.99),
            }),
        );
        Ok(())
    }
}

enum Sender {
    Raw(Connection),
    Pool(hyper_util::client::legacy::Client<HttpConnector, Full<Bytes>>, Uri),
    Reqwest(reqwest::Client, String),
}

async fn one_after_another(
    mut sender: Sender,
    payload: Bytes,
    pause: Duration,
    begin: Instant,
    end: Instant,
) -> anyhow::Result<Histogram<u64>> {
    let mut times = report::histogram();
    loop {
        let sent = Instant::now();
        if sent >= end {
            return Ok(times);
        }
        let status = sender.post(payload.clone()).await?;
        ensure!(status.is_success(), "answered with {status}");
        let answered = Instant::now();
        if answered >= begin && answered < end {
            times.saturating_record((answered - sent).as_nanos() as u64);
        }
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }
}

impl Sender {
    async fn post(&mut self, payload: Bytes) -> anyhow::Result<StatusCode> {
        match self {
            Self::Raw(connection) => connection.post(payload).await,
            Self::Pool(pool, url) => {
                let request = Request::post(url.clone())
                    .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
                    .body(Full::new(payload))?;
                let response = pool.request(request).await?;
                let status = response.status();
                response.collect().await?;
                Ok(status)
            }
            Self::Reqwest(client, url) => {
                let request = client.post(url.as_str()).body(payload);
                let response = request.header(CONTENT_TYPE, "application/json").send().await?;
                let status = response.status();
                response.bytes().await?;
                Ok(status)
            }
        }
    }
}

/// JSON of about so many bytes.
pub fn payload(size: usize) -> Bytes {
    format!(r#"{{"pad":"{}"}}"#, "x".repeat(size.saturating_sub(10))).into()
}
