//! What the settings mean: texts with an origin become checked values, or an error that names both.

use std::net::SocketAddr;
use std::time::Duration;
use std::{env, fmt, fs, io};

use anyhow::{Context, Result, anyhow};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use url::Url;

use crate::api::Allowed;
use crate::model::{
    Builtin, Format, Handler, HttpHandler, Invalid, MASK, QueueName, QueueSettings, ReplicaName,
    parse_span,
};

use super::layers::{Found, Layers, Origin};
use super::settings::{ENVIRONMENT_PREFIX, FILE_DEFAULT, Flags, SETTINGS};
use super::size::parse_size;

/// How a server is to run. What exists was checked.
#[derive(Debug)]
pub(super) struct Config {
    /// Where to answer.
    pub(super) listen: SocketAddr,
    /// Where to answer operators; `None` for the same place.
    pub(super) admin_listen: Option<SocketAddr>,
    /// Where messages are kept.
    pub(super) database: DatabaseUrl,
    /// The name of this process.
    pub(super) replica: ReplicaName,
    /// Queues that are to exist, with their handlers.
    pub(super) queues: Vec<(QueueName, Handler)>,
    /// Whether other machines may reach it.
    pub(super) insecure: bool,
    /// Whether sending to an unknown queue makes it.
    pub(super) auto_create_queues: bool,
    /// How long open deliveries may go on at the end.
    pub(super) drain_deadline: Duration,
    /// The largest message, in bytes.
    pub(super) body_limit: usize,
    /// Which destinations messages may name.
    pub(super) push_allow: Allowed,
    /// How to log.
    pub(super) log: Logging,
}

/// What is logged, and how.
#[derive(Debug, Clone)]
pub(super) struct Logging {
    /// The text of a filter that can be parsed.
    pub(super) filter: String,
    /// Whether each line is a JSON object.
    pub(super) json: bool,
}

/// The URL of a database. Only [`DatabaseUrl::secret`] gives its password away.
#[derive(Clone)]
pub(super) struct DatabaseUrl(String);

impl DatabaseUrl {
    /// The URL as it was written, for the one who opens it.
    pub(super) fn secret(&self) -> &str {
        &self.0
    }

