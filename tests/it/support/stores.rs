//! Fresh, empty stores: one function for each, and nothing that tests them.

use std::sync::Arc;

use jiff::Timestamp;
use pumphouse::clock::{ManualClock, SystemClock};
use pumphouse::store::{Memory, Postgres, Sqlite};

use super::stage::Stage;

/// An empty store in memory, with a clock that moves only when the stage says so.
pub(crate) async fn memory() -> Stage {
    memory_by(&clock())
}

/// An empty store in memory that goes by this clock.
pub(crate) fn memory_by(clock: &Arc<ManualClock>) -> Stage {
    Stage::manual(Arc::new(Memory::new(clock.clone())), clock.clone())
}

/// An empty store in a file of its own, with a clock that moves only when the stage says so.
pub(crate) async fn sqlite() -> Stage {
    sqlite_by(&clock()).await
}

/// An empty store in a file of its own that goes by this clock.
pub(crate) async fn sqlite_by(clock: &Arc<ManualClock>) -> Stage {
    let directory = tempfile::tempdir().expect("a directory to work in");
    let url = format!("sqlite://{}", directory.path().join("house.db").display());
    let store = Sqlite::open(&url, clock.clone()).await.expect("a new file can be opened");
    Stage::manual(Arc::new(store), clock.clone()).with(directory)
}

/// An empty store in a file of its own that goes by the clock of the machine.
pub(crate) async fn sqlite_on_a_real_clock() -> Stage {
    let directory = tempfile::tempdir().expect("a directory to work in");
    let url = format!("sqlite://{}", directory.path().join("house.db").display());
    let store = Sqlite::open(&url, Arc::new(SystemClock)).await.expect("a new file can be opened");
    Stage::real(Arc::new(store)).with(directory)
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
pub(crate) fn clock() -> Arc<ManualClock> {
    let start = Timestamp::from_second(1_700_000_000).expect("a moment of 2023");
    Arc::new(ManualClock::new(start, 0.5))
}
