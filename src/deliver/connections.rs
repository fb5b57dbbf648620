//! Connections to one handler, kept open between deliveries: HTTP/1.1, one exchange at a time on each.
//!
//! Ours and not a client library's pool, because a delivery needs so little of one; what was measured stands
//! in docs/decisions/0008-http-client.md.

use std::collections::VecDeque;
use std::error::Error as StdError;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::{BoxError, ServiceExt};

/// How connections to handlers are made: without a proxy, and with TLS where the URL says https.
#[derive(Debug, Clone)]
pub struct Connector {
    https: HttpsConnector<HttpConnector>,
    /// How many more unused connections may be kept, to all handlers together.
    keeping: Arc<Semaphore>,
}

/// Makes a connector that trusts the machine's certificate authorities, or Mozilla's where it has none.
pub fn connector() -> Connector {
    let mut tcp = HttpConnector::new();
    tcp.set_nodelay(true);
    tcp.enforce_http(false);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    let provider = rustls::crypto::ring::default_provider();
    let tls = HttpsConnectorBuilder::new().with_provider_and_native_roots(provider.clone());
    let tls = tls.unwrap_or_else(|_| {
        let ours = HttpsConnectorBuilder::new().with_provider_and_webpki_roots(provider);
        ours.expect("ring knows TLS 1.2 and 1.3")
    });
    Connector {
        https: tls.https_or_http().enable_http1().wrap_connector(tcp),
        keeping: Arc::new(Semaphore::new(UNUSED_MAX)),
    }
}

/// The connections to one handler.
#[derive(Debug)]
pub(super) struct Connections {
    connector: Connector,
    to: Uri,
    unused: Mutex<Unused>,
}

#[derive(Debug, Default)]
struct Unused {
    /// The one that was used last stands last, and is taken first.
    connections: VecDeque<Kept>,
    /// Whether a task is closing those that are not used for long.
    is_swept: bool,
}

#[derive(Debug)]
struct Kept {
    sender: Sender,
    since: Instant,
    _permit: OwnedSemaphorePermit,
}

impl Kept {
    fn is_good(&self) -> bool {
        !self.sender.is_closed() && self.since.elapsed() < UNUSED_FOR_MAX
    }
}

type Sender = SendRequest<Full<Bytes>>;

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// No connection could be made.
    Connect(BoxError),
    /// The connection broke, or what came was no HTTP.
    Exchange(hyper::Error),
}

/// A connection on which an answer has begun. Dropped, it is closed.
#[derive(Debug)]
pub(super) struct Used {
    sender: Sender,
    of: Arc<Connections>,
}

impl Connections {
    /// No connection yet; the URI says where they go.
    pub(super) fn new(connector: Connector, to: Uri) -> Arc<Self> {
        Arc::new(Self { connector, to, unused: Mutex::default() })
    }

    /// Sends a request, and waits for the head of its answer.
    ///
    /// Tried again only where a connection that was kept turns out to be closed before a byte of the request
    /// was written, which no handler can see.
    pub(super) async fn send(
        self: &Arc<Self>,
        mut request: Request<Full<Bytes>>,
    ) -> Result<(Response<Incoming>, Used), NoAnswer> {
        while let Some(mut kept) = self.take() {
            if kept.ready().await.is_err() {
                continue;
            }
            match kept.try_send_request(request).await {
                Ok(response) => return Ok((response, self.used(kept))),
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(NoAnswer::Exchange(error.into_error())),
                },
            }
        }
        let mut new = self.connect().await?;
        let response = new.send_request(request).await.map_err(NoAnswer::Exchange)?;
        Ok((response, self.used(new)))
    }

    async fn connect(&self) -> Result<Sender, NoAnswer> {
        let connect = self.connector.https.clone().oneshot(self.to.clone());
        let stream = connect.await.map_err(NoAnswer::Connect)?;
        let shaken = http1::Builder::new().max_buf_size(HEAD_MAX).handshake(stream).await;
        let (sender, connection) = shaken.map_err(NoAnswer::Exchange)?;
        #[expect(clippy::disallowed_methods, reason = "it ends with its connection")]
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                // Whoever had an exchange on it hears of it there.
                tracing::debug!(error = &error as &dyn StdError, "a connection to a handler ended");
            }
        });
        Ok(sender)
    }

    fn used(self: &Arc<Self>, sender: Sender) -> Used {
        Used { sender, of: Arc::clone(self) }
    }

    fn take(&self) -> Option<Sender> {
        let mut unused = self.unused();
        while let Some(kept) = unused.connections.pop_back() {
            if kept.is_good() {
                return Some(kept.sender);
            }
        }
        None
    }

    fn unused(&self) -> MutexGuard<'_, Unused> {
        self.unused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Used {
    /// Keeps the connection for the next request. For one whose answer was read whole.
    pub(super) fn keep(self) {
        let Self { sender, of } = self;
        let Ok(permit) = Arc::clone(&of.connector.keeping).try_acquire_owned() else { return };
        let mut unused = of.unused();
        unused.connections.push_back(Kept { sender, since: Instant::now(), _permit: permit });
        if !std::mem::replace(&mut unused.is_swept, true) {
            #[expect(clippy::disallowed_methods, reason = "it ends soon after the last use")]
            tokio::spawn(sweep(Arc::clone(&of)));
        }
    }
}

/// Closes what was not used for long, until nothing is left.
async fn sweep(of: Arc<Connections>) {
    loop {
        tokio::time::sleep(UNUSED_FOR_MAX / 4).await;
        let mut unused = of.unused();
        unused.connections.retain(Kept::is_good);
        if unused.connections.is_empty() {
            unused.is_swept = false;
            return;
        }
    }
}

/// How long a connection may take; the whole exchange has the queue's timeout.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an unused connection is kept: less than common servers keep theirs, which is 5 seconds for many; a
/// request that crosses its end would be a failed delivery.
const UNUSED_FOR_MAX: Duration = Duration::from_secs(4);
/// How many unused connections are kept by one process.
const UNUSED_MAX: usize = 512;
/// The most bytes in the head of an answer.
const HEAD_MAX: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_connection_that_its_handler_has_closed_costs_no_delivery() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        // Promises to keep each connection, and closes it after one answer.
        let serve = async {
            for _ in 0..2 {
                let (mut socket, _) = listener.accept().await.unwrap();
                let mut seen = Vec::new();
                while !seen.ends_with(b"\r\n\r\n") {
                    seen.push(socket.read_u8().await.unwrap());
                }
                socket.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            }
        };
        let connections = Connections::new(connector(), format!("http://{host}/").parse().unwrap());
        let send = async {
            for _ in 0..2 {
                let request = Request::get("/").header("host", &host);
                let request = request.body(Full::default()).unwrap();
                let (response, used) = connections.send(request).await.unwrap();
                assert_eq!(response.status(), 200);
                used.keep();
                let is_open =
                    || connections.unused().connections.iter().any(|kept| !kept.sender.is_closed());
                while is_open() {
                    tokio::task::yield_now().await;
                }
            }
        };
        let both = async { tokio::join!(serve, send) };
        tokio::time::timeout(Duration::from_secs(20), both).await.expect("both are answered");
    }
}
