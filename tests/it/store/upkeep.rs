//! Promises about what has to be done from time to time: promote, reap, sweep, attend.

use std::time::Duration;

use pumphouse::model::{ErrorKind, NewMessage, OnExpiry, Outcome, Settlement, State, Tries, When};
use pumphouse::store::{Attendance, Claim, Promoted, Reaped, Swept, Want};

use crate::support::heard;
use crate::support::stage::{
    ALL, LONG, SHORT, Stage, bodies_of, claim, dead_letter, discard, message, message_in, replica,
};

pub(crate) async fn what_comes_due_is_made_ready(stage: Stage) {
    let queue = stage.queue("letters").await;
    let nothing = stage.store.promote(ALL).await.unwrap();
    assert_eq!(nothing, Promoted { count: 0, next: None });
    let soon = stage.send(message_in(&queue, "soon", SHORT)).await;
    stage.send(message_in(&queue, "late", LONG)).await;
    stage.pass(SHORT).await;
    let mut news = stage.store.news().of_queue(&queue);
    let promoted = stage.store.promote(ALL).await.unwrap();
    assert_eq!(promoted.count, 1);
    assert!(promoted.next.is_some_and(|next| next > LONG / 2 && next < LONG), "{promoted:?}");
    heard(&mut news).await;
    let record = stage.record(soon.id).await;
    assert_eq!((record.state, record.deliver_at), (State::Ready, soon.deliver_at));
    assert_eq!(bodies_of(&stage.claim(&queue, ALL).await), ["soon"]);
}

pub(crate) async fn promoting_takes_the_longest_due_and_no_more_than_asked(stage: Stage) {
    let queue = stage.queue("letters").await;
    let waits = [("c", SHORT * 3), ("a", SHORT), ("b", SHORT * 2)];
    stage.send_all(waits.map(|(body, wait)| message_in(&queue, body, wait)).into()).await;
    stage.pass(SHORT * 3).await;
    let promoted = stage.store.promote(2).await.unwrap();
    assert_eq!(promoted, Promoted { count: 2, next: Some(Duration::ZERO) });
    assert_eq!(bodies_of(&stage.claim(&queue, ALL).await), ["a", "b"]);
    let promoted = stage.store.promote(2).await.unwrap();
    assert_eq!(promoted, Promoted { count: 1, next: None });
}

pub(crate) async fn a_lease_that_has_run_out_is_taken_back_and_counts_as_a_crash(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "lost").await;
    stage.send_to(&queue, "held").await;
    stage.lose_a_lease(&queue).await;
    stage.claim_one(&queue).await;
    let mut news = stage.store.news().of_queue(&queue);
    let reaped = stage.store.reap(ALL).await.unwrap();
    assert_eq!(reaped, [Reaped { id, queue: queue.clone(), state: State::Ready }]);
    heard(&mut news).await;
    assert_eq!(stage.store.reap(ALL).await.unwrap(), [], "once");
    let record = stage.record(id).await;
    assert_eq!(record.state, State::Ready);
    assert_eq!(record.tries, Tries { attempts: 1, failures: 0, crashes: 1 });
    assert_eq!(stage.claim_one(&queue).await.tries, Tries { attempts: 2, failures: 0, crashes: 1 });
}

pub(crate) async fn a_lost_lease_leaves_a_record_of_its_delivery(stage: Stage) {
    let queue = stage.queue("letters").await;
    let id = stage.send_to(&queue, "lost").await;
    let there = pumphouse::model::ReplicaName::parse("there").unwrap();
    let claim = Claim { replica: there.clone(), ..claim(&queue, 1, SHORT) };
    assert_eq!(stage.store.lease(claim).await.unwrap().len(), 1);
    stage.pass(SHORT).await;
    stage.store.reap(ALL).await.unwrap();
    let deliveries = stage.deliveries(id).await;
    assert_eq!(deliveries.len(), 1);
    assert_eq!(deliveries[0].number, 1);
    assert_eq!(deliveries[0].replica, there);
    assert_eq!(deliveries[0].outcome, Outcome::LeaseLost);
    assert_eq!(deliveries[0].error_kind, Some(ErrorKind::LeaseLost));

    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, Settlement::Ack).await;
    let outcomes = stage.deliveries(id).await.into_iter().map(|d| (d.number, d.outcome));
    let expected = [(2, Outcome::Acked), (1, Outcome::LeaseLost)];
    assert_eq!(outcomes.collect::<Vec<_>>(), expected);
}

