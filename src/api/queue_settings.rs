//! How a queue's settings look from outside, and the way in and out of the model.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize};
use url::Url;
use utoipa::ToSchema;

use crate::model::{
    self, Bounds, Builtin, Concurrency, Format, GroupOnDead, HttpHandler, Invalid, MASK, OnExpiry,
    PushHandler, QueueSettings, RateLimit, Retention, Scope,
};

use super::envelope::not_available;
use super::lasting::Lasting;
use super::problem::Problem;
use super::recovery_settings::{BreakerBody, MaybeBreaker, RecoveryBody};

/// How a queue is to be treated. What is missing has its default.
///
/// What only can be read is taken and overlooked, so that what a `GET` shows can be put back.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct SettingsBody {
    handler: HandlerBody,
    concurrency: ConcurrencyBody,
    /// How many deliveries may start in a time; null for no limit.
    rate_limit: Option<RateLimitBody>,
    /// How long a claim lasts; null for the handler's timeout and 30s.
    lease: Option<Lasting>,
    recovery: RecoveryBody,
    /// When the handler is thought to be ill, and is left alone; null for never.
    #[schema(value_type = Option<BreakerBody>)]
    breaker: MaybeBreaker,
    dedup_window: Option<Lasting>,
    retention: RetentionBody,
    /// How many messages may be unsettled at once; null for no limit.
    max_messages: Option<u64>,
    /// What becomes of messages that waited longer than their sender wanted: `expire` ends them, `dead_letter`
    /// sets them aside.
    on_expiry: OnExpiryBody,
    /// What becomes of a group whose first message is dead: `next` lets the next one go, `block` waits until
    /// the dead letter is redriven, deleted or past its retention.
    group_on_dead: GroupOnDeadBody,
    /// Not available in this version: null.
    redirect_to: Option<String>,
    #[serde(skip_serializing_if = "ReadOnly::is_overlooked")]
    #[schema(value_type = serde_json::Value, read_only, required = false)]
    name: ReadOnly,
    #[serde(skip_serializing_if = "ReadOnly::is_overlooked")]
    #[schema(value_type = serde_json::Value, read_only, required = false)]
    state: ReadOnly,
    #[serde(skip_serializing_if = "ReadOnly::is_overlooked")]
    #[schema(value_type = serde_json::Value, read_only, required = false)]
    stopped: ReadOnly,
    #[serde(skip_serializing_if = "ReadOnly::is_overlooked")]
    #[schema(value_type = serde_json::Value, read_only, required = false)]
    held_until: ReadOnly,
    #[serde(skip_serializing_if = "ReadOnly::is_overlooked")]
    #[schema(value_type = serde_json::Value, read_only, required = false)]
    breaker_state: ReadOnly,
    #[serde(skip_serializing_if = "ReadOnly::is_overlooked")]
    #[schema(value_type = serde_json::Value, read_only, required = false)]
    stats: ReadOnly,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum OnExpiryBody {
    #[default]
    Expire,
    DeadLetter,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum GroupOnDeadBody {
    #[default]
    Next,
    Block,
}

/// A member that only can be read.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct ReadOnly;

impl ReadOnly {
    fn is_overlooked(&self) -> bool {
        true
    }
}

impl<'de> Deserialize<'de> for ReadOnly {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(from).map(|_| Self)
    }
}

/// Who processes the messages.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
enum HandlerBody {
    /// An HTTP endpoint that gets a `POST` for each message.
    Http {
        url: String,
        #[serde(default = "thirty_seconds")]
        timeout: Lasting,
        /// Go along with every delivery. Values are masked when read; a mask put back keeps the value.
        #[serde(default)]
        #[schema(value_type = HeadersBody, required = false)]
        headers: BTreeMap<String, String>,
        /// `binary`: the payload is the body; `structured`: the body is a CloudEvent in the JSON format.
        #[serde(default)]
        format: FormatBody,
        /// Not available in this version: empty.
        #[serde(default)]
        secrets: Vec<String>,
    },
    /// `log` shows each message on the console; `discard` drops it.
    Builtin { name: BuiltinBody },
    /// Workers come and take messages; see `POST /v1/queues/{queue}/leases`.
    // In braces, because only then serde refuses members that it does not know.
    Pull {},
    /// Each message is posted where it says itself; see `POST /v1/push`. A breaker means nothing here.
    Push {
        #[serde(default = "thirty_seconds")]
        timeout: Lasting,
        /// Go along with every delivery. Values are masked when read; a mask put back keeps the value.
        #[serde(default)]
        #[schema(value_type = HeadersBody, required = false)]
        headers: BTreeMap<String, String>,
        #[serde(default)]
        format: FormatBody,
        /// How many deliveries to one host may be open at once in each process; null for no limit.
        #[serde(default = "four")]
        per_destination: Option<u32>,
    },
    /// A function in the program that runs the pump; cannot be set from outside.
    Service {},
}

