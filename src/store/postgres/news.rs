//! News to this process at once, and to the other replicas a little later.
//!
//! Nothing is sent inside a transaction that writes messages: `notify` takes a lock over the whole
//! database until the commit is on disk, so that all writers would queue behind each other. A task
//! sends what has gathered, at most every [`PAUSE`], on a connection of its own. It is a hint: what is
//! not sent or not heard is found by those who look from time to time.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use sqlx::query;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::model::QueueName;
use crate::telemetry::metrics;

use super::super::News;
use super::fault::Trouble;
use super::transact::{Line, answered};

/// How long news gathers before it is sent.
const PAUSE: Duration = Duration::from_millis(20);
/// How long to wait before the database is asked again after it did not answer.
const BACKOFF: Duration = Duration::from_millis(500);
/// The most bytes in one notification; the database takes 7999.
const LETTER_MAX: usize = 7000;

const CHANNEL: &str = "pumphouse";

// Lives on: no table.
const NOTIFY: &str = "\
select pg_notify($1, $2)";

/// The statements of this file.
pub(super) const STATEMENTS: &[&str] = &[NOTIFY];

/// What one transaction has to tell.
#[derive(Debug, Default)]
pub(super) struct Word {
    /// Queues that have something to lease.
    pub(super) ready: HashSet<QueueName>,
    /// Whether something was scheduled.
    pub(super) schedule: bool,
    /// Whether a queue or the pump was changed.
    pub(super) settings: bool,
    /// Queues, one for each message that died of being unreadable.
    pub(super) unreadable: Vec<QueueName>,
}

impl Word {
    /// That a queue or the pump was changed.
    pub(super) fn of_settings() -> Self {
        Self { settings: true, ..Default::default() }
    }

    /// That these queues have something to lease.
    pub(super) fn of_ready(queues: impl IntoIterator<Item = QueueName>) -> Self {
        Self { ready: queues.into_iter().collect(), ..Default::default() }
    }

    fn is_empty(&self) -> bool {
        self.ready.is_empty() && !self.schedule && !self.settings
    }

    /// Tells this as well.
    pub(super) fn add(&mut self, other: Self) {
        self.ready.extend(other.ready);
        self.schedule |= other.schedule;
        self.settings |= other.settings;
    }

    fn spread(&self, news: &News) {
        self.ready.iter().for_each(|queue| news.queue_has_messages(queue));
        if self.schedule {
            news.schedule_changed();
        }
        if self.settings {
            news.settings_changed();
        }
    }

    /// As text for others: who says it, then a word for each thing.
    fn letters(&self, sender: &str) -> Vec<String> {
        let mut words = self.ready.iter().map(|queue| format!("queue/{queue}")).collect::<Vec<_>>();
        words.extend(self.schedule.then(|| "schedule".to_owned()));
        words.extend(self.settings.then(|| "settings".to_owned()));
        let mut letters = vec![sender.to_owned()];
        for word in words {
            if letters.last().is_some_and(|letter| letter.len() + word.len() >= LETTER_MAX) {
                letters.push(sender.to_owned());
            }
            let letter = letters.last_mut().expect("there is always a last letter");
            letter.push(' ');
            letter.push_str(&word);
        }
        letters
    }

    /// Reads a letter; `None` for our own. Words that this version does not know are passed over.
    fn read(letter: &str, reader: &str) -> Option<Self> {
        let mut words = letter.split(' ');
        if words.next() == Some(reader) {
            return None;
        }
        let mut word = Self::default();
        for text in words {
            match (text, text.strip_prefix("queue/")) {
                ("schedule", _) => word.schedule = true,
                ("settings", _) => word.settings = true,
                (_, Some(queue)) => word.ready.extend(QueueName::parse(queue)),
                (_, None) => (),
            }
        }
        Some(word)
    }
}

