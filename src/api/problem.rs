//! The only place where an error becomes a status code.
//!
//! Every error is `application/problem+json` (RFC 9457). A [`Problem`] rides in the response's extensions
//! until the outermost layer writes it out, because only that one knows the request's id.

use std::any::Any;
use std::sync::Arc;

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;
use utoipa::ToSchema;

use crate::model::Invalid;
use crate::store;

/// What can go wrong at the doors: one stable word for each, with a page under `docs/problems/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code {
    /// The word.
    pub word: &'static str,
    /// The status that goes with it.
    pub status: StatusCode,
    /// What it means, in a few words.
    pub title: &'static str,
    /// The page that explains it.
    pub page: &'static str,
}

macro_rules! codes {
    ($($name:ident = $word:literal, $status:ident, $title:literal;)*) => {
        $(pub(super) const $name: Code = Code {
            word: $word,
            status: StatusCode::$status,
            title: $title,
            page: include_str!(concat!("../../docs/problems/", $word, ".md")),
        };)*
        /// Every code there is.
        pub const CODES: &[Code] = &[$($name),*];
    };
}

codes! {
    UNREADABLE = "unreadable", BAD_REQUEST, "The request cannot be read";
    INVALID = "invalid", UNPROCESSABLE_ENTITY, "The request can be read, but something in it is wrong";
    NOT_AVAILABLE = "not-available", UNPROCESSABLE_ENTITY, "This version cannot do that yet";
    KEY_REUSED = "idempotency-key-reused", UNPROCESSABLE_ENTITY, "The idempotency key belongs to another request";
    PUSH_NOT_ALLOWED = "push-not-allowed", FORBIDDEN, "Messages may not be sent to that destination";
    CROSS_SITE = "cross-site", FORBIDDEN, "The request comes from another site";
    NOT_FOUND = "not-found", NOT_FOUND, "There is nothing at this address";
    NO_SUCH_QUEUE = "no-such-queue", NOT_FOUND, "There is no such queue";
    NO_SUCH_SUBSCRIPTION = "no-such-subscription", NOT_FOUND, "There is no such subscription";
    NO_SUCH_SCHEDULE = "no-such-schedule", NOT_FOUND, "There is no such schedule";
    NO_SUCH_MESSAGE = "no-such-message", NOT_FOUND, "There is no such message";
    METHOD_NOT_ALLOWED = "method-not-allowed", METHOD_NOT_ALLOWED, "This address does not take that method";
    WRONG_STATE = "wrong-state", CONFLICT, "The message is in a state that does not allow it";
    NOT_EMPTY = "queue-not-empty", CONFLICT, "The queue has messages";
    KEY_IN_USE = "idempotency-key-in-use", CONFLICT, "A request with this Idempotency-Key is under way";
    IN_USE = "queue-in-use", CONFLICT, "Somebody sends to the queue in a transaction that is open";
    NO_SUBSCRIBERS = "no-subscribers", CONFLICT, "No queue wants what was published";
    WRONG_HANDLER = "wrong-handler", CONFLICT, "The queue has a handler of another kind";
    LEASE_LOST = "lease-lost", CONFLICT, "The lease is over, used or unknown";
    PRECONDITION = "precondition-failed", PRECONDITION_FAILED, "The precondition does not hold";
    TOO_LARGE = "too-large", PAYLOAD_TOO_LARGE, "The request is too large";
    MEDIA_TYPE = "unsupported-media-type", UNSUPPORTED_MEDIA_TYPE, "The media type is not one that is taken here";
    QUEUE_FULL = "queue-full", TOO_MANY_REQUESTS, "The queue is full";
    UNAVAILABLE = "database-unavailable", SERVICE_UNAVAILABLE, "The database does not answer";
    DRAINING = "draining", SERVICE_UNAVAILABLE, "This process is on its way out";
    NO_ROOM = "no-room", INSUFFICIENT_STORAGE, "The database has no room left";
    INTERNAL = "internal", INTERNAL_SERVER_ERROR, "Something went wrong inside";
}

/// An error on its way to the caller.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    pub(super) code: Code,
    pub(super) detail: String,
    errors: Vec<Invalid>,
    retry_after: Option<u32>,
    /// What caused it, for the log only.
    pub(super) cause: Option<Arc<Cause>>,
}