    /// What stands before the colon: which kind of database it is.
    pub(super) fn scheme(&self) -> &str {
        self.0.split(':').next().unwrap_or_default()
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&mask(&self.0))
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Reads the file, the environment and the flags of this process.
pub(super) fn layers(file: Option<&str>, flags: &Flags) -> Result<Layers> {
    let variable = format!("{ENVIRONMENT_PREFIX}CONFIG");
    let named = file.map(str::to_owned).or_else(|| env::var(variable).ok());
    let named = named.filter(|path| !path.is_empty());
    let path = named.as_deref().unwrap_or(FILE_DEFAULT);
    let text = match fs::read_to_string(path) {
        Ok(text) => Some(text),
        // Only a file that somebody asked for has to be there.
        Err(error) if error.kind() == io::ErrorKind::NotFound && named.is_none() => None,
        Err(error) => return Err(error).context(format!("cannot read the file {path}")),
    };
    let mut environment = Vec::new();
    for (name, value) in env::vars_os() {
        let Some(name) = name.to_str().filter(|name| name.starts_with(ENVIRONMENT_PREFIX)) else {
            continue;
        };
        let value = value.into_string().map_err(|_| anyhow!("{name} is not UTF-8 text"))?;
        environment.push((name.to_owned(), value));
    }
    Layers::gather(text.as_deref().map(|text| (path, text)), environment, flags)
}

impl Config {
    /// Checks every value. Fails on the first that is wrong: with its name, its origin, and what would
    /// be right.
    pub(super) fn read(layers: &Layers) -> Result<Self> {
        let switch = |flag| read(layers, flag, parse_switch);
        let config = Self {
            listen: read(layers, "listen", parse_address)?.context("listen has a default")?,
            admin_listen: read(layers, "admin-listen", parse_address)?,
            database: read(layers, "database", parse_database)?
                .context("database has a default")?,
            replica: match read(layers, "replica", |text| ReplicaName::parse(text).map_err(why))? {
                Some(name) => name,
                None => replica_default(),
            },
            queues: read_queues(layers)?,
            insecure: switch("insecure")?.unwrap_or_default(),
            auto_create_queues: switch("auto-create-queues")?.unwrap_or_default(),
            drain_deadline: read(layers, "drain-deadline", |text| parse_span(text).map_err(why))?
                .context("drain_deadline has a default")?,
            body_limit: read(layers, "body-limit", parse_size)?
                .context("body_limit has a default")?,
            push_allow: read(layers, "push-allow", Allowed::parse)?.unwrap_or_default(),
            log: Logging {
                filter: read(layers, "log", parse_filter)?.context("log has a default")?,
                json: read(layers, "log-format", parse_format)?.unwrap_or_default(),
            },
        };
        if !config.insecure {
            for flag in ["listen", "admin-listen"] {
                read(layers, flag, refuse_strangers)?;
            }
        }
        Ok(config)
    }
}

/// Every setting that has a value, as `key = value` with its origin; passwords are masked.
pub(super) fn describe(layers: &Layers) -> String {
    let mut rows = Vec::new();
    for setting in SETTINGS {
        if let Some(found) = layers.values.get(setting.flag) {
            rows.push((setting.key(), shown(found), found.origin.to_string()));
        } else if setting.flag == "queue" {
            let queue = |(name, found): (&String, &Found)| {
                (format!("queue.{name}"), shown(found), found.origin.to_string())
            };
            rows.extend(layers.queues.iter().map(queue));
        } else {
            rows.push((setting.key(), "not set".to_owned(), Origin::Default.to_string()));
        }
    }
    let width = |of: fn(&(String, String, String)) -> &String| {
        rows.iter().map(|row| of(row).chars().count()).max().unwrap_or_default()
    };
    let (keys, values) = (width(|row| &row.0), width(|row| &row.1));
    rows.iter()
        .map(|(key, value, origin)| format!("{key:keys$} = {value:values$}  # {origin}\n"))
        .collect()
}

fn shown(found: &Found) -> String {
    format!("{:?}", mask(&found.text))
}

fn read<T>(
    layers: &Layers,
    flag: &'static str,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>> {
    let Some(found) = layers.values.get(flag) else { return Ok(None) };
    parse(&found.text).map(Some).map_err(|why| wrong(&flag.replace('-', "_"), found, &why))
}

fn wrong(key: &str, found: &Found, why: &str) -> anyhow::Error {
    anyhow!("{key} is {:?} (from {}), but {why}", mask(&found.text), found.origin)
}

fn why(invalid: Invalid) -> String {
    invalid.detail
}

fn read_queues(layers: &Layers) -> Result<Vec<(QueueName, Handler)>> {
    let queue = |(name, found): (&String, &Found)| {
        let key = format!("queue.{name}");
        let parsed = QueueName::parse(name).map_err(|invalid| wrong(&key, found, &why(invalid)))?;
        let handler = parse_handler(&found.text).map_err(|why| wrong(&key, found, &why))?;
        Ok((parsed, handler))
    };
    layers.queues.iter().map(queue).collect()
}

/// The handler that a URL stands for: an HTTP endpoint, or `log:` and `discard:` for those of the house.
pub(super) fn parse_handler(text: &str) -> Result<Handler, String> {
    let rule = "a handler is http://…, https://…, pull:, log: or discard:";
    match text {
        "log:" => return Ok(Handler::Builtin { name: Builtin::Log }),
        "pull:" => return Ok(Handler::Pull),
        "discard:" => return Ok(Handler::Builtin { name: Builtin::Discard }),
        _ => {}
    }
    let url = Url::parse(text).map_err(|_| rule.to_owned())?;
    let http = HttpHandler {
        url,
        timeout: HANDLER_TIMEOUT,
        headers: Default::default(),
        format: Format::Binary,
    };
    let settings = QueueSettings { handler: Handler::Http(http), ..QueueSettings::default() };
    settings
        .check()
        .map_err(|wrong| wrong.first().map_or(rule.to_owned(), |w| w.detail.clone()))?;
    Ok(settings.handler)
}

const HANDLER_TIMEOUT: Duration = Duration::from_secs(30);

fn parse_address(text: &str) -> Result<SocketAddr, String> {
    // The one name whose address is known without asking anybody.
    let numeric = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
    numeric.as_deref().unwrap_or(text).parse().map_err(|_| {
        "an address is an IP address and a port, as in 127.0.0.1:8080 or [::1]:8080".to_owned()
    })
}

fn refuse_strangers(text: &str) -> Result<(), String> {
    if parse_address(text)?.ip().is_loopback() {
        return Ok(());
    }
    Err("other machines can reach that address, and there are no API keys yet: whoever reaches it can \
         send, read and delete messages. Listen on 127.0.0.1, or keep strangers out with a network or a \
         proxy of yours and say --insecure (PUMPHOUSE_INSECURE=true)"
        .to_owned())
}

/// The URL of a database of a kind that is known.
pub(super) fn parse_database(text: &str) -> Result<DatabaseUrl, String> {
    // Only the scheme: which of them this program was built with, the store knows.
    let schemes = ["sqlite:", "postgres:", "postgresql:", "memory:"];
    if schemes.iter().any(|scheme| text.starts_with(scheme)) {
        return Ok(DatabaseUrl(text.to_owned()));
    }
    Err("a database is sqlite://FILE, postgres://USER@HOST/NAME or memory:".to_owned())
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("it is true or false".to_owned()),
    }
}

