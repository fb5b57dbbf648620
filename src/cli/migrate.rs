//! `pumphouse migrate`: brings the database's schema up to date, and does nothing else.

use std::sync::Arc;

use anyhow::{Context, Result};

use crate::clock::SystemClock;
use crate::store;

use super::config::DatabaseUrl;
use super::print;

/// Opens the store, which migrates it behind a lock, and closes it. Twice does no harm.
pub(super) async fn run(database: &DatabaseUrl) -> Result<()> {
    let opened = store::open(database.secret(), Arc::new(SystemClock)).await;
    let store = opened.with_context(|| format!("cannot migrate {database}"))?;
    store.close().await;
    print(&format!("{database} has the schema of version {}", env!("CARGO_PKG_VERSION")))
}
