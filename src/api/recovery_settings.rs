//! How a queue's recovery looks from outside: budgets, backoff, rules.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use utoipa::{PartialSchema, ToSchema};

use crate::model::{
    Action, Backoff, BreakerSettings, Curve, ErrorKind, Invalid, Jitter, Match, Numbers, QueueName,
    Recovery, RetryStatuses, Rule,
};

use super::lasting::Lasting;
use super::problem::Problem;
use super::queue_settings::spelled_twice;

/// What follows a failed delivery. What is missing has its default.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RecoveryBody {
    /// How many failures are followed by a retry at once.
    immediate: u32,
    /// How many deliveries may fail before the message is dead.
    max_attempts: u32,
    /// How many attempts may end with nobody answering for them before the message is dead.
    max_crashes: u32,
    backoff: BackoffBody,
    /// How old a message may be to be tried again.
    max_age: Lasting,
    /// The longest wait that a handler can ask for.
    retry_after_max: Lasting,
    /// `default`: by the table of the protocol; `all`: every answer that is no 2xx is worth a retry.
    retry_statuses: RetryStatusesBody,
    /// What is to follow otherwise: the first rule that matches counts, before everything else.
    rules: Vec<RuleBody>,
}

/// When a handler is thought to be ill, and for how long it is left alone.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default, expecting = "an object, or null for none")]
pub(super) struct BreakerBody {
    /// How many deliveries in a row must fail (no answer, 429 or 5xx), in one process.
    failures: u32,
    /// For how long the first time; then twice as long each time.
    open_for: Lasting,
    /// The longest at once.
    max_open: Lasting,
}

/// A breaker, unless somebody says null.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct MaybeBreaker(Option<BreakerBody>);

impl Default for BreakerBody {
    fn default() -> Self {
        Self::from(&BreakerSettings::default())
    }
}

impl From<&BreakerSettings> for BreakerBody {
    fn from(breaker: &BreakerSettings) -> Self {
        Self {
            failures: breaker.failures,
            open_for: Lasting(breaker.open_for),
            max_open: Lasting(breaker.max_open),
        }
    }
}

impl Default for MaybeBreaker {
    fn default() -> Self {
        Self(Some(BreakerBody::default()))
    }
}

impl From<&Option<BreakerSettings>> for MaybeBreaker {
    fn from(breaker: &Option<BreakerSettings>) -> Self {
        Self(breaker.as_ref().map(BreakerBody::from))
    }
}

impl MaybeBreaker {
    /// In. Whether its numbers are possible is for who checks the settings as a whole.
    pub(super) fn into_settings(self) -> Option<BreakerSettings> {
        self.0.map(|breaker| BreakerSettings {
            failures: breaker.failures,
            open_for: breaker.open_for.0,
            max_open: breaker.max_open.0,
        })
    }
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum RetryStatusesBody {
    Default,
    All,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
struct BackoffBody {
    /// `fixed`: `base` each time; `linear`: once, twice, three times `base`; `exponential`: `base × factorⁿ`.
    kind: CurveBody,
    base: Lasting,
    factor: f64,
    max: Lasting,
    /// `full`: anything up to the wait; `bounded`: from its half; `none`.
    jitter: JitterBody,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum CurveBody {
    Fixed,
    Linear,
    Exponential,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum JitterBody {
    Full,
    Bounded,
    None,
}

/// Which failures, and what follows them.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RuleBody {
    #[serde(rename = "match", default)]
    matches: MatchBody,
    action: ActionBody,
    /// With `retry`: the wait in place of the backoff. What the handler asks for is never undercut.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    delay: Option<Lasting>,
    /// With `move`: where to. The message keeps its id; its budget of attempts starts anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    to_queue: Option<String>,
}

/// Failures that match everything that stands here; nothing matches all.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
struct MatchBody {
    /// `404`, `"5xx"`, `"500-503"`, or a list of them.
    #[serde(skip_serializing_if = "Several::is_empty")]
    status: Several<NumbersBody>,
    /// `"timeout"`, or a list.
    #[serde(skip_serializing_if = "Several::is_empty")]
    error_kind: Several<String>,
    /// Headers of the answer, each with exactly this value.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    header: BTreeMap<String, String>,
    /// Which failure of the message: `1`, `"3-"`, `"2-4"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    attempt: Option<NumbersBody>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ActionBody {
    Retry,
    DeadLetter,
    Discard,
    StopQueue,
    Move,
}

/// One, or a list.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(transparent)]
struct Several<T>(Vec<T>);

impl<T> Several<T> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T> Default for Several<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: serde::de::DeserializeOwned> Deserialize<'de> for Several<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let all = match Value::deserialize(from)? {
            Value::Array(all) => all,
            one => vec![one],
        };
        let read = |value| T::deserialize(value).map_err(D::Error::custom);
        all.into_iter().map(read).collect::<Result<_, _>>().map(Self)
    }
}

