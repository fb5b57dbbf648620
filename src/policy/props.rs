//! What holds for every policy, every failure and every chance.

use std::time::Duration;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use crate::model::{
    Action, Answer, Backoff, Curve, ErrorKind, Failure, Jitter, Match, Numbers, QueueName,
    Recovery, RetryStatuses, Rule, Settlement, Tries, Verdict,
};

use super::{Decision, after_failure, after_probe, after_verdict, says_ill, simulate};

fn lasting() -> impl Strategy<Value = Duration> {
    prop_oneof![
        Just(Duration::ZERO),
        Just(Duration::MAX),
        (0u64..100_000_000).prop_map(Duration::from_millis),
    ]
}

/// Up to a year, as settings can have it.
fn set() -> impl Strategy<Value = Duration> {
    (0u64..31_622_400_000).prop_map(Duration::from_millis)
}

fn kind() -> impl Strategy<Value = ErrorKind> {
    proptest::sample::select(ErrorKind::ALL.to_vec())
}

fn failure() -> impl Strategy<Value = Failure> {
    (kind(), option::of(any::<u16>()), option::of(lasting())).prop_map(
        |(kind, status, retry_after)| Failure { status, retry_after, ..Failure::new(kind, "bad") },
    )
}

fn numbers() -> impl Strategy<Value = Numbers> {
    (0u32..700, 0u32..200).prop_map(|(first, more)| Numbers::new(first, first + more).unwrap())
}

fn rule() -> impl Strategy<Value = Rule> {
    let action = prop_oneof![
        option::of(set()).prop_map(|delay| Action::Retry { delay }),
        Just(Action::DeadLetter),
        Just(Action::Discard),
        Just(Action::StopQueue),
        Just(Action::Move { to_queue: QueueName::parse("elsewhere").unwrap() }),
    ];
    (vec(numbers(), 0..3), vec(kind(), 0..3), option::of(numbers()), action).prop_map(
        |(status, error_kind, attempt, action)| {
            let matches = Match { status, error_kind, attempt, ..Match::default() };
            Rule { matches, action }
        },
    )
}

fn backoff() -> impl Strategy<Value = Backoff> {
    let curve = prop_oneof![Just(Curve::Fixed), Just(Curve::Linear), Just(Curve::Exponential)];
    let jitter = prop_oneof![Just(Jitter::Full), Just(Jitter::Bounded), Just(Jitter::None)];
    (curve, set(), 1.0f64..1000.0, set(), jitter)
        .prop_map(|(curve, base, factor, max, jitter)| Backoff { curve, base, factor, max, jitter })
}

fn recovery() -> impl Strategy<Value = Recovery> {
    let statuses = prop_oneof![Just(RetryStatuses::Default), Just(RetryStatuses::All)];
    (0u32..20, 1u32..40, backoff(), set(), set(), statuses, vec(rule(), 0..4)).prop_map(
        |(immediate, max_attempts, backoff, max_age, retry_after_max, retry_statuses, rules)| {
            Recovery {
                immediate,
                max_attempts,
                backoff,
                max_age,
                retry_after_max,
                retry_statuses,
                rules,
                ..Recovery::default()
            }
        },
    )
}

fn tries() -> impl Strategy<Value = Tries> {
    (prop_oneof![0u32..50, Just(u32::MAX)], any::<u32>(), any::<u32>())
        .prop_map(|(failures, attempts, crashes)| Tries { failures, attempts, crashes })
}

/// The rule that decides, if one does.
fn deciding<'a>(recovery: &'a Recovery, failure: &Failure, tries: Tries) -> Option<&'a Rule> {
    let number = tries.failures.saturating_add(1);
    recovery.rules.iter().find(|rule| rule.matches.is_for(failure, number))
}

fn wait(decision: &Decision) -> Option<Duration> {
    match decision.settlement {
        Settlement::Retry { after } | Settlement::Postpone { after } => Some(after),
        _ => None,
    }
}

/// What a handler asked for may be late by.
const SPREAD_MAX: Duration = Duration::from_secs(60);

