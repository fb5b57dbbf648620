//! Failure in, settlement out: at once, later, or set aside.

use std::time::Duration;

use crate::model::{ErrorKind, Failure, Recovery, RetryStatuses, Settlement, Tries, Verdict};

use super::backoff;

/// What is to be written, and whether the queue is to stop as well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What is to be written.
    pub settlement: Settlement,
    /// Why the queue is to stop, where it is.
    pub stop_queue: Option<String>,
}

/// What follows a verdict: as it says; a retry goes by the queue's recovery.
///
/// `tries` counts what came before this delivery, `age` is the message's since it was taken in.
pub fn after_verdict(
    recovery: &Recovery,
    verdict: Verdict,
    tries: Tries,
    age: Duration,
    chance: f64,
) -> Decision {
    let settlement = match verdict {
        Verdict::Ack => Settlement::Ack,
        Verdict::Retry { after } => {
            retry(recovery, tries, age, after, "the handler asked for a retry", chance)
        }
        Verdict::DeadLetter { reason } => Settlement::DeadLetter { reason },
        Verdict::Discard { reason } => Settlement::Discard { reason },
    };
    Decision { settlement, stop_queue: None }
}

/// What follows a failure, by the table of the protocol.
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
        return Decision { settlement: Settlement::Release, stop_queue: None };
    }
    let gone = failure.status == Some(410);
    let stop_queue = gone.then(|| "the handler answered 410 Gone".to_owned());
    if !worth_a_retry(recovery, failure) {
        return Decision { settlement: Settlement::DeadLetter { reason: why }, stop_queue };
    }
    let settlement = retry(recovery, tries, age, failure.retry_after, &why, chance);
    Decision { settlement, stop_queue }
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

/// Retries at once, then with backoff, and sets aside what has used up its failures or its time.
fn retry(
    recovery: &Recovery,
    tries: Tries,
    age: Duration,
    asked_for: Option<Duration>,
    why: &str,
    chance: f64,
) -> Settlement {
    let failures = tries.failures.saturating_add(1);
    if failures >= recovery.max_attempts {
        let reason = format!("failed {failures} times, the last time with {why}");
        return Settlement::DeadLetter { reason };
    }
    if age >= recovery.max_age {
        let reason = format!("older than recovery.max_age, and failed with {why}");
        return Settlement::DeadLetter { reason };
    }
    let ours = match failures.checked_sub(recovery.immediate + 1) {
        None => Duration::ZERO,
        Some(retry) => backoff::wait(&recovery.backoff, retry, chance),
    };
    let theirs = asked_for.unwrap_or_default().min(recovery.retry_after_max);
    Settlement::Retry { after: ours.max(theirs) }
}

#[cfg(test)]
mod tests {
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
        let after = |seconds| decide(&asked(seconds), 0).settlement;
        assert_eq!(after(60), Settlement::Retry { after: Duration::from_secs(60) });
        assert_eq!(after(u64::MAX), Settlement::Retry { after: Duration::from_secs(3600) });
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