/// A number, or a range of them as text.
#[derive(Debug, Clone, Copy)]
struct NumbersBody(Numbers);

impl Serialize for NumbersBody {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let text = self.0.to_string();
        match text.parse::<u32>() {
            Ok(number) => to.serialize_u32(number),
            Err(_) => to.serialize_str(&text),
        }
    }
}

impl<'de> Deserialize<'de> for NumbersBody {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let text = match Value::deserialize(from)? {
            Value::String(text) => text,
            other => other.to_string(),
        };
        text.parse().map(Self).map_err(D::Error::custom)
    }
}

impl PartialSchema for NumbersBody {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::SchemaType::from_iter([
                utoipa::openapi::Type::Integer,
                utoipa::openapi::Type::String,
            ]))
            .description(Some("A number, or a range: \"5xx\", \"500-503\", \"3-\"."))
            .into()
    }
}

impl ToSchema for NumbersBody {}

impl Default for RecoveryBody {
    fn default() -> Self {
        Self::from(&Recovery::default())
    }
}

impl Default for BackoffBody {
    fn default() -> Self {
        Self::from(&Backoff::default())
    }
}

impl From<&Recovery> for RecoveryBody {
    fn from(recovery: &Recovery) -> Self {
        Self {
            immediate: recovery.immediate,
            max_attempts: recovery.max_attempts,
            max_crashes: recovery.max_crashes,
            backoff: BackoffBody::from(&recovery.backoff),
            max_age: Lasting(recovery.max_age),
            retry_after_max: Lasting(recovery.retry_after_max),
            retry_statuses: match recovery.retry_statuses {
                RetryStatuses::Default => RetryStatusesBody::Default,
                RetryStatuses::All => RetryStatusesBody::All,
            },
            rules: recovery.rules.iter().map(RuleBody::from).collect(),
        }
    }
}

impl From<&Backoff> for BackoffBody {
    fn from(backoff: &Backoff) -> Self {
        Self {
            kind: match backoff.curve {
                Curve::Fixed => CurveBody::Fixed,
                Curve::Linear => CurveBody::Linear,
                Curve::Exponential => CurveBody::Exponential,
            },
            base: Lasting(backoff.base),
            factor: backoff.factor,
            max: Lasting(backoff.max),
            jitter: match backoff.jitter {
                Jitter::Full => JitterBody::Full,
                Jitter::Bounded => JitterBody::Bounded,
                Jitter::None => JitterBody::None,
            },
        }
    }
}

impl From<&Rule> for RuleBody {
    fn from(rule: &Rule) -> Self {
        let Match { status, error_kind, header, attempt } = &rule.matches;
        let (action, delay, to_queue) = match &rule.action {
            Action::Retry { delay } => (ActionBody::Retry, delay.map(Lasting), None),
            Action::DeadLetter => (ActionBody::DeadLetter, None, None),
            Action::Discard => (ActionBody::Discard, None, None),
            Action::StopQueue => (ActionBody::StopQueue, None, None),
            Action::Move { to_queue } => (ActionBody::Move, None, Some(to_queue.to_string())),
        };
        let kinds = error_kind.iter().map(|kind| kind.as_str().to_owned());
        Self {
            matches: MatchBody {
                status: Several(status.iter().copied().map(NumbersBody).collect()),
                error_kind: Several(kinds.collect()),
                header: header.clone(),
                attempt: attempt.map(NumbersBody),
            },
            action,
            delay,
            to_queue,
        }
    }
}

