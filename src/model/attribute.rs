//! The value of an attribute of a CloudEvent, with the type that it came with.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The value of an attribute. As text, which is what it is in a header, it has the canonical form of CloudEvents.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Attribute {
    /// A truth.
    Truth(bool),
    /// A whole number.
    Number(i32),
    /// Anything else: text, times, addresses, bytes in base64.
    Text(String),
}

impl Attribute {
    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Text(text) if text.is_empty())
    }

    /// How many bytes it has as text.
    pub fn len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Truth(_) | Self::Number(_) => self.to_string().len(),
        }
    }
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truth(truth) => truth.fmt(f),
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => f.write_str(text),
        }
    }
}

impl From<&str> for Attribute {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}
