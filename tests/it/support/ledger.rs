//! The ledger: what must hold of senders, handler and store together, whatever happened in between.
//!
//! It is read once everything has come to rest, and names every violation, not only the first.

use std::collections::{BTreeMap, BTreeSet};

use futures::stream::{self, StreamExt};
use serde_json::Value;

use super::client::{Client, number, text};
use super::receiver::{Delivery, Receiver};

/// What three sides say of the messages of one queue.
#[derive(Default)]
pub(crate) struct Ledger {
    /// The ids that senders were promised: answered 201.
    pub(crate) promised: BTreeSet<String>,
    /// What the handler saw, by id, in the order it came.
    pub(crate) handled: BTreeMap<String, Vec<Handled>>,
    /// What the store says, by id.
    pub(crate) kept: BTreeMap<String, Kept>,
}

/// One delivery as the handler saw it.
#[derive(Debug, Clone)]
pub(crate) struct Handled {
    /// Its attempt's number.
    pub(crate) attempt: u64,
    /// Whether it was answered with a 2xx.
    pub(crate) succeeded: bool,
}

/// A message as the store knows it.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    /// Where it stands.
    pub(crate) state: String,
    /// How each of its attempts ended.
    pub(crate) outcomes: Vec<(u64, String)>,
}

impl Ledger {
    /// Reads what handler and store say of a queue whose messages go to `path`.
    ///
    /// Fetches every message by itself, because only there its deliveries are shown.
    pub(crate) async fn read(
        promised: impl IntoIterator<Item = String>,
        client: &Client,
        queue: &str,
        receiver: &Receiver,
        path: &str,
    ) -> Self {
        let mut ledger = Self { promised: promised.into_iter().collect(), ..Self::default() };
        for delivery in receiver.deliveries(path) {
            ledger.handled.entry(delivery.id.clone()).or_default().push(Handled::from(&delivery));
        }
        let listed = client.all(&format!("/v1/messages?queue={queue}")).await;
        let ids = listed.iter().map(|item| text(item, "/id"));
        let whole = ids.map(async |id| (Kept::from(&client.message(&id).await), id));
        let mut whole = stream::iter(whole).buffer_unordered(16);
        while let Some((kept, id)) = whole.next().await {
            ledger.kept.insert(id, kept);
        }
        ledger
    }

    /// Fails with everything that is wrong.
    #[track_caller]
    pub(crate) fn check(&self) {
        let wrong = self.violations();
        assert!(wrong.is_empty(), "{} violations:\n{}", wrong.len(), wrong.join("\n"));
    }

    /// What handler and store say of one message, to stand behind what is wrong with it.
    fn history(&self, id: &str) -> String {
        let handled = self.handled.get(id).map_or(&[][..], |handled| handled);
        let outcomes = self.kept.get(id).map(|kept| &kept.outcomes);
        format!("handled {handled:?}, recorded {outcomes:?}")
    }

    /// Everything that is wrong, one sentence each.
    pub(crate) fn violations(&self) -> Vec<String> {
        let mut wrong = self.lost();
        for (id, handled) in &self.handled {
            let mut whats = numbers_that_do_not_rise(handled).collect::<Vec<_>>();
            let kept = self.kept.get(id);
            whats.extend(
                kept.map_or(vec!["handled, and unknown to the store".to_owned()], |kept| {
                    extras_without_cause(handled, &kept.outcomes)
                }),
            );
            let history = self.history(id);
            wrong.extend(whats.into_iter().map(|what| format!("{id}: {what} ({history})")));
        }
        wrong
    }

    fn lost(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        for id in &self.promised {
            if !self.handled.contains_key(id) {
                wrong.push(format!("{id}: answered 201, and never handled"));
            }
            let state = self.kept.get(id).map_or("unknown", |kept| &kept.state);
            if state != "completed" {
                wrong.push(format!("{id}: answered 201, and is {state}"));
            }
        }
        wrong
    }
}

fn numbers_that_do_not_rise(handled: &[Handled]) -> impl Iterator<Item = String> {
    let falls = handled.windows(2).filter(|pair| pair[1].attempt <= pair[0].attempt);
    falls.map(|pair| format!("attempt {} came after {}", pair[1].attempt, pair[0].attempt))
}

