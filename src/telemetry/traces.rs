//! W3C Trace Context in and out of headers. It exports nothing.

/// A `traceparent` for the next hop: the same trace and flags, a new parent id.
///
/// `None` where the given one is not a valid version 00 header of <https://www.w3.org/TR/trace-context/>;
/// a receiver then starts a trace of its own, as that text asks.
pub fn next_hop(traceparent: &str) -> Option<String> {
    let mut parts = traceparent.split('-');
    let (version, trace, parent, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, length| {
        text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let zero = |text: &str| text.bytes().all(|b| b == b'0');
    let valid = version == "00"
        && parts.next().is_none()
        && hex(trace, 32)
        && hex(parent, 16)
        && hex(flags, 2)
        && !zero(trace)
        && !zero(parent);
    let ours = getrandom::u64().ok()?.max(1);
    valid.then(|| format!("00-{trace}-{ours:016x}-{flags}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trace_goes_on_with_a_new_parent() {
        let given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let next = next_hop(given).unwrap();
        assert!(next.starts_with("00-4bf92f3577b34da6a3ce929d0e0e4736-") && next.ends_with("-01"));
        assert_ne!(next, given);
    }

    #[test]
    fn a_broken_trace_ends_here() {
        for bad in [
            "",
            "00",
            "00-zz-00f067aa0ba902b7-01",
            "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(next_hop(bad), None, "{bad}");
        }
    }
}
