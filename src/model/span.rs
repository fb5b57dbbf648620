//! Durations as people write them: `250ms`, `30s`, `2h`, `PT30S`, `1d12h`, or a number of seconds.

use std::time::Duration;

use super::Invalid;

/// Reads a duration: a unit form (`250ms`, `1h30m`, `3d`), ISO 8601 (`PT30S`), or seconds (`30`, `0.5`).
///
/// A day is 24 hours. Years and months are refused, because their length depends on the calendar; so is
/// everything negative or over 100 years.
pub fn parse_span(text: &str) -> Result<Duration, Invalid> {
    let text = text.trim();
    let wrong = || {
        let detail = "a duration is written like \"250ms\", \"30s\", \"2h\", \"3d\", \"PT30S\", or as a \
                      number of seconds; it is not negative and under 100 years";
        Invalid::new("", detail)
    };
    let duration = if text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        let seconds = text.parse::<f64>().map_err(|_| wrong())?;
        Duration::try_from_secs_f64(seconds).map_err(|_| wrong())?
    } else {
        let span = text.parse::<jiff::Span>().map_err(|_| wrong())?;
        let signed =
            span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|_| wrong())?;
        Duration::try_from(signed).map_err(|_| wrong())?
    };
    if duration > SPAN_MAX { Err(wrong()) } else { Ok(duration) }
}

/// Writes a duration so that [`parse_span`] reads the same one back: `250ms`, `30s`, `2h`, `3d`, `1h30m`.
///
/// Whole milliseconds are kept; a finer rest is written in microseconds and below that cut off.
pub fn span_text(duration: Duration) -> String {
    let micros = duration.as_micros();
    let units = [
        ("d", 86_400_000_000),
        ("h", 3_600_000_000),
        ("m", 60_000_000),
        ("s", 1_000_000),
        ("ms", 1_000),
        ("us", 1),
    ];
    let mut rest = micros;
    let mut text = String::new();
    for (unit, size) in units {
        let count = rest / size;
        rest %= size;
        if count > 0 {
            text.push_str(&format!("{count}{unit}"));
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

const SPAN_MAX: Duration = Duration::from_secs(100 * 366 * 86_400);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn people_write_durations_in_many_ways() {
        let ms = Duration::from_millis;
        for (text, duration) in [
            ("250ms", ms(250)),
            ("30s", ms(30_000)),
            ("2h", ms(7_200_000)),
            ("3d", ms(259_200_000)),
            ("1h30m", ms(5_400_000)),
            ("PT30S", ms(30_000)),
            ("P1D", ms(86_400_000)),
            ("30", ms(30_000)),
            ("0.5", ms(500)),
            ("0s", ms(0)),
        ] {
            assert_eq!(parse_span(text), Ok(duration), "{text}");
        }
        for bad in [
            "",
            "soon",
            "-5s",
            "1 fortnight",
            "NaN",
            "inf",
            "1e300",
            "1y",
            "P1M",
            "9".repeat(30).as_str(),
            ".",
        ] {
            assert!(parse_span(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(micros in 0u64..10_000_000_000_000) {
            let duration = Duration::from_micros(micros);
            prop_assert_eq!(parse_span(&span_text(duration)), Ok(duration));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = parse_span(&text); // the result does not matter here: only that there is one
        }
    }
}
