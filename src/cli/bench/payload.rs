//! What is sent: JSON of an exact size, stamped with a number and a time where its arrival is to be told.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;

/// The smallest payload: what the stamp needs.
pub(super) const PAYLOAD_MIN: usize = 64;
/// The largest: what a server takes by default.
pub(super) const PAYLOAD_MAX: usize = 1 << 20;

/// How many bytes at the front of a payload hold its stamp.
pub(super) const STAMP_LEN: usize = 38;

const DIGITS: usize = 12;

/// Numbers messages and says when each was sent, in microseconds since this was made. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Stamps(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    epoch: Instant,
    next: AtomicU64,
}

/// What a payload says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    /// The message's number, from 0.
    pub(super) number: u64,
    /// When it was sent, or was to be sent.
    pub(super) sent: Instant,
}

impl Stamps {
    /// From number 0, and now.
    pub(super) fn new() -> Self {
        Self(Arc::new(Inner { epoch: Instant::now(), next: AtomicU64::new(0) }))
    }

    /// The next payload, of so many bytes.
    pub(super) fn payload(&self, sent: Instant, size: usize) -> Bytes {
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        let micros = sent.saturating_duration_since(self.0.epoch).as_micros();
        let mut text = String::with_capacity(size);
        text.push_str(&format!(r#"{{"n":"{number:012}","at":"{micros:012}","pad":""#));
        pad(text, size)
    }

    /// Reads the stamp; `None` for a payload that is not of this kind.
    pub(super) fn read(&self, payload: &[u8]) -> Option<Stamp> {
        let number = payload.get(6..6 + DIGITS)?;
        let micros = payload.get(26..26 + DIGITS)?;
        let known = payload.starts_with(br#"{"n":""#) && payload.get(18..26)? == br#"","at":""#;
        let sent = self.0.epoch + Duration::from_micros(number_in(micros)?);
        Some(Stamp { number: number_in(number)?, sent }).filter(|_| known)
    }
}

/// A payload of so many bytes that says nothing.
pub(super) fn plain(size: usize) -> Bytes {
    pad(r#"{"pad":""#.to_owned(), size)
}

/// So many envelopes, one a line.
pub(super) fn ndjson(payloads: impl Iterator<Item = Bytes>) -> Bytes {
    let mut lines = Vec::new();
    for payload in payloads {
        lines.extend_from_slice(br#"{"payload":"#);
        lines.extend_from_slice(&payload);
        lines.extend_from_slice(b"}\n");
    }
    lines.into()
}

/// How many bytes one line of [`ndjson`] has around its payload.
pub(super) const ENVELOPE_LEN: usize = 13;

fn pad(mut text: String, size: usize) -> Bytes {
    let end = "\"}";
    text.extend(std::iter::repeat_n('x', size.saturating_sub(text.len() + end.len())));
    text.push_str(end);
    text.into()
}

fn number_in(digits: &[u8]) -> Option<u64> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_read_as_it_was_written() {
        let stamps = Stamps::new();
        let sent = Instant::now() + Duration::from_millis(1500);
        for number in 0..3 {
            let payload = stamps.payload(sent, PAYLOAD_MIN);
            assert_eq!(payload.len(), PAYLOAD_MIN);
            let stamp = stamps.read(&payload[..STAMP_LEN]).unwrap();
            assert_eq!(stamp.number, number);
            assert!(sent - stamp.sent < Duration::from_micros(1));
        }
        for other in [&b""[..], b"{}", &plain(256), &[b'9'; 64]] {
            assert_eq!(stamps.read(other), None);
        }
    }

    #[test]
    fn every_payload_is_json_of_its_size() {
        for payload in [plain(256), Stamps::new().payload(Instant::now(), 256)] {
            assert_eq!(payload.len(), 256);
            serde_json::from_slice::<serde_json::Value>(&payload).unwrap();
        }
        let lines = ndjson([plain(64), plain(64)].into_iter());
        assert_eq!(lines.len(), 2 * (64 + ENVELOPE_LEN));
    }
}