pub(crate) async fn reaping_takes_back_no_more_than_asked(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_all((0..5).map(|n| message(&queue, &n.to_string())).collect()).await;
    assert_eq!(stage.store.lease(claim(&queue, ALL, SHORT)).await.unwrap().len(), 5);
    stage.pass(SHORT).await;
    assert_eq!(stage.store.reap(2).await.unwrap().len(), 2);
    assert_eq!(stage.store.reap(2).await.unwrap().len(), 2);
    assert_eq!(stage.store.reap(2).await.unwrap().len(), 1);
    assert_eq!(stage.depth(&queue).await.ready, 5);
}

pub(crate) async fn a_message_that_crashes_too_often_is_dead(stage: Stage) {
    let queue = stage.queue_with("letters", |settings| settings.recovery.max_crashes = 3).await;
    let id = stage.send_to(&queue, "a poison").await;
    for crashes in 1..=3 {
        stage.lose_a_lease(&queue).await;
        let state = if crashes < 3 { State::Ready } else { State::Dead };
        let reaped = stage.store.reap(ALL).await.unwrap();
        assert_eq!(reaped, [Reaped { id, queue: queue.clone(), state }]);
    }
    let record = stage.record(id).await;
    assert_eq!(record.state, State::Dead);
    assert_eq!(record.tries, Tries { attempts: 3, failures: 0, crashes: 3 });
    let reason = record.reason.expect("it says why");
    assert!(reason.contains("max_crashes"), "{reason}");
    assert!(record.finished_at.is_some());
    assert_eq!(stage.deliveries(id).await.len(), 3);
}

pub(crate) async fn failures_and_crashes_are_counted_apart(stage: Stage) {
    let queue = stage.queue_with("letters", |settings| settings.recovery.max_crashes = 2).await;
    let id = stage.send_to(&queue, "unlucky").await;
    for _ in 0..5 {
        let leased = stage.claim_one(&queue).await;
        stage.must_settle(&leased, Settlement::Retry { after: Duration::ZERO }).await;
    }
    stage.lose_a_lease(&queue).await;
    assert_eq!(stage.store.reap(ALL).await.unwrap()[0].state, State::Ready);
    let expected = Tries { attempts: 6, failures: 5, crashes: 1 };
    assert_eq!(stage.record(id).await.tries, expected);
}

pub(crate) async fn what_waits_too_long_expires(stage: Stage) {
    let (queue, other) = (stage.queue("letters").await, stage.queue("parcels").await);
    let brief = |queue, body| NewMessage { expires: Some(When::In(SHORT)), ..message(queue, body) };
    let ready = stage.send(brief(&queue, "ready")).await.id;
    let scheduled = NewMessage { deliver: When::In(LONG), ..brief(&queue, "never due") };
    let scheduled = stage.send(scheduled).await.id;
    let elsewhere = stage.send(brief(&other, "elsewhere")).await.id;
    let long = NewMessage { expires: Some(When::In(LONG)), ..message(&queue, "in time") };
    let kept = stage.send(long).await.id;
    assert_eq!(stage.depth(&queue).await.ready + stage.depth(&queue).await.scheduled, 3);
    stage.pass(SHORT).await;
    let mut swept = stage.store.sweep(ALL).await.unwrap();
    swept.expired.sort();
    let expired = vec![(queue.clone(), 2), (other.clone(), 1)];
    assert_eq!(swept, Swept { expired, ..Swept::default() });
    for id in [ready, scheduled, elsewhere] {
        let record = stage.record(id).await;
        assert_eq!(record.state, State::Expired);
        assert!(record.finished_at.is_some());
    }
    assert_eq!(stage.state(kept).await, Some(State::Ready));
}