/// An error as it is written: RFC 9457, with members of our own.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProblemBody {
    /// A page about this sort of error, relative to the service's root.
    #[serde(rename = "type")]
    #[schema(example = "/docs/problems/invalid")]
    kind: String,
    /// The same for every error of this sort.
    title: &'static str,
    status: u16,
    /// What is wrong this time, and what would be right.
    detail: String,
    /// A stable word for this sort of error.
    #[schema(example = "invalid")]
    code: &'static str,
    /// Also in the header `X-Request-Id` and in the log.
    request_id: String,
    /// For a bad body or header: where, and what would be right.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<ProblemError>,
}

/// One wrong value.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ProblemError {
    /// A JSON pointer, or the name of a header or parameter.
    #[schema(example = "/recovery/max_attempts")]
    pointer: String,
    detail: String,
}

impl Problem {
    pub(super) fn new(code: Code, detail: impl Into<String>) -> Self {
        let retry_after = match code.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Some(1),
            _ => None,
        };
        Self { code, detail: detail.into(), errors: Vec::new(), retry_after, cause: None }
    }

    pub(super) fn invalid(errors: Vec<Invalid>) -> Self {
        let all = errors.iter().map(ToString::to_string).collect::<Vec<_>>();
        Self { errors, ..Self::new(INVALID, all.join("; ")) }
    }

    pub(super) fn no_such_queue(name: impl std::fmt::Display) -> Self {
        Self::new(
            NO_SUCH_QUEUE,
            format!("there is no queue {name}; PUT /admin/v1/queues/{name} makes one"),
        )
    }

    /// A panic, with its text for the log.
    pub(super) fn panicked(panic: &(dyn Any + Send)) -> Self {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        let cause = Cause::Panic(text.unwrap_or("it did not say why").to_owned());
        Self { cause: Some(Arc::new(cause)), ..Self::new(INTERNAL, SORRY) }
    }

    /// As it is written into an answer, or into an item of one.
    pub(super) fn body(&self, request_id: &str) -> ProblemBody {
        let error = |wrong: &Invalid| ProblemError {
            pointer: wrong.pointer.clone(),
            detail: wrong.detail.clone(),
        };
        ProblemBody {
            kind: format!("/docs/problems/{}", self.code.word),
            title: self.code.title,
            status: self.code.status.as_u16(),
            detail: self.detail.clone(),
            code: self.code.word,
            request_id: request_id.to_owned(),
            errors: self.errors.iter().map(error).collect(),
        }
    }
}

/// What a problem comes from.
#[derive(Debug, thiserror::Error)]
pub(super) enum Cause {
    #[error(transparent)]
    Store(store::Error),
    #[error("panicked: {0}")]
    Panic(String),
}

const SORRY: &str = "something went wrong inside; the log has the details";

impl From<Invalid> for Problem {
    fn from(wrong: Invalid) -> Self {
        Self::invalid(vec![wrong])
    }
}

impl From<store::Error> for Problem {
    /// The caller hears a constant; what the database said goes to the log.
    fn from(error: store::Error) -> Self {
        let problem = match &error {
            store::Error::Unavailable(_) | store::Error::Busy(_) => {
                let detail = "the database does not answer; try again, with the same Idempotency-Key if the request writes";
                Self::new(UNAVAILABLE, detail)
            }
            store::Error::KeyInUse => {
                let detail = "a request with this Idempotency-Key is still under way; try again, and nothing is kept twice";
                Self::new(KEY_IN_USE, detail)
            }
            store::Error::Rejected { what } => Self::new(INVALID, what.clone()),
            store::Error::Full(_) => {
                Self::new(NO_ROOM, "the database has no room left; nothing was kept")
            }
            store::Error::Refused { .. } | store::Error::Corrupt { .. } => {
                Self::new(INTERNAL, SORRY)
            }
        };
        Self { cause: Some(Arc::new(Cause::Store(error))), ..problem }
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        Self::new(UNREADABLE, rejection.body_text())
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(INVALID, rejection.body_text())
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.code.status.into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response.extensions_mut().insert(self);
        response
    }
}

impl Problem {
    /// What was wrong, value by value; for a problem without values, the problem itself.
    pub(super) fn into_errors(self) -> Vec<Invalid> {
        if self.errors.is_empty() { vec![Invalid::new("", self.detail)] } else { self.errors }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_keeps_its_text_for_the_log_and_from_the_caller() {
        for panic in [Box::new("a bug") as Box<dyn Any + Send>, Box::new("a bug".to_owned())] {
            let problem = Problem::panicked(&*panic);
            assert_eq!(problem.cause.as_ref().unwrap().to_string(), "panicked: a bug");
            assert_eq!(problem.body("id").detail, SORRY);
        }
    }
}
