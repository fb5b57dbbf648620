//! Defaults, file, environment and flags, laid over each other, each value with its origin.
//!
//! It finds what is set and refuses names that do not exist; what the values mean is `config`'s business.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, bail};
use toml::{Table, Value};

use super::settings::{ENVIRONMENT_PREFIX, Flags, Kind, SETTINGS, Setting};

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// Nobody set it.
    Default,
    /// This file.
    File(String),
    /// This environment variable.
    Environment(String),
    /// This flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => write!(f, "file {path}"),
            Self::Environment(variable) => write!(f, "environment {variable}"),
            Self::Flag(flag) => write!(f, "flag --{flag}"),
        }
    }
}

/// A value as it was written, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    /// The text.
    pub(super) text: String,
    /// Who wrote it.
    pub(super) origin: Origin,
}

/// The last word on every setting.
#[derive(Debug, Default)]
pub(super) struct Layers {
    /// By flag; every setting that has a value.
    pub(super) values: BTreeMap<&'static str, Found>,
    /// URLs of queues, by the queue's name. Layers add queues, and replace those of the same name.
    pub(super) queues: BTreeMap<String, Found>,
}

impl Layers {
    /// Lays flags over environment over file (its path and its text) over defaults.
    ///
    /// Fails on a file that cannot be parsed and on every name that does not exist, with the nearest one
    /// that does.
    pub(super) fn gather(
        file: Option<(&str, &str)>,
        environment: impl IntoIterator<Item = (String, String)>,
        flags: &Flags,
    ) -> Result<Self> {
        let mut layers = Self::default();
        for setting in SETTINGS.iter().filter(|setting| !setting.default.is_empty()) {
            layers.set(setting, setting.default, &Origin::Default)?;
        }
        if let Some((path, text)) = file {
            layers.lay_file(path, text).with_context(|| format!("cannot use the file {path}"))?;
        }
        layers.lay_environment(environment)?;
        for (flag, texts) in &flags.0 {
            let setting = find(flag).expect("flags are made from the settings");
            for text in texts {
                layers.set(setting, text, &Origin::Flag((*flag).to_owned()))?;
            }
        }
        Ok(layers)
    }

    fn lay_file(&mut self, path: &str, text: &str) -> Result<()> {
        let origin = Origin::File(path.to_owned());
        let table: Table = text.parse()?;
        let unknown = table.keys().filter(|key| by_key(key).is_none());
        refuse_unknown(unknown, SETTINGS.iter().map(Setting::key), "key")?;
        for (key, value) in &table {
            let setting = by_key(key).expect("unknown keys were refused");
            match (setting.kind, value) {
                (Kind::Queues, Value::Table(queues)) => {
                    for (name, url) in queues {
                        let text = scalar(&format!("{key}.{name}"), url)?;
                        self.queues.insert(name.clone(), Found { text, origin: origin.clone() });
                    }
                }
                (Kind::Queues, _) => bail!(
                    "{key} is a table of names and URLs, as in\n\n  [queue]\n  emails = \
                     \"http://127.0.0.1:9000/emails\""
                ),
                (Kind::Text(_) | Kind::Switch, value) => {
                    self.set(setting, &scalar(key, value)?, &origin)?;
                }
            }
        }
        Ok(())
    }

    fn lay_environment(
        &mut self,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<()> {
        let mut unknown = Vec::new();
        for (variable, text) in environment {
            if !variable.starts_with(ENVIRONMENT_PREFIX) || is_not_ours(&variable, &text) {
                continue;
            }
            let Some(setting) = SETTINGS.iter().find(|setting| setting.variable() == variable)
            else {
                unknown.push(variable);
                continue;
            };
            // Compose files and unit files hand over empty variables for "not set".
            for text in words(setting.kind, &text) {
                self.set(setting, text, &Origin::Environment(variable.clone()))?;
            }
        }
        refuse_unknown(
            unknown.iter(),
            SETTINGS.iter().map(Setting::variable),
            "environment variable",
        )
    }

    fn set(&mut self, setting: &'static Setting, text: &str, origin: &Origin) -> Result<()> {
        let found = |text: &str| Found { text: text.to_owned(), origin: origin.clone() };
        if setting.kind != Kind::Queues {
            self.values.insert(setting.flag, found(text));
            return Ok(());
        }
        let Some((name, url)) = text.split_once('=') else {
            bail!(
                "{}: {text:?} names no URL (from {origin}); write NAME=URL, as in \
                 emails=http://127.0.0.1:9000/emails",
                setting.key()
            );
        };
        self.queues.insert(name.to_owned(), found(url));
        Ok(())
    }
}

fn find(flag: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.flag == flag)
}

fn by_key(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key() == key)
}

/// The values in a variable: one, several for queues (a URL has no blanks in it), none in an empty one.
fn words(kind: Kind, text: &str) -> Vec<&str> {
    match kind {
        Kind::Queues => text.split_whitespace().collect(),
        Kind::Text(_) | Kind::Switch if text.is_empty() => Vec::new(),
        Kind::Text(_) | Kind::Switch => vec![text],
    }
}

fn scalar(key: &str, value: &Value) -> Result<String> {
    Ok(match value {
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::Boolean(truth) => truth.to_string(),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => {
            bail!("{key} is one value, as in {key} = \"…\", and not a list, a table or a date")
        }
    })
}

