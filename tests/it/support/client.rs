//! A thin client: it sends what a test says and shows what came back. It hides nothing and retries nothing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use reqwest::{Body, Method, RequestBuilder};
use serde_json::{Value, json};

/// The media type of a message in JSON.
pub(crate) const ENVELOPE: &str = "application/vnd.pumphouse.message+json";

/// Who asks a process. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Client {
    base: String,
    http: reqwest::Client,
}

/// An answer, read to its end.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    /// Its status.
    pub(crate) status: u16,
    /// Its headers.
    pub(crate) headers: HeaderMap,
    /// Its body.
    pub(crate) body: Bytes,
}

impl Client {
    /// A client of the process that listens there.
    pub(crate) fn new(address: SocketAddr) -> Self {
        let http = reqwest::Client::builder()
            // Shorter than the server keeps an idle connection, or a request may meet one that just closed.
            .pool_idle_timeout(Duration::from_secs(4))
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(Duration::from_secs(60));
        let http = http.build().expect("a client can be built");
        Self { base: format!("http://{address}"), http }
    }

    /// A request that is still to be sent.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    /// A message that is still to be sent: its body is the payload.
    pub(crate) fn message_to(&self, queue: &str, body: impl Into<Body>) -> RequestBuilder {
        self.request(Method::POST, &format!("/v1/queues/{queue}/messages")).body(body)
    }

    /// `GET`.
    pub(crate) async fn get(&self, path: &str) -> Answer {
        ask(self.request(Method::GET, path)).await
    }

    /// `POST` without a body.
    pub(crate) async fn post_nothing(&self, path: &str) -> Answer {
        ask(self.request(Method::POST, path)).await
    }

    /// `POST` with a body of JSON.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        ask(self.request(Method::POST, path).json(body)).await
    }

    /// `PUT` with a body of JSON.
    pub(crate) async fn put(&self, path: &str, body: &Value) -> Answer {
        ask(self.request(Method::PUT, path).json(body)).await
    }

    /// `PATCH` with a merge patch.
    pub(crate) async fn patch(&self, path: &str, body: &Value) -> Answer {
        let request = self.request(Method::PATCH, path);
        let request = request.header("content-type", "application/merge-patch+json");
        ask(request.body(body.to_string())).await
    }

    /// `DELETE`.
    pub(crate) async fn delete(&self, path: &str) -> Answer {
        ask(self.request(Method::DELETE, path)).await
    }

    /// Sends a payload as it is; gives the message's id.
    pub(crate) async fn send(&self, queue: &str, body: impl Into<Body>) -> String {
        ask(self.message_to(queue, body)).await.expect(201).id()
    }

    /// Sends an envelope; gives the message's id.
    pub(crate) async fn send_envelope(&self, queue: &str, envelope: &Value) -> String {
        let request = self.message_to(queue, envelope.to_string());
        ask(request.header("content-type", ENVELOPE)).await.expect(201).id()
    }

    /// Sends a batch as NDJSON.
    pub(crate) fn batch(&self, queue: &str, lines: impl Into<Body>) -> RequestBuilder {
        let request = self.request(Method::POST, &format!("/v1/queues/{queue}/messages/batch"));
        request.header("content-type", "application/x-ndjson").body(lines)
    }

    /// A message with its deliveries.
    pub(crate) async fn message(&self, id: &str) -> Value {
        self.get(&format!("/v1/messages/{id}")).await.expect(200).json()
    }

    /// The state of a message.
    pub(crate) async fn state(&self, id: &str) -> String {
        text(&self.message(id).await, "/state")
    }

    /// Every item of a list, page by page; `path` may have a query.
    pub(crate) async fn all(&self, path: &str) -> Vec<Value> {
        let joint = if path.contains('?') { '&' } else { '?' };
        let mut items = Vec::new();
        let mut cursor = String::new();
        loop {
            let page = self.get(&format!("{path}{joint}limit=200&cursor={cursor}")).await;
            let page = page.expect(200).json();
            items.extend(page["items"].as_array().expect("a page has items").iter().cloned());
            let Some(next) = page["next"].as_str() else { return items };
            next.clone_into(&mut cursor);
        }
    }

    /// Makes a queue or replaces it.
    pub(crate) async fn put_queue(&self, queue: &str, settings: &Value) {
        let answer = self.put(&format!("/admin/v1/queues/{queue}"), settings).await;
        assert!(matches!(answer.status, 200 | 201), "{answer:?}");
    }

    /// A queue as the operator sees it.
    pub(crate) async fn queue(&self, queue: &str) -> Value {
        self.get(&format!("/admin/v1/queues/{queue}")).await.expect(200).json()
    }

    /// Changes a queue.
    pub(crate) async fn patch_queue(&self, queue: &str, patch: &Value) -> Value {
        self.patch(&format!("/admin/v1/queues/{queue}"), patch).await.expect(200).json()
    }

    /// Stops a queue and waits for it; gives the report.
    pub(crate) async fn stop_queue(&self, queue: &str, how: &Value) -> Value {
        self.post(&format!("/admin/v1/queues/{queue}/stop"), how).await.expect(200).json()
    }

    /// Starts a queue.
    pub(crate) async fn start_queue(&self, queue: &str) {
        let answer = self.post_nothing(&format!("/admin/v1/queues/{queue}/start")).await;
        assert!(matches!(answer.status, 200 | 204), "{answer:?}");
    }

    /// What is counted now.
    pub(crate) async fn metrics(&self) -> Metrics {
        Metrics::parse(&self.get("/metrics").await.expect(200).text())
    }
}

