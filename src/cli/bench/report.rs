//! What was found: figures with units, over several runs, as a table or as JSON.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

/// Times in nanoseconds, up to a minute, to three digits.
pub(super) fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(60_000_000_000, 3).expect("these bounds are allowed")
}

/// What a number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// Things.
    Count,
    /// Things a second.
    PerSecond,
    /// Milliseconds.
    Milliseconds,
    /// Seconds.
    Seconds,
}

/// One number that was found.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Figure {
    /// Its key in JSON.
    pub(super) key: String,
    /// What it is, for people.
    pub(super) label: String,
    /// What it counts.
    pub(super) unit: Unit,
    /// It.
    pub(super) value: f64,
}

/// What one run found, in the order in which it is shown.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Figures(Vec<Figure>);

impl Figures {
    /// One figure more.
    pub(super) fn add(&mut self, key: &str, label: &str, unit: Unit, value: f64) {
        self.0.push(Figure { key: key.to_owned(), label: label.to_owned(), unit, value });
    }

    /// How many in how long: the rate, if it can be told.
    pub(super) fn add_rate(&mut self, key: &str, label: &str, count: u64, took: Duration) {
        let rate = count as f64 / took.as_secs_f64().max(1e-9);
        self.add(key, label, Unit::PerSecond, rate);
    }

    /// A quantile of times, or their maximum for 1.
    pub(super) fn add_time(&mut self, key: &str, label: &str, times: &Histogram<u64>, at: f64) {
        self.add(key, label, Unit::Milliseconds, times.value_at_quantile(at) as f64 / 1e6);
    }
}

/// All runs of one command.
#[derive(Debug)]
pub(super) struct Report {
    /// The command's name.
    pub(super) command: &'static str,
    /// What was measured, in a line.
    pub(super) what: String,
    /// How it was measured, for JSON.
    pub(super) settings: Value,
    /// What the reader must know to believe it.
    pub(super) notes: Vec<String>,
    /// What each run found.
    pub(super) runs: Vec<Figures>,
}

impl Report {
    /// One object.
    pub(super) fn json(&self) -> String {
        let figures = self.summaries().map(|(figure, summary)| {
            let of = |value| rounded(figure.unit, value);
            let all = json!({
                "median": of(summary.median),
                "min": of(summary.min),
                "max": of(summary.max),
                "unit": unit_word(figure.unit),
            });
            (figure.key.clone(), all)
        });
        let run = |run: &Figures| {
            run.0.iter().map(|f| (f.key.clone(), rounded(f.unit, f.value))).collect()
        };
        let object = json!({
            "bench": self.command,
            "version": env!("CARGO_PKG_VERSION"),
            "build": if cfg!(debug_assertions) { "debug" } else { "release" },
            "settings": self.settings,
            "figures": figures.collect::<Map<_, _>>(),
            "runs": self.runs.iter().map(run).collect::<Vec<Map<_, _>>>(),
            "notes": self.notes,
        });
        object.to_string()
    }

    /// Lines for people: medians, and with several runs from what to what.
    pub(super) fn table(&self) -> String {
        let rows = self.summaries().map(|(figure, summary)| {
            let value = shown(figure.unit, summary.median);
            let spread = match self.runs.len() {
                0 | 1 => String::new(),
                _ => format!(
                    "  ({} to {})",
                    shown(figure.unit, summary.min),
                    shown(figure.unit, summary.max)
                ),
            };
            (figure.label.clone(), value, spread)
        });
        let rows = rows.collect::<Vec<_>>();
        let width = |of: fn(&(String, String, String)) -> usize| {
            rows.iter().map(of).max().unwrap_or_default()
        };
        let (labels, values) = (width(|row| row.0.len()), width(|row| row.1.len()));
        let mut text = format!("pumphouse bench {}: {}", self.command, self.what);
        if self.runs.len() > 1 {
            text.push_str(&format!("; median of {} runs (lowest to highest)", self.runs.len()));
        }
        for (label, value, spread) in rows {
            text.push_str(&format!("\n  {label:<labels$}  {value:>values$}{spread}"));
        }
        for note in &self.notes {
            text.push_str(&format!("\nnote: {note}"));
        }
        text
    }

    fn summaries(&self) -> impl Iterator<Item = (&Figure, Summary)> {
        self.runs.first().into_iter().flat_map(|run| &run.0).map(|figure| {
            let of_run =
                |run: &Figures| run.0.iter().find(|f| f.key == figure.key).map(|f| f.value);
            (figure, Summary::of(self.runs.iter().filter_map(of_run).collect()))
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Summary {
    median: f64,
    min: f64,
    max: f64,
}

impl Summary {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or_default();
        let (low, high) = (values.len().saturating_sub(1) / 2, values.len() / 2);
        Self {
            median: f64::midpoint(at(low), at(high)),
            min: at(0),
            max: at(values.len().saturating_sub(1)),
        }
    }
}

fn unit_word(unit: Unit) -> &'static str {
    match unit {
        Unit::Count => "count",
        Unit::PerSecond => "per second",
        Unit::Milliseconds => "ms",
        Unit::Seconds => "s",
    }
}

fn rounded(unit: Unit, value: f64) -> Value {
    match unit {
        Unit::Count => json!(value.round() as u64),
        Unit::PerSecond => json!((value * 10.0).round() / 10.0),
        Unit::Milliseconds | Unit::Seconds => json!((value * 1e3).round() / 1e3),
    }
}

fn shown(unit: Unit, value: f64) -> String {
    match unit {
        Unit::Count => thousands(value),
        Unit::PerSecond => format!("{}/s", thousands(value)),
        Unit::Milliseconds => format!("{value:.2} ms"),
        Unit::Seconds => format!("{value:.2} s"),
    }
}

/// A whole number with its digits in threes: `43,900`.
pub(super) fn thousands(value: f64) -> String {
    let digits = (value.round().max(0.0) as u64).to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(rates: &[f64]) -> Report {
        let run = |rate: &f64| {
            let mut figures = Figures::default();
            figures.add("messages_per_second", "messages", Unit::PerSecond, *rate);
            figures.add("p50_ms", "p50", Unit::Milliseconds, 1.5);
            figures
        };
        Report {
            command: "enqueue",
            what: "64 connections".to_owned(),
            settings: json!({}),
            notes: vec!["a debug build".to_owned()],
            runs: rates.iter().map(run).collect(),
        }
    }

    #[test]
    fn a_table_has_medians_with_their_spread() {
        let text = report(&[1000.0, 43_900.4, 2000.0]).table();
        let expected = "\
pumphouse bench enqueue: 64 connections; median of 3 runs (lowest to highest)
  messages  2,000/s  (1,000/s to 43,900/s)
  p50       1.50 ms  (1.50 ms to 1.50 ms)
note: a debug build";
        assert_eq!(text, expected);
        assert!(!report(&[1.0]).table().contains("median"));
    }

    #[test]
    fn json_has_every_run_and_their_median() {
        let json: Value = serde_json::from_str(&report(&[1.0, 2.0]).json()).unwrap();
        let rate = &json["figures"]["messages_per_second"];
        assert_eq!((&rate["median"], &rate["min"]), (&json!(1.5), &json!(1.0)));
        assert_eq!(rate["unit"], "per second");
        assert_eq!(json["runs"][1]["messages_per_second"], 2.0);
    }

    #[test]
    fn digits_stand_in_threes() {
        for (value, text) in [(0.0, "0"), (999.4, "999"), (1000.0, "1,000"), (1e6, "1,000,000")] {
            assert_eq!(thousands(value), text);
        }
    }
}