/// Variables that begin like ours and say nothing to us.
fn is_not_ours(variable: &str, text: &str) -> bool {
    let name = &variable[ENVIRONMENT_PREFIX.len()..];
    // The file to read, the server that `send` talks to, and what the tests are told.
    let read_elsewhere = matches!(name, "CONFIG" | "URL") || name.starts_with("TEST_");
    // Kubernetes describes a service called `pumphouse` to every pod beside it in these, ours too.
    let of_service = name.starts_with("SERVICE_HOST") || name.starts_with("SERVICE_PORT");
    let of_port = name == "PORT" && text.contains("://")
        || name
            .strip_prefix("PORT_")
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    read_elsewhere || of_service || of_port
}

fn refuse_unknown<'a>(
    unknown: impl Iterator<Item = &'a String>,
    known: impl Iterator<Item = String>,
    what: &str,
) -> Result<()> {
    let known: Vec<String> = known.collect();
    let complaints: Vec<String> = unknown
        .map(|name| format!("there is no {what} {name}{}", suggestion(name, &known)))
        .collect();
    if complaints.is_empty() { Ok(()) } else { bail!(complaints.join("\n")) }
}

/// The known name that is most like a wrong one, if one is like it at all.
fn suggestion(wrong: &str, known: &[String]) -> String {
    // What all names begin with says nothing about which one was meant.
    let bare = |name: &str| name.trim_start_matches(ENVIRONMENT_PREFIX).to_lowercase();
    let likeness = |name: &String| strsim::jaro_winkler(&bare(wrong), &bare(name));
    let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest.filter(|name| likeness(name) > LIKE_ENOUGH) {
        Some(name) => format!("; did you mean {name}?"),
        None => format!("; there are {}", known.join(", ")),
    }
}

const LIKE_ENOUGH: f64 = 0.8;

#[cfg(test)]
mod tests {
    use super::*;

    fn gather(
        file: &str,
        environment: &[(&str, &str)],
        flags: &[(&'static str, &str)],
    ) -> Result<Layers> {
        let environment = environment.iter().map(|(name, text)| ((*name).into(), (*text).into()));
        let mut given = Flags::default();
        for (flag, text) in flags {
            given.0.entry(flag).or_default().push((*text).to_owned());
        }
        Layers::gather(Some(("p.toml", file)), environment, &given)
    }

    fn complaint(file: &str, environment: &[(&str, &str)]) -> String {
        format!("{:#}", gather(file, environment, &[]).unwrap_err())
    }

    #[test]
    fn flags_go_over_environment_over_file_over_defaults() {
        let file = "log = 'file'";
        let environment = [("PUMPHOUSE_LOG", "environment")];
        let flags = [("log", "flag")];
        let origin = |layers: Result<Layers>| layers.unwrap().values["log"].origin.to_string();
        assert_eq!(origin(gather("", &[], &[])), "default");
        assert_eq!(origin(gather(file, &[], &[])), "file p.toml");
        assert_eq!(origin(gather(file, &environment, &[])), "environment PUMPHOUSE_LOG");
        assert_eq!(origin(gather(file, &environment, &flags)), "flag --log");
    }

    #[test]
    fn every_layer_adds_its_queues() {
        let file = "[queue]\na = 'log:'\nb = 'log:'";
        let environment = [("PUMPHOUSE_QUEUE", "b=http://b/?x=1  c=log:")];
        let queues = gather(file, &environment, &[("queue", "d=log:")]).unwrap().queues;
        assert_eq!(queues.keys().collect::<Vec<_>>(), ["a", "b", "c", "d"]);
        assert_eq!(queues["b"].text, "http://b/?x=1");
        assert!(gather("", &[], &[("queue", "d")]).is_err());
    }

    #[test]
    fn numbers_and_truths_need_no_quotes() {
        let layers = gather("body_limit = 1000\ninsecure = true\ndrain_deadline = 2.5", &[], &[]);
        let values = layers.unwrap().values;
        assert_eq!(values["body-limit"].text, "1000");
        assert_eq!(values["insecure"].text, "true");
        assert_eq!(values["drain-deadline"].text, "2.5");
        assert!(gather("log = ['info']", &[], &[]).is_err());
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_nearest_one() {
        let text = complaint("body_limt = 1\nzzz = 2", &[]);
        assert!(text.contains("there is no key body_limt; did you mean body_limit?"), "{text}");
        assert!(text.contains("there is no key zzz; there are listen, admin_listen"), "{text}");
        let text = complaint("", &[("PUMPHOUSE_DATABSE", "x")]);
        assert!(text.contains("did you mean PUMPHOUSE_DATABASE?"), "{text}");
    }

    #[test]
    fn a_file_that_is_not_toml_is_refused_with_the_place() {
        let text = complaint("listen = 'a'\nlog = ", &[]);
        assert!(text.contains("cannot use the file p.toml") && text.contains("line 2"), "{text}");
    }

    #[test]
    fn what_others_put_into_the_environment_is_no_mistake() {
        let others = [
            ("PUMPHOUSE_TEST_POSTGRES", "x"),
            ("PUMPHOUSE_URL", "http://h"),
            ("PUMPHOUSE_CONFIG", "f"),
            ("PUMPHOUSE_SERVICE_HOST", "10.0.0.1"),
            ("PUMPHOUSE_SERVICE_PORT_HTTP", "8080"),
            ("PUMPHOUSE_PORT", "tcp://10.0.0.1:8080"),
            ("PUMPHOUSE_PORT_8080_TCP_ADDR", "10.0.0.1"),
            ("PUMPHOUSE_LISTEN", ""),
            ("PATH", "/bin"),
        ];
        let layers = gather("", &others, &[]).unwrap();
        assert_eq!(layers.values["listen"].origin, Origin::Default);
        assert!(gather("", &[("PUMPHOUSE_PORT", "8080")], &[]).is_err());
    }
}
