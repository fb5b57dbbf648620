//! SQLite: WAL, synced on every commit, one connection that writes.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use clap::Args;
use rusqlite::{Connection, params};
use serde_json::json;
use tokio::sync::mpsc;

use crate::chain::{HandedOver, Outlet};
use crate::client::payload;
use crate::door::{self, Listen, Write};
use crate::report;

#[derive(Args)]
pub struct Enqueue {
    /// The database; its table `bare_message` is made anew
    #[arg(long)]
    file: PathBuf,
    #[command(flatten)]
    listen: Listen,
}

#[derive(Args)]
pub struct Insert {
    /// The database; its table `bare_message` is made anew
    #[arg(long)]
    file: PathBuf,
    /// How many rows go into one commit
    #[arg(long, default_value_t = 1000)]
    batch: usize,
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
    file: PathBuf,
    /// How many messages are leased, and deleted, by one commit
    #[arg(long, default_value_t = 1000)]
    batch: usize,
    /// How many messages wait to be drained
    #[arg(long, default_value_t = 200_000)]
    jobs: usize,
    /// How many bytes each message carries
    #[arg(long, default_value_t = 256)]
    payload: usize,
}

impl Enqueue {
    pub async fn run(self) -> anyhow::Result<()> {
        let (writes, waiting) = mpsc::channel(door::WRITES_WAITING_MAX);
        write(Store::open(&self.file)?, waiting, None);
        door::serve(self.listen, door::messages(writes, None)).await
    }
}

impl Insert {
    pub fn run(self) -> anyhow::Result<()> {
        let store = Store::open(&self.file)?;
        let payload = payload(self.payload);
        let begin = Instant::now();
        let end = begin + Duration::from_secs_f64(self.seconds);
        let mut count = 0;
        while Instant::now() < end {
            store.insert_many(&payload, self.batch)?;
            count += self.batch as u64;
        }
        report::say("sqlite-insert", count, begin.elapsed(), json!({"batch": self.batch}));
        Ok(())
    }
}

impl Drain {
    pub fn run(self) -> anyhow::Result<()> {
        let store = Store::open(&self.file)?;
        let payload = payload(self.payload);
        let mut missing = self.jobs;
        while missing > 0 {
            let batch = missing.min(1000);
            store.insert_many(&payload, batch)?;
            missing -= batch;
        }
        let mut count = 0;
        let mut bytes = 0;
        let begin = Instant::now();
        loop {
            let leased = store.lease(self.batch)?;
            if leased.is_empty() {
                break;
            }
            bytes += leased.iter().map(|(_, payload)| payload.len()).sum::<usize>();
            store.delete(leased.iter().map(|(id, _)| *id))?;
            count += leased.len() as u64;
        }
        let took = begin.elapsed();
        ensure!(count == self.jobs as u64 && bytes == self.jobs * payload.len(), "lost some");
        report::say("sqlite-drain", count, took, json!({"batch": self.batch}));
        Ok(())
    }
}

/// A thread that commits whatever is waiting, again and again. It waits for nothing else, so that a
/// single write is committed at once, and many share the sync of the ones before them. With an outlet,
/// what was inserted goes out as soon as it is committed.
pub fn write(store: Store, mut waiting: mpsc::Receiver<Write>, mut outlet: Option<Outlet>) {
    thread::spawn(move || {
        let mut batch = Vec::with_capacity(door::BATCH_MAX);
        let mut ids = Vec::with_capacity(door::BATCH_MAX);
        while waiting.blocking_recv_many(&mut batch, door::BATCH_MAX) > 0 {
            if let Err(error) = store.write(&batch, &mut ids) {
                door::give_up(error);
            }
            for (write, id) in batch.drain(..).zip(ids.drain(..)) {
                let Write::Insert(insert) = write else { continue };
                // Whoever waited may have gone; the message stays.
                let _ = insert.answer.send(id);
                if let Some(outlet) = &mut outlet {
                    outlet.hand_over(HandedOver { id, payload: insert.payload, room: insert.room });
                }
            }
        }
    });
}

