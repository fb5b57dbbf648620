//! One HTTP/1.1 connection, owned by the one task that uses it: the cheapest way to send a request, so that
//! a measurement shows the server and not its client. No pool, no retries, no TLS.

use std::fmt;

use anyhow::{Context, Result, bail};
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_util::task::TaskTracker;
use url::Url;

/// How much of a refusal is shown.
const EXCERPT_MAX: usize = 2048;

/// Where a server answers: what a URL says before the path of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Base {
    host: String,
    port: u16,
    prefix: String,
}

impl Base {
    /// Reads a URL as in `http://127.0.0.1:8080`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let rule = "write where the server answers, as in http://127.0.0.1:8080";
        let url = Url::parse(text).map_err(|_| rule.to_owned())?;
        if url.scheme() == "https" {
            return Err(
                "only plain http:// is measured; TLS belongs to the proxy in front".to_owned()
            );
        }
        let plain = url.scheme() == "http" && url.query().is_none() && url.username().is_empty();
        let host = url.host_str().filter(|_| plain).ok_or_else(|| rule.to_owned())?;
        Ok(Self {
            host: host.to_owned(),
            port: url.port().unwrap_or(80),
            prefix: url.path().trim_end_matches('/').to_owned(),
        })
    }

    /// The request target of a path on this server.
    pub(super) fn path(&self, path: &str) -> Result<Uri> {
        let text = format!("{}{path}", self.prefix);
        text.parse().with_context(|| format!("{text} is not a path"))
    }

    fn authority(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}{}", self.authority(), self.prefix)
    }
}

/// One connection. Dropped, it is closed.
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    host: HeaderValue,
}

impl Connection {
    /// Connects. Nothing is sent yet.
    pub(super) async fn open(base: &Base) -> Result<Self> {
        // An IPv6 address stands in brackets in a URL, and without them in a socket address.
        let host = base.host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((host, base.port)).await;
        let stream = stream.with_context(|| format!("cannot connect to {base}"))?;
        stream.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // Ends when the sender is dropped; whether it failed, the sender is told.
        TaskTracker::new().spawn(connection);
        Ok(Self { sender, host: HeaderValue::try_from(base.authority())? })
    }

    /// Sends a `POST` whose answer is only whether it was taken. Fails with what a refusal said.
    pub(super) async fn post(
        &mut self,
        path: &Uri,
        content_type: &HeaderValue,
        body: Bytes,
    ) -> Result<()> {
        let request = Request::post(path.clone()).header(CONTENT_TYPE, content_type.clone());
        let mut answer = self.send(request, body).await?;
        if !answer.status().is_success() {
            let status = answer.status();
            let text = read(answer).await?;
            let text = String::from_utf8_lossy(&text[..text.len().min(EXCERPT_MAX)]).into_owned();
            bail!("{}", format!("POST {path} was answered with {status}\n{text}").trim_end());
        }
        while let Some(frame) = answer.frame().await {
            frame?;
        }
        Ok(())
    }

    /// Sends any request and reads the whole answer, whatever its status.
    pub(super) async fn ask(
        &mut self,
        method: Method,
        path: &Uri,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<(StatusCode, HeaderMap, Bytes)> {
        let mut request = Request::builder().method(method).uri(path.clone());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut answer = self.send(request, body).await?;
        let headers = std::mem::take(answer.headers_mut());
        Ok((answer.status(), headers, read(answer).await?))
    }

    async fn send(
        &mut self,
        request: http::request::Builder,
        body: Bytes,
    ) -> Result<Response<Incoming>> {
        let request = request.header(HOST, self.host.clone()).body(Full::new(body))?;
        self.sender.ready().await.context("the server closed the connection")?;
        self.sender.send_request(request).await.context("the server did not answer")
    }
}

async fn read(mut answer: Response<Incoming>) -> Result<Bytes> {
    let mut body = BytesMut::new();
    while let Some(frame) = answer.frame().await {
        if let Ok(data) = frame?.into_data() {
            body.extend_from_slice(&data);
        }
    }
    Ok(body.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_where_a_server_answers() {
        for (text, shown, path) in [
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080", "/v1"),
            ("http://h/", "http://h:80", "/v1"),
            ("http://[::1]:81/pump/", "http://[::1]:81/pump", "/pump/v1"),
        ] {
            let base = Base::parse(text).unwrap();
            assert_eq!(base.to_string(), shown);
            assert_eq!(base.path("/v1").unwrap().path(), path);
        }
        for bad in ["h:80", "https://h", "http://h?a=b", "ftp://h", "http://me@h", ""] {
            assert!(Base::parse(bad).is_err(), "{bad}");
        }
    }
}
