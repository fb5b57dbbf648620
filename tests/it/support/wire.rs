//! HTTP/1.1 by hand, for what no library would send: broken requests, broken answers.
//!
//! It reads a whole message with a length or in chunks, and nothing more of the protocol than tests need.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A request or an answer, read to its end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parsed {
    /// `POST /path HTTP/1.1` or `HTTP/1.1 200 OK`.
    pub(crate) first_line: String,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    /// Without the chunks around it.
    pub(crate) body: Vec<u8>,
}

impl Parsed {
    /// A header's value, or nothing.
    pub(crate) fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(given, _)| given == name);
        found.map_or("", |(_, value)| value)
    }

    /// The status, if this is an answer.
    pub(crate) fn status(&self) -> u16 {
        let word = self.first_line.split(' ').nth(1).unwrap_or_default();
        word.parse().unwrap_or_else(|_| panic!("no status in {:?}", self.first_line))
    }
}

/// Sends bytes as they are; gives the answer, or `None` if the connection was closed without one.
pub(crate) async fn send_bytes(address: SocketAddr, bytes: &[u8]) -> Option<Parsed> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.expect("the process listens");
        // The other side may answer and close before it has read everything: the answer counts.
        if stream.write_all(bytes).await.is_err() {
            return None;
        }
        read_message(&mut stream, &mut BytesMut::new()).await.ok().flatten()
    };
    timeout(Duration::from_secs(30), exchange).await.expect("answered or closed in time")
}

/// Reads one message; `None` if the other side closed before it began.
pub(crate) async fn read_message(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
) -> io::Result<Option<Parsed>> {
    let head_end = loop {
        if let Some(at) = find(buffer, b"\r\n\r\n") {
            break at;
        }
        if buffer.first().is_some_and(|byte| !byte.is_ascii_alphabetic()) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if stream.read_buf(buffer).await? == 0 {
            let clean = buffer.is_empty();
            return if clean { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
        }
    };
    let head = String::from_utf8_lossy(&buffer[..head_end]).into_owned();
    buffer.advance(head_end + 4);
    let mut lines = head.split("\r\n");
    let first_line = lines.next().unwrap_or_default().to_owned();
    let headers = lines.filter_map(|line| line.split_once(':'));
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()));
    let mut parsed = Parsed { first_line, headers: headers.collect(), body: Vec::new() };
    if parsed.header("transfer-encoding").contains("chunked") {
        while let Some(chunk) = read_chunk(stream, buffer).await? {
            parsed.body.extend(chunk);
        }
    } else {
        let length = parsed.header("content-length").parse().unwrap_or(0);
        parsed.body = take(stream, buffer, length).await?;
    }
    Ok(Some(parsed))
}

async fn read_chunk(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
) -> io::Result<Option<Vec<u8>>> {
    let line_end = loop {
        if let Some(at) = find(buffer, b"\r\n") {
            break at;
        }
        fill(stream, buffer).await?;
    };
    let line = String::from_utf8_lossy(&buffer[..line_end]).into_owned();
    buffer.advance(line_end + 2);
    let size = usize::from_str_radix(line.trim(), 16).map_err(io::Error::other)?;
    let mut chunk = take(stream, buffer, size + 2).await?;
    chunk.truncate(size);
    Ok((size > 0).then_some(chunk))
}

async fn take(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
    length: usize,
) -> io::Result<Vec<u8>> {
    while buffer.len() < length {
        fill(stream, buffer).await?;
    }
    Ok(buffer.split_to(length).to_vec())
}

async fn fill(stream: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut) -> io::Result<()> {
    match stream.read_buf(buffer).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}
