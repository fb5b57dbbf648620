//! How a patch meets a queue's settings: a JSON merge patch, and what JSON does not know of them.

use serde_json::Value;

use crate::model::{Invalid, QueueSettings};

use super::problem::{self, Problem};
use super::queue_settings::{SettingsBody, spelled_twice};

/// A patch of a queue's settings: a merge patch, with what a queue knows and JSON does not.
#[derive(Debug)]
pub(super) struct SettingsPatch(Value);

impl SettingsPatch {
    /// Fails on what is no patch of settings whatever they are.
    pub(super) fn new(mut patch: Value) -> Result<Self, Problem> {
        let Value::Object(members) = &mut patch else {
            return Err(Invalid::new("", "a patch is a JSON object").into());
        };
        // Overlooked, they would be answered 200 and change nothing.
        for (name, detail) in READ_ONLY {
            if members.contains_key(name) {
                return Err(Invalid::new(format!("/{name}"), detail).into());
            }
        }
        if let Some(headers) = patch.pointer_mut("/handler/headers") {
            lower_case_names(headers)?;
        }
        Ok(Self(patch))
    }

    /// These settings with the patch applied to them.
    pub(super) fn apply_to(&self, settings: &QueueSettings) -> Result<Value, Problem> {
        let mut body = serde_json::to_value(SettingsBody::as_set(settings))
            .map_err(|_| Problem::new(problem::INTERNAL, "settings could not be written"))?;
        if let Some(kind) = self.0.pointer("/handler/kind")
            && body.pointer("/handler/kind") != Some(kind)
        {
            // Of another kind of handler there is nothing to keep.
            body["handler"] = Value::Null;
        }
        merge_patch(&mut body, self.0.clone());
        if self.0.get("breaker").is_some_and(Value::is_null) {
            // What a merge patch takes out has its default, and of a breaker that is not none.
            body["breaker"] = Value::Null;
        }
        Ok(body)
    }
}

/// Names are stored in lower case, and a merge patch has to meet them.
fn lower_case_names(headers: &mut Value) -> Result<(), Invalid> {
    let Value::Object(members) = headers else { return Ok(()) };
    for (name, value) in std::mem::take(members) {
        if members.insert(name.to_ascii_lowercase(), value).is_some() {
            return Err(spelled_twice(Invalid::pointer("/handler/headers", &name)));
        }
    }
    Ok(())
}

/// What a patch cannot change, and what does.
const READ_ONLY: [(&str, &str); 6] = [
    ("name", "a queue keeps its name"),
    ("state", RUNNING),
    ("stopped", RUNNING),
    ("held_until", "this can only be read"),
    ("breaker_state", "this can only be read"),
    ("stats", "this can only be read"),
];
const RUNNING: &str =
    "this can only be read; POST /admin/v1/queues/{queue}/stop and /start change it";

/// Applies a JSON merge patch (RFC 7396).
fn merge_patch(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(members) = target else { return };
    for (name, value) in patch {
        if value.is_null() {
            members.remove(&name);
        } else {
            merge_patch(members.entry(name).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn merge_patch_is_that_of_the_rfc() {
        for (target, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (
                json!({"a": {"b": "c"}}),
                json!({"a": {"b": "d", "c": null}}),
                json!({"a": {"b": "d"}}),
            ),
            (
                json!({"a": "foo"}),
                json!({"b": {"c": {"d": null}}}),
                json!({"a": "foo", "b": {"c": {}}}),
            ),
            (json!(["a"]), json!({"x": 1}), json!({"x": 1})),
        ] {
            let mut patched = target;
            merge_patch(&mut patched, patch);
            assert_eq!(patched, result);
        }
    }
}