pub(crate) async fn what_expires_is_set_aside_if_its_queue_asks_for_it(stage: Stage) {
    let queue = stage.queue_with("letters", |s| s.on_expiry = OnExpiry::DeadLetter).await;
    let other = stage.queue("parcels").await;
    let brief = |queue, body| NewMessage { expires: Some(When::In(SHORT)), ..message(queue, body) };
    let ready = stage.send(brief(&queue, "ready")).await.id;
    let scheduled = NewMessage { deliver: When::In(LONG), ..brief(&queue, "never due") };
    let scheduled = stage.send(scheduled).await.id;
    let elsewhere = stage.send(brief(&other, "elsewhere")).await.id;
    stage.pass(SHORT).await;
    let mut swept = stage.store.sweep(ALL).await.unwrap();
    swept.expired.sort();
    let expired = vec![(queue.clone(), 2), (other.clone(), 1)];
    let set_aside = vec![(queue.clone(), 2)];
    assert_eq!(swept, Swept { expired, set_aside, ..Swept::default() });
    for id in [ready, scheduled] {
        let record = stage.record(id).await;
        assert_eq!(record.state, State::Dead);
        let reason = record.reason.expect("it says why");
        assert!(reason.contains("longer"), "{reason}");
    }
    assert_eq!(stage.state(elsewhere).await, Some(State::Expired));
    assert_eq!(stage.depth(&queue).await.dead, 2);
    assert_eq!(stage.store.sweep(ALL).await.unwrap(), Swept::default(), "dead, it expires no more");
}

pub(crate) async fn what_is_leased_or_dead_does_not_expire(stage: Stage) {
    let queue = stage.queue("letters").await;
    // Long enough to be claimed in time on a busy machine.
    let life = Duration::from_secs(4);
    let brief = |body| NewMessage { expires: Some(When::In(life)), ..message(&queue, body) };
    let dead = stage.send(brief("dead")).await.id;
    let leased = stage.claim_one(&queue).await;
    stage.must_settle(&leased, dead_letter("a test")).await;
    let held = stage.send(brief("leased")).await.id;
    let leased = stage.claim_one(&queue).await;
    stage.pass(life).await;
    assert_eq!(stage.store.sweep(ALL).await.unwrap(), Swept::default());
    assert_eq!(stage.state(dead).await, Some(State::Dead));
    assert_eq!(stage.state(held).await, Some(State::Leased));
    stage.must_settle(&leased, Settlement::Release).await;
    assert_eq!(stage.store.sweep(ALL).await.unwrap().expired, [(queue.clone(), 1)]);
    assert_eq!(stage.state(held).await, Some(State::Expired));
}

pub(crate) async fn what_has_ended_is_deleted_after_its_retention(stage: Stage) {
    let queue = stage.queue_with("letters", |s| s.retention.completed = SHORT).await;
    let completed = stage.send_and_settle(&queue, Settlement::Ack).await;
    let discarded = stage.send_and_settle(&queue, discard("a test")).await;
    let cancelled = stage.send_to(&queue, "cancelled").await;
    stage.store.amend(cancelled, pumphouse::store::Amendment::Cancel).await.unwrap();
    let dead = stage.send_and_settle(&queue, dead_letter("a test")).await;
    let waiting = stage.send_to(&queue, "waiting").await;
    stage.pass(SHORT).await;
    let swept = stage.store.sweep(ALL).await.unwrap();
    assert_eq!(swept, Swept { deleted: 3, ..Swept::default() });
    for id in [completed, discarded, cancelled] {
        assert_eq!(stage.look(id).await, None);
        assert_eq!(stage.store.payload(id).await.unwrap(), None);
    }
    assert_eq!(stage.state(dead).await, Some(State::Dead));
    assert_eq!(stage.state(waiting).await, Some(State::Ready));
}

pub(crate) async fn dead_letters_have_a_retention_of_their_own(stage: Stage) {
    let queue = stage.queue_with("letters", |s| s.retention.dead = SHORT).await;
    let completed = stage.send_and_settle(&queue, Settlement::Ack).await;
    let dead = stage.send_and_settle(&queue, dead_letter("a test")).await;
    stage.pass(SHORT).await;
    assert_eq!(stage.store.sweep(ALL).await.unwrap().deleted, 1);
    assert_eq!(stage.look(dead).await, None);
    assert_eq!(stage.state(completed).await, Some(State::Completed));
    assert_eq!(stage.depth(&queue).await.dead, 0);
}

