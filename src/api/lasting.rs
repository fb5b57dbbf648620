//! Durations in bodies: `"250ms"`, `"30s"`, ISO 8601, or a number of seconds.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::{PartialSchema, ToSchema};

use crate::model::{parse_span, span_text};

/// A duration as people write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Lasting(pub(super) Duration);

impl Serialize for Lasting {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&span_text(self.0))
    }
}

impl<'de> Deserialize<'de> for Lasting {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(LastingVisitor)
    }
}

struct LastingVisitor;

impl Visitor<'_> for LastingVisitor {
    type Value = Lasting;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a duration like \"30s\", or a number of seconds")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Lasting, E> {
        parse_span(text).map(Lasting).map_err(|wrong| E::custom(wrong.detail))
    }

    fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Lasting, E> {
        self.visit_str(&seconds.to_string())
    }

    fn visit_i64<E: de::Error>(self, seconds: i64) -> Result<Lasting, E> {
        self.visit_str(&seconds.to_string())
    }

    fn visit_f64<E: de::Error>(self, seconds: f64) -> Result<Lasting, E> {
        self.visit_str(&seconds.to_string())
    }
}

impl PartialSchema for Lasting {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::Type::String)
            .description(Some(
                "A duration: \"250ms\", \"30s\", \"2h\", \"3d\", ISO 8601, or a number of seconds.",
            ))
            .examples(["30s"])
            .into()
    }
}

impl ToSchema for Lasting {
    fn name() -> Cow<'static, str> {
        Cow::Borrowed("Duration")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_seconds() {
        for (json, duration) in [
            ("\"250ms\"", Duration::from_millis(250)),
            ("30", Duration::from_secs(30)),
            ("0.5", Duration::from_millis(500)),
        ] {
            assert_eq!(serde_json::from_str::<Lasting>(json).unwrap().0, duration, "{json}");
        }
        for bad in ["-1", "\"soon\"", "1e300", "null", "[]"] {
            assert!(serde_json::from_str::<Lasting>(bad).is_err(), "{bad}");
        }
    }
}