impl RecoveryBody {
    /// In. Whether its numbers are possible is for who checks the settings as a whole.
    pub(super) fn into_recovery(self) -> Result<Recovery, Problem> {
        let mut rules = Vec::with_capacity(self.rules.len());
        let mut wrong = Vec::new();
        for (number, rule) in self.rules.into_iter().enumerate() {
            match rule.into_rule() {
                Ok(rule) => rules.push(rule),
                Err(error) => wrong.push(error.under(&format!("/recovery/rules/{number}"))),
            }
        }
        if !wrong.is_empty() {
            return Err(Problem::invalid(wrong));
        }
        Ok(Recovery {
            immediate: self.immediate,
            max_attempts: self.max_attempts,
            max_crashes: self.max_crashes,
            backoff: Backoff {
                curve: match self.backoff.kind {
                    CurveBody::Fixed => Curve::Fixed,
                    CurveBody::Linear => Curve::Linear,
                    CurveBody::Exponential => Curve::Exponential,
                },
                base: self.backoff.base.0,
                factor: self.backoff.factor,
                max: self.backoff.max.0,
                jitter: match self.backoff.jitter {
                    JitterBody::Full => Jitter::Full,
                    JitterBody::Bounded => Jitter::Bounded,
                    JitterBody::None => Jitter::None,
                },
            },
            max_age: self.max_age.0,
            retry_after_max: self.retry_after_max.0,
            retry_statuses: match self.retry_statuses {
                RetryStatusesBody::Default => RetryStatuses::Default,
                RetryStatusesBody::All => RetryStatuses::All,
            },
            rules,
        })
    }
}

impl RuleBody {
    fn into_rule(self) -> Result<Rule, Invalid> {
        let Self { matches, action, delay, to_queue } = self;
        if delay.is_some() && action != ActionBody::Retry {
            return Err(Invalid::new("/delay", "only a retry has a delay"));
        }
        if to_queue.is_some() && action != ActionBody::Move {
            return Err(Invalid::new("/to_queue", "only a move has a queue to go to"));
        }
        let action = match (action, to_queue) {
            (ActionBody::Retry, _) => Action::Retry { delay: delay.map(|delay| delay.0) },
            (ActionBody::DeadLetter, _) => Action::DeadLetter,
            (ActionBody::Discard, _) => Action::Discard,
            (ActionBody::StopQueue, _) => Action::StopQueue,
            (ActionBody::Move, Some(to_queue)) => {
                let to_queue = QueueName::parse(&to_queue);
                Action::Move { to_queue: to_queue.map_err(|wrong| at("/to_queue", wrong))? }
            }
            (ActionBody::Move, None) => {
                return Err(Invalid::new("/to_queue", "a move names the queue to go to"));
            }
        };
        let kinds = matches.error_kind.0.iter().map(|kind| ErrorKind::parse(kind));
        let kinds = kinds.collect::<Result<Vec<_>, _>>();
        let mut header = BTreeMap::new();
        for (name, value) in matches.header {
            let pointer = Invalid::pointer("/match/header", &name);
            if header.insert(name.to_ascii_lowercase(), value).is_some() {
                return Err(spelled_twice(pointer));
            }
        }
        let matches = Match {
            status: matches.status.0.into_iter().map(|numbers| numbers.0).collect(),
            error_kind: kinds.map_err(|wrong| at("/match/error_kind", wrong))?,
            header,
            attempt: matches.attempt.map(|numbers| numbers.0),
        };
        Ok(Rule { matches, action })
    }
}

/// The same complaint about another place.
fn at(pointer: &str, wrong: Invalid) -> Invalid {
    Invalid { pointer: pointer.to_owned(), ..wrong }
}
