//! Failure in, settlement out: at once, later, or set aside.

use std::time::Duration;

use crate::model::{
    Action, Answer, ErrorKind, Failure, Jitter, Recovery, RetryStatuses, Settlement, Tries, Verdict,
};

use super::backoff;

/// What is to be written, and whether the queue is to stop as well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What is to be written.
    pub settlement: Settlement,
    /// Why the queue is to stop, where it is.
    pub stop_queue: Option<String>,
    /// For how long nobody is to ask the handler, where it said so.
    pub hold: Option<Duration>,
}

/// What follows a verdict: as it says; a retry goes by the queue's recovery.
///
/// `tries` counts what came before this delivery, `age` is the message's since it was taken in.
pub fn after_verdict(
    recovery: &Recovery,
    answer: &Answer,
    tries: Tries,
    age: Duration,
    chance: f64,
) -> Decision {
    let mut hold = None;
    let settlement = match answer.verdict.clone() {
        Verdict::Ack => Settlement::Ack,
        Verdict::Retry { after } => {
            hold = held_for(recovery, answer.status, after);
            let budget = Budget { recovery, tries, age };
            budget.retry(
                Wait { ours: None, theirs: after },
                "the handler asked for a retry",
                chance,
            )
        }
        Verdict::DeadLetter { reason } => Settlement::DeadLetter { reason },
        Verdict::Discard { reason } => Settlement::Discard { reason },
    };
    Decision { settlement, stop_queue: None, hold }
}

/// What follows what a worker says: a retry after the delay that it names, or else by the queue's recovery. The arguments
/// are those of [`after_verdict`].
pub fn after_word(
    recovery: &Recovery,
    verdict: &Verdict,
    tries: Tries,
    age: Duration,
    chance: f64,
) -> Settlement {
    match verdict {
        Verdict::Retry { after } => {
            let wait = Wait { ours: *after, theirs: None };
            Budget { recovery, tries, age }.retry(wait, "the worker asked for a retry", chance)
        }
        Verdict::Ack | Verdict::DeadLetter { .. } | Verdict::Discard { .. } => {
            let answer = Answer::from(verdict.clone());
            after_verdict(recovery, &answer, tries, age, chance).settlement
        }
    }
}

/// What follows a failure: by the first of the queue's rules that matches, else by the table of the protocol.
///
/// Total over every kind and status. The arguments are those of [`after_verdict`].
pub fn after_failure(
    recovery: &Recovery,
    failure: &Failure,
    tries: Tries,
    age: Duration,
    chance: f64,
) -> Decision {
    let why = failure.to_string();
    if failure.kind == ErrorKind::Cancelled {
        return Decision { settlement: Settlement::Release, stop_queue: None, hold: None };
    }
    let budget = Budget { recovery, tries, age };
    let hold = held_for(recovery, failure.status, failure.retry_after);
    let number = budget.failures();
    if let Some(rule) = recovery.rules.iter().find(|rule| rule.matches.is_for(failure, number)) {
        return Decision { hold, ..by_rule(&rule.action, budget, failure, why, chance) };
    }
    let gone = failure.status == Some(410);
    let stop_queue = gone.then(|| "the handler answered 410 Gone".to_owned());
    if !worth_a_retry(recovery, failure) {
        return Decision { settlement: Settlement::DeadLetter { reason: why }, stop_queue, hold };
    }
    let wait = Wait { ours: None, theirs: failure.retry_after };
    Decision { settlement: budget.retry(wait, &why, chance), stop_queue, hold }
}

/// What follows a failure of a delivery that was made to see whether the handler is well again: where it is not,
/// nothing is counted, so that no message dies of an outage, but of its age. The next time, which is after
/// `open_for`, another message goes first. The other arguments are those of [`after_verdict`].
pub fn after_probe(
    recovery: &Recovery,
    failure: &Failure,
    tries: Tries,
    age: Duration,
    chance: f64,
    open_for: Duration,
) -> Decision {
    // Asked as if there were no end of attempts, so that only a rule or its age can end it.
    let unlimited = Recovery { max_attempts: u32::MAX, ..recovery.clone() };
    let decision = after_failure(&unlimited, failure, tries, age, chance);
    match decision.settlement {
        Settlement::Retry { after } if says_ill(failure) => {
            let after = after.max(open_for.saturating_add(STEP_BACK));
            Decision { settlement: Settlement::Postpone { after }, ..decision }
        }
        _ => after_failure(recovery, failure, tries, age, chance),
    }
}

/// Whether a failure says that the handler is ill, and not that it does not like the message.
pub fn says_ill(failure: &Failure) -> bool {
    match (failure.kind, failure.status) {
        (ErrorKind::Status, status) => matches!(status, Some(429 | 500..=599)),
        (
            ErrorKind::Dns
            | ErrorKind::Connect
            | ErrorKind::Tls
            | ErrorKind::Timeout
            | ErrorKind::Reset
            | ErrorKind::Handler,
            _,
        ) => true,
        (
            ErrorKind::TooLarge
            | ErrorKind::Malformed
            | ErrorKind::Panic
            | ErrorKind::Cancelled
            | ErrorKind::AddressRefused
            | ErrorKind::LeaseLost,
            _,
        ) => false,
    }
}

