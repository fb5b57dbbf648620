//! What tests share: the running program, its clients, its handlers, and what must hold of them.
//!
//! Nothing in here asserts anything about one scenario; the rooms beside it do.

pub(crate) mod postgres;
pub(crate) mod process;
pub(crate) mod client;
pub(crate) mod receiver;
pub(crate) mod wire;
pub(crate) mod senders;
pub(crate) mod ledger;
pub(crate) mod text;
pub(crate) mod scene;
pub(crate) mod chance;
pub(crate) mod stage;
pub(crate) mod stores;
pub(crate) mod python;

use std::time::{Duration, Instant};

use tokio::sync::watch;

/// How long a test waits for what must come in the end.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

const POLL: Duration = Duration::from_millis(10);

/// Waits until `probe` says yes; says what it waited for if that does not come within [`PATIENCE`].
pub(crate) async fn eventually(what: &str, probe: impl AsyncFnMut() -> bool) {
    eventually_within(what, PATIENCE, probe).await;
}

/// The same with a limit of its own, for promises that name one.
pub(crate) async fn eventually_within(
    what: &str,
    limit: Duration,
    mut probe: impl AsyncFnMut() -> bool,
) {
    let start = Instant::now();
    while !probe().await {
        assert!(start.elapsed() < limit, "waited {limit:?} in vain for this: {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until a listener was told something, and marks it as seen.
pub(crate) async fn heard(news: &mut watch::Receiver<()>) {
    eventually("the news has come", async || news.has_changed().expect("the board is there")).await;
    news.mark_unchanged();
}

/// Looks for a while whether something that must not happen does.
pub(crate) async fn never_within<F>(what: &str, span: Duration, mut probe: F)
where
    F: FnMut() -> bool,
{
    let start = Instant::now();
    while start.elapsed() < span {
        assert!(!probe(), "this must not happen: {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// Lets a span pass, for what happens at a moment that nobody can wait for: a kill, a second try.
pub(crate) async fn pass(span: Duration) {
    tokio::time::sleep(span).await;
}

/// Shows a figure to whoever runs a test with `--nocapture`.
macro_rules! say {
    ($($what:tt)*) => {
        $crate::support::show(format_args!($($what)*))
    };
}
pub(crate) use say;

/// See [`say`].
#[expect(clippy::disallowed_macros, reason = "what a test measured is for the person who runs it")]
pub(crate) fn show(what: std::fmt::Arguments<'_>) {
    println!("{what}");
}

/// Makes two tests of one `async fn(Database)`: one on SQLite, one on Postgres.
macro_rules! on_both {
    ($($name:ident)*) => {
        $(mod $name {
            use crate::support::process::Database;

            #[tokio::test]
            async fn on_sqlite() {
                super::$name(Database::sqlite()).await;
            }

            #[tokio::test]
            async fn on_postgres() {
                super::$name(Database::postgres().await).await;
            }
        })*
    };
}
pub(crate) use on_both;
