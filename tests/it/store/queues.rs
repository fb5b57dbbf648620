//! Promises about queues and the pump.

use jiff::Timestamp;
use pumphouse::model::{
    Action, Backoff, Bounds, Breaker, BreakerSettings, Builtin, Concurrency, Curve, ErrorKind,
    Format, GroupOnDead, Guard, GuardChange, Handler, Hold, HttpHandler, Jitter, Match, OnExpiry,
    QueueRecord, QueueSettings, RateLimit, Recovery, Retention, RetryStatuses, Rule, RunState,
    Scope, Settlement, State, Stopped,
};
use pumphouse::store::{CEILING_DEFAULT, DeleteQueue, Precondition, PumpRecord, PutQueue};
use std::time::Duration;

use crate::support::heard;
use crate::support::stage::{
    ALL, LONG, Stage, dead_letter, message, message_in, of_queue, queue_name,
};

pub(crate) async fn a_queue_is_what_was_put(stage: Stage) {
    let name = queue_name("letters");
    assert_eq!(stage.store.queue(&name).await.unwrap(), None);
    for (round, settings) in [QueueSettings::default(), every_setting()].into_iter().enumerate() {
        let put = stage.store.put_queue(&name, settings.clone(), Precondition::None).await.unwrap();
        let guard = Guard::default();
        let record = QueueRecord { name: name.clone(), settings, state: RunState::Running, guard };
        match put {
            PutQueue::Created(put) if round == 0 => assert_eq!(put, record),
            PutQueue::Replaced(put) if round == 1 => assert_eq!(put, record),
            other => panic!("round {round}: {other:?}"),
        }
        assert_eq!(stage.store.queue(&name).await.unwrap(), Some(record.clone()));
        assert_eq!(stage.store.queues().await.unwrap(), [record]);
    }
}

pub(crate) async fn a_guard_changes_once_and_whoever_listens_hears_of_it(stage: Stage) {
    let name = stage.queue("letters").await;
    let tell = async |change| stage.store.guard(&name, change).await.unwrap().unwrap();
    let mut news = stage.store.news().of_settings();
    news.mark_unchanged();
    let hold = Hold { wait: LONG, longest: LONG };
    let failed = GuardChange::Failed(BreakerSettings::default(), Some(hold));
    let open = tell(failed.clone()).await;
    assert!(matches!(open.breaker, Breaker::Open { times: 1, .. }), "{open:?}");
    heard(&mut news).await;
    let held_until = open.held_until.expect("it is held as well");
    let at = stage.record(stage.send_to(&name, "now").await).await.head.enqueued_at;
    let wait = Duration::try_from(held_until.duration_since(at)).unwrap();
    assert!(wait >= LONG && wait < LONG * 2, "{wait:?}");
    assert_eq!(tell(GuardChange::Failed(BreakerSettings::default(), None)).await, open);
    assert_eq!(tell(GuardChange::TimeIsUp(BreakerSettings::default())).await, open);
    let record = stage.store.queue(&name).await.unwrap().unwrap();
    assert_eq!(record.guard, open);
    let lifted = tell(GuardChange::Lifted).await;
    assert_eq!((lifted.held_until, lifted.breaker), (None, Breaker::Closed));
    assert!(lifted.version > open.version);
    let nowhere = stage.store.guard(&queue_name("nowhere"), failed).await.unwrap();
    assert_eq!(nowhere, None);
}

pub(crate) async fn another_handler_or_breaker_begins_anew(stage: Stage) {
    let name = stage.queue("letters").await;
    let mut settings = QueueSettings::default();
    for (anew, change) in [
        (false, (|settings| settings.max_messages = Some(7)) as fn(&mut QueueSettings)),
        (true, |settings| settings.breaker = None),
        (true, |settings| settings.handler = Handler::Builtin { name: Builtin::Log }),
    ] {
        let failed = GuardChange::Failed(BreakerSettings::default(), None);
        let open = stage.store.guard(&name, failed).await.unwrap().unwrap();
        assert_ne!(open.breaker, Breaker::Closed);
        change(&mut settings);
        let put = stage.store.put_queue(&name, settings.clone(), Precondition::None).await.unwrap();
        let PutQueue::Replaced(record) = put else { panic!("{put:?}") };
        assert_eq!(record.guard.breaker == Breaker::Closed, anew);
        assert_eq!(stage.store.queue(&name).await.unwrap(), Some(record));
    }
}

