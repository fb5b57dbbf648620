//! One HTTP/1.1 connection, owned by the one task that uses it: the cheapest way to send a POST.

use anyhow::Context as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

pub struct Connection {
    sender: SendRequest<Full<Bytes>>,
    host: HeaderValue,
    path: Uri,
}

impl Connection {
    pub async fn open(url: &Uri) -> anyhow::Result<Self> {
        let host = url.host().context("the URL names no host")?;
        let port = url.port_u16().unwrap_or(80);
        let stream = TcpStream::connect((host, port)).await.context("cannot connect")?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // Its end is seen by the sender.
        tokio::spawn(connection);
        let path = url.path_and_query().map_or("/", |path| path.as_str()).parse()?;
        Ok(Self { sender, host: HeaderValue::try_from(format!("{host}:{port}"))?, path })
    }

    pub async fn post(&mut self, payload: Bytes) -> anyhow::Result<StatusCode> {
        let request = Request::post(self.path.clone())
            .header(HOST, self.host.clone())
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .body(Full::new(payload))?;
        self.sender.ready().await?;
        let mut response = self.sender.send_request(request).await?;
        while let Some(frame) = response.frame().await {
            frame?;
        }
        Ok(response.status())
    }
}
