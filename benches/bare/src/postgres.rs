//! Postgres: synced on every commit, a few connections that write.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use serde_json::json;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio_postgres::{Client, NoTls, Statement};

use crate::chain::{HandedOver, Outlet};
use crate::client::payload;
use crate::door::{self, Delete, Listen, Write};
use crate::report;
use crate::sqlite::{HEADERS, LEASE, QUEUE, now};

#[derive(Args)]
pub struct Enqueue {
    /// The database; its table `bare_message` is made anew
    #[arg(long)]
    url: String,
    #[command(flatten)]
    listen: Listen,
}

#[derive(Args)]
pub struct Insert {
    /// The database; its table `bare_message` is made anew
    #[arg(long)]
    url: String,
    /// How many rows go into one commit
    #[arg(long, default_value_t = 1000)]
    batch: usize,
    /// How many connections insert at once
    #[arg(long, default_value_t = 2)]
    connections: usize,
    /// How long to insert
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// How many bytes each message carries
    #[arg(long, default_value_t = 256)]
    payload: usize,
}

#[derive(Args)]
pub struct Drain {
    /// The database; its table `bare_message` is made anew
    #[arg(long)]
    url: String,
    /// How many messages are leased, and deleted, by one commit
    #[arg(long, default_value_t = 100)]
    batch: usize,
    /// How many connections drain at once
    #[arg(long, default_value_t = 2)]
    connections: usize,
    /// How many messages wait to be drained
    #[arg(long, default_value_t = 200_000)]
    jobs: usize,
    /// How many bytes each message carries
    #[arg(long, default_value_t = 256)]
    payload: usize,
}

impl Enqueue {
    pub async fn run(self) -> anyhow::Result<()> {
        make_table(&self.url).await?;
        let (writes, waiting) = mpsc::channel(door::WRITES_WAITING_MAX);
        write(&self.url, State::Ready, waiting, None).await?;
        door::serve(self.listen, door::messages(writes, None)).await
    }
}

impl Insert {
    pub async fn run(self) -> anyhow::Result<()> {
        make_table(&self.url).await?;
        let mut stores = Vec::new();
        for _ in 0..self.connections {
            stores.push(Store::connect(&self.url).await?);
        }
        let payload = payload(self.payload);
        let begin = Instant::now();
        let end = begin + Duration::from_secs_f64(self.seconds);
        let mut tasks = JoinSet::new();
        for store in stores {
            let payload = payload.clone();
            tasks.spawn(async move {
                let mut count = 0;
                while Instant::now() < end {
                    store.insert_many(&payload, self.batch).await?;
                    count += self.batch as u64;
                }
                anyhow::Ok(count)
            });
        }
        let mut count = 0;
        while let Some(done) = tasks.join_next().await {
            count += done??;
        }
        let more = json!({"batch": self.batch, "connections": self.connections});
        report::say("postgres-insert", count, begin.elapsed(), more);
        Ok(())
    }
}

impl Drain {
    pub async fn run(self) -> anyhow::Result<()> {
        make_table(&self.url).await?;
        let mut stores = Vec::new();
        for _ in 0..self.connections {
            stores.push(Store::connect(&self.url).await?);
        }
        let payload = payload(self.payload);
        let filler = stores.first().context("at least one connection is needed")?;
        let mut missing = self.jobs;
        while missing > 0 {
            let batch = missing.min(1000);
            filler.insert_many(&payload, batch).await?;
            missing -= batch;
        }
        let left = Arc::new(AtomicI64::new(self.jobs as i64));
        let begin = Instant::now();
        let mut tasks = JoinSet::new();
        for store in stores {
            let left = left.clone();
            tasks.spawn(async move {
                let mut bytes = 0;
                // Nothing found is not the end: another connection may hold the rest.
                while left.load(Ordering::Relaxed) > 0 {
                    let leased = store.lease(self.batch).await?;
                    let ids: Vec<i64> = leased.iter().map(|(id, _)| *id).collect();
                    bytes += leased.iter().map(|(_, payload)| payload.len()).sum::<usize>();
                    store.delete(&ids).await?;
                    left.fetch_sub(ids.len() as i64, Ordering::Relaxed);
                }
                anyhow::Ok(bytes)
            });
        }
        let mut bytes = 0;
        while let Some(done) = tasks.join_next().await {
            bytes += done??;
        }
        let took = begin.elapsed();
        ensure!(bytes == self.jobs * payload.len(), "lost some, or drained some twice");
        let more = json!({"batch": self.batch, "connections": self.connections});
        report::say("postgres-drain", self.jobs as u64, took, more);
        Ok(())
    }
}

/// Connections that commit whatever is waiting, again and again: while one commits, the next takes what
/// has come in since. With an outlet, what was inserted goes out as soon as it is committed.
pub async fn write(
    url: &str,
    state: State,
    waiting: mpsc::Receiver<Write>,
    outlet: Option<Outlet>,
) -> anyhow::Result<()> {
    let waiting = Arc::new(Mutex::new(waiting));
    for _ in 0..WRITERS {
        let store = Store::connect(url).await?;
        let waiting = waiting.clone();
        let outlet = outlet.clone();
        tokio::spawn(async move {
            if let Err(error) = commit_what_waits(&store, state, &waiting, outlet).await {
                door::give_up(error);
            }
        });
    }
    Ok(())
}

