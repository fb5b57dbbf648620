//! `pumphouse serve`: from a configuration to a running server, and back down in the opposite order.
//!
//! ```text
//!   up    signals › metrics › listeners › (waiting room) store › queues › pump › doors
//!   down  (signal) › refuse messages › drain the pump › close the doors › close the store
//! ```

use std::io;
use std::iter;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::api::{self, Names};
use crate::clock::SystemClock;
use crate::model::{Handler, QueueName, QueueSettings};
use crate::pump::{Pumphouse, StopReport};
use crate::store::{self, Precondition, PutQueue, Store};
use crate::telemetry;

use super::config::Config;
use super::{causes, log, signals};

/// How long open requests may go on once the pump has ended.
const DOORS_DEADLINE: Duration = Duration::from_secs(5);
/// How often the metrics recorder tidies up; without it samples pile up when nobody asks for them.
const UPKEEP_EVERY: Duration = Duration::from_secs(5);
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// Runs until a signal ends it. Fails where it cannot begin; a database that does not answer yet is waited for.
pub(super) async fn run(config: Config) -> Result<()> {
    log::begin(&config.log)?;
    // On a tracker of its own: it listens until the very end, so nobody waits for it.
    let stop = signals::listen(&TaskTracker::new())?;
    let tasks = TaskTracker::new();
    let closing = CancellationToken::new();
    let metrics = record_metrics(&tasks, &closing)?;

    let listeners = Listeners::bind(&config).await?;
    let waiting_room = WaitingRoom::open(&listeners)?;
    let Some(store) = open(&config, &stop).await? else { return Ok(()) };
    let served = serve(&config, &store, listeners, waiting_room, metrics, &stop, &tasks, &closing);
    let served = served.await;

    closing.cancel();
    tasks.close();
    tasks.wait().await;
    store.close().await;
    served
}

#[expect(
    clippy::too_many_arguments,
    reason = "each is made by `run`, in the order of the plan above"
)]
async fn serve(
    config: &Config,
    store: &Arc<dyn Store>,
    listeners: Listeners,
    waiting_room: WaitingRoom,
    metrics: PrometheusHandle,
    stop: &CancellationToken,
    tasks: &TaskTracker,
    closing: &CancellationToken,
) -> Result<()> {
    let begin = patiently(stop, "start the pump", async || {
        store.set_body_limit(config.body_limit).await?;
        Pumphouse::builder(Arc::clone(store))
            .replica(config.replica.clone())
            .answer_max(config.body_limit)
            .start()
            .await
    });
    let Some(pump) = begin.await.context("cannot start the pump")? else { return Ok(()) };

    waiting_room.close().await;
    announce(config, &listeners)?;
    open_doors(config, &pump, metrics, listeners, tasks, closing);
    stop.cancelled().await;

    // From here on nothing is taken in, and whoever asks is told that this process is not ready.
    let StopReport { drained, aborted, released } = pump.shut_down(config.drain_deadline).await;
    tracing::info!(drained, aborted, released, "drained");
    Ok(())
}

/// Where this process can be reached.
struct Listeners {
    all: TcpListener,
    /// Of the operators, where they have one of their own.
    admin: Option<TcpListener>,
}

impl Listeners {
    async fn bind(config: &Config) -> Result<Self> {
        let all = bind(config.listen).await?;
        let admin = match config.admin_listen {
            Some(address) => Some(bind(address).await?),
            None => None,
        };
        Ok(Self { all, admin })
    }
}

/// Answers for this process until its database is there, so that whoever watches it does not end it for
/// something that a new start would not mend.
struct WaitingRoom {
    tasks: TaskTracker,
    closing: CancellationToken,
}

impl WaitingRoom {
    fn open(listeners: &Listeners) -> Result<Self> {
        let room = Self { tasks: TaskTracker::new(), closing: CancellationToken::new() };
        for listener in iter::once(&listeners.all).chain(&listeners.admin) {
            let listener = second_handle(listener).context("cannot listen")?;
            let router = api::waiting_router();
            room.tasks.spawn(api::serve(listener, router, room.closing.clone(), DOORS_DEADLINE));
        }
        room.tasks.close();
        Ok(room)
    }

    async fn close(self) {
        self.closing.cancel();
        self.tasks.wait().await;
    }
}

/// Another handle on the same socket: both accept from one queue of connections.
fn second_handle(listener: &TcpListener) -> io::Result<TcpListener> {
    let socket = listener.as_fd().try_clone_to_owned()?;
    TcpListener::from_std(socket.into())
}

/// One line that says where to knock; with port 0 it is the only place where the port is told.
fn announce(config: &Config, listeners: &Listeners) -> Result<()> {
    let address = listeners.all.local_addr()?;
    let admin_address = listeners.admin.as_ref().map(TcpListener::local_addr).transpose()?;
    tracing::info!(
        %address,
        admin_address = admin_address.map(tracing::field::display),
        replica = %config.replica,
        database = config.database.scheme(),
        version = env!("CARGO_PKG_VERSION"),
        "listening on http://{address}"
    );
    Ok(())
}