pub struct Store {
    connection: Connection,
}

impl Store {
    pub fn open(file: &Path) -> anyhow::Result<Self> {
        let connection = Connection::open(file).context("cannot open the database")?;
        connection.set_prepared_statement_cache_capacity(16);
        connection.execute_batch(
            "pragma journal_mode = wal;
             pragma synchronous = full;
             pragma cache_size = -65536;
             pragma temp_store = memory;
             pragma wal_autocheckpoint = 4000;
             drop table if exists bare_message;
             create table bare_message (
                 id integer primary key,
                 queue text not null,
                 state integer not null,
                 due integer not null,
                 attempts integer not null,
                 lease integer not null,
                 headers text not null,
                 payload blob not null
             );
             create index bare_message_ready on bare_message (queue, due) where state = 0;",
        )?;
        let mode: String = connection.query_row("pragma journal_mode", [], |row| row.get(0))?;
        let synchronous: i64 = connection.query_row("pragma synchronous", [], |row| row.get(0))?;
        ensure!(mode == "wal" && synchronous == 2, "this database would not be durable");
        Ok(Self { connection })
    }

    /// All in one commit. Tells the id that each write is about.
    fn write(&self, batch: &[Write], ids: &mut Vec<i64>) -> anyhow::Result<()> {
        self.transaction(|| {
            let mut insert = self.connection.prepare_cached(INSERT)?;
            let mut delete = self.connection.prepare_cached(DELETE)?;
            let now = now();
            for write in batch {
                match write {
                    Write::Insert(message) => {
                        insert.execute(params![
                            message.queue,
                            now,
                            HEADERS,
                            &message.payload[..]
                        ])?;
                        ids.push(self.connection.last_insert_rowid());
                    }
                    Write::Delete(message) => {
                        delete.execute([message.id])?;
                        ids.push(message.id);
                    }
                }
            }
            Ok(())
        })
    }

    pub fn insert_many(&self, payload: &[u8], count: usize) -> anyhow::Result<()> {
        self.transaction(|| {
            let mut insert = self.connection.prepare_cached(INSERT)?;
            let now = now();
            for _ in 0..count {
                insert.execute(params![QUEUE, now, HEADERS, payload])?;
            }
            Ok(())
        })
    }

    fn lease(&self, count: usize) -> anyhow::Result<Vec<(i64, Vec<u8>)>> {
        self.transaction(|| {
            // On bare_message_ready.
            let mut lease = self.connection.prepare_cached(
                "update bare_message
                 set state = 1, lease = ?1, attempts = attempts + 1
                 where id in (
                     select id from bare_message
                     where queue = ?2 and state = 0 and due <= ?3
                     order by due
                     limit ?4
                 )
                 returning id, payload",
            )?;
            let now = now();
            let leased = lease
                .query_map(params![now + LEASE, QUEUE, now, count as i64], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })?;
            Ok(leased.collect::<Result<_, _>>()?)
        })
    }

    fn delete(&self, ids: impl Iterator<Item = i64>) -> anyhow::Result<()> {
        self.transaction(|| {
            let mut delete = self.connection.prepare_cached(DELETE)?;
            for id in ids {
                delete.execute([id])?;
            }
            Ok(())
        })
    }

    /// Rolls back nothing: after an error the process ends.
    fn transaction<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        self.connection.prepare_cached("begin immediate")?.execute([])?;
        let done = work()?;
        self.connection.prepare_cached("commit")?.execute([])?;
        Ok(done)
    }
}

const INSERT: &str =
    "insert into bare_message (queue, state, due, attempts, lease, headers, payload)
     values (?1, 0, ?2, 0, 0, ?3, ?4)";
const DELETE: &str = "delete from bare_message where id = ?1";

/// The queue of what is not sent by HTTP.
pub const QUEUE: &str = "bench";
pub const HEADERS: &str = r#"{"content-type":"application/json"}"#;
/// In microseconds, like all times.
pub const LEASE: i64 = 60_000_000;

pub fn now() -> i64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_micros() as i64)
}