pub(crate) async fn queues_are_listed_by_name(stage: Stage) {
    for name in ["parcels", "0-first", "letters", "z.last"] {
        stage.queue(name).await;
    }
    let names = stage.store.queues().await.unwrap().into_iter().map(|queue| queue.name);
    let names = names.map(|name| name.as_str().to_owned()).collect::<Vec<_>>();
    assert_eq!(names, ["0-first", "letters", "parcels", "z.last"]);
}

pub(crate) async fn replacing_settings_keeps_run_state_and_messages(stage: Stage) {
    let name = stage.queue("letters").await;
    let id = stage.send_to(&name, "stays").await;
    let state = stopped();
    assert!(stage.store.set_run_state(Some(&name), state.clone(), None).await.unwrap());
    let put = stage.store.put_queue(&name, every_setting(), Precondition::None).await.unwrap();
    let guard = Guard::default();
    let record = QueueRecord { name: name.clone(), settings: every_setting(), state, guard };
    assert_eq!(put, PutQueue::Replaced(record.clone()));
    assert_eq!(stage.store.queue(&name).await.unwrap(), Some(record));
    assert_eq!(stage.state(id).await, Some(State::Ready));
    assert_eq!(stage.claim_one(&name).await.lease.id, id);
}

pub(crate) async fn a_queue_is_put_only_if_the_precondition_holds(stage: Stage) {
    let name = queue_name("letters");
    let put = |settings: QueueSettings, precondition| {
        let (store, name) = (stage.store.clone(), name.clone());
        async move { store.put_queue(&name, settings, precondition).await.unwrap() }
    };
    let (first, second) = (QueueSettings::default(), every_setting());
    let no = PutQueue::PreconditionFailed;
    assert_eq!(put(first.clone(), Precondition::Exists).await, no);
    assert_eq!(put(first.clone(), Precondition::Matches(first.etag())).await, no);
    assert_eq!(stage.store.queue(&name).await.unwrap(), None);

    let created = put(first.clone(), Precondition::Absent).await;
    assert!(matches!(created, PutQueue::Created(_)), "{created:?}");
    assert_eq!(put(second.clone(), Precondition::Absent).await, no);
    assert_eq!(put(second.clone(), Precondition::Matches(second.etag())).await, no);
    assert_eq!(stage.store.queue(&name).await.unwrap().unwrap().settings, first);

    let replaced = put(second.clone(), Precondition::Matches(first.etag())).await;
    assert!(matches!(replaced, PutQueue::Replaced(_)), "{replaced:?}");
    assert_eq!(put(first.clone(), Precondition::Matches(first.etag())).await, no);
    let replaced = put(first.clone(), Precondition::Exists).await;
    assert!(matches!(replaced, PutQueue::Replaced(_)), "{replaced:?}");
}

pub(crate) async fn of_two_operators_with_one_etag_one_wins(stage: Stage) {
    let name = stage.queue("letters").await;
    let etag = QueueSettings::default().etag();
    let mut operators = tokio::task::JoinSet::new();
    for limit in 1..=8 {
        let (store, name) = (stage.store.clone(), name.clone());
        let settings = QueueSettings { max_messages: Some(limit), ..QueueSettings::default() };
        let precondition = Precondition::Matches(etag.clone());
        operators
            .spawn(async move { store.put_queue(&name, settings, precondition).await.unwrap() });
    }
    let answers = operators.join_all().await;
    let won = answers.iter().filter(|answer| matches!(answer, PutQueue::Replaced(_)));
    assert_eq!(won.count(), 1, "{answers:?}");
}

