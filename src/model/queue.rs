//! How a queue is to be treated: handler, limits, recovery, retention.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use url::Url;

use super::{BreakerSettings, Guard, GuardChange, QueueName, Rule};

/// What a lease lasts longer than the handler's timeout, by default.
pub const LEASE_MARGIN: Duration = Duration::from_secs(30);
/// The highest concurrency limit a queue or the whole pump can have.
pub const LIMIT_MAX: u32 = 100_000;
/// What stands in place of a secret when settings are read; put back, it keeps what is stored.
pub const MASK: &str = "********";

/// How a queue is to be treated. Checked by [`QueueSettings::check`]; what is stored was checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSettings {
    /// Who processes its messages.
    pub handler: Handler,
    /// How many at once.
    pub concurrency: Concurrency,
    /// How many may start in a time; `None` for no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<RateLimit>,
    /// How long a claim on a message lasts; `None` for the handler's timeout and [`LEASE_MARGIN`].
    #[serde(default, with = "maybe_micros")]
    pub lease: Option<Duration>,
    /// What follows a failure.
    pub recovery: Recovery,
    /// When the handler is thought to be ill, and is left alone; `None` for never.
    #[serde(default)]
    pub breaker: Option<BreakerSettings>,
    /// How long an idempotency key is remembered, at least.
    #[serde(with = "micros")]
    pub dedup_window: Duration,
    /// How long what has ended is kept.
    pub retention: Retention,
    /// How many messages may be unsettled at once; `None` for no limit.
    pub max_messages: Option<u64>,
    /// What becomes of a message that waited longer than its sender wanted.
    #[serde(default)]
    pub on_expiry: OnExpiry,
    /// What becomes of a group whose first message is dead.
    #[serde(default)]
    pub group_on_dead: GroupOnDead,
}

impl Default for QueueSettings {
    fn default() -> Self {
        Self {
            handler: Handler::Pull,
            concurrency: Concurrency::default(),
            rate_limit: None,
            lease: None,
            recovery: Recovery::default(),
            breaker: Some(BreakerSettings::default()),
            dedup_window: Duration::from_secs(24 * 3600),
            retention: Retention::default(),
            max_messages: None,
            on_expiry: OnExpiry::default(),
            group_on_dead: GroupOnDead::default(),
        }
    }
}

/// What becomes of a message that waited longer than its sender wanted. It is never delivered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnExpiry {
    /// It ends as expired, and is kept for as long as what was completed.
    #[default]
    Expire,
    /// It is set aside as a dead letter.
    DeadLetter,
}

/// What becomes of a group whose first message is dead.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupOnDead {
    /// The next one goes.
    #[default]
    Next,
    /// The others wait until the dead letter is redriven, deleted or past its retention.
    Block,
}

/// Who processes a queue's messages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Handler {
    /// An HTTP endpoint that gets a `POST` for each message.
    Http(HttpHandler),
    /// A handler that comes with the house.
    Builtin {
        /// Which one.
        name: Builtin,
    },
    /// Workers, who come and take messages.
    Pull,
    /// An HTTP endpoint that each message names itself.
    Push(PushHandler),
    /// A `tower::Service` in the program that runs the pump.
    Service,
}

/// An HTTP endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpHandler {
    /// Where to `POST`: http or https, without user name and password.
    pub url: Url,
    /// One deadline over connecting, TLS, headers and body.
    #[serde(with = "micros")]
    pub timeout: Duration,
    /// Headers that go along with every delivery; values are masked when read.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// How a message is written.
    #[serde(default, skip_serializing_if = "Format::is_binary")]
    pub format: Format,
}

/// Endpoints that messages name themselves. A breaker, and what an endpoint wants of all who call it, mean nothing here:
/// one that is ill says nothing of the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PushHandler {
    /// One deadline over connecting, TLS, headers and body.
    #[serde(with = "micros")]
    pub timeout: Duration,
    /// Headers that go along with every delivery, to whatever host the message names: no secrets, unless all hosts that
    /// are allowed may know them. Values are masked when read.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// How a message is written.
    #[serde(default, skip_serializing_if = "Format::is_binary")]
    pub format: Format,
    /// How many deliveries to one host may be open at once in each process; `None` for as many as the queue's gate lets
    /// through.
    pub per_destination: Option<u32>,
}

impl Default for PushHandler {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            headers: BTreeMap::new(),
            format: Format::Binary,
            per_destination: Some(4),
        }
    }
}

/// How a message is written for an HTTP endpoint, in the words of the HTTP binding of CloudEvents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// The payload is the body, all else is in headers.
    #[default]
    Binary,
    /// The body is a CloudEvent in the JSON format, with the payload in it.
    Structured,
}

