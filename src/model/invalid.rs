//! Which field was wrong, and what would have been right.

/// A value from outside that cannot be accepted; it names the field and says what would be right.
///
/// `pointer` is a JSON pointer (RFC 6901) into the body, or the name of a header or parameter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{detail}", where_to_look(pointer))]
pub struct Invalid {
    /// Where: `/recovery/backoff/base`, `Pumphouse-Delay`, `limit`; empty for the whole body.
    pub pointer: String,
    /// What would have been right, as a sentence fragment without a full stop.
    pub detail: String,
}

impl Invalid {
    /// An error about the value at `pointer`.
    pub fn new(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: pointer.into(), detail: detail.into() }
    }

    /// The JSON pointer to a member of what `pointer` points at.
    pub fn pointer(pointer: &str, member: &str) -> String {
        format!("{pointer}/{}", member.replace('~', "~0").replace('/', "~1"))
    }

    /// The same error, seen from one level further out: `/delay` becomes `/messages/1/delay`.
    #[must_use]
    pub fn under(self, prefix: &str) -> Self {
        Self { pointer: format!("{prefix}{}", self.pointer), detail: self.detail }
    }
}

fn where_to_look(pointer: &str) -> String {
    if pointer.is_empty() { String::new() } else { format!("{pointer}: ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_where_if_that_is_not_everywhere() {
        assert_eq!(Invalid::new("/delay", "too long").to_string(), "/delay: too long");
        assert_eq!(Invalid::new("", "no object").to_string(), "no object");
    }
}