async fn commit_what_waits(
    store: &Store,
    state: State,
    waiting: &Mutex<mpsc::Receiver<Write>>,
    mut outlet: Option<Outlet>,
) -> anyhow::Result<()> {
    let mut batch = Vec::with_capacity(door::BATCH_MAX);
    let mut inserts = Vec::with_capacity(door::BATCH_MAX);
    let mut deletes = Vec::with_capacity(door::BATCH_MAX);
    while waiting.lock().await.recv_many(&mut batch, door::BATCH_MAX).await > 0 {
        for write in batch.drain(..) {
            match write {
                Write::Insert(insert) => inserts.push(insert),
                Write::Delete(delete) => deletes.push(delete),
            }
        }
        let ids = store.write(state, &inserts, &deletes).await?;
        deletes.clear();
        for (insert, id) in inserts.drain(..).zip(ids) {
            // Whoever waited may have gone; the message stays.
            let _ = insert.answer.send(id);
            if let Some(outlet) = &mut outlet {
                outlet.hand_over(HandedOver { id, payload: insert.payload, room: insert.room });
            }
        }
    }
    Ok(())
}

/// How a message is written: waiting for whoever leases it, or leased already to who inserts it, which
/// saves its entry in the index and the update.
#[derive(Clone, Copy)]
pub enum State {
    Ready = 0,
    Leased = 1,
}

pub async fn make_table(url: &str) -> anyhow::Result<()> {
    let client = connect(url).await?;
    client
        .batch_execute(
            "drop table if exists bare_message;
             create table bare_message (
                 id bigint generated always as identity primary key,
                 queue text collate \"C\" not null,
                 state smallint not null,
                 due bigint not null,
                 attempts integer not null,
                 lease bigint not null,
                 headers text not null,
                 payload bytea not null
             );
             create index bare_message_ready on bare_message (queue, due, id) where state = 0;",
        )
        .await?;
    Ok(())
}

async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, connection) =
        tokio_postgres::connect(url, NoTls).await.context("cannot connect to the database")?;
    // Its end is seen by the client.
    tokio::spawn(connection);
    // The table goes from empty to full and back, so that its statistics are always wrong.
    client
        .batch_execute(
            "set client_min_messages = warning;
             set synchronous_commit = on;
             set enable_seqscan = off;
             set enable_bitmapscan = off;
             set enable_sort = off",
        )
        .await?;
    let fsync: String = client.query_one("show fsync", &[]).await?.get(0);
    ensure!(fsync == "on", "this database would not be durable: fsync is {fsync}");
    Ok(client)
}

/// One connection, with its statements.
pub struct Store {
    client: Client,
    insert: Statement,
    write: Statement,
    lease: Statement,
    delete: Statement,
}

impl Store {
    pub async fn connect(url: &str) -> anyhow::Result<Self> {
        let client = connect(url).await?;
        let insert = client.prepare(INSERT).await?;
        // On bare_message_pkey.
        let write = format!(
            "with deleted as (delete from bare_message where id = any($7::bigint[])) {INSERT}"
        );
        let write = client.prepare(&write).await?;
        // On bare_message_ready, then on bare_message_pkey.
        let lease = client
            .prepare(
                "update bare_message
                 set state = 1, lease = $1, attempts = attempts + 1
                 where id = any(array(
                     select id from bare_message
                     where queue = $2 and state = 0 and due <= $3
                     order by queue, due, id
                     limit $4
                     for update skip locked
                 ))
                 returning id, payload",
            )
            .await?;
        // On bare_message_pkey.
        let delete = client.prepare("delete from bare_message where id = any($1)").await?;
        Ok(Self { client, insert, write, lease, delete })
    }

    /// All in one statement, and so in one commit. Tells the ids of what was inserted.
    async fn write(
        &self,
        state: State,
        inserts: &[door::Insert],
        deletes: &[Delete],
    ) -> anyhow::Result<Vec<i64>> {
        let queues: Vec<&str> = inserts.iter().map(|insert| &*insert.queue).collect();
        let payloads: Vec<&[u8]> = inserts.iter().map(|insert| &*insert.payload).collect();
        let headers = vec![HEADERS; inserts.len()];
        let deletes: Vec<i64> = deletes.iter().map(|delete| delete.id).collect();
        let now = now();
        let lease = match state {
            State::Ready => 0,
            State::Leased => now + LEASE,
        };
        let state = state as i16;
        let rows = if deletes.is_empty() {
            let values: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
                [&state, &now, &lease, &queues, &headers, &payloads];
            self.client.query(&self.insert, &values).await?
        } else if inserts.is_empty() {
            self.client.execute(&self.delete, &[&deletes]).await?;
            return Ok(Vec::new());
        } else {
            let values: [&(dyn tokio_postgres::types::ToSql + Sync); 7] =
                [&state, &now, &lease, &queues, &headers, &payloads, &deletes];
            self.client.query(&self.write, &values).await?
        };
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }

    pub async fn insert_many(&self, payload: &[u8], count: usize) -> anyhow::Result<()> {
        let (queues, headers) = (vec![QUEUE; count], vec![HEADERS; count]);
        let payloads = vec![payload; count];
        let now = now();
        let ready = State::Ready as i16;
        self.client
            .query(&self.insert, &[&ready, &now, &0i64, &queues, &headers, &payloads])
            .await?;
        Ok(())
    }

    async fn lease(&self, count: usize) -> anyhow::Result<Vec<(i64, Vec<u8>)>> {
        let now = now();
        let rows = self
            .client
            .query(&self.lease, &[&(now + LEASE), &QUEUE, &now, &(count as i64)])
            .await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    async fn delete(&self, ids: &[i64]) -> anyhow::Result<()> {
        self.client.execute(&self.delete, &[&ids]).await?;
        Ok(())
    }
}

const INSERT: &str =
    "insert into bare_message (queue, state, due, attempts, lease, headers, payload)
     select queue, $1, $2, 0, $3, headers, payload
     from unnest($4::text[], $5::text[], $6::bytea[]) as new (queue, headers, payload)
     returning id";

/// How many connections write by group commit.
const WRITERS: usize = 2;