fn parse_filter(text: &str) -> Result<String, String> {
    // To the filter a lone word is a room, logged in full and nothing else: "wran" would be silence.
    let meant = |part: &str| {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level);
        !level.is_empty() && level.parse::<LevelFilter>().is_ok()
    };
    if text.split(',').all(|part| meant(part.trim())) && EnvFilter::try_new(text).is_ok() {
        return Ok(text.to_owned());
    }
    Err("a filter is a level (off, error, warn, info, debug, trace) or room=level, separated by \
         commas, as in info,pumphouse::store=debug"
        .to_owned())
}

fn parse_format(text: &str) -> Result<bool, String> {
    match text {
        "plain" => Ok(false),
        "json" => Ok(true),
        _ => Err("the format is plain or json".to_owned()),
    }
}

/// The host's name and six random characters: two processes on one machine must not take each other's
/// leases for their own.
fn replica_default() -> ReplicaName {
    let host = fs::read_to_string("/etc/hostname").unwrap_or_default().trim().to_lowercase();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
    let host: String = host.chars().map(plain).take(64).collect();
    let host = host.trim_matches(|c: char| !c.is_ascii_alphanumeric());
    let host = if host.is_empty() { "pumphouse" } else { host };
    let chance = getrandom::u32().expect("the operating system has random numbers") & 0xff_ffff;
    ReplicaName::parse(&format!("{host}-{chance:06x}")).expect("it was made of allowed characters")
}

