//! What stands around every request: an id, a count, problems written out, panics caught, and strangers
//! kept out: a web page that an operator opens must not operate the pump through the operator's browser.

use std::any::Any;
use std::convert::Infallible;
use std::net::IpAddr;

use axum::Json;
use axum::Router;
use axum::extract::{FromRequestParts, MatchedPath, Request};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderValue, Method, StatusCode, Uri, header};
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

/// Under which names in `Host` the doors answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// IP addresses and `localhost`: for a listener that only this machine reaches. Another name was pointed
    /// here by a stranger's name server (DNS rebinding), so that a browser takes both for one site.
    Local,
    /// Any: for a listener that others reach, under names that only they know.
    Any,
}

/// The routes with everything around them. The last line is the outermost layer.
pub(super) fn around(router: Router, names: Names) -> Router {
    router
        .fallback(async || {
            Problem::new(
                problem::NOT_FOUND,
                "there is nothing here; GET /docs, where operators are answered, shows what there is",
            )
        })
        .method_not_allowed_fallback(async || {
            Problem::new(
                problem::METHOD_NOT_ALLOWED,
                "this address does not take that method; see Allow",
            )
        })
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn(move |request, next| write_out(names, request, next)))
}

/// Gives the request an id, refuses it where a stranger made it, and writes out the problem it ended with,
/// if it did. One layer for all three, because each layer is an allocation and a turn for every request.
async fn write_out(names: Names, mut request: Request, next: Next) -> Response {
    let id = request_id(&request);
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let mut response = match stranger(names, &request) {
        Some(detail) => Problem::new(problem::CROSS_SITE, detail).into_response(),
        None => {
            request.extensions_mut().insert(RequestId(id.clone()));
            next.run(request).await
        }
    };
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
    count(route.as_ref().map(MatchedPath::as_str), &method, response.status());
    response
}

/// Why this request was not made by whom it seems to be made, if it was not. Only browsers send what is
/// looked at here; programs are let through.
fn stranger(names: Names, request: &Request) -> Option<&'static str> {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    if reads && matches!(request.uri().path(), "/livez" | "/readyz") {
        return None;
    }
    let header = |name| request.headers().get(name).map(HeaderValue::as_bytes);
    let (asked_for, host) = match header(header::HOST) {
        Some(host) => (true, Authority::try_from(host).ok()),
        // HTTP/2 has it in the address.
        None => (request.uri().authority().is_some(), request.uri().authority().cloned()),
    };
    let local = host.as_ref().is_some_and(|host| is_local(host.host()));
    if names == Names::Local && asked_for && !local {
        return Some("Host is neither localhost nor an IP address; see the page of this code");
    }
    if request.headers().get("sec-fetch-site").is_some_and(|site| site == "cross-site") {
        return Some("a page of another site made this request");
    }
    // A neighbour of the same site, another port of this machine say, is told by its Origin.
    let foreign = header(header::ORIGIN).is_some_and(|origin| !is_own(origin, host.as_ref()));
    foreign
        .then_some("Origin is not the address in Host; a page of another origin made this request")
}

fn is_local(host: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(&host);
    host == "localhost" || host.ends_with(".localhost") || address.parse::<IpAddr>().is_ok()
}

/// Whether an origin is the address that was asked for. Its scheme is not compared, because a proxy before
/// this process may speak https.
fn is_own(origin: &[u8], host: Option<&Authority>) -> bool {
    let Ok(origin) = Uri::try_from(origin) else { return false };
    let usual = match origin.scheme_str() {
        Some("https") => 443,
        _ => 80,
    };
    let port = |authority: &Authority| authority.port_u16().unwrap_or(usual);
    match (origin.authority(), host) {
        (Some(origin), Some(host)) => {
            origin.host().eq_ignore_ascii_case(host.host()) && port(origin) == port(host)
        }
        _ => false,
    }
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

fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    Problem::panicked(&*panic).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_compared_with_the_address_that_was_asked_for() {
        for (origin, host, own) in [
            ("http://localhost:8080", "localhost:8080", true),
            ("http://LOCALHOST:8080", "localhost:8080", true),
            ("https://pump.example", "pump.example", true),
            ("https://pump.example", "pump.example:443", true),
            ("http://[::1]:8080", "[::1]:8080", true),
            ("http://localhost:3000", "localhost:8080", false),
            ("http://localhost", "localhost:8080", false),
            ("https://evil.example", "pump.example", false),
            ("null", "localhost:8080", false),
            ("", "localhost:8080", false),
        ] {
            let host = host.parse::<Authority>().unwrap();
            assert_eq!(is_own(origin.as_bytes(), Some(&host)), own, "{origin} {host}");
        }
    }

    #[test]
    fn a_local_name_is_one_that_no_name_server_can_give_away() {
        for local in ["localhost", "LocalHost.", "pump.localhost", "127.0.0.1", "[::1]", "10.0.0.7"]
        {
            assert!(is_local(local), "{local}");
        }
        for other in
            ["evil.example", "localhost.evil.example", "notlocalhost", "", "127.0.0.1.nip.io"]
        {
            assert!(!is_local(other), "{other}");
        }
    }
}
