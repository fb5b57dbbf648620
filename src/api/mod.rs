//! The doors: HTTP in. No SQL and no decisions; every room below is asked, and its answer written out.
//!
//! The URL map, with the file that answers:
//!
//! ```text
//!   POST   /v1/queues/{queue}/messages            sending.rs
//!   POST   /v1/queues/{queue}/messages/batch      batches.rs
//!   POST   /v1/topics/{topic}/messages            sending.rs
//!   POST   /v1/topics/{topic}/messages/batch      batches.rs
//!   POST   /v1/push                               push.rs
//!   POST   /v1/queues/{queue}/leases              leases.rs
//!   POST   /v1/leases/settle | renew              leases.rs
//!   GET    /v1/messages                           messages.rs
//!   GET PATCH DELETE  /v1/messages/{id}           messages.rs
//!   GET    /v1/messages/{id}/payload              messages.rs
//!   POST   /v1/messages/{id}/run                  messages.rs
//!
//!   GET    /admin/v1/queues                       queues.rs
//!   GET PUT PATCH DELETE  /admin/v1/queues/{queue}
//!   POST   /admin/v1/queues/{queue}/start | stop | purge
//!   GET    /admin/v1/topics                       topics.rs
//!   GET    /admin/v1/topics/{topic}/subscriptions
//!   GET PUT DELETE  /admin/v1/topics/{topic}/subscriptions/{name}
//!   GET    /admin/v1/schedules                    schedules.rs
//!   GET PUT PATCH DELETE  /admin/v1/schedules/{name}
//!   POST   /admin/v1/schedules/{name}/pause | resume | run
//!   GET PATCH  /admin/v1/pump                     pump.rs
//!   POST   /admin/v1/pump/start | stop
//!   GET    /admin/v1/dead-letters                 dead_letters.rs
//!   DELETE /admin/v1/dead-letters/{id}
//!   POST   /admin/v1/dead-letters/{id}/redrive
//!   POST   /admin/v1/redrives
//!
//!   GET    /livez /readyz                         health.rs, on both listeners
//!   GET    /docs/problems/{code}                  here, on both listeners
//!   GET    /metrics                               health.rs, where operators are answered
//!   GET    /openapi.json /docs                    here, where operators are answered
//! ```

mod doors;
mod problem;
mod body;
mod lasting;
mod pages;
mod envelope;
mod sending;
mod batches;
mod push;
mod leases;
mod topics;
mod schedules;
mod messages;
mod queue_settings;
mod recovery_settings;
mod settings_patch;
mod queues;
mod recovery;
mod pump;
mod dead_letters;
mod health;
mod around;

use std::sync::Arc;

use axum::Router;
use axum::middleware::map_response;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use http::{StatusCode, header};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio_util::task::TaskTracker;
use utoipa::openapi::{
    ContentBuilder, InfoBuilder, LicenseBuilder, OpenApi, Ref, RefOr, ResponseBuilder, Schema,
};
use utoipa_axum::router::OpenApiRouter;
use utoipa_swagger_ui::SwaggerUi;

use crate::pump::Pumphouse;

use body::Path;
use problem::Problem;

pub use around::{Names, RequestId};
pub use doors::serve;
pub use problem::{CODES, Code};
pub use push::Allowed;

/// What the doors share. Cheap to clone.
#[derive(Clone)]
pub struct Doors(Arc<Inner>);

struct Inner {
    pump: Pumphouse,
    metrics: PrometheusHandle,
    body_limit: usize,
    creates_queues: bool,
    push_allowed: Allowed,
    names: Names,
    lately: health::Lately,
    /// Writes that go on although their client went away.
    writes: TaskTracker,
}

impl Doors {
    /// Doors before this pump. `body_limit` is in bytes; `creates_queues` makes a queue of what is sent to none;
    /// `push_allowed` says which destinations messages may name; `names` under which names they answer.
    pub fn new(
        pump: Pumphouse,
        metrics: PrometheusHandle,
        body_limit: usize,
        creates_queues: bool,
        push_allowed: Allowed,
        names: Names,
    ) -> Self {
        Self(Arc::new(Inner {
            pump,
            metrics,
            body_limit,
            creates_queues,
            push_allowed,
            names,
            lately: health::Lately::default(),
            writes: TaskTracker::new(),
        }))
    }

    fn pump(&self) -> &Pumphouse {
        &self.0.pump
    }

    fn body_limit(&self) -> usize {
        self.0.body_limit
    }

    fn push_allowed(&self) -> &Allowed {
        &self.0.push_allowed
    }

    fn creates_queues(&self) -> bool {
        self.0.creates_queues
    }

    fn lately(&self) -> &health::Lately {
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
        done.unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => Err(Problem::panicked(&*panic)),
            Err(_) => {
                Err(Problem::new(problem::INTERNAL, "the process ended before the write did"))
            }
        })
    }
}