/// For how long the handler wants nobody to ask it: with 429 and 503 it speaks for all messages.
fn held_for(
    recovery: &Recovery,
    status: Option<u16>,
    retry_after: Option<Duration>,
) -> Option<Duration> {
    let wait = retry_after.filter(|_| matches!(status, Some(429 | 503)))?;
    Some(wait.min(recovery.retry_after_max)).filter(|wait| !wait.is_zero())
}

fn by_rule(
    action: &Action,
    budget: Budget<'_>,
    failure: &Failure,
    why: String,
    chance: f64,
) -> Decision {
    let theirs = failure.retry_after;
    let stop_queue = (*action == Action::StopQueue).then(|| format!("a rule stops it on {why}"));
    let settlement = match action {
        Action::Retry { delay } => budget.retry(Wait { ours: *delay, theirs }, &why, chance),
        // It says something of the queue, and nothing of the message.
        Action::StopQueue => {
            let theirs = theirs.unwrap_or_default().min(budget.recovery.retry_after_max);
            Settlement::Postpone { after: theirs.max(STEP_BACK) }
        }
        Action::DeadLetter => Settlement::DeadLetter { reason: why },
        Action::Discard => Settlement::Discard { reason: why },
        Action::Move { to_queue } => Settlement::Move { to_queue: to_queue.clone(), reason: why },
    };
    Decision { settlement, stop_queue, hold: None }
}

fn worth_a_retry(recovery: &Recovery, failure: &Failure) -> bool {
    match (failure.kind, failure.status) {
        (ErrorKind::Status, Some(status)) => {
            let by_table = matches!(status, 404 | 408 | 409 | 425 | 429 | 500..=599);
            by_table || recovery.retry_statuses == RetryStatuses::All
        }
        (
            ErrorKind::Dns
            | ErrorKind::Connect
            | ErrorKind::Tls
            | ErrorKind::Timeout
            | ErrorKind::Reset
            | ErrorKind::Status
            | ErrorKind::TooLarge
            | ErrorKind::Malformed
            | ErrorKind::Panic
            | ErrorKind::Cancelled
            | ErrorKind::AddressRefused
            | ErrorKind::LeaseLost
            | ErrorKind::Handler,
            _,
        ) => true,
    }
}

/// What a message may still use up.
#[derive(Debug, Clone, Copy)]
struct Budget<'a> {
    recovery: &'a Recovery,
    tries: Tries,
    age: Duration,
}

/// What is said of a wait; what is `None` says nothing.
#[derive(Debug, Clone, Copy)]
struct Wait {
    /// By a rule, in place of the backoff.
    ours: Option<Duration>,
    /// By the handler, at least.
    theirs: Option<Duration>,
}

impl Budget<'_> {
    /// How many deliveries have failed, this one too.
    fn failures(self) -> u32 {
        self.tries.failures.saturating_add(1)
    }

    /// Retries at once, then with backoff, and sets aside what has used up its failures or its time.
    fn retry(self, wait: Wait, why: &str, chance: f64) -> Settlement {
        let Self { recovery, age, .. } = self;
        let failures = self.failures();
        if failures >= recovery.max_attempts {
            let reason = format!("failed {failures} times, the last time with {why}");
            return Settlement::DeadLetter { reason };
        }
        if age >= recovery.max_age {
            let reason = format!("older than recovery.max_age, and failed with {why}");
            return Settlement::DeadLetter { reason };
        }
        let backoff = || match failures.checked_sub(recovery.immediate + 1) {
            None => Duration::ZERO,
            Some(retry) => backoff::wait(&recovery.backoff, retry, chance),
        };
        let ours = wait.ours.unwrap_or_else(backoff);
        let theirs = wait.theirs.unwrap_or_default().min(recovery.retry_after_max);
        let late = match recovery.backoff.jitter {
            Jitter::Full | Jitter::Bounded => {
                theirs.mul_f64(SPREAD).min(SPREAD_MAX).mul_f64(chance)
            }
            Jitter::None => Duration::ZERO,
        };
        Settlement::Retry { after: ours.max(theirs + late) }
    }
}