impl Format {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks like this")]
    fn is_binary(&self) -> bool {
        *self == Self::Binary
    }
}

/// The handlers that come with the house.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Builtin {
    /// Shows each message on the console, and acks.
    Log,
    /// Acks.
    Discard,
}

/// How many deliveries of a queue may be open at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Concurrency {
    /// The limit; 0 pauses the queue.
    pub limit: u32,
    /// Whether the limit is for all replicas together or for each.
    pub scope: Scope,
    /// Where the limit is found by itself, between which numbers; `limit` is where each process begins, and 0 still
    /// pauses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adaptive: Option<Bounds>,
}

/// Between which numbers a limit is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bounds {
    /// At least 1.
    pub min: u32,
    /// At least `min`.
    pub max: u32,
}

impl Concurrency {
    /// The most that can ever be open. A limit of 0 pauses an adaptive gate too.
    pub fn most(&self) -> u32 {
        match self.adaptive {
            Some(bounds) if self.limit > 0 => bounds.max,
            Some(_) | None => self.limit,
        }
    }
}

/// How many deliveries may start in a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// So many on the average.
    pub limit: u32,
    /// In each such time.
    #[serde(with = "micros")]
    pub period: Duration,
    /// So many at once after a pause.
    pub burst: u32,
}

impl Default for Concurrency {
    fn default() -> Self {
        Self { limit: 16, scope: Scope::Cluster, adaptive: None }
    }
}

/// What a limit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Open deliveries over all replicas.
    Cluster,
    /// Open deliveries of each replica.
    Replica,
}

/// What follows a failed delivery.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recovery {
    /// How many failures are followed by a retry at once, before any backoff.
    pub immediate: u32,
    /// How many deliveries may fail before the message is dead.
    pub max_attempts: u32,
    /// How many attempts may end with nobody answering for them before the message is dead.
    pub max_crashes: u32,
    /// How long to wait after the immediate retries.
    pub backoff: Backoff,
    /// How old a message may be to be tried again.
    #[serde(with = "micros")]
    pub max_age: Duration,
    /// The longest wait a handler can ask for.
    #[serde(with = "micros")]
    pub retry_after_max: Duration,
    /// Which statuses are worth a retry.
    pub retry_statuses: RetryStatuses,
    /// What is to follow otherwise: the first that matches counts, before everything else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
}

/// Which HTTP statuses are worth a retry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryStatuses {
    /// Those of the table in the protocol.
    Default,
    /// Everything that is no 2xx.
    All,
}

impl Default for Recovery {
    fn default() -> Self {
        Self {
            immediate: 2,
            max_attempts: 12,
            max_crashes: 20,
            backoff: Backoff::default(),
            max_age: Duration::from_secs(3 * 86_400),
            retry_after_max: Duration::from_secs(3600),
            retry_statuses: RetryStatuses::Default,
            rules: Vec::new(),
        }
    }
}

/// How long to wait before the next attempt: at most `max`, spread by the jitter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backoff {
    /// How waits grow.
    #[serde(default)]
    pub curve: Curve,
    /// The first wait.
    #[serde(with = "micros")]
    pub base: Duration,
    /// What each wait of an exponential backoff is multiplied with to get the next; at least 1.
    pub factor: f64,
    /// The longest wait.
    #[serde(with = "micros")]
    pub max: Duration,
    /// How waits are spread, so that what failed together does not come back together.
    pub jitter: Jitter,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            curve: Curve::Exponential,
            base: Duration::from_secs(1),
            factor: 2.0,
            max: Duration::from_secs(3600),
            jitter: Jitter::Full,
        }
    }
}

/// How waits grow from one retry to the next.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Curve {
    /// `base`, always.
    Fixed,
    /// `base`, twice that, three times that, …
    Linear,
    /// `base × factorⁿ`.
    #[default]
    Exponential,
}

/// How a wait is spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Jitter {
    /// Anything from nothing to the whole wait.
    Full,
    /// Anything from the half to the whole wait.
    Bounded,
    /// Not at all.
    None,
}

/// How long what has ended is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retention {
    /// Completed, discarded, expired and cancelled messages.
    #[serde(with = "micros")]
    pub completed: Duration,
    /// Dead letters.
    #[serde(with = "micros")]
    pub dead: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        Self { completed: Duration::from_secs(24 * 3600), dead: Duration::from_secs(30 * 86_400) }
    }
}