/// A delivery that the handler answered well ends the message, unless its record names what came between.
fn extras_without_cause(handled: &[Handled], outcomes: &[(u64, String)]) -> Vec<String> {
    let mut wrong = Vec::new();
    let acks = outcomes.iter().filter(|(_, outcome)| outcome == "acked").count();
    if acks > 1 {
        wrong.push(format!("acked {acks} times"));
    }
    for seen in handled {
        let number = seen.attempt;
        let records = outcomes.iter().filter(|(attempt, _)| *attempt == number);
        let records = records.map(|(_, outcome)| outcome.as_str()).collect::<Vec<_>>();
        let [outcome] = records[..] else {
            wrong.push(format!("attempt {number} has the records {records:?}, not one"));
            continue;
        };
        let cut_off = matches!(outcome, "lease_lost" | "released");
        let as_answered = (outcome == "acked") == seen.succeeded;
        if !cut_off && !as_answered {
            wrong.push(format!("attempt {number} is {outcome}, but succeeded: {}", seen.succeeded));
        }
    }
    wrong
}

impl From<&Delivery> for Handled {
    fn from(delivery: &Delivery) -> Self {
        Self { attempt: delivery.attempt.into(), succeeded: delivery.succeeded() }
    }
}

impl From<&Value> for Kept {
    fn from(message: &Value) -> Self {
        let deliveries = message["deliveries"].as_array().expect("a message has deliveries");
        let outcome = |delivery: &Value| (number(delivery, "/number"), text(delivery, "/outcome"));
        Self { state: text(message, "/state"), outcomes: deliveries.iter().map(outcome).collect() }
    }
}

/// Which ids more than one handler's delivery succeeded for.
pub(crate) fn doubled(deliveries: &[Delivery]) -> usize {
    let mut successes = BTreeMap::<&str, usize>::new();
    for delivery in deliveries.iter().filter(|delivery| delivery.succeeded()) {
        *successes.entry(&delivery.id).or_default() += 1;
    }
    successes.values().filter(|count| **count > 1).count()
}

/// The checker itself: histories by hand, each with what it must find in them.
mod tests {
    use super::{Handled, Kept, Ledger};

    fn history(handled: &[(u64, bool)], state: &str, outcomes: &[(u64, &str)]) -> Ledger {
        let mut ledger = Ledger::default();
        ledger.promised.insert("m".to_owned());
        if !handled.is_empty() {
            let seen = |&(attempt, succeeded): &(u64, bool)| Handled { attempt, succeeded };
            ledger.handled.insert("m".to_owned(), handled.iter().map(seen).collect());
        }
        let outcomes = outcomes.iter().map(|(n, outcome)| (*n, (*outcome).to_owned())).collect();
        ledger.kept.insert("m".to_owned(), Kept { state: state.to_owned(), outcomes });
        ledger
    }

    #[test]
    fn the_ledger_lets_good_histories_pass() {
        history(&[(1, true)], "completed", &[(1, "acked")]).check();
        history(&[(1, false), (2, true)], "completed", &[(2, "acked"), (1, "failed")]).check();
        history(
            &[(1, true), (3, true)],
            "completed",
            &[(1, "lease_lost"), (2, "lease_lost"), (3, "acked")],
        )
        .check();
        history(&[(1, true), (2, true)], "completed", &[(1, "released"), (2, "acked")]).check();
    }

    #[test]
    fn the_ledger_finds_what_is_wrong() {
        for (what, ledger) in [
            ("never handled", history(&[], "completed", &[])),
            ("still waiting", history(&[(1, false)], "scheduled", &[(1, "failed")])),
            (
                "acked twice",
                history(&[(1, true), (2, true)], "completed", &[(1, "acked"), (2, "acked")]),
            ),
            ("a number used twice", history(&[(1, true), (1, true)], "completed", &[(1, "acked")])),
            (
                "numbers that fall",
                history(&[(2, false), (1, true)], "completed", &[(1, "acked"), (2, "failed")]),
            ),
            ("no record", history(&[(1, true), (2, true)], "completed", &[(2, "acked")])),
            ("an ack that was a failure", history(&[(1, false)], "completed", &[(1, "acked")])),
            (
                "a failure that was an ack",
                history(&[(1, true), (2, true)], "completed", &[(1, "failed"), (2, "acked")]),
            ),
        ] {
            assert!(!ledger.violations().is_empty(), "{what}");
        }
        let mut gone = history(&[(1, true)], "completed", &[(1, "acked")]);
        gone.kept.clear();
        assert!(!gone.violations().is_empty(), "gone from the store");
    }
}
