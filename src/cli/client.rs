//! One HTTP request to a running Pumphouse, for the commands that talk to one. No retries (see `again`), no redirects.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy;
use hyper_util::rt::TokioExecutor;
use rustls::crypto::ring;
use serde_json::Value;

/// How long an answer may take, if the request itself does not ask for longer.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// The longest answer that is read.
const ANSWER_MAX: usize = 64 << 20;

/// What to ask.
#[derive(Debug)]
pub(super) struct Call<'a> {
    /// How.
    pub(super) method: Method,
    /// Where the server answers, as in `http://127.0.0.1:8080`.
    pub(super) base: &'a str,
    /// What, as in `/v1/queues/emails/messages`.
    pub(super) path: &'a str,
    /// Names and values.
    pub(super) headers: Vec<(String, String)>,
    /// The body; empty for none.
    pub(super) body: Bytes,
    /// How long the answer may take.
    pub(super) patience: Duration,
}

/// Nobody knows what became of a request: it was not answered, or not to the end.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NoAnswer(String);

/// An answer that is none of 2xx, or such an item in one.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub(super) struct Refused {
    status: u16,
    /// The problem's word.
    code: String,
    text: String,
}

impl Refused {
    /// An item of an answer that was refused; nothing for one that was not.
    pub(super) fn of_item(item: &Value) -> Option<Self> {
        let status = item["status"].as_u64().and_then(|status| u16::try_from(status).ok());
        let status = status.unwrap_or_default();
        let problem = |name: &str| item["problem"][name].as_str();
        (!(200..300).contains(&status)).then(|| Self {
            status,
            code: problem("code").unwrap_or_default().to_owned(),
            text: problem("detail").unwrap_or("refused").to_owned(),
        })
    }

    /// Whether the same may be answered otherwise a little later. Of those who answer, a proxy before a server that
    /// is away says 502 or 504. 409 is for good, but where somebody else sends with the same key right now.
    pub(super) fn is_for_now(&self) -> bool {
        matches!(self.status, 429 | 502 | 503 | 504) || self.code == "idempotency-key-in-use"
    }

    /// Whether surely nothing was kept of it, so that it may be sent under another key.
    pub(super) fn is_surely_not_kept(&self) -> bool {
        self.status == 429
    }
}

/// Whether the same may go well a little later: no answer, or one that was for now.
pub(super) fn may_pass(error: &anyhow::Error) -> bool {
    let refused = error.downcast_ref::<Refused>();
    error.is::<NoAnswer>() || refused.is_some_and(Refused::is_for_now)
}

/// Reads the address of a server: one that cannot be meant would only fail later, and again and again.
pub(super) fn parse_url(text: &str) -> Result<String, &'static str> {
    let is_good = text.parse::<Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.host().is_some_and(|host| !host.is_empty())
            && uri.query().is_none()
    });
    if is_good { Ok(text.to_owned()) } else { Err("write it as in http://127.0.0.1:8080") }
}

/// Sends it, and returns the body of a 2xx answer. Any other answer is an error that says what the server said.
pub(super) async fn call(call: Call<'_>) -> Result<Bytes> {
    let url = format!("{}{}", call.base.trim_end_matches('/'), call.path);
    let what = format!("{} {url}", call.method);
    let mut request = Request::builder().method(call.method).uri(&url);
    for (name, value) in &call.headers {
        request = request.header(name, value);
    }
    let request =
        request.body(Full::new(call.body)).with_context(|| format!("cannot ask {what}"))?;
    let answer = tokio::time::timeout(call.patience, exchange(request))
        .await
        .map_err(|_| NoAnswer(format!("no answer within {:?} to {what}", call.patience)))?;
    let (status, body) = answer.with_context(|| NoAnswer(format!("no answer to {what}")))?;
    if !status.is_success() {
        let text = format!("{what} was answered with {status}\n{}", pretty(&body));
        let problem = serde_json::from_slice::<Value>(&body).unwrap_or_default();
        let code = problem["code"].as_str().unwrap_or_default().to_owned();
        let text = text.trim_end().to_owned();
        return Err(Refused { status: status.as_u16(), code, text }.into());
    }
    Ok(body)
}

async fn exchange(request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes)> {
    let builder = HttpsConnectorBuilder::new;
    let provider = ring::default_provider();
    // A machine without certificates of its own still has those that are built in.
    let tls = match builder().with_provider_and_native_roots(provider.clone()) {
        Ok(tls) => tls,
        Err(_) => builder().with_provider_and_webpki_roots(provider)?,
    };
    let client = legacy::Client::builder(TokioExecutor::new())
        .build(tls.https_or_http().enable_http1().build());
    let answer = client.request(request).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_MAX).collect().await;
    Ok((status, body.map_err(|error| anyhow!(error))?.to_bytes()))
}

/// JSON with one member a line; anything else as it is.
pub(super) fn pretty(body: &[u8]) -> String {
    let json = serde_json::from_slice::<Value>(body).ok();
    json.and_then(|json| serde_json::to_string_pretty(&json).ok())
        .unwrap_or_else(|| String::from_utf8_lossy(body).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_told_from_what_does_not() {
        let refused = |status: u16, code: &str| {
            let item = serde_json::json!({"status": status, "problem": {"code": code}});
            Refused::of_item(&item).map(anyhow::Error::from)
        };
        for status in [429, 502, 503, 504] {
            assert!(refused(status, "").is_some_and(|error| may_pass(&error)), "{status}");
        }
        for status in [0, 400, 401, 403, 404, 409, 413, 422, 500, 507] {
            assert!(refused(status, "").is_some_and(|error| !may_pass(&error)), "{status}");
        }
        assert!(refused(409, "idempotency-key-in-use").is_some_and(|error| may_pass(&error)));
        assert!(refused(409, "wrong-handler").is_some_and(|error| !may_pass(&error)));
        assert!(refused(200, "").or(refused(201, "")).is_none());
        let unanswered = anyhow!("reset").context(NoAnswer("no answer".to_owned()));
        assert!(may_pass(&unanswered) && may_pass(&unanswered.context("lines 1 to 2")));
        assert!(!may_pass(&anyhow!("the server's answer is not JSON")));
    }
}
