//! What a program that measures says at its end: one line of JSON.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

pub fn say(program: &str, count: u64, took: Duration, more: Value) {
    let mut line = Map::new();
    line.insert("program".into(), json!(program));
    line.insert("per_second".into(), json!((count as f64 / took.as_secs_f64()).round()));
    line.insert("count".into(), json!(count));
    line.insert("seconds".into(), json!(thousandths(took.as_secs_f64())));
    if let Value::Object(more) = more {
        line.extend(more);
    }
    println!("{}", Value::Object(line));
}

/// Of times in nanoseconds, up to a minute.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(60_000_000_000, 3).expect("the bounds of a histogram")
}

pub fn milliseconds(times: &Histogram<u64>, quantile: f64) -> f64 {
    thousandths(times.value_at_quantile(quantile) as f64 / 1e6)
}

fn thousandths(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}