/// Headers, by name.
#[derive(ToSchema)]
#[schema(as = Headers)]
#[expect(dead_code, reason = "only its description is used")]
struct HeadersBody(BTreeMap<String, String>);

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum FormatBody {
    #[default]
    Binary,
    Structured,
}

impl From<Format> for FormatBody {
    fn from(format: Format) -> Self {
        match format {
            Format::Binary => Self::Binary,
            Format::Structured => Self::Structured,
        }
    }
}

impl From<FormatBody> for Format {
    fn from(format: FormatBody) -> Self {
        match format {
            FormatBody::Binary => Self::Binary,
            FormatBody::Structured => Self::Structured,
        }
    }
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum BuiltinBody {
    Log,
    Discard,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
struct ConcurrencyBody {
    /// How many deliveries at once; 0 pauses.
    limit: u32,
    /// `cluster`: over all replicas; `replica`: of each.
    scope: ScopeBody,
    /// Lets each process find its limit by itself, within these; null for `limit`.
    adaptive: Option<BoundsBody>,
}

/// Between which numbers a limit is looked for.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct BoundsBody {
    min: u32,
    max: u32,
}

/// How many deliveries may start in a time.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RateLimitBody {
    /// So many on the average.
    limit: u32,
    /// In each such time; 1s if it is left out.
    #[serde(default = "one_second")]
    period: Lasting,
    /// So many at once after a pause; `limit` if it is left out.
    burst: Option<u32>,
}

