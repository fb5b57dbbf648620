//! How statements get to the database: alone, in a transaction, or many calls in one.
//!
//! Everything that talks to the database runs in a task of its own, so that a caller who goes away in
//! the middle cannot leave a connection behind in an open transaction, to which the next caller's
//! write would then belong, acknowledged and later rolled back. So nobody else may begin one.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::super::{Error, Result};
use super::fault::Trouble;

/// How often a transaction is tried that others were in the way of.
const TRIES: u32 = 4;
/// The longest pause before the second try; it doubles with each.
const PAUSE: Duration = Duration::from_millis(10);
/// After how long without an answer a connection is given up. Longer than any timeout of the database.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long a connection may take to be made.
pub(super) const CONNECT_MAX: Duration = Duration::from_secs(5);
/// After how long without use a connection is asked whether it still stands.
pub(super) const IDLE: Duration = Duration::from_secs(1);

/// A pool of connections, and the tasks in which they are used.
#[derive(Debug, Clone)]
pub(super) struct Hands {
    pub(super) pool: PgPool,
    pub(super) tasks: TaskTracker,
}

#[derive(Debug, Clone, Copy)]
enum Mode {
    /// Each statement is committed by itself.
    Plain,
    /// All of them or none.
    Transaction,
}

impl Hands {
    /// Does the work, each statement of it committed by itself. It may be done more than once.
    pub(super) async fn run<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'c> Fn(&'c mut PgConnection) -> BoxFuture<'c, Result<T, Trouble>>,
        F: Send + Sync + 'static,
    {
        self.carry(Mode::Plain, work).await
    }

    /// Does the work in one transaction. It may be done more than once, until one is committed.
    pub(super) async fn transact<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'c> Fn(&'c mut PgConnection) -> BoxFuture<'c, Result<T, Trouble>>,
        F: Send + Sync + 'static,
    {
        self.carry(Mode::Transaction, work).await
    }

    /// Carries the work to its end, even if nobody waits for that any more.
    async fn carry<T, F>(&self, mode: Mode, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'c> Fn(&'c mut PgConnection) -> BoxFuture<'c, Result<T, Trouble>>,
        F: Send + Sync + 'static,
    {
        let pool = self.pool.clone();
        let task = self.tasks.spawn(async move {
            let mut tries = 1;
            loop {
                match attempt(&pool, mode, &work).await {
                    Err(trouble) if tries < TRIES && trouble.is_worth_another_try() => {
                        pause(tries).await;
                        tries += 1;
                    }
                    done => return done,
                }
            }
        });
        match task.await {
            Ok(done) => done.map_err(Error::from),
            Err(died) => Err(Error::Unavailable(died.into())),
        }
    }
}

async fn attempt<T, F>(pool: &PgPool, mode: Mode, work: &F) -> Result<T, Trouble>
where
    F: for<'c> Fn(&'c mut PgConnection) -> BoxFuture<'c, Result<T, Trouble>>,
{
    let mut connection = pool.acquire().await?;
    let done = async {
        match mode {
            Mode::Plain => work(&mut connection).await,
            Mode::Transaction => transaction(&mut connection, work).await,
        }
    };
    let done = answered(done).await;
    if done.is_err() {
        // Nobody knows what state it is in, and another is made in milliseconds.
        connection.close_on_drop();
    }
    done
}

async fn transaction<T, F>(connection: &mut PgConnection, work: &F) -> Result<T, Trouble>
where
    F: for<'c> Fn(&'c mut PgConnection) -> BoxFuture<'c, Result<T, Trouble>>,
{
    let mut transaction = connection.begin().await?;
    let done = work(&mut transaction).await?;
    transaction.commit().await?;
    Ok(done)
}

/// Waits for an answer, but not for ever: a connection whose other end is gone without a word says nothing.
pub(super) async fn answered<T>(
    work: impl Future<Output = Result<T, Trouble>>,
) -> Result<T, Trouble> {
    let silent = || sqlx::Error::Io(io::Error::from(io::ErrorKind::TimedOut)).into();
    timeout(SILENCE_MAX, work).await.unwrap_or_else(|_| Err(silent()))
}

/// Waits a random while before the next try, so that those who collided do not collide again.
pub(super) async fn pause(tries: u32) {
    let chance = f64::from(getrandom::u32().unwrap_or(u32::MAX)) / f64::from(u32::MAX);
    tokio::time::sleep(PAUSE.mul_f64(chance * f64::from(1 << tries))).await;
}

/// A connection that is kept for one purpose, and made again when it breaks.
#[derive(Debug)]
pub(super) struct Line {
    options: PgConnectOptions,
    connection: Option<PgConnection>,
    used_at: Instant,
    breaks: Breaks,
    /// How many of them were known when it was used last.
    known_breaks: usize,
}

/// How often a line of this store has broken, so that the others are not trusted either.
pub(super) type Breaks = Arc<AtomicUsize>;

impl Line {
    /// A line that connects when it is needed.
    pub(super) fn new(options: PgConnectOptions, breaks: &Breaks) -> Self {
        let breaks = Arc::clone(breaks);
        Self { options, connection: None, used_at: Instant::now(), breaks, known_breaks: 0 }
    }

    /// The connection; one that was idle, or beside which another one broke, is asked first whether it still
    /// stands, so that a server that was started again costs a connection and no write.
    pub(super) async fn connection(&mut self) -> sqlx::Result<&mut PgConnection> {
        let breaks = self.breaks.load(Ordering::Relaxed);
        let in_doubt = self.used_at.elapsed() > IDLE || self.known_breaks != breaks;
        if let Some(connection) = &mut self.connection
            && in_doubt
            && !stands(connection).await
        {
            self.connection = None;
        }
        self.known_breaks = breaks;
        self.used_at = Instant::now();
        match &mut self.connection {
            Some(connection) => Ok(connection),
            none => Ok(none.insert(connect(&self.options).await?)),
        }
    }

    /// Gives the connection up, because nobody knows what state it is in.
    pub(super) fn hang_up(&mut self) {
        self.connection = None;
        self.breaks.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends it in good order.
    pub(super) async fn close(self) {
        if let Some(connection) = self.connection {
            // The server notices by itself that we are gone.
            let _ = connection.close().await;
        }
    }
}

/// Makes a connection, within [`CONNECT_MAX`].
pub(super) async fn connect(options: &PgConnectOptions) -> sqlx::Result<PgConnection> {
    let late = || sqlx::Error::Io(io::Error::from(io::ErrorKind::TimedOut));
    timeout(CONNECT_MAX, options.connect()).await.unwrap_or_else(|_| Err(late()))
}

/// Whether a connection that was idle still works.
pub(super) async fn stands(connection: &mut PgConnection) -> bool {
    matches!(timeout(CONNECT_MAX, connection.ping()).await, Ok(Ok(())))
}
