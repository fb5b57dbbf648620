//! beanstalkd over plain sockets: its protocol is lines, and a client library would only add to them.

use anyhow::{Context, Result, bail};
use pumphouse_bench_peers::{Ask, Handled, Job, Peer, measure};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

const WORKERS: usize = 8;
const SECONDS_TO_RUN: u32 = 120;

/// A connection of its own for each producer, opened when it is first used.
struct Beanstalkd {
    address: String,
    connection: Option<BufReader<TcpStream>>,
}

impl Clone for Beanstalkd {
    fn clone(&self) -> Self {
        Self { address: self.address.clone(), connection: None }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    measure(|ask: Ask| async { Ok(Beanstalkd { address: ask.url, connection: None }) }).await
}

impl Peer for Beanstalkd {
    fn describe(&self, measure: &str) -> (String, String) {
        let settings = match measure {
            "enqueue" => "-f 0; put, a connection for each producer".to_owned(),
            "bulk" => "-f 0; 1000 puts pipelined, then all answers awaited".to_owned(),
            _ => format!("-f 0; {WORKERS} connections, delete and next reserve in one write"),
        };
        // The client is ours; run.py knows the server's version.
        (String::new(), settings)
    }

    async fn enqueue(&mut self, job: Job) -> Result<()> {
        self.bulk(vec![job]).await
    }

    async fn bulk(&mut self, jobs: Vec<Job>) -> Result<()> {
        let connection = self.connection().await?;
        let mut puts = Vec::new();
        for job in &jobs {
            let body = serde_json::to_vec(job)?;
            puts.extend(format!("put 0 0 {SECONDS_TO_RUN} {}\r\n", body.len()).into_bytes());
            puts.extend(body);
            puts.extend(b"\r\n");
        }
        connection.write_all(&puts).await?;
        for _ in jobs {
            let answer = line(connection).await?;
            if !answer.starts_with("INSERTED ") {
                bail!("a put was answered {answer}");
            }
        }
        Ok(())
    }

    async fn work(&mut self, _: &Ask, handled: Handled) -> Result<()> {
        for _ in 0..WORKERS {
            let (mut worker, handled) = (self.clone(), handled.clone());
            tokio::spawn(async move {
                worker.drain(handled).await.expect("the worker lost its server")
            });
        }
        Ok(())
    }
}

impl Beanstalkd {
    async fn drain(&mut self, handled: Handled) -> Result<()> {
        let connection = self.connection().await?;
        connection.write_all(b"reserve\r\n").await?;
        loop {
            let answer = line(connection).await?;
            let mut words = answer.split(' ');
            let (Some("RESERVED"), Some(id), Some(length)) =
                (words.next(), words.next(), words.next())
            else {
                bail!("a reserve was answered {answer}");
            };
            let mut body = vec![0; length.parse::<usize>()? + 2];
            connection.read_exact(&mut body).await?;
            let job: Job = serde_json::from_slice(&body[..body.len() - 2])?;
            handled.handled(job.n);
            connection.write_all(format!("delete {id}\r\nreserve\r\n").as_bytes()).await?;
            let answer = line(connection).await?;
            if answer != "DELETED" {
                bail!("a delete was answered {answer}");
            }
        }
    }

    async fn connection(&mut self) -> Result<&mut BufReader<TcpStream>> {
        if self.connection.is_none() {
            let stream = TcpStream::connect(&self.address).await.context("cannot connect")?;
            stream.set_nodelay(true)?;
            self.connection = Some(BufReader::new(stream));
        }
        self.connection.as_mut().context("no connection")
    }
}

async fn line(connection: &mut BufReader<TcpStream>) -> Result<String> {
    let mut line = String::new();
    if connection.read_line(&mut line).await? == 0 {
        bail!("the server hung up");
    }
    Ok(line.trim_end().to_owned())
}
