//! Promises about leases that are held outside of any process of the house, and about schedules.

use futures::future::join_all;
use jiff::Timestamp;
use pumphouse::model::{
    Lease, Missed, Schedule, ScheduleName, ScheduleState, Settlement, State, Ticket, Timetable,
    Token,
};
use pumphouse::store::{Attendance, Claim, Precondition, PutSchedule};
use tokio_util::task::TaskTracker;

use crate::support::postgres::fresh_database;
use crate::support::stage::{ALL, LONG, SHORT, Stage, claim, replica};
use crate::support::stores;

pub(crate) async fn what_is_held_outside_is_bounded_and_outlives_its_process(stage: Stage) {
    let queue = stage.queue("jobs").await;
    for body in ["1", "2", "3", "4"] {
        stage.send_to(&queue, body).await;
    }
    let attend = |incarnation| Attendance {
        replica: replica(),
        incarnation,
        good_for: LONG,
        wants: Vec::new(),
        leaving: false,
    };
    stage.store.attend(attend(1)).await.unwrap();
    let outside = |max| Claim { out_max: Some(3), ..claim(&queue, max, LONG) };
    let first = stage.store.lease(outside(2)).await.unwrap();
    let second = stage.store.lease(outside(10)).await.unwrap();
    assert_eq!((first.len(), second.len()), (2, 1), "three may be out");
    assert_eq!(stage.store.lease(outside(10)).await.unwrap().len(), 0);
    // The process starts again: what it gave out is still held.
    let attended = stage.store.attend(attend(2)).await.unwrap();
    assert_eq!(attended.reaped, []);
    assert_eq!(stage.depth(&queue).await.leased, 3);
    stage.must_settle(&first[0], Settlement::Ack).await;
    assert_eq!(stage.store.lease(outside(10)).await.unwrap().len(), 1, "there is room for one");
}

pub(crate) async fn what_is_held_is_known_by_its_ticket(stage: Stage) {
    let queue = stage.queue("jobs").await;
    stage.send_to(&queue, "1").await;
    stage.send_to(&queue, "2").await;
    let outside = Claim { out_max: Some(10), ..claim(&queue, 1, LONG) };
    let one = stage.store.lease(outside.clone()).await.unwrap().remove(0);
    let short = Claim { duration: SHORT, ..outside };
    let lost = stage.store.lease(short).await.unwrap().remove(0);
    let ticket = Ticket::from(&one.lease);
    assert_eq!(Ticket::parse(&ticket.to_string()), Some(ticket));
    let forged = Ticket { token: Token(ticket.token.0 ^ 1), ..ticket };
    let unknown = Ticket { seq: 1 << 40, ..ticket };
    stage.pass(SHORT).await;
    let tickets = vec![ticket, forged, unknown, Ticket::from(&lost.lease), ticket];
    let held = stage.store.held(tickets).await.unwrap();
    let known = held.iter().map(Option::is_some).collect::<Vec<_>>();
    assert_eq!(known, [true, false, false, false, true]);
    let held = held[0].as_ref().unwrap();
    assert_eq!((&held.head, held.tries), (&one.message.head, one.tries));
    assert_eq!(held.leased_at, one.leased_at);
    assert!(held.now >= held.leased_at);
    let lease = Lease { until: one.lease.until, ..one.lease.clone() };
    assert_eq!(stage.store.renew(vec![lease], LONG).await.unwrap(), [true]);
    assert_eq!(stage.store.reap(ALL).await.unwrap().len(), 1, "the lost one comes back");
    assert_eq!(stage.state(lost.lease.id).await, Some(State::Ready));
}

pub(crate) async fn a_schedule_is_turned_by_whoever_saw_it_last(stage: Stage) {
    let name = ScheduleName::parse("nightly").unwrap();
    let at_hour = |hour, missed| Schedule {
        timetable: Timetable::Cron {
            expression: format!("0 {hour} * * *"),
            time_zone: "Europe/Berlin".to_owned(),
        },
        message: serde_json::from_str(r#"{"queue": "a", "payload": {"n":  1}}"#).unwrap(),
        missed,
        paused: false,
    };
    let schedule = |missed| at_hour(3, missed);
    let store = &stage.store;
    let at = |second| Timestamp::from_second(second).unwrap();
    let put = store.put_schedule(&name, schedule(Missed::Once), Some(at(7)), Precondition::Absent);
    let PutSchedule::Created(made) = put.await.unwrap() else { panic!("it is new") };
    assert_eq!(store.schedules().await.unwrap(), std::slice::from_ref(&made));
    let state = ScheduleState { next_at: Some(at(8)), firings: Vec::new() };
    assert!(store.turn_schedule(&name, made.version, state.clone()).await.unwrap());
    assert!(!store.turn_schedule(&name, made.version, state.clone()).await.unwrap(), "once");
    let turned = store.schedules().await.unwrap().remove(0);
    assert_eq!((turned.state, turned.schedule), (state, schedule(Missed::Once)));
    let etag = Precondition::Matches(made.schedule.etag());
    // Who says the same about when does not forget what is due.
    let put = store.put_schedule(&name, schedule(Missed::Skip), Some(at(9)), etag.clone());
    let PutSchedule::Replaced(changed) = put.await.unwrap() else { panic!("it was there") };
    assert!(changed.version > turned.version && changed.state.next_at == Some(at(8)));
    let later = at_hour(4, Missed::Skip);
    let put = store.put_schedule(&name, later.clone(), Some(at(9)), Precondition::None);
    let PutSchedule::Replaced(moved) = put.await.unwrap() else { panic!("it was there") };
    assert_eq!(moved.state.next_at, Some(at(9)));
    let put =
        store.put_schedule(&name, Schedule { paused: true, ..later }, None, Precondition::None);
    let PutSchedule::Replaced(changed) = put.await.unwrap() else { panic!("it was there") };
    assert!(changed.version > moved.version && changed.state.next_at.is_none());
    let put = store.put_schedule(&name, schedule(Missed::Once), None, etag);
    assert_eq!(put.await.unwrap(), PutSchedule::PreconditionFailed);
    assert!(store.delete_schedule(&name).await.unwrap());
    assert!(!store.delete_schedule(&name).await.unwrap());
    assert!(!store.turn_schedule(&name, changed.version, ScheduleState::default()).await.unwrap());
}

/// Many who ask at the same time, over all these stores on one database, are bounded together.
async fn those_who_ask_at_once_hold_no_more_than_may_be_out(stages: Vec<Stage>) {
    let stage = &stages[0];
    for round in 0..10 {
        let queue = stage.queue(&format!("jobs-{round}")).await;
        for body in 0..30 {
            stage.send_to(&queue, &body.to_string()).await;
        }
        let claims = (0..20).map(|number| {
            let store = stages[number % stages.len()].store.clone();
            let outside = Claim { out_max: Some(3), ..claim(&queue, 1 + number % 3, LONG) };
            TaskTracker::new().spawn(async move { store.lease(outside).await.unwrap().len() })
        });
        let held = join_all(claims).await.into_iter().map(Result::unwrap).sum::<usize>();
        assert_eq!((held, stage.depth(&queue).await.leased), (3, 3), "three are out in all");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_ask_at_once_on_sqlite() {
    those_who_ask_at_once_hold_no_more_than_may_be_out(vec![stores::sqlite().await]).await;
}

/// Here over two replicas.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_ask_at_once_on_postgres() {
    let url = fresh_database().await;
    let stages = vec![stores::on_postgres(&url).await, stores::on_postgres(&url).await];
    those_who_ask_at_once_hold_no_more_than_may_be_out(stages).await;
}
