//! One HTTP request to a running Pumphouse, for the commands that talk to one. No retries, no redirects.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy;
use hyper_util::rt::TokioExecutor;
use rustls::crypto::ring;

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

/// An answer that is none of 2xx.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(super) struct Refused {
    status: StatusCode,
    text: String,
}

impl Refused {
    /// Whether the same may be answered otherwise a little later.
    pub(super) fn is_for_now(&self) -> bool {
        matches!(
            self.status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE | StatusCode::CONFLICT
        )
    }
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
        .map_err(|_| anyhow!("no answer within {:?} to {what}", call.patience))?;
    let (status, body) = answer.with_context(|| format!("no answer to {what}"))?;
    if !status.is_success() {
        let text = format!("{what} was answered with {status}\n{}", pretty(&body));
        return Err(Refused { status, text: text.trim_end().to_owned() }.into());
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
    let json = serde_json::from_slice::<serde_json::Value>(body).ok();
    json.and_then(|json| serde_json::to_string_pretty(&json).ok())
        .unwrap_or_else(|| String::from_utf8_lossy(body).into_owned())
}
