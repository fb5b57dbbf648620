//! What a queue's recovery would make of a row of failures, without a message that fails.

use std::time::Duration;

use crate::model::{Failure, Recovery, Settlement, Tries};

use super::{Decision, after_failure};

/// What follows one failure of the row.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// Which failure, from 1.
    pub number: u32,
    /// What is decided, where the wait is the shortest that chance allows.
    pub decision: Decision,
    /// The shortest and the longest wait, where it is tried again.
    pub wait: Option<(Duration, Duration)>,
    /// How old the message is then at least and at most, if a failure takes no time itself.
    pub age: (Duration, Duration),
}

/// Follows a message that meets these failures, the last of them again and again, until it is not tried any
/// more. At most [`Recovery::max_attempts`] steps; none for no failures.
pub fn simulate(recovery: &Recovery, failures: &[Failure]) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut age = (Duration::ZERO, Duration::ZERO);
    for number in 1..=recovery.max_attempts {
        let at = (number as usize - 1).min(failures.len().saturating_sub(1));
        let Some(failure) = failures.get(at) else { break };
        let tries = Tries { failures: number - 1, attempts: number, crashes: 0 };
        let decide = |age, chance| after_failure(recovery, failure, tries, age, chance);
        let decision = decide(age.0, 0.0);
        let shortest = wait(&decision);
        // With more luck a message gets older: it may end by its age where the shortest way goes on.
        let wait = shortest.zip(wait(&decide(Duration::ZERO, ALMOST_ONE)));
        if let Some((shortest, longest)) = wait {
            age = (age.0.saturating_add(shortest), age.1.saturating_add(longest));
        }
        steps.push(Step { number, decision, wait, age });
        if wait.is_none() {
            break;
        }
    }
    steps
}

fn wait(decision: &Decision) -> Option<Duration> {
    match decision.settlement {
        // Nothing is counted of what waits in a stopped queue: the next one would be the same failure again.
        Settlement::Retry { after } => Some(after),
        _ => None,
    }
}

/// The largest chance there is.
const ALMOST_ONE: f64 = 1.0 - f64::EPSILON;

#[cfg(test)]
mod tests {
    use crate::model::ErrorKind;

    use super::*;

    #[test]
    fn a_row_of_failures_ends_as_a_message_would() {
        let failure = Failure { status: Some(500), ..Failure::new(ErrorKind::Status, "500") };
        let steps = simulate(&Recovery::default(), std::slice::from_ref(&failure));
        assert_eq!(steps.len(), 12);
        let waits = steps
            .iter()
            .filter_map(|step| step.wait)
            .map(|(_, longest)| longest.as_secs_f64().round());
        assert_eq!(waits.take(5).collect::<Vec<_>>(), [0.0, 0.0, 1.0, 2.0, 4.0]);
        assert!(matches!(steps[11].decision.settlement, Settlement::DeadLetter { .. }));
        let refused = Failure { status: Some(400), ..failure };
        assert_eq!(simulate(&Recovery::default(), &[refused]).len(), 1);
        assert_eq!(simulate(&Recovery::default(), &[]), []);
    }
}
