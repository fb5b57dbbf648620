//! The two servers that do nothing: one stands in for the pump, one for a handler.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use bytes::Bytes;

use crate::door::{self, Listen};

pub async fn echo(listen: Listen) -> anyhow::Result<()> {
    let router = Router::new().route("/{*any}", post(|_: Bytes| async { door::created(1) }));
    door::serve(listen, router).await
}

pub async fn sink(listen: Listen) -> anyhow::Result<()> {
    let count = Arc::new(AtomicU64::new(0));
    let router = Router::new()
        .route("/count", get(told))
        .route("/", post(counted))
        .route("/{*any}", post(counted))
        .with_state(count);
    door::serve(listen, router).await
}

async fn counted(State(count): State<Arc<AtomicU64>>, _: Bytes) -> (StatusCode, Body) {
    count.fetch_add(1, Ordering::Relaxed);
    (StatusCode::OK, Body::empty())
}

async fn told(State(count): State<Arc<AtomicU64>>) -> String {
    count.load(Ordering::Relaxed).to_string()
}