/// A text with the password of a URL replaced, and those in its query too.
fn mask(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else {
        // What stands before an @ in something that is nearly a URL may well be a password.
        return match text.rsplit_once('@') {
            Some((_, rest)) => format!("{MASK}@{rest}"),
            None => text.to_owned(),
        };
    };
    let secret = |name: &str| {
        let name = name.to_lowercase();
        ["password", "secret", "token", "key"].iter().any(|word| name.contains(word))
    };
    let has_secret = url.query_pairs().any(|(name, _)| secret(&name));
    if url.password().is_none() && !has_secret {
        return text.to_owned();
    }
    if url.password().is_some() && url.set_password(Some(MASK)).is_err() {
        return MASK.to_owned();
    }
    if has_secret {
        let pairs: Vec<(String, String)> = url.query_pairs().into_owned().collect();
        let masked = pairs.into_iter().map(|(name, value)| {
            let value = if secret(&name) { MASK.to_owned() } else { value };
            (name, value)
        });
        url.query_pairs_mut().clear().extend_pairs(masked);
    }
    url.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(flags: &[(&'static str, &str)]) -> Layers {
        let mut given = Flags::default();
        for (flag, text) in flags {
            given.0.entry(flag).or_default().push((*text).to_owned());
        }
        Layers::gather(None, [], &given).unwrap()
    }

    fn complaint(flags: &[(&'static str, &str)]) -> String {
        Config::read(&given(flags)).unwrap_err().to_string()
    }

    #[test]
    fn the_defaults_are_in_order_and_safe() {
        let config = Config::read(&given(&[])).unwrap();
        assert!(config.listen.ip().is_loopback());
        assert_eq!(config.admin_listen, None);
        assert_eq!(config.database.secret(), "sqlite://pumphouse.db");
        assert_eq!(config.drain_deadline, Duration::from_secs(25));
        assert_eq!(config.body_limit, 1 << 20);
        assert!(!config.auto_create_queues && !config.log.json);
        assert_ne!(config.replica, Config::read(&given(&[])).unwrap().replica);
    }

    #[test]
    fn a_wrong_value_is_named_with_its_origin_and_what_is_right() {
        for (flag, text, right) in [
            ("listen", "8080", "an IP address and a port"),
            ("admin-listen", ":1", "an IP address and a port"),
            ("database", "mysql://h", "postgres://"),
            ("replica", "A", "a replica name is 1 to 80 characters"),
            ("auto-create-queues", "yes", "true or false"),
            ("drain-deadline", "soon", "\"250ms\""),
            ("body-limit", "1MB", "512KiB"),
            ("log", "wran", "room=level"),
            ("log", "info,pumphouse=loud", "room=level"),
            ("log", "pumphouse=", "room=level"),
            ("log", "", "room=level"),
            ("log-format", "xml", "plain or json"),
        ] {
            let text = complaint(&[(flag, text)]);
            let key = flag.replace('-', "_");
            assert!(text.starts_with(&format!("{key} is ")) && text.contains(right), "{text}");
            assert!(text.contains(&format!("(from flag --{flag})")), "{text}");
        }
    }

    #[test]
    fn an_open_address_needs_a_word() {
        for flag in ["listen", "admin-listen"] {
            let open = [(flag, "0.0.0.0:1")];
            assert!(complaint(&open).contains("say --insecure"), "{}", complaint(&open));
            assert!(Config::read(&given(&[open[0], ("insecure", "true")])).is_ok());
        }
        for local in ["127.0.0.1:0", "127.9.9.9:1", "[::1]:0", "localhost:80"] {
            assert!(Config::read(&given(&[("listen", local)])).is_ok(), "{local}");
        }
    }

    #[test]
    fn a_queue_has_a_url_or_a_handler_of_the_house() {
        let queues = Config::read(&given(&[("queue", "a=log:"), ("queue", "b=https://h/x")]));
        let queues = queues.unwrap().queues;
        assert_eq!(queues[0].1, Handler::Builtin { name: Builtin::Log });
        assert!(matches!(&queues[1].1, Handler::Http(http) if http.url.as_str() == "https://h/x"));
        for bad in ["a=ftp://h", "a=h", "a=", "A=log:", "a=http://user:word@h/"] {
            let text = complaint(&[("queue", bad)]);
            assert!(text.starts_with("queue.") && !text.contains("word@"), "{text}");
        }
    }

    #[test]
    fn no_password_is_shown() {
        for url in [
            "postgres://me:hush@h/db",
            "postgres://h/db?user=me&password=hush",
            "postgres://me:hush@h:notaport/db",
        ] {
            let layers = given(&[("database", url)]);
            let shown = [describe(&layers), format!("{:?}", Config::read(&layers).unwrap())];
            for text in shown {
                assert!(text.contains(MASK) && !text.contains("hush"), "{text}");
            }
        }
    }

    #[test]
    fn what_is_described_has_every_setting_and_its_origin() {
        let text = describe(&given(&[("queue", "a=log:"), ("log", "warn")]));
        assert!(text.contains("queue.a") && text.contains("\"warn\""), "{text}");
        assert!(text.contains("# flag --log\n") && text.contains("# default\n"), "{text}");
        for setting in SETTINGS {
            assert!(text.contains(&setting.key()), "{}", setting.flag);
        }
    }
}