fn open_doors(
    config: &Config,
    pump: &Pumphouse,
    metrics: PrometheusHandle,
    listeners: Listeners,
    tasks: &TaskTracker,
    closing: &CancellationToken,
) {
    let state = api::Doors::new(
        pump.clone(),
        metrics,
        config.body_limit,
        config.auto_create_queues,
        config.push_allow.clone(),
        if config.insecure { Names::Any } else { Names::Local },
    );
    let serve = |listener, router| {
        tasks.spawn(api::serve(listener, router, closing.clone(), DOORS_DEADLINE));
    };
    match listeners.admin {
        Some(admin) => {
            serve(listeners.all, api::data_router(state.clone()));
            serve(admin, api::admin_router(state));
        }
        None => serve(listeners.all, api::router(state)),
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Installs the recorder behind `/metrics`, with buckets that fit what is measured.
fn record_metrics(tasks: &TaskTracker, closing: &CancellationToken) -> Result<PrometheusHandle> {
    let seconds = Matcher::Suffix("_seconds".to_owned());
    let batch = Matcher::Full("pumphouse_store_batch_size".to_owned());
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(seconds, SECONDS)?
        .set_buckets_for_metric(batch, BATCH_SIZES)?
        .install_recorder()
        .context("cannot record metrics")?;
    telemetry::metrics::describe();
    let (recorder, closing) = (handle.clone(), closing.clone());
    tasks.spawn(async move {
        let wait = || tokio::time::sleep(UPKEEP_EVERY);
        while closing.run_until_cancelled(wait()).await.is_some() {
            recorder.run_upkeep();
        }
    });
    Ok(handle)
}

/// From a commit on a fast disk to a delivery that waited for an hour.
const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    300.0, 3600.0,
];
const BATCH_SIZES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// Opens the store with the queues of the configuration in it; `None` where a signal came first.
async fn open(config: &Config, stop: &CancellationToken) -> Result<Option<Arc<dyn Store>>> {
    let opened = patiently(stop, "open the database", async || {
        store::open(config.database.secret(), Arc::new(SystemClock)).await
    });
    let cannot = || format!("cannot open the database {}", config.database);
    let Some(store) = opened.await.with_context(cannot)? else { return Ok(None) };
    for (queue, handler) in &config.queues {
        let declared =
            patiently(stop, "declare the queues", async || declare(&*store, queue, handler).await);
        match declared.await {
            Ok(Some(())) => {}
            ended => {
                store.close().await;
                return ended
                    .map(|_| None)
                    .with_context(|| format!("cannot declare queue {queue}"));
            }
        }
    }
    Ok(Some(store))
}

/// Makes the queue if there is none; gives it the handler if it has another one, and leaves the rest of
/// its settings, which an operator may have changed.
async fn declare(store: &dyn Store, queue: &QueueName, handler: &Handler) -> store::Result<()> {
    loop {
        let (settings, precondition) = match store.queue(queue).await? {
            Some(record) if same(&record.settings.handler, handler) => return Ok(()),
            Some(record) => {
                let precondition = Precondition::Matches(record.settings.etag());
                (record.settings.with_handler(handler.clone()), precondition)
            }
            None => {
                let settings = QueueSettings { handler: handler.clone(), ..Default::default() };
                (settings, Precondition::Absent)
            }
        };
        // Where another replica was faster, what it wrote is looked at anew.
        if store.put_queue(queue, settings, precondition).await? != PutQueue::PreconditionFailed {
            return Ok(());
        }
    }
}

/// Whether a queue has the declared handler already: an endpoint's timeout and headers are not declared.
fn same(existing: &Handler, declared: &Handler) -> bool {
    match (existing, declared) {
        (Handler::Http(existing), Handler::Http(declared)) => existing.url == declared.url,
        (existing, declared) => existing == declared,
    }
}

/// Tries until it succeeds, fails for good, or a signal comes (`None`): a database that is away is waited
/// for, because a process that dies and is started again would only do the same less well.
async fn patiently<T>(
    stop: &CancellationToken,
    what: &str,
    mut attempt: impl AsyncFnMut() -> store::Result<T>,
) -> store::Result<Option<T>> {
    let mut wait = RETRY_FIRST;
    let mut told = String::new();
    loop {
        let Some(outcome) = stop.run_until_cancelled(attempt()).await else { return Ok(None) };
        match outcome {
            Ok(value) => return Ok(Some(value)),
            Err(error) if error.is_transient() => {
                let why = causes(&error.into()).join(": ");
                // Once for each reason, not once for each attempt.
                if why != told {
                    tracing::warn!(%why, "cannot {what} yet; trying again until it works");
                    told = why;
                }
            }
            Err(error) => return Err(error),
        }
        if stop.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
            return Ok(None);
        }
        wait = (wait * 2).min(RETRY_MAX);
    }
}
