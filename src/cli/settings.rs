//! The list of settings: names, defaults and meanings, in one place. It reads and checks nothing.
//!
//! Flag, environment variable and key in the file follow from one name, so that none can be forgotten.
//! If you add a setting: 1. add it to [`SETTINGS`]; 2. read it in `config`; 3. describe it in
//! `docs/configuration.md`, which a test compares with this list.

use std::collections::BTreeMap;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

/// What every environment variable of this program starts with.
pub(super) const ENVIRONMENT_PREFIX: &str = "PUMPHOUSE_";

/// The file that is read where `--config` names none.
pub(super) const FILE_DEFAULT: &str = "pumphouse.toml";

/// One thing that can be set.
#[derive(Debug)]
pub(super) struct Setting {
    /// Its flag, without the dashes.
    pub(super) flag: &'static str,
    /// What kind of value it takes.
    pub(super) kind: Kind,
    /// What it is without being set; empty where there is nothing.
    pub(super) default: &'static str,
    /// What it means, in a sentence or two.
    pub(super) help: &'static str,
}

/// What kind of value a setting takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One text; the word stands for it in help.
    Text(&'static str),
    /// Yes or no.
    Switch,
    /// Any number of `NAME=URL`.
    Queues,
}

/// Everything that can be set, in the order in which it is shown.
pub(super) const SETTINGS: &[Setting] = &[
    Setting {
        flag: "listen",
        kind: Kind::Text("ADDRESS"),
        default: "127.0.0.1:8080",
        help: "Where to answer HTTP: an IP address and a port; port 0 takes a free one. An address that \
               other machines can reach needs --insecure",
    },
    Setting {
        flag: "admin-listen",
        kind: Kind::Text("ADDRESS"),
        default: "",
        help: "Where to answer operators instead: /admin, /metrics, /docs and /openapi.json stand there and no \
               more on --listen, so that programs that send cannot operate. /livez, /readyz and the pages \
               about problems stand on both. Without it everything is answered on --listen",
    },
    Setting {
        flag: "database",
        kind: Kind::Text("URL"),
        default: "sqlite://pumphouse.db",
        help: "Where messages are kept: sqlite://FILE for one process, postgres://USER@HOST/NAME for \
               several, memory: to try things out (forgets everything at the end)",
    },
    Setting {
        flag: "replica",
        kind: Kind::Text("NAME"),
        default: "",
        help: "The name of this process, different from that of every other on the same database. With a \
               name that stays over restarts, leases of a crashed process come back at its restart; without \
               one on Postgres when it was not heard of for five seconds, on SQLite at the restart too. \
               Without it: the host's name and six random characters",
    },
    Setting {
        flag: "queue",
        kind: Kind::Queues,
        default: "",
        help: "A queue to have, and the http(s) URL that its messages are posted to; log: shows them and \
               discard: drops them. An existing queue keeps all its settings but the handler",
    },
    Setting {
        flag: "auto-create-queues",
        kind: Kind::Switch,
        default: "false",
        help: "Make a queue when a message is sent to a name that is not known; without it that is a 404. \
               Such a queue has no handler: until an operator gives it one its messages wait, those to a \
               mistyped name too",
    },
    Setting {
        flag: "drain-deadline",
        kind: Kind::Text("DURATION"),
        default: "25s",
        help: "How long open deliveries may go on after SIGTERM; then they are cut and their messages go \
               back. Keep it shorter than what the supervisor waits before it kills",
    },
    Setting {
        flag: "body-limit",
        kind: Kind::Text("SIZE"),
        default: "1MiB",
        help: "The largest message that is taken: bytes, or with KiB or MiB",
    },
    Setting {
        flag: "push-allow",
        kind: Kind::Text("HOSTS"),
        default: "",
        help: "Which hosts messages may name as their destinations (POST /v1/push), separated by commas: \
               hooks.example.com, *.example.com, localhost:9000, or * for every host that this machine \
               can reach, those inside your network too. Without it none",
    },
    Setting {
        flag: "insecure",
        kind: Kind::Switch,
        default: "false",
        help: "Listen where other machines can reach it although there are no API keys, and answer under any \
               name in Host: only with a network or a proxy before it that keeps strangers out",
    },
    Setting {
        flag: "log",
        kind: Kind::Text("FILTER"),
        default: "info",
        help: "What to log: error, warn, info, debug or trace, also per room, as in \
               info,pumphouse::store=debug",
    },
    Setting {
        flag: "log-format",
        kind: Kind::Text("FORMAT"),
        default: "plain",
        help: "How to log: plain for people, json (an object a line) for machines",
    },
];

