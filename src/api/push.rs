//! Ad-hoc destinations: a message that says itself where it is delivered. Only where the configuration allows it.

use axum::extract::{Request, State};
use axum::response::Response;
use http::HeaderMap;
use url::Url;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::model::{Handler, Invalid, NewMessage, PushHandler, QueueName, QueueSettings};
use crate::store::{Precondition, PutQueue};

use super::Doors;
use super::body::{Query, read};
use super::envelope::{self, PayloadBody};
use super::problem::{self, Problem};
use super::sending::{ReceiptBody, SendQuery, SettledOrReceipt, send};

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new().routes(routes!(push_message))
}

/// The queue of messages that name none.
const QUEUE: &str = "push";
/// The longest URL.
const URL_MAX: usize = 2048;

/// Which destinations messages may name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed(Vec<String>);

impl Allowed {
    /// Reads a list, separated by commas: `*`, or hosts, `hooks.example.com`, `*.example.com`, `localhost:9000`; nothing
    /// for none. A host without a port means every port.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut hosts = Vec::new();
        for host in text.split(',').map(str::trim).filter(|host| !host.is_empty()) {
            let plain =
                |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']');
            let rest = host.strip_prefix("*.").unwrap_or(host);
            if host != "*" && !rest.chars().all(plain) {
                return Err(format!(
                    "{host:?} is no host: write example.com, *.example.com, localhost:9000 or *"
                ));
            }
            hosts.push(host.to_ascii_lowercase());
        }
        Ok(Self(hosts))
    }

    /// Whether nobody may name any.
    fn is_off(&self) -> bool {
        self.0.is_empty()
    }

    fn allows(&self, url: &Url) -> bool {
        let host = url.host_str().unwrap_or("").to_ascii_lowercase();
        let with_port = format!("{host}:{}", url.port_or_known_default().unwrap_or(0));
        self.0.iter().any(|allowed| match allowed.strip_prefix('*') {
            Some("") => true,
            Some(end) => host.ends_with(end) || with_port.ends_with(end),
            None => *allowed == host || *allowed == with_port,
        })
    }
}

/// Send a message to a destination of its own.
///
/// `Pumphouse-Url` says where it is posted, `Pumphouse-Queue` through which queue of the kind `push` (its gate, rate limit
/// and recovery; `push` without it, which is made when it is first needed). All other options are as for any message. Off,
/// unless `push_allow` names the destination's host.
#[utoipa::path(post, path = "/v1/push", tag = "sending",
    params(SendQuery, ("Pumphouse-Url" = String, Header, description = "Where it is posted: http or https"),
        ("Pumphouse-Queue" = Option<String>, Header, description = "Through which queue"),
        ("Idempotency-Key" = Option<String>, Header, description = "Quoted or bare, at most 255 characters")),
    request_body(content = PayloadBody, content_type = "application/octet-stream"),
    responses(
        (status = 201, description = "Committed", body = ReceiptBody),
        (status = 202, description = "Committed, and not settled in the time to wait", body = ReceiptBody),
        (status = 200, description = "The same request came before, and this was its answer; or, with `wait`, the message, which is settled", body = SettledOrReceipt)))]
async fn push_message(
    State(doors): State<Doors>,
    Query(query): Query<SendQuery>,
    request: Request,
) -> Result<Response, Problem> {
    let wait = query.wait()?;
    doors.refuse_while_draining()?;
    if doors.push_allowed().is_off() {
        let detail =
            "messages may name no destinations here; the setting push_allow says which they may";
        return Err(Problem::new(problem::PUSH_NOT_ALLOWED, detail));
    }
    let (parts, body) = request.into_parts();
    let url = url_of(&parts.headers)?;
    if !doors.push_allowed().allows(&url) {
        let host = url.host_str().unwrap_or_default();
        let detail = format!(
            "messages may not be sent to {host}; the setting push_allow says where they may"
        );
        return Err(Problem::new(problem::PUSH_NOT_ALLOWED, detail));
    }
    let queue = match one_header(&parts.headers, "pumphouse-queue")? {
        Some(name) => {
            QueueName::parse(name).map_err(|it| Invalid::new("Pumphouse-Queue", it.detail))?
        }
        None => doors.push_queue().await?,
    };
    doors.check_is_push(&queue).await?;
    let body = read(&parts.headers, body, doors.body_limit()).await?;
    let mut message = NewMessage::new(queue, body.clone());
    message.details.url = Some(url);
    let message = envelope::pushed(message, &parts.headers, &body)?;
    send(&doors, message, wait).await
}