pub(crate) async fn a_queue_that_has_messages_is_not_deleted(stage: Stage) {
    let name = queue_name("letters");
    let delete =
        || async { stage.store.delete_queue(&name, false, Precondition::None).await.unwrap() };
    assert_eq!(delete().await, DeleteQueue::NoSuchQueue);
    stage.queue("letters").await;
    stage.send(message_in(&name, "scheduled", LONG)).await;
    assert_eq!(delete().await, DeleteQueue::NotEmpty);
    stage.store.purge(&name, ALL).await.unwrap();
    stage.send_to(&name, "ready").await;
    assert_eq!(delete().await, DeleteQueue::NotEmpty);
    let leased = stage.claim_one(&name).await;
    assert_eq!(delete().await, DeleteQueue::NotEmpty);
    stage.must_settle(&leased, dead_letter("a test")).await;
    assert_eq!(delete().await, DeleteQueue::NotEmpty);
    stage.store.delete_dead(leased.lease.id).await.unwrap();
    let done = stage.send_and_settle(&name, Settlement::Ack).await;
    assert_eq!(delete().await, DeleteQueue::Deleted, "what is done holds nothing up");
    assert_eq!(delete().await, DeleteQueue::NoSuchQueue);
    assert_eq!(stage.look(done).await, None);
    assert_eq!(stage.store.queue(&name).await.unwrap(), None);
}

pub(crate) async fn a_queue_deleted_by_force_takes_everything_with_it(stage: Stage) {
    let name = stage.queue("letters").await;
    let other = stage.queue("parcels").await;
    let key = pumphouse::model::Idempotency::new("test", "k", [1; 32]);
    let mut ids = vec![
        stage.send_and_settle(&name, Settlement::Ack).await,
        stage.send_and_settle(&name, dead_letter("a test")).await,
    ];
    ids.push(stage.send_to(&name, "to be leased").await);
    let leased = stage.claim_one(&name).await;
    let mut keyed = message(&name, "ready");
    keyed.keys.push(key);
    ids.push(stage.send(keyed.clone()).await.id);
    ids.push(stage.send(message_in(&name, "scheduled", LONG)).await.id);
    let spared = stage.send_to(&other, "spared").await;

    let deleted = stage.store.delete_queue(&name, true, Precondition::None).await.unwrap();
    assert_eq!(deleted, DeleteQueue::Deleted);
    for id in ids {
        assert_eq!(stage.look(id).await, None);
        assert_eq!(stage.store.payload(id).await.unwrap(), None);
    }
    assert_eq!(stage.list(&of_queue(&name), ALL).await, []);
    assert_eq!(stage.state(spared).await, Some(State::Ready));
    let lost = stage.settle(&leased, Settlement::Ack).await;
    assert_eq!(lost, pumphouse::store::Settled::LeaseLost);

    stage.queue("letters").await;
    assert_eq!(stage.depth(&name).await.ready, 0);
    stage.send(pumphouse::model::NewMessage { id: Default::default(), ..keyed }).await;
}

pub(crate) async fn a_queue_is_deleted_only_if_the_precondition_holds(stage: Stage) {
    let name = stage.queue("letters").await;
    let delete = |precondition| {
        let (store, name) = (stage.store.clone(), name.clone());
        async move { store.delete_queue(&name, true, precondition).await.unwrap() }
    };
    let wrong = Precondition::Matches(every_setting().etag());
    assert_eq!(delete(wrong).await, DeleteQueue::PreconditionFailed);
    assert!(stage.store.queue(&name).await.unwrap().is_some());
    let right = Precondition::Matches(QueueSettings::default().etag());
    assert_eq!(delete(right).await, DeleteQueue::Deleted);
}

pub(crate) async fn a_queue_is_stopped_and_started(stage: Stage) {
    let name = stage.queue("letters").await;
    let other = stage.queue("parcels").await;
    let state = |name| {
        let store = stage.store.clone();
        async move { store.queue(name).await.unwrap().expect("it is there").state }
    };
    assert!(stage.store.set_run_state(Some(&name), stopped(), None).await.unwrap());
    assert_eq!(state(&name).await, stopped());
    assert_eq!(state(&other).await, RunState::Running);
    assert_eq!(stage.store.pump().await.unwrap().state, RunState::Running);
    stage.send_to(&name, "a stopped queue keeps accepting").await;
    assert!(stage.store.set_run_state(Some(&name), RunState::Running, None).await.unwrap());
    assert_eq!(state(&name).await, RunState::Running);
    let from = |from: RunState| stage.store.set_run_state(Some(&name), stopped(), Some(from));
    assert!(!from(stopped()).await.unwrap(), "it runs, so this is not what is changed");
    assert_eq!(state(&name).await, RunState::Running);
    assert!(from(RunState::Running).await.unwrap());
    assert!(!from(RunState::Running).await.unwrap(), "an operator was faster");
    assert_eq!(state(&name).await, stopped());
    let nowhere = queue_name("nowhere");
    assert!(!stage.store.set_run_state(Some(&nowhere), stopped(), None).await.unwrap());
}

