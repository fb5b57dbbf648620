//! What both databases do with rows that cannot be read: one of them stops neither the house nor a list.

use std::sync::Arc;

use pumphouse::model::{QueueName, Record, Settlement, State};
use pumphouse::store::{Amended, Error, Filter, Postgres, Precondition, PutQueue, Sqlite};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection, SqliteConnection};

use crate::support::postgres::fresh_database;
use crate::support::stage::{
    ALL, LONG, SHORT, Stage, bodies_of, claim, dead_letter, message, of_queue, queue_name, together,
};
use crate::support::stores::clock;

/// A store, and a way to its rows besides.
struct Ground {
    stage: Stage,
    back_door: BackDoor,
}

enum BackDoor {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

impl Ground {
    async fn sqlite() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("house.db");
        let clock = clock();
        let store = Sqlite::open(&format!("sqlite://{}", path.display()), clock.clone()).await;
        let stage = Stage::manual(Arc::new(store.unwrap()), clock).with(directory);
        let back_door = SqliteConnectOptions::new().filename(path).connect().await.unwrap();
        Self { stage, back_door: BackDoor::Sqlite(back_door) }
    }

    async fn postgres() -> Self {
        let url = fresh_database().await;
        let stage = Stage::real(Arc::new(Postgres::open(&url).await.unwrap()));
        let mut back_door = PgConnection::connect(&url).await.unwrap();
        back_door.execute("set search_path = pumphouse").await.unwrap();
        Self { stage, back_door: BackDoor::Postgres(back_door) }
    }

    async fn damage(&mut self, statement: &'static str) {
        match &mut self.back_door {
            BackDoor::Sqlite(back_door) => drop(back_door.execute(statement).await.unwrap()),
            BackDoor::Postgres(back_door) => drop(back_door.execute(statement).await.unwrap()),
        }
    }

    /// Writes settings as a newer program would, and has the store look at its queues again.
    async fn unknown_settings(&mut self) {
        self.damage("update queue set settings = '{\"newer\": true}' where name = 'broken'").await;
        self.stage.queue("something-changes").await;
    }
}

macro_rules! on_both {
    ($($name:ident),+ $(,)?) => {
        mod sqlite {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::Ground::sqlite().await).await;
            })+
        }
        mod postgres {
            $(#[tokio::test]
            async fn $name() {
                super::$name(super::Ground::postgres().await).await;
            })+
        }
    };
}

on_both!(
    one_queue_that_cannot_be_read_leaves_the_others_alone,
    what_lies_in_a_queue_that_cannot_be_read_is_there_when_it_can_be,
    dead_letters_that_cannot_be_read_are_shown_and_deleted,
    dead_letters_that_cannot_be_read_can_be_redriven_and_die_again,
);

async fn one_queue_that_cannot_be_read_leaves_the_others_alone(mut ground: Ground) {
    let (broken, whole) = (ground.stage.queue("broken").await, ground.stage.queue("whole").await);
    ground.unknown_settings().await;
    let stage = &ground.stage;
    let queues = stage.store.queues().await.unwrap().into_iter().map(|queue| queue.name);
    assert_eq!(queues.collect::<Vec<_>>(), [queue_name("something-changes"), whole.clone()]);
    assert_corrupt(stage.store.queue(&broken).await);
    let put = stage.store.put_queue(&broken, Default::default(), Precondition::None).await;
    assert_corrupt(put);
    assert_corrupt(stage.store.delete_queue(&broken, true, Precondition::None).await);

    for _ in 0..2 {
        let id = stage.send_to(&whole, "a letter").await;
        stage.must_settle(&stage.claim_one(&whole).await, dead_letter("a test")).await;
        assert_eq!(stage.store.redrive(of_queue(&whole), ALL).await.unwrap(), [id]);
        stage.must_settle(&stage.claim_one(&whole).await, Settlement::Ack).await;
    }
    let put = stage.store.put_queue(&whole, Default::default(), Precondition::Exists).await;
    assert!(matches!(put, Ok(PutQueue::Replaced(_))), "{put:?}");
    stage.store.promote(ALL).await.unwrap();
    stage.store.reap(ALL).await.unwrap();
    stage.store.sweep(ALL).await.unwrap();
    stage.store.depths().await.unwrap();
    stage.store.check().await.unwrap();
}

