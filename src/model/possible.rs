//! Which settings of a queue are impossible, and what would be right.

use std::time::Duration;

use super::{
    Action, Bounds, ErrorKind, Handler, Invalid, LEASE_MARGIN, LIMIT_MAX, Numbers, QueueSettings,
    RULES_MAX, Rule,
};

impl QueueSettings {
    /// Says what is wrong with them; every wrong value, not only the first.
    pub fn check(&self) -> Result<(), Vec<Invalid>> {
        let mut wrong = Vec::new();
        let mut rule = |good: bool, pointer: &str, detail: &str| {
            if !good {
                wrong.push(Invalid::new(pointer, detail));
            }
        };
        if let Handler::Http(http) = &self.handler {
            let scheme = matches!(http.url.scheme(), "http" | "https");
            rule(
                scheme && http.url.has_host(),
                "/handler/url",
                "a handler's URL starts with http:// or https:// and names a host",
            );
            let anonymous = http.url.username().is_empty() && http.url.password().is_none();
            rule(
                anonymous,
                "/handler/url",
                "a handler's URL carries no user name or password; use handler.headers",
            );
            rule(
                http.url.as_str().len() <= 2048,
                "/handler/url",
                "a handler's URL has at most 2048 bytes",
            );
            rule(
                (SHORTEST..=LONGEST_TIMEOUT).contains(&http.timeout),
                "/handler/timeout",
                "a timeout is from 1ms to 12h",
            );
            rule(http.headers.len() <= 32, "/handler/headers", "at most 32 headers");
        }
        if let Handler::Push(push) = &self.handler {
            rule(
                (SHORTEST..=LONGEST_TIMEOUT).contains(&push.timeout),
                "/handler/timeout",
                "a timeout is from 1ms to 12h",
            );
            rule(push.headers.len() <= 32, "/handler/headers", "at most 32 headers");
            rule(
                push.per_destination.is_none_or(|limit| (1..=LIMIT_MAX).contains(&limit)),
                "/handler/per_destination",
                "from 1 to 100000, or null for no limit",
            );
        }
        rule(
            self.concurrency.limit <= LIMIT_MAX,
            "/concurrency/limit",
            "a limit is from 0 to 100000",
        );
        if let Some(Bounds { min, max }) = self.concurrency.adaptive {
            rule(min >= 1 && min <= max, "/concurrency/adaptive/min", "from 1 to adaptive.max");
            rule(max <= LIMIT_MAX, "/concurrency/adaptive/max", "at most 100000");
        }
        if let Some(rate) = &self.rate_limit {
            rule((1..=1_000_000).contains(&rate.limit), "/rate_limit/limit", "from 1 to 1000000");
            rule((1..=1_000_000).contains(&rate.burst), "/rate_limit/burst", "from 1 to 1000000");
            rule(
                rate.period >= SHORTEST && rate.period <= LONGEST_PERIOD,
                "/rate_limit/period",
                "from 1ms to 1d",
            );
        }
        let shortest_lease = self.timeout() + Duration::from_secs(1);
        rule(
            self.lease() >= shortest_lease,
            "/lease",
            "a lease is at least the handler's timeout and one second",
        );
        rule(self.lease() <= LONGEST_TIMEOUT + LEASE_MARGIN, "/lease", "a lease is at most 12h");
        let recovery = &self.recovery;
        rule(
            (1..=1000).contains(&recovery.max_attempts),
            "/recovery/max_attempts",
            "from 1 to 1000",
        );
        rule((1..=1000).contains(&recovery.max_crashes), "/recovery/max_crashes", "from 1 to 1000");
        rule(recovery.immediate <= 1000, "/recovery/immediate", "from 0 to 1000");
        let factor = recovery.backoff.factor;
        rule((1.0..=100.0).contains(&factor), "/recovery/backoff/factor", "from 1 to 100");
        rule(
            recovery.backoff.base >= SHORTEST && recovery.backoff.base <= recovery.backoff.max,
            "/recovery/backoff/base",
            "at least 1ms, and not longer than backoff.max",
        );
        rule(recovery.backoff.max <= LONGEST, "/recovery/backoff/max", "at most 366d");
        rule(
            recovery.max_age >= SHORTEST && recovery.max_age <= LONGEST,
            "/recovery/max_age",
            "from 1ms to 366d",
        );
        rule(recovery.retry_after_max <= LONGEST, "/recovery/retry_after_max", "at most 366d");
        if let Some(breaker) = &self.breaker {
            rule((1..=1000).contains(&breaker.failures), "/breaker/failures", "from 1 to 1000");
            rule(
                breaker.open_for >= SHORTEST && breaker.open_for <= breaker.max_open,
                "/breaker/open_for",
                "at least 1ms, and not longer than breaker.max_open",
            );
            rule(breaker.max_open <= LONGEST, "/breaker/max_open", "at most 366d");
        }
        rule(recovery.rules.len() <= RULES_MAX, "/recovery/rules", "at most 32 rules");
        for (number, one) in recovery.rules.iter().enumerate() {
            let too_many = |attempts: &Numbers| attempts.first() > recovery.max_attempts;
            if one.matches.attempt.as_ref().is_some_and(too_many) {
                let detail = "there are no more failures than recovery.max_attempts";
                rule(false, &format!("/recovery/rules/{number}/match/attempt"), detail);
            }
            if let Err((member, detail)) = check_rule(one) {
                rule(false, &format!("/recovery/rules/{number}/{member}"), detail);
            }
        }
        rule(self.dedup_window <= LONGEST, "/dedup_window", "at most 366d");
        rule(self.retention.completed <= LONGEST, "/retention/completed", "at most 366d");
        rule(self.retention.dead <= LONGEST * 10, "/retention/dead", "at most 3660d");
        rule(self.max_messages != Some(0), "/max_messages", "at least 1, or null for no limit");
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }
}