pub(crate) async fn the_pump_of_a_new_store_runs_and_remembers_what_it_is_told(stage: Stage) {
    let queue = stage.queue("letters").await;
    let new = PumpRecord { state: RunState::Running, ceiling: CEILING_DEFAULT };
    assert_eq!(stage.store.pump().await.unwrap(), new);
    assert!(stage.store.set_run_state(None, stopped(), None).await.unwrap());
    stage.store.set_ceiling(7).await.unwrap();
    let told = PumpRecord { state: stopped(), ceiling: 7 };
    assert_eq!(stage.store.pump().await.unwrap(), told);
    let record = stage.store.queue(&queue).await.unwrap().expect("it is there");
    assert_eq!(record.state, RunState::Running, "a queue has a state of its own");
    let from = |from: RunState| stage.store.set_run_state(None, RunState::Running, Some(from));
    assert!(!from(RunState::Running).await.unwrap());
    assert!(from(stopped()).await.unwrap());
    assert_eq!(stage.store.pump().await.unwrap().state, RunState::Running);
}

pub(crate) async fn whoever_listens_hears_of_settings(stage: Stage) {
    let mut news = stage.store.news().of_settings();
    let name = stage.queue("letters").await;
    heard(&mut news).await;
    stage.store.set_run_state(Some(&name), stopped(), None).await.unwrap();
    heard(&mut news).await;
    stage.store.set_run_state(None, stopped(), None).await.unwrap();
    heard(&mut news).await;
    stage.store.set_ceiling(7).await.unwrap();
    heard(&mut news).await;
    stage.store.delete_queue(&name, false, Precondition::None).await.unwrap();
    heard(&mut news).await;
}

pub(crate) async fn a_store_that_works_says_so_and_closes_twice(stage: Stage) {
    stage.store.check().await.unwrap();
    stage.store.close().await;
    stage.store.close().await;
}

fn stopped() -> RunState {
    RunState::Stopped(Stopped {
        at: Timestamp::from_microsecond(1_700_000_000_123_456).unwrap(),
        by: "operator".to_owned(),
        reason: Some("a test, nothing else".to_owned()),
        until: Some(Timestamp::from_second(1_800_000_000).unwrap()),
    })
}

/// Settings of which none is the default.
fn every_setting() -> QueueSettings {
    let http = HttpHandler {
        format: Format::Structured,
        url: "https://example.com/hook?a=b".parse().unwrap(),
        timeout: Duration::from_millis(1234),
        headers: [("x-key".to_owned(), "a 'quoted' \"value\"".to_owned())].into(),
    };
    let matches = Match {
        status: vec!["5xx".parse().unwrap()],
        error_kind: vec![ErrorKind::Malformed],
        header: [("x-a".to_owned(), "b".to_owned())].into(),
        attempt: Some("3-".parse().unwrap()),
    };
    let settings = QueueSettings {
        handler: Handler::Http(http),
        concurrency: Concurrency {
            limit: 3,
            scope: Scope::Replica,
            adaptive: Some(Bounds { min: 2, max: 4 }),
        },
        rate_limit: Some(RateLimit { limit: 70, period: Duration::from_secs(71), burst: 72 }),
        lease: Some(Duration::from_micros(7_000_001)),
        recovery: Recovery {
            immediate: 1,
            max_attempts: 5,
            max_crashes: 6,
            backoff: Backoff {
                curve: Curve::Linear,
                base: Duration::from_millis(10),
                factor: 1.1,
                max: Duration::from_secs(9),
                jitter: Jitter::None,
            },
            max_age: Duration::from_secs(77),
            retry_after_max: Duration::from_secs(78),
            retry_statuses: RetryStatuses::All,
            rules: vec![Rule { matches, action: Action::Retry { delay: Some(LONG) } }],
        },
        breaker: None,
        dedup_window: Duration::from_secs(79),
        retention: Retention { completed: Duration::from_secs(80), dead: Duration::from_secs(81) },
        max_messages: Some(82),
        on_expiry: OnExpiry::DeadLetter,
        group_on_dead: GroupOnDead::Block,
    };
    assert_ne!(settings.handler, Handler::Builtin { name: Builtin::Log });
    assert_eq!(settings.check(), Ok(()));
    settings
}
