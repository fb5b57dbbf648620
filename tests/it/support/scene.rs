//! The usual scene of a test: one database, one process on it, one client, one handler.

use serde_json::{Value, json};

use super::client::Client;
use super::process::{Database, Process};
use super::receiver::Receiver;

/// One database, one process on it, one client, one handler.
pub(crate) struct Scene {
    pub(crate) database: Database,
    pub(crate) process: Process,
    pub(crate) client: Client,
    pub(crate) receiver: Receiver,
    flags: Vec<String>,
}

impl Scene {
    /// On an empty SQLite database.
    pub(crate) async fn new() -> Self {
        Self::on(Database::sqlite()).await
    }

    /// On this database.
    pub(crate) async fn on(database: Database) -> Self {
        Self::with_flags(database, &[]).await
    }

    /// On this database, the process with more flags.
    pub(crate) async fn with_flags(database: Database, flags: &[&str]) -> Self {
        let process = Process::start(&database, flags).await;
        let (client, receiver) = (process.client(), Receiver::start().await);
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        Self { database, process, client, receiver, flags }
    }

    /// Makes a queue that delivers to the receiver's path `/{name}`, and retries quickly.
    pub(crate) async fn queue(&self, name: &str) {
        self.queue_with(name, json!({})).await;
    }

    /// The same with some settings changed, as by a merge patch.
    pub(crate) async fn queue_with(&self, name: &str, changes: Value) {
        let settings = quick(&self.receiver.url(&format!("/{name}")), changes);
        self.client.put_queue(name, &settings).await;
    }

    /// Starts another process, with the same flags, in place of one that has ended.
    pub(crate) async fn restart(&mut self) {
        let flags = self.flags.iter().map(String::as_str).collect::<Vec<_>>();
        self.process = Process::start(&self.database, &flags).await;
        self.client = self.process.client();
    }
}

/// Settings of a queue for this handler that retries quickly, changed as by a merge patch.
pub(crate) fn quick(url: &str, changes: Value) -> Value {
    let mut settings = json!({
        "handler": {"kind": "http", "url": url, "timeout": "5s"},
        "recovery": {"backoff": {"base": "10ms", "max": "50ms"}},
        "breaker": null, // or ten failures in a row of a test would slow it down
    });
    merge(&mut settings, changes);
    settings
}

/// Merge patch (RFC 7396), but that a null is put in and not taken out.
fn merge(target: &mut Value, patch: Value) {
    match (target, patch) {
        (Value::Object(target), Value::Object(patch)) => {
            for (name, value) in patch {
                merge(target.entry(name).or_insert(Value::Null), value);
            }
        }
        (target, patch) => *target = patch,
    }
}