/// Says what is wrong with a rule: in which member, and what.
fn check_rule(rule: &Rule) -> Result<(), (&'static str, &'static str)> {
    let statuses = |wanted: &Numbers| wanted.are_within(100, 599);
    let numbers = |wanted: Numbers| !wanted.contain(0);
    let Rule { matches, action } = rule;
    let never = |kind: &ErrorKind| matches!(kind, ErrorKind::Cancelled | ErrorKind::LeaseLost);
    if matches.error_kind.iter().any(never) {
        return Err(("match/error_kind", "what was cut, or lost its lease, is decided by no rule"));
    }
    let answers = |kind: &ErrorKind| matches!(kind, ErrorKind::Status | ErrorKind::Malformed);
    let kinds = &matches.error_kind;
    if !matches.status.is_empty() && !kinds.is_empty() && !kinds.iter().any(answers) {
        return Err(("match/error_kind", "a failure of these kinds has no status"));
    }
    if matches.status.len().max(kinds.len()).max(matches.header.len()) > MATCHES_MAX {
        return Err(("match", "at most 64 of a kind"));
    }
    let is_name = |name: &String| http_name(name) && name.len() <= 256;
    if !matches.header.iter().all(|(name, value)| is_name(name) && value.len() <= 1024) {
        return Err((
            "match/header",
            "a header has a name of RFC 9110, and a value of at most 1024 bytes",
        ));
    }
    if !matches.status.iter().all(statuses) {
        return Err(("match/status", "a status is from 100 to 599"));
    }
    if !matches.attempt.is_none_or(numbers) {
        return Err(("match/attempt", "attempts are counted from 1"));
    }
    match action {
        Action::Retry { delay: Some(delay) } if *delay > LONGEST => {
            Err(("delay", "a delay is at most 366d"))
        }
        _ => Ok(()),
    }
}

/// Whether this is a header's name, in lower case: a token of RFC 9110.
fn http_name(name: &str) -> bool {
    let token = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"!#$%&'*+-.^_`|~".contains(&byte)
    };
    !name.is_empty() && name.bytes().all(token)
}

/// How many statuses, kinds or headers a rule can name.
const MATCHES_MAX: usize = 64;
const SHORTEST: Duration = Duration::from_millis(1);
const LONGEST: Duration = Duration::from_secs(366 * 86_400);
const LONGEST_PERIOD: Duration = Duration::from_secs(86_400);
const LONGEST_TIMEOUT: Duration = Duration::from_secs(12 * 3600);