impl QueueSettings {
    /// How long the handler may take.
    pub fn timeout(&self) -> Duration {
        match &self.handler {
            Handler::Http(http) => http.timeout,
            Handler::Push(push) => push.timeout,
            Handler::Builtin { .. } | Handler::Pull | Handler::Service => Duration::from_secs(30),
        }
    }

    /// Whether its handler is one that can be ill: then it has a breaker, and is heard when it wants to be left alone.
    pub fn has_one_handler(&self) -> bool {
        match self.handler {
            Handler::Http(_) | Handler::Builtin { .. } | Handler::Service => true,
            Handler::Push(_) | Handler::Pull => false,
        }
    }

    /// How long a lease on one of its messages lasts.
    pub fn lease(&self) -> Duration {
        self.lease.unwrap_or(self.timeout() + LEASE_MARGIN)
    }

    /// The ETag of the settings alone: it changes with them and with nothing else.
    pub fn etag(&self) -> String {
        let json = serde_json::to_vec(self).expect("settings are plain data, which is always JSON");
        let digest = Sha256::digest(json);
        let hex = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>();
        format!("\"{hex}\"")
    }

    /// The same settings with another handler. A lease that was set for the old one may be too short for it:
    /// then it goes back to its default, because nothing could be delivered with it.
    #[must_use]
    pub fn with_handler(self, handler: Handler) -> Self {
        let settings = Self { handler, ..self };
        match settings.check() {
            Ok(()) => settings,
            Err(_) => Self { lease: None, ..settings },
        }
    }
}

/// Whether a queue, or the whole pump, is to run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum RunState {
    /// Its messages are delivered.
    #[default]
    Running,
    /// Its messages wait. It keeps accepting.
    Stopped(Stopped),
}

/// Who stopped it, when and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    /// When.
    pub at: Timestamp,
    /// Who: `operator`, or `handler` for an answer that stops the queue: a 410, or what a rule says so of.
    pub by: String,
    /// Why, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it starts again by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
}

/// A queue as the store knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct QueueRecord {
    /// Its name.
    pub name: QueueName,
    /// How it is to be treated.
    pub settings: QueueSettings,
    /// Whether it is to run.
    pub state: RunState,
    /// What keeps its handler from being asked.
    pub guard: Guard,
}

impl QueueRecord {
    /// What becomes of its guard under these settings: another handler, or another breaker, begins anew.
    pub fn guard_under(&self, settings: &QueueSettings) -> Guard {
        let same =
            self.settings.breaker == settings.breaker && self.settings.handler == settings.handler;
        if same {
            return self.guard.clone();
        }
        self.guard.after(&GuardChange::Lifted, Timestamp::MIN)
    }
}

/// Durations as whole microseconds, the unit of everything that is stored.
pub(super) mod micros {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(in super::super) fn serialize<S: Serializer>(
        value: &Duration,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(value.as_micros()).unwrap_or(u64::MAX))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_micros)
    }
}

/// The same, where there may be none.
pub(super) mod maybe_micros {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(in super::super) fn serialize<S: Serializer>(
        v: &Option<Duration>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        v.map(|value| u64::try_from(value.as_micros()).unwrap_or(u64::MAX)).serialize(to)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Duration>, D::Error> {
        Ok(Option::<u64>::deserialize(from)?.map(Duration::from_micros))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_in_order() {
        assert_eq!(QueueSettings::default().check(), Ok(()));
    }

    #[test]
    fn a_lease_must_outlast_the_handler() {
        let mut settings =
            QueueSettings { lease: Some(Duration::from_secs(30)), ..Default::default() };
        assert_eq!(settings.check().unwrap_err()[0].pointer, "/lease");
        settings.lease = Some(Duration::from_secs(31));
        assert_eq!(settings.check(), Ok(()));
    }

    #[test]
    fn every_wrong_value_is_named() {
        let mut settings = QueueSettings::default();
        settings.recovery.backoff.factor = f64::NAN;
        settings.recovery.max_attempts = 0;
        settings.max_messages = Some(0);
        let pointers = settings.check().unwrap_err().into_iter().map(|wrong| wrong.pointer);
        let expected = ["/recovery/max_attempts", "/recovery/backoff/factor", "/max_messages"];
        assert_eq!(pointers.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_is_stored_is_read_back() {
        let settings = QueueSettings::default();
        let json = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<QueueSettings>(&json).unwrap(), settings);
    }

    #[test]
    fn the_etag_follows_the_settings() {
        let settings = QueueSettings::default();
        let other = QueueSettings { max_messages: Some(1), ..settings.clone() };
        assert_eq!(settings.etag(), settings.clone().etag());
        assert_ne!(settings.etag(), other.etag());
    }
}
