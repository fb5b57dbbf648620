//! The whole way of a message: in by HTTP, committed, handed over in memory, out by HTTP, deleted by one
//! of the next group commits.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::ensure;
use bytes::Bytes;
use clap::Args;
use hyper::Uri;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::door::{self, Delete, Listen, Write};
use crate::http::Connection;
use crate::{postgres, sqlite};

#[derive(Args)]
pub struct Sqlite {
    /// The database; its table `bare_message` is made anew
    #[arg(long)]
    file: PathBuf,
    #[command(flatten)]
    out: Out,
    #[command(flatten)]
    listen: Listen,
}

#[derive(Args)]
pub struct Postgres {
    /// The database; its table `bare_message` is made anew
    #[arg(long)]
    url: String,
    #[command(flatten)]
    out: Out,
    #[command(flatten)]
    listen: Listen,
}

#[derive(Args)]
struct Out {
    /// Where each message is sent to by POST
    #[arg(long)]
    to: Uri,
    /// How many connections send
    #[arg(long, default_value_t = 64)]
    connections: usize,
}

impl Sqlite {
    pub async fn run(self) -> anyhow::Result<()> {
        let (writes, waiting) = mpsc::channel(ON_THE_WAY_MAX);
        let outlet = Outlet::open(&self.out, &writes).await?;
        sqlite::write(sqlite::Store::open(&self.file)?, waiting, Some(outlet));
        door::serve(self.listen, door::messages(writes, Some(room()))).await
    }
}

impl Postgres {
    pub async fn run(self) -> anyhow::Result<()> {
        postgres::make_table(&self.url).await?;
        let (writes, waiting) = mpsc::channel(ON_THE_WAY_MAX);
        let outlet = Outlet::open(&self.out, &writes).await?;
        postgres::write(&self.url, postgres::State::Leased, waiting, Some(outlet)).await?;
        door::serve(self.listen, door::messages(writes, Some(room()))).await
    }
}

/// A message that has been committed and is to be sent.
pub struct HandedOver {
    pub id: i64,
    pub payload: Bytes,
    pub room: Option<OwnedSemaphorePermit>,
}

/// The connections that send, each with its own line of messages.
#[derive(Clone)]
pub struct Outlet {
    senders: Vec<mpsc::Sender<HandedOver>>,
    next: usize,
}

impl Outlet {
    async fn open(out: &Out, writes: &mpsc::Sender<Write>) -> anyhow::Result<Self> {
        let mut senders = Vec::new();
        for _ in 0..out.connections {
            let connection = Connection::open(&out.to).await?;
            let (sender, waiting) = mpsc::channel(ON_THE_WAY_MAX);
            let writes = writes.clone();
            tokio::spawn(async move {
                if let Err(error) = send(connection, waiting, writes).await {
                    door::give_up(error);
                }
            });
            senders.push(sender);
        }
        ensure!(!senders.is_empty(), "at least one connection is needed");
        Ok(Self { senders, next: 0 })
    }

    /// In turn, and never waiting: there is room for everything that is on the way.
    pub fn hand_over(&mut self, message: HandedOver) {
        self.next = (self.next + 1) % self.senders.len();
        let handed_over = self.senders[self.next].try_send(message);
        handed_over.expect("a line holds all that is on the way");
    }
}

async fn send(
    mut connection: Connection,
    mut waiting: mpsc::Receiver<HandedOver>,
    writes: mpsc::Sender<Write>,
) -> anyhow::Result<()> {
    while let Some(message) = waiting.recv().await {
        let status = connection.post(message.payload).await?;
        ensure!(status.is_success(), "the sink answered with {status}");
        let delete = Delete { id: message.id, room: message.room };
        writes.send(Write::Delete(delete)).await.expect("the writer ends with the process");
    }
    Ok(())
}

fn room() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(ON_THE_WAY_MAX))
}

/// How many messages are between their POST and their delete. One more waits at the door, so that what
/// comes in cannot outrun what goes out, and no line overflows.
const ON_THE_WAY_MAX: usize = 10_000;
