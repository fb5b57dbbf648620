//! How a queue's settings look from outside, and the way in and out of the model.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use url::Url;
use utoipa::ToSchema;

use crate::model::{
    self, Backoff, Builtin, Concurrency, HttpHandler, Invalid, Jitter, MASK, QueueSettings,
    Recovery, Retention, RetryStatuses, Scope,
};

use super::body::pointer_to;
use super::envelope::{check_forwarded, not_available};
use super::lasting::Lasting;
use super::problem::Problem;

/// How a queue is to be treated. What is missing has its default.
///
/// What only can be read is taken and overlooked, so that what a `GET` shows can be put back.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct SettingsBody {
    handler: HandlerBody,
    concurrency: ConcurrencyBody,
    /// Not available in this version: null.
    #[schema(value_type = Option<Object>)]
    rate_limit: Value,
    /// How long a claim lasts; null for the handler's timeout and 30s.
    lease: Option<Lasting>,
    recovery: RecoveryBody,
    /// Not available in this version: null.
    #[schema(value_type = Option<Object>)]
    breaker: Value,
    dedup_window: Option<Lasting>,
    retention: RetentionBody,
    /// How many messages may be unsettled at once; null for no limit.
    max_messages: Option<u64>,
    /// Not available in this version: null.
    redirect_to: Option<String>,
    #[serde(skip_serializing_if = "ReadOnly::is_overlooked")]
    #[schema(value_type = Option<String>, read_only, required = false)]
    name: ReadOnly,
    #[serde(skip_serializing_if = "ReadOnly::is_overlooked")]
    #[schema(value_type = Option<String>, read_only, required = false)]
    state: ReadOnly,
    #[serde(skip_serializing_if = "ReadOnly::is_overlooked")]
    #[schema(value_type = Option<Object>, read_only, required = false)]
    stopped: ReadOnly,
    #[serde(skip_serializing_if = "ReadOnly::is_overlooked")]
    #[schema(value_type = Option<String>, read_only, required = false)]
    held_until: ReadOnly,
    #[serde(skip_serializing_if = "ReadOnly::is_overlooked")]
    #[schema(value_type = Option<String>, read_only, required = false)]
    breaker_state: ReadOnly,
    #[serde(skip_serializing_if = "ReadOnly::is_overlooked")]
    #[schema(value_type = Option<Object>, read_only, required = false)]
    stats: ReadOnly,
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
        headers: BTreeMap<String, String>,
        #[serde(default = "binary")]
        format: String,
        /// Not available in this version: empty.
        #[serde(default)]
        secrets: Vec<String>,
    },
    /// `log` shows each message on the console; `discard` drops it.
    Builtin { name: BuiltinBody },
    /// Messages wait; pulling them is not available in this version.
    // In braces, because only then serde refuses members that it does not know.
    Pull {},
    /// A function in the program that runs the pump; cannot be set from outside.
    Service {},
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
    /// Not available in this version: null.
    #[schema(value_type = Option<Object>)]
    adaptive: Value,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum ScopeBody {
    Cluster,
    Replica,
}

#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
struct RecoveryBody {
    immediate: u32,
    max_attempts: u32,
    max_crashes: u32,
    backoff: BackoffBody,
    max_age: Lasting,
    retry_after_max: Lasting,
    /// `default` or `all`.
    retry_statuses: RetryStatusesBody,
    /// Not available in this version: empty.
    #[schema(value_type = Vec<Object>)]
    rules: Vec<Value>,
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
    base: Lasting,
    factor: f64,
    max: Lasting,
    /// `full` or `none`.
    jitter: JitterBody,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum JitterBody {
    Full,
    None,
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

fn binary() -> String {
    "binary".to_owned()
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
        Self { limit: concurrency.limit, scope, adaptive: Value::Null }
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
            rules: Vec::new(),
        }
    }
}