fn url_of(headers: &HeaderMap) -> Result<Url, Problem> {
    let wrong = |detail: &str| Problem::from(Invalid::new("Pumphouse-Url", detail));
    let text = one_header(headers, "pumphouse-url")?;
    let text = text.ok_or_else(|| wrong("a message names its destination"))?;
    let url =
        Url::parse(text).map_err(|_| wrong("a URL is absolute, like https://example.com/hook"))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() || text.len() > URL_MAX {
        return Err(wrong(
            "a URL starts with http:// or https://, names a host, and has at most 2048 bytes",
        ));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("a URL carries no user name or password"));
    }
    Ok(url)
}

fn one_header<'h>(headers: &'h HeaderMap, name: &str) -> Result<Option<&'h str>, Problem> {
    let mut values = headers.get_all(name).iter();
    let (Some(value), more) = (values.next(), values.next()) else { return Ok(None) };
    let text = value.to_str().ok().filter(|_| more.is_none());
    let wrong = || Problem::from(Invalid::new(name, "this header is given once, in ASCII"));
    text.map(Some).ok_or_else(wrong)
}

impl Doors {
    /// The queue of messages that name none; made where there is none.
    async fn push_queue(&self) -> Result<QueueName, Problem> {
        let name = QueueName::parse(QUEUE).expect("this is a name");
        if self.pump().store().queue(&name).await?.is_some() {
            return Ok(name);
        }
        let settings =
            QueueSettings { handler: Handler::Push(PushHandler::default()), ..Default::default() };
        let (store, made) = (self.pump().store().clone(), name.clone());
        let put = async move { Ok(store.put_queue(&made, settings, Precondition::Absent).await?) };
        if let PutQueue::Created(_) = self.to_the_end(put).await? {
            tracing::info!(queue = %name, "made for messages that name their destinations");
        }
        Ok(name)
    }

    async fn check_is_push(&self, queue: &QueueName) -> Result<(), Problem> {
        let found = self.pump().store().queue(queue).await?;
        let found = found.ok_or_else(|| Problem::no_such_queue(queue))?;
        if matches!(found.settings.handler, Handler::Push(_)) {
            return Ok(());
        }
        let detail = format!(
            "the queue {queue} has a handler of its own; this wants one whose handler.kind is push"
        );
        Err(Problem::new(problem::WRONG_HANDLER, detail))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hosts_that_are_named_are_allowed() {
        let allowed = Allowed::parse("hooks.example.com, *.test.example ,localhost:9000").unwrap();
        for (url, good) in [
            ("https://hooks.example.com/x", true),
            ("http://HOOKS.example.com:8443/x", true),
            ("https://example.com/x", false),
            ("https://hooks.example.com.evil.com/", false),
            ("https://a.test.example/", true),
            ("https://test.example/", false),
            ("https://eviltest.example/", false),
            ("http://localhost:9000/", true),
            ("http://localhost:9001/", false),
            ("http://hooks.example.com@evil.com/", false),
        ] {
            assert_eq!(allowed.allows(&Url::parse(url).unwrap()), good, "{url}");
        }
        assert!(Allowed::parse("").unwrap().is_off());
        assert!(Allowed::parse("*").unwrap().allows(&Url::parse("http://x/").unwrap()));
        assert!(Allowed::parse("http://x/").is_err());
    }
}