/// Who tells everybody.
#[derive(Debug)]
pub(super) struct Herald {
    /// Those in this process.
    pub(super) news: News,
    /// What the other replicas have not been told yet.
    unsent: Mutex<Word>,
    something: Notify,
    /// Which store this is, so that it does not listen to itself.
    name: String,
}

impl Herald {
    /// A herald of a store that nobody knows yet.
    pub(super) fn new() -> Self {
        Self {
            news: News::default(),
            unsent: Mutex::default(),
            something: Notify::new(),
            name: Uuid::now_v7().simple().to_string(),
        }
    }

    /// Tells what was committed.
    pub(super) fn tell(&self, word: Word) {
        word.spread(&self.news);
        for queue in &word.unreadable {
            metrics::dead(queue).increment(1);
        }
        if !word.is_empty() {
            self.unsent.lock().unwrap_or_else(PoisonError::into_inner).add(word);
            self.something.notify_one();
        }
    }

    fn take_unsent(&self) -> Word {
        std::mem::take(&mut self.unsent.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends what there is to tell, until told to stop.
    pub(super) async fn send(self: Arc<Self>, mut line: Line, stop: CancellationToken) {
        while stop.run_until_cancelled(self.something.notified()).await.is_some() {
            for letter in self.take_unsent().letters(&self.name) {
                // What cannot be sent is forgotten: the others look by themselves.
                if answered(send(&mut line, &letter)).await.is_err() {
                    line.hang_up();
                    stop.run_until_cancelled(tokio::time::sleep(BACKOFF)).await;
                }
            }
            stop.run_until_cancelled(tokio::time::sleep(PAUSE)).await;
        }
    }

    /// Hears what other replicas tell, until told to stop.
    pub(super) async fn listen(
        self: Arc<Self>,
        options: PgConnectOptions,
        stop: CancellationToken,
    ) {
        let pool = PgPoolOptions::new().max_connections(1).test_before_acquire(false);
        let pool = pool.connect_lazy_with(options);
        let hear = async {
            loop {
                if let Err(error) = self.hear(&pool).await {
                    tracing::debug!(%error, "not hearing what other replicas tell; listening again soon");
                }
                tokio::time::sleep(BACKOFF).await;
            }
        };
        // The pool is dropped and not closed: the listener takes leave of the server in a task of its own
        // (`unlisten`), and closing would wait for that, with a server that says nothing for ever.
        stop.run_until_cancelled(hear).await;
    }

    async fn hear(&self, pool: &sqlx::PgPool) -> sqlx::Result<()> {
        let mut listener = PgListener::connect_with(pool).await?;
        listener.listen(CHANNEL).await?;
        self.assume_everything();
        loop {
            match listener.try_recv().await? {
                Some(letter) => {
                    if let Some(word) = Word::read(letter.payload(), &self.name) {
                        word.spread(&self.news);
                    }
                }
                // The connection was lost, and with it whatever was told meanwhile.
                None => self.assume_everything(),
            }
        }
    }

    fn assume_everything(&self) {
        self.news.schedule_changed();
        self.news.settings_changed();
    }
}

async fn send(line: &mut Line, letter: &str) -> Result<(), Trouble> {
    let connection = line.connection().await?;
    query(NOTIFY).bind(CHANNEL).bind(letter).execute(connection).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_says_what_was_told_to_everybody_but_its_sender() {
        let queues = (0..200).map(|n| QueueName::parse(&format!("{n:0>80}")).unwrap());
        let word = Word { schedule: true, ..Word::of_ready(queues) };
        let letters = word.letters("me");
        assert!(letters.len() > 1 && letters.iter().all(|letter| letter.len() < 8000));
        let mut heard = Word::default();
        for letter in &letters {
            assert!(Word::read(letter, "me").is_none());
            heard.add(Word::read(letter, "you").unwrap());
        }
        assert_eq!(heard.ready, word.ready);
        assert!(heard.schedule && !heard.settings);
    }
}