async fn what_lies_in_a_queue_that_cannot_be_read_is_there_when_it_can_be(mut ground: Ground) {
    let (broken, whole) = (ground.stage.queue("broken").await, ground.stage.queue("whole").await);
    let waiting = ground.stage.send_to(&broken, "first").await;
    let dead = ground.stage.send_to(&broken, "second").await;
    let leased = ground.stage.claim(&broken, 2).await;
    ground.stage.must_settle(&leased[0], Settlement::Release).await;
    ground.stage.must_settle(&leased[1], dead_letter("a test")).await;
    ground.damage("create table kept as select settings from queue where name = 'broken'").await;
    ground.unknown_settings().await;

    let stage = &ground.stage;
    // Calls about it that came together with others fail alone.
    let (other, call) = tokio::join!(
        stage.store.enqueue(together(vec![message(&whole, "a letter")])),
        stage.store.lease(claim(&broken, 0, LONG)),
    );
    other.unwrap();
    assert!(matches!(call, Ok(_) | Err(Error::Corrupt { .. })), "{call:?}");
    stage.pass(SHORT).await;
    stage.store.reap(ALL).await.unwrap();
    stage.store.sweep(ALL).await.unwrap();
    let shown = stage.list(&of_queue(&broken), ALL).await;
    assert_eq!(ids(&shown), [dead, waiting]);

    let mend = "update queue set settings = (select settings from kept) where name = 'broken'";
    ground.damage(mend).await;
    ground.stage.queue("something-else-changes").await;
    assert_eq!(bodies_of(&ground.stage.claim(&broken, ALL).await), ["first"]);
    assert_eq!(ground.stage.state(dead).await, Some(State::Dead));
}

/// Dead letters, the oldest first: a whole one, and some that are damaged in all kinds of ways.
async fn dead_letters(ground: &mut Ground) -> (QueueName, Vec<pumphouse::model::MessageId>) {
    let queue = ground.stage.queue("letters").await;
    let mut ids = Vec::new();
    for body in ["whole", "details", "content", "priority", "time", "attempts"] {
        ids.push(ground.stage.send_and_settle(&queue, dead_letter(body)).await);
    }
    for damage in [
        "update content set details = '{\"so\":' where seq = 2",
        "delete from content where seq = 3",
        "update message set rank = 1000 where seq = 4",
        "update message set enqueued_at = 9223372036854775807 where seq = 5",
        "update message set attempts = -9 where seq = 6",
        "update delivery set outcome = 'unheard of' where seq = 6",
    ] {
        ground.damage(damage).await;
    }
    (queue, ids)
}

async fn dead_letters_that_cannot_be_read_are_shown_and_deleted(mut ground: Ground) {
    let (queue, dead) = dead_letters(&mut ground).await;
    let stage = &ground.stage;
    let newest_first = dead.iter().rev().copied().collect::<Vec<_>>();
    let of_dead = Filter { state: Some(State::Dead), ..of_queue(&queue) };
    let named = Filter { ids: dead.clone(), ..Filter::default() };
    for filter in [Filter::default(), of_queue(&queue), of_dead, named] {
        assert_eq!(ids(&stage.list(&filter, 2).await), newest_first, "{filter:?}");
    }
    for id in dead {
        let (record, _) = stage.look(id).await.expect("it is shown");
        assert_eq!((record.head.id, record.state), (id, State::Dead));
        assert_eq!(stage.store.delete_dead(id).await.unwrap(), Amended::Done(record));
        assert_eq!(stage.look(id).await, None);
        assert_eq!(stage.store.delete_dead(id).await.unwrap(), Amended::NoSuchMessage);
    }
    assert_eq!(stage.depth(&queue).await.dead, 0);
}

async fn dead_letters_that_cannot_be_read_can_be_redriven_and_die_again(mut ground: Ground) {
    let (queue, dead) = dead_letters(&mut ground).await;
    let stage = &ground.stage;
    assert_eq!(stage.store.redrive(of_queue(&queue), ALL).await.unwrap(), dead);
    let leased = stage.claim(&queue, ALL).await;
    assert_eq!(leased.iter().map(|leased| leased.lease.id).collect::<Vec<_>>(), dead[..1]);
    assert_eq!(stage.depth(&queue).await.dead, 5);
    assert_eq!(stage.depth(&queue).await.leased, 1);
}

fn ids(records: &[Record]) -> Vec<pumphouse::model::MessageId> {
    records.iter().map(|record| record.head.id).collect()
}

fn assert_corrupt<T: std::fmt::Debug>(answer: Result<T, Error>) {
    assert!(matches!(answer, Err(Error::Corrupt { .. })), "{answer:?}");
}