/// Sends a request that must be answered, whatever the answer is.
pub(crate) async fn ask(request: RequestBuilder) -> Answer {
    try_ask(request).await.expect("the process answers")
}

/// Sends a request that may fail half-way: then nobody knows what became of it.
pub(crate) async fn try_ask(request: RequestBuilder) -> Result<Answer, reqwest::Error> {
    let response = request.send().await?;
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    Ok(Answer { status, headers, body: response.bytes().await? })
}

impl Answer {
    /// Itself, if it has this status.
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}", self.text());
        self
    }

    /// Its body as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Its body as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {}: {}", self.status, self.text()))
    }

    /// The id in its body.
    #[track_caller]
    pub(crate) fn id(&self) -> String {
        text(&self.json(), "/id")
    }

    /// The ids of a batch that was taken whole.
    #[track_caller]
    pub(crate) fn ids(&self) -> Vec<String> {
        let body = self.json();
        let items = body["items"].as_array().unwrap_or_else(|| panic!("no items: {body}"));
        items.iter().map(|item| text(item, "/id")).collect()
    }

    /// One of its headers, or nothing.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Insists on a problem with this status and code.
    pub(crate) fn expect_problem(&self, status: u16, code: &str) {
        assert_eq!((self.status, self.problem().as_str()), (status, code), "{}", self.text());
    }

    /// Its problem's code, after a look at whether it is a whole problem.
    #[track_caller]
    pub(crate) fn problem(&self) -> String {
        let body = self.json();
        assert_eq!(self.header("content-type"), "application/problem+json", "{body}");
        assert_eq!(body["status"], json!(self.status), "{body}");
        for member in ["type", "title", "detail", "code", "request_id"] {
            assert!(body[member].is_string(), "a problem has a {member}: {body}");
        }
        let code = text(&body, "/code");
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(!code.is_empty() && code.chars().all(plain), "{body}");
        code
    }

    /// The pointers of its problem's errors.
    #[track_caller]
    pub(crate) fn pointers(&self) -> Vec<String> {
        let body = self.json();
        let errors = body["errors"].as_array().unwrap_or_else(|| panic!("no errors: {body}"));
        errors.iter().map(|error| text(error, "/pointer")).collect()
    }
}

/// The text at a JSON pointer.
#[track_caller]
pub(crate) fn text(value: &Value, pointer: &str) -> String {
    let found = value.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_else(|| panic!("no text at {pointer}: {value}")).to_owned()
}

/// The whole number at a JSON pointer.
#[track_caller]
pub(crate) fn number(value: &Value, pointer: &str) -> u64 {
    let found = value.pointer(pointer).and_then(Value::as_u64);
    found.unwrap_or_else(|| panic!("no number at {pointer}: {value}"))
}

/// What `/metrics` said: name and labels, and the value.
#[derive(Debug)]
pub(crate) struct Metrics(Vec<(String, BTreeMap<String, String>, f64)>);

impl Metrics {
    /// Reads the Prometheus text format, as far as we write it.
    pub(crate) fn parse(page: &str) -> Self {
        let samples = page.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        Self(samples.map(sample).collect())
    }

    /// The sum over all samples of this name that carry these labels; 0 if there is none.
    pub(crate) fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let carries = |all: &BTreeMap<String, String>| {
            labels.iter().all(|(label, value)| all.get(*label).is_some_and(|v| v == value))
        };
        let matching = self.0.iter().filter(|(n, all, _)| n == name && carries(all));
        matching.map(|(_, _, value)| value).sum()
    }
}

fn sample(line: &str) -> (String, BTreeMap<String, String>, f64) {
    let (series, value) = line.rsplit_once(' ').expect("a sample has a value");
    let (name, labels) = match series.split_once('{') {
        Some((name, labels)) => (name, labels.trim_end_matches('}')),
        None => (series, ""),
    };
    let pair = |pair: &str| {
        let (label, value) = pair.split_once('=').expect("a label has a value");
        (label.to_owned(), value.trim_matches('"').to_owned())
    };
    let labels = labels.split(',').filter(|pair| !pair.is_empty()).map(pair).collect();
    (name.to_owned(), labels, value.parse().expect("a value is a number"))
}
