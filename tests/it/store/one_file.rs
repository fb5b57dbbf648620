//! What only the SQLite store promises: one process, one file, and what of it survives.

use std::sync::Arc;

use futures::FutureExt;
use futures::future::join_all;
use jiff::Timestamp;
use pumphouse::clock::ManualClock;
use pumphouse::model::{DeliveryRecord, Idempotency, NewMessage, Outcome, Settlement, State};
use pumphouse::store::{
    Amended, Amendment, Attendance, EnqueueOutcome, Enqueued, Error, Filter, Promoted, Settle,
    Settled, Sqlite, Store,
};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, SqliteConnection};
use tempfile::TempDir;

use crate::support::eventually;
use crate::support::stage::{
    ALL, LONG, SHORT, Stage, claim, dead_letter, message, message_in, replica, retry_at_once,
    settle, together,
};

/// A file, a clock, and no process that has them open yet.
struct Ground {
    directory: TempDir,
    clock: Arc<ManualClock>,
}

impl Ground {
    fn new() -> Self {
        let start = Timestamp::from_second(1_700_000_000).unwrap();
        let clock = Arc::new(ManualClock::new(start, 0.5));
        Self { directory: tempfile::tempdir().unwrap(), clock }
    }

    fn path(&self) -> std::path::PathBuf {
        self.directory.path().join("house.db")
    }

    fn url(&self) -> String {
        format!("sqlite://{}", self.path().display())
    }

    async fn open(&self) -> Result<Sqlite, Error> {
        Sqlite::open(&self.url(), self.clock.clone()).await
    }

    async fn stage(&self) -> Stage {
        Stage::manual(Arc::new(self.open().await.expect("it can be opened")), self.clock.clone())
    }

    /// A way into the file besides the store, which SQLite allows.
    async fn back_door(&self) -> SqliteConnection {
        SqliteConnectOptions::new().filename(self.path()).connect().await.unwrap()
    }
}

fn assert_refused(opened: Result<Sqlite, Error>, why: &str) {
    match opened {
        Err(Error::Refused { what }) => assert!(what.contains(why), "{what}"),
        Err(other) => panic!("refused for another reason: {other:?}"),
        Ok(_) => panic!("not refused, although: {why}"),
    }
}

#[tokio::test]
async fn a_second_process_is_refused_until_the_first_has_closed() {
    let ground = Ground::new();
    let first = ground.open().await.unwrap();
    assert_refused(ground.open().await, "another process");
    let migrated = Sqlite::migrate(&ground.url()).await;
    assert!(matches!(migrated, Err(Error::Refused { .. })), "{migrated:?}");
    first.close().await;
    ground.open().await.unwrap().close().await;
}

#[tokio::test]
async fn what_cannot_be_kept_is_refused() {
    let clock = Ground::new().clock;
    for (url, why) in [
        ("sqlite::memory:", "needs a file"),
        ("sqlite://", "needs a file"),
        ("sqlite://house.db?mode=ro", "nothing can be set"),
        ("sqlite:///nowhere/at/all/house.db", "cannot be opened"),
    ] {
        assert_refused(Sqlite::open(url, clock.clone()).await, why);
    }
}

#[tokio::test]
async fn a_file_that_is_no_database_is_not_touched() {
    let ground = Ground::new();
    let text = "dear diary, ".repeat(1000);
    std::fs::write(ground.path(), &text).unwrap();
    let opened = ground.open().await;
    assert!(matches!(opened, Err(Error::Corrupt { .. })), "{opened:?}");
    assert_eq!(std::fs::read_to_string(ground.path()).unwrap(), text);
}

#[tokio::test]
async fn a_schema_that_is_newer_than_the_program_is_refused() {
    let ground = Ground::new();
    Sqlite::migrate(&ground.url()).await.unwrap();
    let future =
        "insert into _sqlx_migrations (version, description, success, checksum, execution_time)
        values (9999, 'from the future', true, x'00', 0)";
    sqlx::query(future).execute(&mut ground.back_door().await).await.unwrap();
    assert_refused(ground.open().await, "newer than this program");
}