/// Everything, for one listener.
pub fn router(doors: Doors) -> Router {
    let routes = data_routes().merge(admin_routes()).merge(common_routes());
    finish(routes, documents(), doors)
}

/// The plane of programs that send, with health and the pages about problems, for a listener of their own.
pub fn data_router(doors: Doors) -> Router {
    finish(data_routes().merge(common_routes()), Router::new(), doors)
}

/// The plane of operators, with health, metrics and documents, for a listener of their own.
pub fn admin_router(doors: Doors) -> Router {
    finish(admin_routes().merge(common_routes()), documents(), doors)
}

/// What is answered before there is a database to put doors before. It changes nothing and shows nothing,
/// so it asks nobody for a name.
pub fn waiting_router() -> Router {
    around::around(health::waiting_routes(), Names::Any)
}

/// The description of everything, as OpenAPI.
pub fn openapi() -> OpenApi {
    let mut document = data_routes().merge(admin_routes()).merge(health::routes()).into_openapi();
    add_problems(&mut document);
    leave_out_whole_defaults(&mut document);
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

/// Leaves out defaults that are whole objects: each of their members has its own, and generators of clients take them for
/// mistakes.
fn leave_out_whole_defaults(document: &mut OpenApi) {
    let Some(components) = &mut document.components else { return };
    for schema in components.schemas.values_mut() {
        let RefOr::T(Schema::Object(object)) = schema else { continue };
        for property in object.properties.values_mut() {
            let default = match property {
                RefOr::Ref(reference) => &mut reference.default,
                RefOr::T(Schema::OneOf(one_of)) => &mut one_of.default,
                RefOr::T(Schema::Object(object)) => &mut object.default,
                RefOr::T(_) => continue,
            };
            if default.as_ref().is_some_and(serde_json::Value::is_object) {
                *default = None;
            }
        }
    }
}

/// Says of every route that it can answer with a problem, because every one can.
fn add_problems(document: &mut OpenApi) {
    let problem = Ref::from_schema_name("ProblemBody");
    let problem = ContentBuilder::new().schema(Some(problem)).build();
    for item in document.paths.paths.values_mut() {
        let operations =
            [&mut item.get, &mut item.put, &mut item.post, &mut item.patch, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            let responses = &mut operation.responses.responses;
            for (status, response) in responses.iter_mut() {
                // OpenAPI wants one of every answer, and generators of clients insist.
                if let RefOr::T(response) = response
                    && response.description.is_empty()
                {
                    let status = status.parse::<StatusCode>().ok();
                    let reason = status.and_then(|status| status.canonical_reason());
                    response.description = reason.unwrap_or("Done").to_owned();
                }
            }
            for (status, description) in [("4XX", CALLERS_PROBLEM), ("5XX", OUR_PROBLEM)] {
                let response = ResponseBuilder::new()
                    .description(description)
                    .content("application/problem+json", problem.clone())
                    .build();
                responses.entry(status.to_owned()).or_insert_with(|| response.into());
            }
        }
    }
}

const CALLERS_PROBLEM: &str = "The request has to be changed, or made later; `code` says why";
const OUR_PROBLEM: &str =
    "Try again, with the same Idempotency-Key if the request writes; `code` says why";

/// The same as text, as it stands under `openapi/`.
pub fn openapi_json() -> String {
    openapi().to_pretty_json().expect("a document made by types is JSON")
}

fn data_routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new()
        .merge(sending::routes())
        .merge(batches::routes())
        .merge(push::routes())
        .merge(leases::routes())
        .merge(messages::routes())
}

fn admin_routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new()
        .merge(queues::routes())
        .merge(recovery::routes())
        .merge(topics::routes())
        .merge(schedules::routes())
        .merge(pump::routes())
        .merge(dead_letters::routes())
        .merge(health::metrics_routes())
        .route("/openapi.json", get(openapi_page))
        .route("/", get(async || Redirect::temporary("/docs")))
}

/// What stands on every listener: health, and the pages that problems point at.
fn common_routes() -> OpenApiRouter<Doors> {
    health::routes().route("/docs/problems/{code}", get(problem_page))
}

/// The API with forms to try it. It describes the operators' plane too, so it stands where that one is.
fn documents() -> Router {
    let swagger = SwaggerUi::new("/docs").url("/docs/openapi.json", openapi());
    Router::from(swagger).layer(map_response(async |response: Response| {
        // The library's own 404 is bare.
        match response.status() {
            StatusCode::NOT_FOUND => {
                Problem::new(problem::NOT_FOUND, "there is no such page").into_response()
            }
            _ => response,
        }
    }))
}

fn finish(routes: OpenApiRouter<Doors>, documents: Router, doors: Doors) -> Router {
    let (router, _) = routes.split_for_parts();
    let names = doors.0.names;
    around::around(router.with_state(doors).merge(documents), names)
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
