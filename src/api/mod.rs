//! The doors: HTTP in. No SQL and no decisions; every room below is asked, and its answer written out.
//!
//! The URL map, with the file that answers:
//!
//! ```text
//!   POST   /v1/queues/{queue}/messages            sending.rs
//!   POST   /v1/queues/{queue}/messages/batch      sending.rs
//!   GET    /v1/messages                           messages.rs
//!   GET PATCH DELETE  /v1/messages/{id}           messages.rs
//!   GET    /v1/messages/{id}/payload              messages.rs
//!   POST   /v1/messages/{id}/run                  messages.rs
//!
//!   GET    /admin/v1/queues                       queues.rs
//!   GET PUT PATCH DELETE  /admin/v1/queues/{queue}
//!   POST   /admin/v1/queues/{queue}/start | stop | purge
//!   GET PATCH  /admin/v1/pump                     pump.rs
//!   POST   /admin/v1/pump/start | stop
//!   GET    /admin/v1/dead-letters                 dead_letters.rs
//!   DELETE /admin/v1/dead-letters/{id}
//!   POST   /admin/v1/dead-letters/{id}/redrive
//!   POST   /admin/v1/redrives
//!
//!   GET    /livez /readyz /metrics                health.rs
//!   GET    /openapi.json /docs /docs/problems/{code}
//! ```

mod doors;
mod problem;
mod body;
mod lasting;
mod pages;
mod envelope;
mod sending;
mod messages;
mod queue_settings;
mod queues;
mod pump;
mod dead_letters;
mod health;
mod around;

use std::sync::Arc;

use axum::Router;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use http::header;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio_util::task::TaskTracker;
use utoipa::openapi::{InfoBuilder, LicenseBuilder, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_swagger_ui::SwaggerUi;

use crate::pump::Pumphouse;

use body::Path;
use problem::Problem;

pub use around::RequestId;
pub use doors::serve;
pub use problem::{CODES, Code};

/// What the doors share. Cheap to clone.
#[derive(Clone)]
pub struct Doors(Arc<Inner>);

struct Inner {
    pump: Pumphouse,
    metrics: PrometheusHandle,
    body_limit: usize,
    creates_queues: bool,
    lately: health::Lately,
    /// Writes that go on although their client went away.
    writes: TaskTracker,
}

impl Doors {
    /// Doors before this pump. `body_limit` is in bytes; `creates_queues` makes a queue of what is sent to none.
    pub fn new(
        pump: Pumphouse,
        metrics: PrometheusHandle,
        body_limit: usize,
        creates_queues: bool,
    ) -> Self {
        let lately = health::Lately::default();
        let writes = TaskTracker::new();
        Self(Arc::new(Inner { pump, metrics, body_limit, creates_queues, lately, writes }))
    }

    fn pump(&self) -> &Pumphouse {
        &self.0.pump
    }

    fn body_limit(&self) -> usize {
        self.0.body_limit
    }

    fn creates_queues(&self) -> bool {
        self.0.creates_queues
    }

    fn memory(&self) -> &health::Lately {
        &self.0.lately
    }

    fn render_metrics(&self) -> String {
        self.0.metrics.render()
    }

    fn refuse_while_draining(&self) -> Result<(), Problem> {
        if self.0.pump.is_shutting_down() {
            let detail =
                "this process is on its way out; nothing was kept, send it to another or try again";
            return Err(Problem::new(problem::DRAINING, detail));
        }
        Ok(())
    }

    /// Runs a write to its end, even if the client goes away: a request that is dropped half-way must not
    /// leave half a write behind.
    async fn to_the_end<T: Send + 'static>(
        &self,
        write: impl Future<Output = Result<T, Problem>> + Send + 'static,
    ) -> Result<T, Problem> {
        let done = self.0.writes.spawn(write).await;
        done.unwrap_or_else(|_| {
            Err(Problem::new(
                problem::INTERNAL,
                "something went wrong inside; the log has the details",
            ))
        })
    }
}

/// Everything, for one listener.
pub fn router(doors: Doors) -> Router {
    let routes = data_routes().merge(admin_routes()).merge(health::routes());
    finish(routes, doors)
}

/// The plane of programs that send, and health, for a listener of their own.
pub fn data_router(doors: Doors) -> Router {
    finish(data_routes().merge(health::routes()), doors)
}

/// The plane of operators, with metrics and documents, for a listener of their own.
pub fn admin_router(doors: Doors) -> Router {
    finish(admin_routes().merge(health::routes()), doors)
}

/// The description of everything, as OpenAPI.
pub fn openapi() -> OpenApi {
    let mut document = data_routes().merge(admin_routes()).merge(health::routes()).into_openapi();
    // Made anew: what comes by default describes the library that makes the document.
    let license =
        LicenseBuilder::new().name("MIT OR Apache-2.0").identifier(Some("MIT OR Apache-2.0"));
    document.info = InfoBuilder::new()
        .title("Pumphouse")
        .description(Some("A durable message pump: POST a message and go on."))
        .version(env!("CARGO_PKG_VERSION"))
        .license(Some(license.build()))
        .build();
    document
}

/// The same as text, as it stands under `openapi/`.
pub fn openapi_json() -> String {
    openapi().to_pretty_json().expect("a document made by types is JSON")
}

fn data_routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new().merge(sending::routes()).merge(messages::routes())
}

fn admin_routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new()
        .merge(queues::routes())
        .merge(pump::routes())
        .merge(dead_letters::routes())
        .merge(health::metrics_routes())
        .route("/openapi.json", get(openapi_page))
        .route("/docs/problems/{code}", get(problem_page))
        .route("/", get(async || Redirect::temporary("/docs")))
}

fn finish(routes: OpenApiRouter<Doors>, doors: Doors) -> Router {
    let (router, _) = routes.split_for_parts();
    let swagger = SwaggerUi::new("/docs").url("/docs/openapi.json", openapi());
    around::around(router.with_state(doors).merge(swagger))
}

async fn openapi_page() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], openapi_json()).into_response()
}

/// The page about a sort of error.
async fn problem_page(Path(word): Path<String>) -> Result<Response, Problem> {
    let code = CODES.iter().find(|code| code.word == word);
    let code = code.ok_or_else(|| Problem::new(problem::NOT_FOUND, "there is no such code"))?;
    Ok(([(header::CONTENT_TYPE, "text/markdown; charset=utf-8")], code.page).into_response())
}
