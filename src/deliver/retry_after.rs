//! Reads `Retry-After` (RFC 9110, 10.2.3): seconds or an HTTP date, by checked arithmetic.

use std::time::{Duration, SystemTime};

/// How long to wait; `None` for what is not a wait: garbage, a negative number, an empty value.
///
/// A date that has passed is no wait at all. A number too large to be a duration is the longest one, and
/// is capped by the queue's `retry_after_max` later.
pub(super) fn parse(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    #[test]
    fn seconds_and_dates_are_waits_and_nothing_else_is() {
        assert_eq!(parse("120", NOW), Some(Duration::from_secs(120)));
        assert_eq!(parse(" 0 ", NOW), Some(Duration::ZERO));
        assert_eq!(parse("99999999999999999999999", NOW), Some(Duration::from_secs(u64::MAX)));
        let minute = parse("Thu, 01 Jan 1970 00:01:00 GMT", NOW);
        assert_eq!(minute, Some(Duration::from_secs(60)));
        let later = NOW + Duration::from_secs(3600);
        assert_eq!(parse("Thu, 01 Jan 1970 00:01:00 GMT", later), Some(Duration::ZERO));
        for garbage in ["", "-1", "NaN", "1e300", "1.5", "soon", "12 s"] {
            assert_eq!(parse(garbage, NOW), None, "{garbage}");
        }
    }

    proptest! {
        #[test]
        fn no_value_panics(value in ".*") {
            let _ = parse(&value, NOW); // only that it returns matters
        }
    }
}