impl From<&Backoff> for BackoffBody {
    fn from(backoff: &Backoff) -> Self {
        let jitter = match backoff.jitter {
            Jitter::Full => JitterBody::Full,
            Jitter::None => JitterBody::None,
        };
        Self {
            base: Lasting(backoff.base),
            factor: backoff.factor,
            max: Lasting(backoff.max),
            jitter,
        }
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
                format: binary(),
                secrets: Vec::new(),
            },
            model::Handler::Builtin { name: Builtin::Log } => {
                HandlerBody::Builtin { name: BuiltinBody::Log }
            }
            model::Handler::Builtin { name: Builtin::Discard } => {
                HandlerBody::Builtin { name: BuiltinBody::Discard }
            }
            model::Handler::Pull => HandlerBody::Pull {},
            model::Handler::Service => HandlerBody::Service {},
        };
        Self {
            handler,
            concurrency: ConcurrencyBody::from(&settings.concurrency),
            rate_limit: Value::Null,
            lease: Some(Lasting(settings.lease())),
            recovery: RecoveryBody::from(&settings.recovery),
            breaker: Value::Null,
            dedup_window: Some(Lasting(settings.dedup_window)),
            retention: RetentionBody::from(&settings.retention),
            max_messages: settings.max_messages,
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
        if let HandlerBody::Http { headers, .. } = &mut self.handler {
            for value in headers.values_mut() {
                MASK.clone_into(value);
            }
        }
        self
    }

    /// Whether it says of some secret to keep what is stored.
    pub(super) fn has_a_mask(&self) -> bool {
        match &self.handler {
            HandlerBody::Http { headers, .. } => headers.values().any(|value| value == MASK),
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
        let defaults = QueueSettings::default();
        let recovery = self.recovery;
        let settings = QueueSettings {
            handler,
            concurrency: Concurrency {
                limit: self.concurrency.limit,
                scope: match self.concurrency.scope {
                    ScopeBody::Cluster => Scope::Cluster,
                    ScopeBody::Replica => Scope::Replica,
                },
            },
            lease: self.lease.map(|lasting| lasting.0),
            recovery: Recovery {
                immediate: recovery.immediate,
                max_attempts: recovery.max_attempts,
                max_crashes: recovery.max_crashes,
                backoff: Backoff {
                    base: recovery.backoff.base.0,
                    factor: recovery.backoff.factor,
                    max: recovery.backoff.max.0,
                    jitter: match recovery.backoff.jitter {
                        JitterBody::Full => Jitter::Full,
                        JitterBody::None => Jitter::None,
                    },
                },
                max_age: recovery.max_age.0,
                retry_after_max: recovery.retry_after_max.0,
                retry_statuses: match recovery.retry_statuses {
                    RetryStatusesBody::Default => RetryStatuses::Default,
                    RetryStatusesBody::All => RetryStatuses::All,
                },
            },
            dedup_window: self.dedup_window.map_or(defaults.dedup_window, |lasting| lasting.0),
            retention: Retention {
                completed: self.retention.completed.0,
                dead: self.retention.dead.0,
            },
            max_messages: self.max_messages,
        };
        settings.check().map_err(Problem::invalid)?;
        // The default, put back by who read it, stays a default that follows the timeout.
        let by_default = QueueSettings { lease: None, ..settings.clone() };
        Ok(if settings.lease() == by_default.lease() { by_default } else { settings })
    }

    fn refuse_what_is_not_there_yet(&self) -> Result<(), Problem> {
        let asked_for = [
            ("rate_limit", !self.rate_limit.is_null()),
            ("breaker", !self.breaker.is_null()),
            ("concurrency.adaptive", !self.concurrency.adaptive.is_null()),
            ("recovery.rules", !self.recovery.rules.is_empty()),
            ("redirect_to", self.redirect_to.is_some()),
        ];
        match asked_for.iter().find(|(_, asked)| *asked) {
            Some((name, _)) => Err(not_available(name)),
            None => Ok(()),
        }
    }
}

fn handler(body: HandlerBody, before: Option<&model::Handler>) -> Result<model::Handler, Problem> {
    match body {
        HandlerBody::Http { url, timeout, headers, format, secrets } => {
            if format == "structured" {
                return Err(not_available("handler.format \"structured\""));
            }
            if format != "binary" {
                let detail = "a format is binary or structured";
                return Err(Invalid::new("/handler/format", detail).into());
            }
            if !secrets.is_empty() {
                return Err(not_available("handler.secrets"));
            }
            let detail = "a handler's URL is absolute, like http://localhost:9000/hook";
            let url = Url::parse(&url).map_err(|_| Invalid::new("/handler/url", detail))?;
            let stored = match before {
                Some(model::Handler::Http(http)) => http.headers.clone(),
                _ => BTreeMap::new(),
            };
            let headers = unmask(headers, &stored)?;
            Ok(model::Handler::Http(HttpHandler { url, timeout: timeout.0, headers }))
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

fn unmask(
    headers: BTreeMap<String, String>,
    stored: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, Problem> {
    let mut result = BTreeMap::new();
    for (name, value) in headers {
        let pointer = pointer_to("/handler/headers", &name);
        let name = name.to_ascii_lowercase();
        let value = match stored.get(&name) {
            Some(stored) if value == MASK => stored.clone(),
            None if value == MASK => {
                let detail = "a masked value keeps what is stored, and nothing is";
                return Err(Invalid::new(pointer, detail).into());
            }
            _ => value,
        };
        check_forwarded(&name, &value).map_err(|detail| Invalid::new(&pointer, detail))?;
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
        for body in [
            json!({"breaker": {"failures": 3}}),
            json!({"rate_limit": {"limit": 1}}),
            json!({"concurrency": {"adaptive": {"min": 1}}}),
            json!({"recovery": {"rules": [{}]}}),
            json!({"redirect_to": "other"}),
        ] {
            let parsed = serde_json::from_value::<SettingsBody>(body.clone()).unwrap();
            let problem = parsed.into_settings(None).unwrap_err();
            assert_eq!(problem.code.word, "not-available", "{body}");
        }
    }
}