#[cfg(unix)]
#[tokio::test]
async fn the_files_can_be_read_by_nobody_else() {
    use std::os::unix::fs::PermissionsExt;
    let ground = Ground::new();
    let stage = ground.stage().await;
    stage.queue("letters").await;
    for file in ["house.db", "house.db-wal", "house.db.lock"] {
        let mode = std::fs::metadata(ground.directory.path().join(file)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600, "{file}");
    }
}

#[tokio::test]
async fn what_was_answered_is_there_for_the_next_process() {
    let ground = Ground::new();
    let first = ground.stage().await;
    let queue = first.queue_with("letters", |settings| settings.max_messages = Some(7)).await;
    let id = first.send_to(&queue, "a letter").await;
    first.store.set_ceiling(77).await.unwrap();
    first.store.close().await;

    let second = ground.stage().await;
    assert_eq!(second.bodies(&queue).await, ["a letter"]);
    assert_eq!(second.store.pump().await.unwrap().ceiling, 77);
    let kept = second.store.queue(&queue).await.unwrap().unwrap();
    assert_eq!(kept.settings.max_messages, Some(7));
    assert_eq!(second.claim_one(&queue).await.lease.id, id);
    assert_ne!(second.send_to(&queue, "another").await, id);
    second.store.check().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_is_dropped_lets_the_next_one_in() {
    let ground = Ground::new();
    let stage = ground.stage().await;
    let queue = stage.queue("letters").await;
    stage.send_to(&queue, "a letter").await;
    drop(stage);
    eventually("the file is free", async || ground.open().await.is_ok()).await;
}

#[tokio::test]
async fn nothing_can_be_written_to_a_store_that_is_closed() {
    let ground = Ground::new();
    let stage = ground.stage().await;
    let queue = stage.queue("letters").await;
    stage.store.close().await;
    let sent = stage.store.enqueue(together(vec![message(&queue, "late")])).await;
    assert!(matches!(sent, Err(Error::Unavailable(_))), "{sent:?}");
}

#[tokio::test]
async fn the_next_process_takes_back_what_the_last_one_held() {
    let ground = Ground::new();
    let first = ground.stage().await;
    let queue = first.queue_with("letters", |settings| settings.recovery.max_crashes = 2).await;
    let id = first.send_to(&queue, "a letter").await;
    attend(&first, 1).await;
    first.claim_one(&queue).await;
    assert_eq!(attend(&first, 1).await, [], "its own leases stay");
    first.store.close().await;

    let second = ground.stage().await;
    let reaped = attend(&second, 2).await;
    assert_eq!(reaped, [(id, State::Ready)]);
    assert_eq!(attend(&second, 2).await, []);
    let record = second.record(id).await;
    assert_eq!((record.tries.attempts, record.tries.crashes), (1, 1));
    let lost = &second.deliveries(id).await[0];
    assert_eq!((lost.number, lost.outcome), (1, Outcome::LeaseLost));
    second.claim_one(&queue).await;
    second.store.close().await;

    let third = ground.stage().await;
    assert_eq!(attend(&third, 3).await, [(id, State::Dead)], "twice is enough here");
}

async fn attend(stage: &Stage, incarnation: i64) -> Vec<(pumphouse::model::MessageId, State)> {
    let attendance = Attendance {
        replica: replica(),
        incarnation,
        good_for: LONG,
        wants: Vec::new(),
        leaving: false,
    };
    let attended = stage.store.attend(attendance).await.unwrap();
    attended.reaped.into_iter().map(|reaped| (reaped.id, reaped.state)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_bad_call_does_not_fail_those_that_share_its_transaction() {
    let ground = Ground::new();
    let stage = ground.stage().await;
    let queue = stage.queue("letters").await;
    let poison = "create trigger poison before insert on content when new.kind = 'poison'
        begin select raise(abort, 'poisoned'); end";
    sqlx::query(poison).execute(&mut ground.back_door().await).await.unwrap();
    let calls = (0..100).map(|n| {
        let kind = if n == 50 { "poison" } else { "letter" };
        let message = NewMessage { kind: Some(kind.to_owned()), ..message(&queue, "text") };
        stage.store.enqueue(together(vec![message]))
    });
    for (n, answer) in join_all(calls).await.into_iter().enumerate() {
        match answer {
            Err(error) => {
                assert_eq!(n, 50, "{error:?}");
                assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
            }
            Ok(EnqueueOutcome::Done(answers)) => {
                assert_ne!(n, 50);
                assert!(matches!(answers[..], [Enqueued::New(_)]), "{answers:?}");
            }
            Ok(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(stage.depth(&queue).await.ready, 99);
    assert_counts_are_true(&ground).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_bad_settlement_does_not_fail_the_others() {
    let ground = Ground::new();
    let stage = ground.stage().await;
    let queue = stage.queue("letters").await;
    let poison = "create trigger poison before insert on delivery when new.error = 'poison'
        begin select raise(abort, 'poisoned'); end";
    sqlx::query(poison).execute(&mut ground.back_door().await).await.unwrap();
    stage.send_all((0..100).map(|_| message(&queue, "text")).collect()).await;
    let leased = stage.claim(&queue, ALL).await;
    let calls = leased.iter().enumerate().map(|(n, leased)| {
        let settle = settle(leased, Settlement::Ack, Vec::new());
        let error = Some(if n == 50 { "poison" } else { "none" }.to_owned());
        let delivery = settle.delivery.map(|delivery| DeliveryRecord { error, ..delivery });
        stage.store.settle(Settle { delivery, ..settle })
    });
    for (n, answer) in join_all(calls).await.into_iter().enumerate() {
        assert_eq!(answer.is_err(), n == 50, "{n}: {answer:?}");
    }
    assert_eq!(stage.depth(&queue).await.leased, 1);
    assert_eq!(stage.state(leased[50].lease.id).await, Some(State::Leased));
    assert_counts_are_true(&ground).await;
}

#[tokio::test]
async fn a_message_that_cannot_be_read_is_set_aside_and_the_next_is_taken() {
    let ground = Ground::new();
    let stage = ground.stage().await;
    let queue = stage.queue("letters").await;
    let mut ids = Vec::new();
    for body in ["broken details", "no content", "impossible priority", "good"] {
        ids.push(stage.send_to(&queue, body).await);
    }
    let mut back_door = ground.back_door().await;
    for damage in [
        "update content set details = '{\"so\":' where seq = 1",
        "delete from content where seq = 2",
        "update message set rank = 1000 where seq = 3",
    ] {
        sqlx::query(damage).execute(&mut back_door).await.unwrap();
    }
    let leased = stage.claim(&queue, 1).await;
    assert_eq!(leased.len(), 1);
    assert_eq!(leased[0].lease.id, ids[3]);
    let leased_then = stage.claim(&queue, ALL).await;
    assert!(leased_then.is_empty(), "{leased_then:?}");
    assert_eq!(stage.depth(&queue).await.dead, 3);
    let reason = stage.record(ids[0]).await.reason.expect("a dead letter has a reason");
    assert!(reason.contains("cannot be read"), "{reason}");
}

#[tokio::test]
async fn a_message_whose_name_cannot_be_read_stands_in_nobodys_way() {
    let ground = Ground::new();
    let stage = ground.stage().await;
    let queue = stage.queue("letters").await;
    stage.send_and_settle(&queue, dead_letter("a test")).await;
    let whole = stage.send_and_settle(&queue, dead_letter("a test")).await;
    stage.send_to(&queue, "lost").await;
    stage.lose_a_lease(&queue).await;
    let mut back_door = ground.back_door().await;
    for damage in [
        "update message set id = x'00' where seq = 1",
        "update message set id = x'01', replica = '' where seq = 3",
    ] {
        sqlx::query(damage).execute(&mut back_door).await.unwrap();
    }
    assert_eq!(stage.list(&Filter::default(), ALL).await.len(), 3);
    assert_eq!(stage.store.reap(ALL).await.unwrap().len(), 1);
    let redriven = stage.store.redrive(Filter::default(), ALL).await.unwrap();
    assert_eq!((redriven.len(), redriven[1]), (2, whole));
    let leased = stage.claim(&queue, ALL).await;
    assert_eq!(leased.iter().map(|leased| leased.lease.id).collect::<Vec<_>>(), [whole]);
    assert_eq!(stage.depth(&queue).await.dead, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_nobody_waits_for_any_more_holds_nothing() {
    let ground = Ground::new();
    let stage = ground.stage().await;
    let queue = stage.queue("letters").await;
    stage.send_to(&queue, "a letter").await;
    for _ in 0..50 {
        // Sent, and given up before it can be answered.
        assert!(stage.store.lease(claim(&queue, 1, LONG)).now_or_never().is_none());
    }
    eventually("the message can be leased", async || stage.depth(&queue).await.leased == 0).await;
    stage.claim_one(&queue).await;
}

#[tokio::test]
async fn counts_are_true_whatever_happens() {
    let ground = Ground::new();
    let stage = ground.stage().await;
    let queue = stage.queue_with("letters", |s| s.retention.completed = SHORT).await;
    let other = stage.queue("parcels").await;
    for round in 0..6 {
        let mut some = (0..12).map(|_| message(&queue, "now")).collect::<Vec<_>>();
        some.extend((0..3).map(|_| message_in(&queue, "later", SHORT)));
        some.push(NewMessage {
            expires: Some(pumphouse::model::When::In(SHORT / 2)),
            ..message(&queue, "soon stale")
        });
        stage.send_all(some).await;
        let leased = stage.claim(&queue, 7).await;
        let [ack, retry, later, dead, discard, release, ..] = &leased[..] else { panic!() };
        let sent = vec![message(&other, "sent with an ack")];
        let settled = stage.settle_and_send(ack, Settlement::Ack, sent).await;
        assert!(matches!(settled, Settled::Done { .. }));
        stage.must_settle(retry, retry_at_once()).await;
        stage.must_settle(later, Settlement::Retry { after: LONG }).await;
        stage.must_settle(dead, dead_letter("enough")).await;
        stage.must_settle(discard, Settlement::Discard { reason: "no".to_owned() }).await;
        stage.must_settle(release, Settlement::Release).await;
        let waiting = stage.send_to(&queue, "to be cancelled").await;
        stage.store.amend(waiting, Amendment::Cancel).await.unwrap();
        let postponed = stage.send_to(&queue, "to be postponed").await;
        let later = Amendment::Reschedule(pumphouse::model::When::In(LONG));
        stage.store.amend(postponed, later).await.unwrap();
        assert_counts_are_true(&ground).await;

        let short = claim(&other, 1, SHORT);
        stage.store.lease(short).await.unwrap();
        stage.pass(SHORT).await;
        stage.store.promote(ALL).await.unwrap();
        stage.store.reap(ALL).await.unwrap();
        stage.store.sweep(ALL).await.unwrap();
        assert_counts_are_true(&ground).await;

        match round {
            1 => drop(stage.store.redrive(Default::default(), 1).await.unwrap()),
            2 => drop(stage.store.purge(&queue, ALL).await.unwrap()),
            3 => drop(stage.store.delete_queue(&other, true, Default::default()).await.unwrap()),
            4 => drop(stage.store.delete_dead(dead.lease.id).await.unwrap()),
            _ => (),
        }
        stage.queue("parcels").await;
        assert_counts_are_true(&ground).await;
    }
}

/// Counts all messages one by one, and compares that with what the store says.
async fn assert_counts_are_true(ground: &Ground) {
    let mut back_door = ground.back_door().await;
    let counted = "select queue_id, state, count(*) from message
        where queue_id in (select id from queue) group by queue_id, state order by 1, 2";
    let kept = "select queue_id, state, n from tally where n <> 0 order by 1, 2";
    let counted: Vec<(i64, i64, i64)> =
        sqlx::query_as(counted).fetch_all(&mut back_door).await.unwrap();
    let kept: Vec<(i64, i64, i64)> = sqlx::query_as(kept).fetch_all(&mut back_door).await.unwrap();
    assert_eq!(kept, counted);
}

#[tokio::test]
async fn a_deleted_queue_is_gone_at_once_and_its_rows_bit_by_bit() {
    let ground = Ground::new();
    let stage = ground.stage().await;
    let queue = stage.queue("letters").await;
    let key = Idempotency::new("test", "k", [1; 32]);
    let mut all = (0..20).map(|_| message(&queue, "text")).collect::<Vec<_>>();
    all.push(NewMessage { keys: vec![key], ..message(&queue, "with a key") });
    all.push(message_in(&queue, "later", SHORT));
    let ids = all.iter().map(|message| message.id).collect::<Vec<_>>();
    stage.send_all(all.clone()).await;
    let leased = stage.claim(&queue, 3).await;
    stage.must_settle(&leased[0], dead_letter("a test")).await;
    stage.store.delete_queue(&queue, true, Default::default()).await.unwrap();

    assert_eq!(
        stage.store.settle(settle(&leased[1], Settlement::Ack, vec![])).await.unwrap(),
        Settled::LeaseLost
    );
    assert_eq!(stage.store.renew(vec![leased[2].lease.clone()], LONG).await.unwrap(), [false]);
    stage.pass(LONG).await;
    assert_eq!(stage.store.promote(ALL).await.unwrap(), Promoted { count: 0, next: None });
    assert_eq!(stage.store.reap(ALL).await.unwrap(), []);
    assert_eq!(stage.store.redrive(Filter::default(), ALL).await.unwrap(), []);
    assert_eq!(stage.list(&Filter::default(), ALL).await, []);
    for id in ids {
        assert_eq!(stage.look(id).await, None);
        assert_eq!(stage.store.payload(id).await.unwrap(), None);
        assert_eq!(stage.store.amend(id, Amendment::Cancel).await.unwrap(), Amended::NoSuchMessage);
        assert_eq!(stage.store.delete_dead(id).await.unwrap(), Amended::NoSuchMessage);
    }
    // Another queue of that name knows nothing of it, neither names nor keys.
    stage.queue("letters").await;
    let again = stage.send_all(all[15..21].to_vec()).await;
    assert!(again.iter().all(|answer| matches!(answer, Enqueued::New(_))), "{again:?}");

    let mut sweeps = 0;
    while stage.store.sweep(3).await.unwrap().more {
        sweeps += 1;
    }
    assert!(sweeps >= 4, "a sweep takes a few rows: {sweeps}");
    let mut back_door = ground.back_door().await;
    let left = "select (select count(*) from doomed), (select count(*) from message),
        (select count(*) from content), (select count(*) from delivery), (select count(*) from idempotency)";
    let left: (i64, i64, i64, i64, i64) =
        sqlx::query_as(left).fetch_one(&mut back_door).await.unwrap();
    assert_eq!(left, (0, 6, 6, 0, 1));
    assert_counts_are_true(&ground).await;
}

#[tokio::test]
async fn pages_that_were_used_are_given_back_in_time() {
    let ground = Ground::new();
    let stage = ground.stage().await;
    let queue = stage.queue("letters").await;
    let big = "x".repeat(1 << 20);
    for _ in 0..50 {
        stage.send_to(&queue, &big).await;
    }
    let pages = async || -> i64 {
        let mut back_door = ground.back_door().await;
        sqlx::query_scalar("pragma page_count").fetch_one(&mut back_door).await.unwrap()
    };
    let before = pages().await;
    assert_eq!(stage.store.purge(&queue, ALL).await.unwrap(), 50);
    eventually("the file is smaller", async || {
        stage.store.sweep(ALL).await.unwrap();
        pages().await < before - 1000
    })
    .await;
}