fn one_second() -> Lasting {
    Lasting(Duration::from_secs(1))
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ScopeBody {
    Cluster,
    Replica,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
struct RetentionBody {
    completed: Lasting,
    dead: Lasting,
}

fn thirty_seconds() -> Lasting {
    Lasting(Duration::from_secs(30))
}

fn four() -> Option<u32> {
    Some(4)
}

impl Default for HandlerBody {
    fn default() -> Self {
        Self::Pull {}
    }
}

impl Default for ConcurrencyBody {
    fn default() -> Self {
        Self::from(&Concurrency::default())
    }
}

impl Default for RetentionBody {
    fn default() -> Self {
        Self::from(&Retention::default())
    }
}

impl From<&Concurrency> for ConcurrencyBody {
    fn from(concurrency: &Concurrency) -> Self {
        let scope = match concurrency.scope {
            Scope::Cluster => ScopeBody::Cluster,
            Scope::Replica => ScopeBody::Replica,
        };
        let adaptive = concurrency.adaptive.map(|Bounds { min, max }| BoundsBody { min, max });
        Self { limit: concurrency.limit, scope, adaptive }
    }
}

impl From<&RateLimit> for RateLimitBody {
    fn from(rate: &RateLimit) -> Self {
        Self { limit: rate.limit, period: Lasting(rate.period), burst: Some(rate.burst) }
    }
}

impl RateLimitBody {
    fn into_settings(self) -> RateLimit {
        let burst = self.burst.unwrap_or(self.limit);
        RateLimit { limit: self.limit, period: self.period.0, burst }
    }
}

impl From<&Retention> for RetentionBody {
    fn from(retention: &Retention) -> Self {
        Self { completed: Lasting(retention.completed), dead: Lasting(retention.dead) }
    }
}

/// Out: secrets in the clear. Whoever shows it masks it first.
impl From<&QueueSettings> for SettingsBody {
    fn from(settings: &QueueSettings) -> Self {
        let handler = match &settings.handler {
            model::Handler::Http(http) => HandlerBody::Http {
                url: http.url.to_string(),
                timeout: Lasting(http.timeout),
                headers: http.headers.clone(),
                format: http.format.into(),
                secrets: Vec::new(),
            },
            model::Handler::Builtin { name: Builtin::Log } => {
                HandlerBody::Builtin { name: BuiltinBody::Log }
            }
            model::Handler::Builtin { name: Builtin::Discard } => {
                HandlerBody::Builtin { name: BuiltinBody::Discard }
            }
            model::Handler::Pull => HandlerBody::Pull {},
            model::Handler::Push(push) => HandlerBody::Push {
                timeout: Lasting(push.timeout),
                headers: push.headers.clone(),
                format: push.format.into(),
                per_destination: push.per_destination,
            },
            model::Handler::Service => HandlerBody::Service {},
        };
        Self {
            handler,
            concurrency: ConcurrencyBody::from(&settings.concurrency),
            rate_limit: settings.rate_limit.as_ref().map(RateLimitBody::from),
            lease: Some(Lasting(settings.lease())),
            recovery: RecoveryBody::from(&settings.recovery),
            breaker: MaybeBreaker::from(&settings.breaker),
            dedup_window: Some(Lasting(settings.dedup_window)),
            retention: RetentionBody::from(&settings.retention),
            max_messages: settings.max_messages,
            on_expiry: match settings.on_expiry {
                OnExpiry::Expire => OnExpiryBody::Expire,
                OnExpiry::DeadLetter => OnExpiryBody::DeadLetter,
            },
            group_on_dead: match settings.group_on_dead {
                GroupOnDead::Next => GroupOnDeadBody::Next,
                GroupOnDead::Block => GroupOnDeadBody::Block,
            },
            ..Self::default()
        }
    }
}

impl SettingsBody {
    /// What was set: a lease that nobody set is null, and goes on to follow the timeout.
    pub(super) fn as_set(settings: &QueueSettings) -> Self {
        Self { lease: settings.lease.map(Lasting), ..Self::from(settings) }
    }

    /// With every secret replaced by [`MASK`].
    pub(super) fn masked(mut self) -> Self {
        if let HandlerBody::Http { headers, .. } | HandlerBody::Push { headers, .. } =
            &mut self.handler
        {
            for value in headers.values_mut() {
                MASK.clone_into(value);
            }
        }
        self
    }

    /// Whether it says of some secret to keep what is stored.
    pub(super) fn has_a_mask(&self) -> bool {
        match &self.handler {
            HandlerBody::Http { headers, .. } | HandlerBody::Push { headers, .. } => {
                headers.values().any(|value| value == MASK)
            }
            HandlerBody::Builtin { .. } | HandlerBody::Pull {} | HandlerBody::Service {} => false,
        }
    }

    /// In: checked, with masks replaced by what is stored in `before`.
    pub(super) fn into_settings(
        self,
        before: Option<&QueueSettings>,
    ) -> Result<QueueSettings, Problem> {
        self.refuse_what_is_not_there_yet()?;
        let handler = handler(self.handler, before.map(|before| &before.handler))?;
        let adaptive = self.concurrency.adaptive;
        let defaults = QueueSettings::default();
        let settings = QueueSettings {
            handler,
            concurrency: Concurrency {
                limit: self.concurrency.limit,
                scope: match self.concurrency.scope {
                    ScopeBody::Cluster => Scope::Cluster,
                    ScopeBody::Replica => Scope::Replica,
                },
                adaptive: adaptive.map(|BoundsBody { min, max }| Bounds { min, max }),
            },
            rate_limit: self.rate_limit.map(RateLimitBody::into_settings),
            lease: self.lease.map(|lasting| lasting.0),
            recovery: self.recovery.into_recovery()?,
            breaker: self.breaker.into_settings(),
            dedup_window: self.dedup_window.map_or(defaults.dedup_window, |lasting| lasting.0),
            retention: Retention {
                completed: self.retention.completed.0,
                dead: self.retention.dead.0,
            },
            max_messages: self.max_messages,
            on_expiry: match self.on_expiry {
                OnExpiryBody::Expire => OnExpiry::Expire,
                OnExpiryBody::DeadLetter => OnExpiry::DeadLetter,
            },
            group_on_dead: match self.group_on_dead {
                GroupOnDeadBody::Next => GroupOnDead::Next,
                GroupOnDeadBody::Block => GroupOnDead::Block,
            },
        };
        settings.check().map_err(Problem::invalid)?;
        // The default, put back by who read it, stays a default that follows the timeout.
        let by_default = QueueSettings { lease: None, ..settings.clone() };
        Ok(if settings.lease() == by_default.lease() { by_default } else { settings })
    }

    fn refuse_what_is_not_there_yet(&self) -> Result<(), Problem> {
        let asked_for = [("redirect_to", self.redirect_to.is_some())];
        match asked_for.iter().find(|(_, asked)| *asked) {
            Some((name, _)) => Err(not_available(name)),
            None => Ok(()),
        }
    }
}

fn handler(body: HandlerBody, before: Option<&model::Handler>) -> Result<model::Handler, Problem> {
    match body {
        HandlerBody::Http { url, timeout, headers, format, secrets } => {
            if !secrets.is_empty() {
                return Err(not_available("handler.secrets"));
            }
            let detail = "a handler's URL is absolute, like http://localhost:9000/hook";
            let url = Url::parse(&url).map_err(|_| Invalid::new("/handler/url", detail))?;
            let headers = unmask(headers, &stored_headers(before))?;
            let (timeout, format) = (timeout.0, format.into());
            Ok(model::Handler::Http(HttpHandler { url, timeout, headers, format }))
        }
        HandlerBody::Push { timeout, headers, format, per_destination } => {
            let headers = unmask(headers, &stored_headers(before))?;
            let (timeout, format) = (timeout.0, format.into());
            Ok(model::Handler::Push(PushHandler { timeout, headers, format, per_destination }))
        }
        HandlerBody::Builtin { name: BuiltinBody::Log } => {
            Ok(model::Handler::Builtin { name: Builtin::Log })
        }
        HandlerBody::Builtin { name: BuiltinBody::Discard } => {
            Ok(model::Handler::Builtin { name: Builtin::Discard })
        }
        HandlerBody::Pull {} => Ok(model::Handler::Pull),
        HandlerBody::Service {} if before == Some(&model::Handler::Service) => {
            Ok(model::Handler::Service)
        }
        HandlerBody::Service {} => {
            let detail = "a service is set by the program that has it, not from outside";
            Err(Invalid::new("/handler/kind", detail).into())
        }
    }
}

fn stored_headers(before: Option<&model::Handler>) -> BTreeMap<String, String> {
    match before {
        Some(model::Handler::Http(http)) => http.headers.clone(),
        Some(model::Handler::Push(push)) => push.headers.clone(),
        _ => BTreeMap::new(),
    }
}

fn unmask(
    headers: BTreeMap<String, String>,
    stored: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, Problem> {
    let mut result = BTreeMap::new();
    for (name, value) in headers {
        let pointer = Invalid::pointer("/handler/headers", &name);
        let name = name.to_ascii_lowercase();
        let value = match stored.get(&name) {
            Some(stored) if value == MASK => stored.clone(),
            None if value == MASK => {
                let detail = "a masked value keeps what is stored, and nothing is";
                return Err(Invalid::new(pointer, detail).into());
            }
            _ => value,
        };
        model::check_forwarded(&name, &value).map_err(|detail| Invalid::new(&pointer, detail))?;
        if result.insert(name, value).is_some() {
            return Err(spelled_twice(pointer).into());
        }
    }
    Ok(result)
}

/// A header whose name stands twice in what was sent.
pub(super) fn spelled_twice(pointer: String) -> Invalid {
    Invalid::new(pointer, "one header stands here in two spellings")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn defaults_go_out_and_come_back() {
        let settings = QueueSettings::default();
        let out = serde_json::to_value(SettingsBody::from(&settings)).unwrap();
        let back = serde_json::from_value::<SettingsBody>(out).unwrap();
        assert_eq!(back.into_settings(None).unwrap(), settings);
        let empty = serde_json::from_value::<SettingsBody>(json!({})).unwrap();
        assert_eq!(empty.into_settings(None).unwrap(), settings);
    }

    #[test]
    fn a_mask_keeps_what_is_stored() {
        let handler =
            json!({"kind": "http", "url": "http://x/", "headers": {"Authorization": "hunter2"}});
        let first = serde_json::from_value::<SettingsBody>(json!({"handler": handler})).unwrap();
        let first = first.into_settings(None).unwrap();
        let shown = SettingsBody::from(&first).masked();
        let text = serde_json::to_string(&shown).unwrap();
        assert!(!text.contains("hunter2"), "{text}");
        assert_eq!(shown.clone().into_settings(Some(&first)).unwrap(), first);
        assert!(shown.into_settings(None).is_err());
    }

    #[test]
    fn what_is_not_there_yet_is_refused() {
        let body = json!({"redirect_to": "other"});
        let parsed = serde_json::from_value::<SettingsBody>(body).unwrap();
        assert_eq!(parsed.into_settings(None).unwrap_err().code.word, "not-available");
    }
}