impl Setting {
    /// Its key in the file.
    pub(super) fn key(&self) -> String {
        self.flag.replace('-', "_")
    }

    /// Its environment variable.
    pub(super) fn variable(&self) -> String {
        format!("{ENVIRONMENT_PREFIX}{}", self.key().to_uppercase())
    }

    fn arg(&self) -> Arg {
        let arg = Arg::new(self.flag).long(self.flag);
        let mut help = format!("{} [env: {}]", self.help, self.variable());
        if !self.default.is_empty() {
            help.push_str(&format!(" [default: {}]", self.default));
        }
        match self.kind {
            Kind::Text(word) => arg.value_name(word),
            // `--insecure` alone means yes, and `--insecure=false` overrides a file that says yes.
            Kind::Switch => arg
                .value_name("BOOL")
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true"),
            Kind::Queues => arg.value_name("NAME=URL").action(ArgAction::Append),
        }
        .help(help)
    }
}

/// What was set by flags: texts as they were written, by flag.
#[derive(Debug, Clone, Default)]
pub(super) struct Flags(pub(super) BTreeMap<&'static str, Vec<String>>);

impl Args for Flags {
    fn augment_args(command: Command) -> Command {
        command.args(SETTINGS.iter().map(Setting::arg))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = Self::default();
        flags.update_from_arg_matches(matches)?;
        Ok(flags)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for setting in SETTINGS {
            if let Some(values) = matches.get_many::<String>(setting.flag) {
                self.0.insert(setting.flag, values.cloned().collect());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::layers::{Layers, Origin};

    const PAGE: &str = include_str!("../../docs/configuration.md");
    const EXAMPLE: &str = include_str!("../../pumphouse.example.toml");

    #[test]
    fn the_page_has_every_setting_with_its_default_and_no_other() {
        let rows: Vec<&str> = PAGE.lines().filter(|line| line.starts_with("| `--")).collect();
        let expected = |setting: &Setting| {
            let key = match setting.kind {
                Kind::Queues => format!("[{}]", setting.key()),
                Kind::Text(_) | Kind::Switch => setting.key(),
            };
            format!("| `--{}` | `{}` | `{key}` | ", setting.flag, setting.variable())
        };
        assert_eq!(rows.len(), SETTINGS.len());
        for (row, setting) in rows.into_iter().zip(SETTINGS) {
            let rest = row.strip_prefix(&expected(setting)).unwrap_or_else(|| {
                panic!("{row} does not begin with {}", expected(setting));
            });
            if !setting.default.is_empty() {
                assert!(rest.starts_with(&format!("`{}` | ", setting.default)), "{row}");
            }
        }
    }

    #[test]
    fn the_example_file_has_every_setting_and_its_default() {
        let example = Layers::gather(Some(("example", EXAMPLE)), [], &Flags::default()).unwrap();
        for setting in SETTINGS {
            let line = format!("{} = ", setting.key());
            let table = format!("[{}]", setting.key());
            let commented = format!("# {line}");
            let begins = |text: &str| EXAMPLE.lines().any(|written| written.starts_with(text));
            assert!([line, table, commented].iter().any(|text| begins(text)), "{}", setting.flag);
            if let Some(found) = example.values.get(setting.flag) {
                assert_eq!(found.text, setting.default, "{}", setting.flag);
                assert_ne!(found.origin, Origin::Default, "{} is not set", setting.flag);
            }
        }
    }
}