pub(crate) async fn nothing_is_deleted_before_its_retention(stage: Stage) {
    let queue = stage.queue("letters").await;
    let completed = stage.send_and_settle(&queue, Settlement::Ack).await;
    let dead = stage.send_and_settle(&queue, dead_letter("a test")).await;
    stage.pass(SHORT).await;
    assert_eq!(stage.store.sweep(ALL).await.unwrap(), Swept::default());
    assert!(stage.look(completed).await.is_some() && stage.look(dead).await.is_some());
}

pub(crate) async fn sweeping_stops_at_its_limit_and_says_so(stage: Stage) {
    let queue = stage.queue("letters").await;
    let brief =
        |n: i32| NewMessage { expires: Some(When::In(SHORT)), ..message(&queue, &n.to_string()) };
    stage.send_all((0..5).map(brief).collect()).await;
    stage.pass(SHORT).await;
    for (count, more) in [(2, true), (2, true), (1, false)] {
        let swept = stage.store.sweep(2).await.unwrap();
        assert_eq!(swept.expired, [(queue.clone(), count)]);
        assert_eq!(swept.more, more);
    }
    assert_eq!(stage.store.sweep(2).await.unwrap(), Swept::default());
}

pub(crate) async fn a_process_alone_may_open_all_it_wants(stage: Stage) {
    let queue = stage.queue("letters").await;
    let other = stage.queue("parcels").await;
    let want = |queue, limit, shared| Want {
        queue,
        limit,
        most: limit,
        shared,
        able: true,
        open: 0,
        strays: 0,
    };
    let wants = vec![want(queue, 16, true), want(other, 3, false)];
    let attended = stage.store.attend(attendance(wants)).await.unwrap();
    assert_eq!(attended.shares, [16, 3]);
    assert_eq!(attended.reaped, []);
    assert_eq!(attended.replicas, [replica()]);
    let nobody = stage.store.attend(attendance(Vec::new())).await.unwrap();
    assert_eq!(nobody.shares, [0; 0]);
}

pub(crate) async fn reporting_again_takes_no_lease_away(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.store.attend(attendance(Vec::new())).await.unwrap();
    stage.send_to(&queue, "mine").await;
    let leased = stage.claim_one(&queue).await;
    let attended = stage.store.attend(attendance(Vec::new())).await.unwrap();
    assert_eq!(attended.reaped, []);
    stage.must_settle(&leased, Settlement::Ack).await;
}

pub(crate) async fn the_revision_follows_every_change_of_queues_and_pump(stage: Stage) {
    let revision = || async { stage.store.attend(attendance(Vec::new())).await.unwrap().revision };
    let mut seen = vec![revision().await];
    let queue = stage.queue("letters").await;
    seen.push(revision().await);
    stage.queue_with("letters", |settings| settings.max_messages = Some(9)).await;
    seen.push(revision().await);
    let stopped = || {
        pumphouse::model::RunState::Stopped(pumphouse::model::Stopped {
            at: stage.now(),
            by: "operator".to_owned(),
            reason: None,
            until: None,
        })
    };
    stage.store.set_run_state(Some(&queue), stopped(), None).await.unwrap();
    seen.push(revision().await);
    stage.store.set_run_state(None, stopped(), None).await.unwrap();
    seen.push(revision().await);
    stage.store.set_ceiling(7).await.unwrap();
    seen.push(revision().await);
    stage.store.delete_queue(&queue, false, Default::default()).await.unwrap();
    seen.push(revision().await);
    for pair in seen.windows(2) {
        assert_ne!(pair[0], pair[1], "{seen:?}");
    }
    stage.queue("letters").await;
    let last = revision().await;
    stage.send_to(&queue, "messages change nothing").await;
    assert_eq!(revision().await, last);
}

fn attendance(wants: Vec<Want>) -> Attendance {
    Attendance { replica: replica(), incarnation: 7, good_for: LONG, wants, leaving: false }
}
