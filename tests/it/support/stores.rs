//! Fresh, empty stores: one function for each, and nothing that tests them.

use std::sync::Arc;

use jiff::Timestamp;
use pumphouse::clock::ManualClock;
use pumphouse::store::{Memory, Postgres, Sqlite};

use super::stage::Stage;

/// An empty store in memory, with a clock that moves only when the stage says so.
pub(crate) async fn memory() -> Stage {
    let clock = clock();
    Stage::manual(Arc::new(Memory::new(clock.clone())), clock)
}

/// An empty store in a file of its own, with a clock that moves only when the stage says so.
#[expect(dead_code, reason = "not switched on yet in `store/mod.rs`")]
pub(crate) async fn sqlite() -> Stage {
    let directory = tempfile::tempdir().expect("a directory to work in");
    let url = format!("sqlite://{}", directory.path().join("house.db").display());
    let clock = clock();
    let store = Sqlite::open(&url, clock.clone()).await.expect("a new file can be opened");
    Stage::manual(Arc::new(store), clock).with(directory)
}

/// An empty database of its own, which goes by the server's clock.
pub(crate) async fn postgres() -> Stage {
    on_postgres(&super::postgres::fresh_database().await).await
}

/// A store on a database that others may use as well.
pub(crate) async fn on_postgres(url: &str) -> Stage {
    Stage::real(Arc::new(Postgres::open(url).await.expect("the database can be opened")))
}

/// A clock that stands at the same moment at the start of every test.
fn clock() -> Arc<ManualClock> {
    let start = Timestamp::from_second(1_700_000_000).expect("a moment of 2023");
    Arc::new(ManualClock::new(start, 0.5))
}
