//! Senders that go on whatever happens: they repeat what they do not know, and keep what they were promised.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::{Answer, Client, try_ask};
use super::pass;

/// How long a sender waits before it repeats.
const AGAIN: Duration = Duration::from_millis(20);
/// How many messages a sender's batch has.
const BATCH: usize = 10;

/// A few senders on one queue.
pub(crate) struct Senders {
    client: watch::Sender<Client>,
    kept: Arc<Mutex<Kept>>,
    enough: CancellationToken,
    tasks: TaskTracker,
}

/// What senders remember.
#[derive(Default)]
struct Kept {
    /// Idempotency keys, and the ids that were promised for each.
    promised: BTreeMap<String, Vec<String>>,
    /// What was answered that may not be, whatever happens.
    wrong: Vec<String>,
    refused: usize,
}

impl Senders {
    /// So many of them, until [`Senders::finish`].
    pub(crate) fn start(count: usize, client: Client, queue: &'static str) -> Self {
        let (client, clients) = watch::channel(client);
        let (kept, enough) = (Arc::new(Mutex::new(Kept::default())), CancellationToken::new());
        let tasks = TaskTracker::new();
        for number in 0..count {
            let (clients, kept, enough) = (clients.clone(), kept.clone(), enough.clone());
            tasks.spawn(async move {
                for round in 0.. {
                    if enough.is_cancelled() {
                        return;
                    }
                    let key = format!("{number}-{round}");
                    send_until_known(&clients, queue, &key, round % 5 == 4, &kept).await;
                }
            });
        }
        tasks.close();
        Self { client, kept, enough, tasks }
    }

    /// From now on they ask this process.
    pub(crate) fn use_client(&self, client: Client) {
        self.client.send_replace(client);
    }

    /// How many messages were promised so far.
    pub(crate) fn promised(&self) -> usize {
        self.kept().promised.values().map(Vec::len).sum()
    }

    /// How often a sender was told to come again.
    pub(crate) fn refused(&self) -> usize {
        self.kept().refused
    }

    /// Lets each end what it is about, and gives the ids that were promised.
    pub(crate) async fn finish(self) -> Vec<String> {
        self.enough.cancel();
        self.tasks.wait().await;
        let kept = self.kept();
        assert!(kept.wrong.is_empty(), "{:?}", kept.wrong);
        kept.promised.values().flatten().cloned().collect()
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().expect("no sender panics with it")
    }
}

/// Sends one message or a batch, again and again with the same key, until it is known to be taken.
async fn send_until_known(
    clients: &watch::Receiver<Client>,
    queue: &str,
    key: &str,
    batch: bool,
    kept: &Mutex<Kept>,
) {
    loop {
        let client = clients.borrow().clone();
        let request = if batch {
            let lines = (0..BATCH).map(|item| format!("{{\"payload\":\"{key} {item}\"}}\n"));
            client.batch(queue, lines.collect::<String>())
        } else {
            client.message_to(queue, key.to_owned())
        };
        let answer = try_ask(request.header("Idempotency-Key", key)).await;
        if kept.lock().expect("no sender panics with it").note(key, batch, answer.ok()) {
            return;
        }
        pass(AGAIN).await;
    }
}

impl Kept {
    /// Keeps what an answer says; `true` if it is known now. No answer: the process is gone or went in
    /// between, nobody knows, so the same again.
    fn note(&mut self, key: &str, batch: bool, answer: Option<Answer>) -> bool {
        let Some(answer) = answer else { return false };
        match answer.status {
            200 | 201 | 207 => {
                let ids = if batch { answer.ids() } else { vec![answer.id()] };
                self.promised.insert(key.to_owned(), ids);
                return true;
            }
            503 => self.refused += 1,
            other => self.wrong.push(format!("{other}: {}", answer.text())),
        }
        false
    }
}