/// How long a message waits at least of which nothing is counted: others go first, and every replica has heard of a
/// stop by then.
const STEP_BACK: Duration = Duration::from_secs(1);
/// By which part of what a handler asked for messages are late at most: all that it turned away in one moment
/// would come back in one moment otherwise.
const SPREAD: f64 = 0.1;
/// By how much they are late at most.
const SPREAD_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use crate::model::{Match, QueueName, Rule};

    use super::*;

    fn status(status: u16) -> Failure {
        let failure = Failure::new(ErrorKind::Status, format!("the handler answered {status}"));
        Failure { status: Some(status), ..failure }
    }

    fn decide(failure: &Failure, failures: u32) -> Decision {
        let tries = Tries { failures, ..Default::default() };
        after_failure(&Recovery::default(), failure, tries, Duration::ZERO, 0.5)
    }

    #[test]
    fn statuses_go_by_the_table() {
        for code in 300..=599 {
            let expected = matches!(code, 404 | 408 | 409 | 425 | 429 | 500..=599);
            let retried = matches!(decide(&status(code), 0).settlement, Settlement::Retry { .. });
            assert_eq!(retried, expected, "{code}");
        }
        assert!(decide(&status(410), 0).stop_queue.is_some());
        assert!(decide(&status(400), 0).stop_queue.is_none());
    }

    #[test]
    fn every_non_2xx_can_be_made_worth_a_retry() {
        let recovery = Recovery { retry_statuses: RetryStatuses::All, ..Default::default() };
        for code in [301, 400, 410, 422] {
            let decision =
                after_failure(&recovery, &status(code), Tries::default(), Duration::ZERO, 0.0);
            assert!(matches!(decision.settlement, Settlement::Retry { .. }), "{code}");
        }
    }

    #[test]
    fn two_retries_at_once_then_backoff_then_dead() {
        let after = |failures| decide(&status(500), failures).settlement;
        assert_eq!(after(0), Settlement::Retry { after: Duration::ZERO });
        assert_eq!(after(1), Settlement::Retry { after: Duration::ZERO });
        assert_eq!(after(2), Settlement::Retry { after: Duration::from_millis(500) });
        assert_eq!(after(3), Settlement::Retry { after: Duration::from_secs(1) });
        assert!(matches!(after(11), Settlement::DeadLetter { .. }));
        assert!(matches!(after(u32::MAX), Settlement::DeadLetter { .. }));
    }

    #[test]
    fn retry_after_is_never_undercut_and_capped() {
        let asked =
            |seconds| Failure { retry_after: Some(Duration::from_secs(seconds)), ..status(503) };
        let after = |seconds, chance| {
            let recovery = Recovery::default();
            let tries = Tries::default();
            match after_failure(&recovery, &asked(seconds), tries, Duration::ZERO, chance)
                .settlement
            {
                Settlement::Retry { after } => after.as_secs(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(
            (after(60, 0.0), after(60, 0.5)),
            (60, 63),
            "spread, so that not all come at once"
        );
        assert_eq!(
            (after(u64::MAX, 0.0), after(u64::MAX, 0.999)),
            (3600, 3659),
            "the spread is over a minute at most"
        );
    }

    #[test]
    fn the_first_rule_that_matches_counts_before_the_table() {
        let rule = |status: &str, action| Rule {
            matches: Match { status: vec![status.parse().unwrap()], ..Match::default() },
            action,
        };
        let to_queue = QueueName::parse("elsewhere").unwrap();
        let delay = Some(Duration::from_secs(7));
        let rules = vec![
            rule("404", Action::DeadLetter),
            rule("4xx", Action::Retry { delay }),
            rule("500", Action::StopQueue),
            rule("501", Action::Discard),
            rule("502", Action::Move { to_queue: to_queue.clone() }),
        ];
        let recovery = Recovery { rules, ..Recovery::default() };
        let decide = |code, failures| {
            let tries = Tries { failures, ..Tries::default() };
            after_failure(&recovery, &status(code), tries, Duration::ZERO, 0.5)
        };
        assert!(matches!(decide(404, 0).settlement, Settlement::DeadLetter { .. }));
        assert_eq!(decide(400, 0).settlement, Settlement::Retry { after: Duration::from_secs(7) });
        assert_eq!(decide(410, 0).stop_queue, None, "a rule takes the place of the whole row");
        assert!(
            matches!(decide(400, 11).settlement, Settlement::DeadLetter { .. }),
            "within its budget"
        );
        let stops = decide(500, 0);
        assert!(stops.stop_queue.is_some());
        assert_eq!(stops.settlement, Settlement::Postpone { after: STEP_BACK });
        assert_eq!(
            decide(500, 11).settlement,
            stops.settlement,
            "the message waits, whatever it was"
        );
        assert!(matches!(decide(501, 0).settlement, Settlement::Discard { .. }));
        assert!(
            matches!(decide(502, 0).settlement, Settlement::Move { to_queue: to, .. } if to == to_queue)
        );
        assert!(matches!(decide(503, 0).settlement, Settlement::Retry { .. }), "else by the table");
    }

    #[test]
    fn what_the_pump_cut_is_no_failure() {
        let cut = Failure::new(ErrorKind::Cancelled, "cut");
        assert_eq!(decide(&cut, 11).settlement, Settlement::Release);
    }

    #[test]
    fn an_old_message_is_set_aside() {
        let old = Duration::from_secs(4 * 86_400);
        let decision =
            after_failure(&Recovery::default(), &status(500), Tries::default(), old, 0.0);
        assert!(matches!(decision.settlement, Settlement::DeadLetter { .. }));
    }
}
