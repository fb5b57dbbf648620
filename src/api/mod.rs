//! Stand-in until the HTTP room is built: the names that the command line needs, and nothing behind them.

use std::time::Duration;

use axum::Router;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::pump::Pumphouse;

/// What every route needs.
#[derive(Clone)]
pub struct State {}

impl State {
    /// A state.
    pub fn new(_: Pumphouse, _: PrometheusHandle, _body_limit: usize, _auto_create: bool) -> Self {
        Self {}
    }
}

/// Both planes.
pub fn router(_: State) -> Router {
    Router::new()
}

/// Programs.
pub fn data_router(_: State) -> Router {
    Router::new()
}

/// Operators.
pub fn admin_router(_: State) -> Router {
    Router::new()
}

/// The document.
pub fn openapi_json() -> String {
    "{}".to_owned()
}

/// Serves.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken, _: Duration) {
    let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await;
    served.expect("a stand-in does not fail");
}