proptest! {
    #[test]
    fn a_retry_is_never_earlier_than_asked_and_never_later_than_the_cap(
        recovery in recovery(), failure in failure(), tries in tries(), age in set(), chance in 0.0f64..1.0,
    ) {
        let asked = failure.retry_after.unwrap_or_default().min(recovery.retry_after_max);
        let rule = deciding(&recovery, &failure, tries).map(|rule| rule.action.clone());
        let delay = match rule {
            Some(Action::Retry { delay: Some(delay) }) => Some(delay),
            _ => None,
        };
        let open_for = Duration::from_secs(30);
        let cut = Duration::from_secs(1);
        let probe = after_probe(&recovery, &failure, tries, age, chance, open_for);
        for decision in [after_failure(&recovery, &failure, tries, age, chance), probe] {
            let stays = matches!(decision.settlement, Settlement::Postpone { .. });
            if let Some(wait) = wait(&decision) {
                prop_assert!(wait >= asked, "{wait:?} where the handler asked for {asked:?}");
                prop_assert!(wait >= delay.unwrap_or_default(), "{wait:?} where a rule says {delay:?}");
                let least = if stays { open_for + cut } else { Duration::ZERO };
                let cap = delay.unwrap_or(recovery.backoff.max).max(asked + SPREAD_MAX).max(least);
                prop_assert!(wait <= cap, "{wait:?} is above {cap:?}");
            }
            if let Some(hold) = decision.hold {
                prop_assert!(matches!(failure.status, Some(429 | 503)));
                prop_assert_eq!(hold, asked);
            }
        }
    }

    #[test]
    fn failures_are_never_more_than_the_maximum(
        recovery in recovery(), failure in failure(), tries in tries(), age in set(), chance in 0.0f64..1.0,
    ) {
        let decision = after_failure(&recovery, &failure, tries, age, chance);
        if let Settlement::Retry { .. } = decision.settlement {
            prop_assert!(tries.failures.saturating_add(1) < recovery.max_attempts);
            prop_assert!(age < recovery.max_age);
        }
        let verdict = Verdict::Retry { after: failure.retry_after };
        let answer = Answer { status: failure.status, ..Answer::from(verdict) };
        let decision = after_verdict(&recovery, &answer, tries, age, chance);
        if let Settlement::Retry { after } = decision.settlement {
            prop_assert!(tries.failures.saturating_add(1) < recovery.max_attempts);
            prop_assert!(after >= failure.retry_after.unwrap_or_default().min(recovery.retry_after_max));
        }
    }

    #[test]
    fn a_row_of_failures_ends_within_the_budget(
        recovery in recovery(), failures in vec(failure(), 1..5),
    ) {
        let steps = simulate(&recovery, &failures);
        prop_assert!(!steps.is_empty() && steps.len() <= recovery.max_attempts as usize);
        prop_assert!(steps.iter().rev().skip(1).all(|step| step.wait.is_some()));
        for step in &steps {
            prop_assert!(step.wait.is_none_or(|(shortest, longest)| shortest <= longest));
        }
    }

    #[test]
    fn who_probes_dies_of_its_age_or_of_a_rule_only(
        recovery in recovery(), failure in failure(), tries in tries(), chance in 0.0f64..1.0,
    ) {
        prop_assume!(says_ill(&failure) && deciding(&recovery, &failure, tries).is_none());
        prop_assume!(recovery.max_age > Duration::ZERO);
        let open_for = Duration::from_secs(30);
        let decision = after_probe(&recovery, &failure, tries, Duration::ZERO, chance, open_for);
        let postponed = matches!(decision.settlement, Settlement::Postpone { .. });
        prop_assert!(postponed || tries.failures == u32::MAX, "{:?}", decision);
    }
}

/// Every status and every kind, with and without rules: no panic, and nothing that fails is acked.
#[test]
fn it_is_a_total_function_over_every_status_and_kind() {
    let rules = vec![Rule { matches: Match::default(), action: Action::StopQueue }];
    let with_rules = Recovery { rules, ..Recovery::default() };
    for recovery in [Recovery::default(), with_rules] {
        for kind in ErrorKind::ALL {
            for status in std::iter::once(None).chain((0..=u16::MAX).map(Some)) {
                let failure = Failure { status, ..Failure::new(kind, "bad") };
                let decision =
                    after_failure(&recovery, &failure, Tries::default(), Duration::ZERO, 0.5);
                assert_ne!(decision.settlement, Settlement::Ack, "{kind:?} {status:?}");
                let cut = matches!(decision.settlement, Settlement::Release);
                assert_eq!(cut, kind == ErrorKind::Cancelled, "{kind:?} {status:?}");
            }
        }
    }
}
