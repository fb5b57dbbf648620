//! What stands around every request: an id, a count, problems written out, panics caught.

use std::any::Any;
use std::convert::Infallible;

use axum::Json;
use axum::Router;
use axum::extract::{FromRequestParts, MatchedPath, Request};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode, header};
use tower_http::catch_panic::CatchPanicLayer;
use uuid::Uuid;

use crate::telemetry::metrics;

use super::problem::{self, Problem};

/// The id of a request: the client's own if it is a sane one, else a new one.
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

impl<S: Sync> FromRequestParts<S> for RequestId {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let id = parts.extensions.get::<Self>().cloned();
        Ok(id.unwrap_or_else(|| Self(Uuid::now_v7().to_string())))
    }
}

/// The routes with everything around them. The last line is the outermost layer.
pub(super) fn around(router: Router) -> Router {
    router
        .fallback(async || {
            Problem::new(problem::NOT_FOUND, "there is nothing here; GET /docs shows what there is")
        })
        .method_not_allowed_fallback(async || {
            Problem::new(
                problem::METHOD_NOT_ALLOWED,
                "this address does not take that method; see Allow",
            )
        })
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn(write_out))
}

/// Gives the request an id, and writes out the problem it ended with, if it did.
async fn write_out(mut request: Request, next: Next) -> Response {
    let id = request_id(&request);
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        log(&problem, &id);
        let headers = std::mem::take(response.headers_mut());
        response = (response.status(), Json(problem.body(&id))).into_response();
        for (name, value) in &headers {
            if name != header::CONTENT_LENGTH && name != header::CONTENT_TYPE {
                response.headers_mut().insert(name, value.clone());
            }
        }
        let problem_json = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, problem_json);
    }
    if let Ok(id) = HeaderValue::try_from(id) {
        response.headers_mut().insert("x-request-id", id);
    }
    count(route.as_deref(), &method, response.status());
    response
}

fn request_id(request: &Request) -> String {
    let given = request.headers().get("x-request-id").and_then(|value| value.to_str().ok());
    let sane = |id: &&str| {
        !id.is_empty() && id.len() <= 64 && id.bytes().all(|byte| byte.is_ascii_graphic())
    };
    given.filter(sane).map_or_else(|| Uuid::now_v7().to_string(), ToOwned::to_owned)
}

/// Logs what is ours to mend, once, with its causes; never a body.
fn log(problem: &Problem, request_id: &str) {
    if problem.code.status.is_server_error() {
        let cause = problem.cause.as_deref().map(|cause| cause as &dyn std::error::Error);
        tracing::warn!(request_id, code = problem.code.word, error = cause, "a request failed");
    }
}

fn count(route: Option<&str>, method: &Method, status: StatusCode) {
    let method = match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        _ => "other",
    };
    // Only routes that exist: a stranger's paths must not become labels.
    metrics::http_requests(route.unwrap_or("none"), method, status.as_u16()).increment(1);
}

fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    let detail = "something went wrong inside; the log has the details";
    Problem::new(problem::INTERNAL, detail).into_response()
}
