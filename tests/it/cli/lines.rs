//! Many lines into a queue or a topic: what is refused for now, what is refused for good, and what is named.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::future::join;
use serde_json::{Value, json};

use crate::support::process::{Database, Process};
use crate::support::receiver::{Delivery, Mood, Receiver, Reply};
use crate::support::{eventually, pass};

use super::running::{End, Running};

const LINES: &[&str] = &["send", "q", "--lines"];
const LINES_WITH_KEY: &[&str] = &["send", "q", "--lines", "--key", "import"];

async fn send(server: &Process, arguments: &[&str], input: impl AsRef<[u8]>) -> End {
    let mut running = Running::start(server.address(), arguments);
    running.feed(input).await;
    running.end().await
}

fn numbered(numbers: std::ops::Range<u64>) -> String {
    numbers.map(|number| format!("{{\"payload\":{number}}}\n")).collect()
}

/// Takes ten messages at most from the queue, and acks them; gives their payloads.
async fn take(server: &Process) -> Vec<u64> {
    let client = server.client();
    let leased = client.post("/v1/queues/q/leases", &json!({"max": 10})).await.expect(200).json();
    let leases = leased["leases"].as_array().expect("leases");
    if leases.is_empty() {
        return Vec::new();
    }
    let ack = |lease: &Value| json!({"token": lease["token"], "verdict": "ack"});
    let acks = json!({"settlements": leases.iter().map(ack).collect::<Vec<_>>()});
    client.post("/v1/leases/settle", &acks).await.expect(207);
    leases.iter().map(|lease| lease["message"]["payload"].as_u64().expect("a number")).collect()
}

/// Sends 25 lines to a queue with room for ten, which is emptied meanwhile; gives what came out of it.
async fn squeeze(server: &Process, arguments: &[&str]) -> (End, Vec<u64>) {
    let mut running = Running::start(server.address(), arguments);
    running.feed(numbered(0..25)).await;
    let mut taken = Vec::new();
    let squeezed = async {
        eventually("the queue is full", async || {
            server.client().queue("q").await["stats"]["ready"] == 10
        })
        .await;
        eventually("all have come", async || {
            taken.extend(take(server).await);
            taken.len() >= 25
        })
        .await;
    };
    let (end, ()) = join(running.end(), squeezed).await;
    taken.sort_unstable();
    (end, taken)
}

#[tokio::test]
async fn what_a_full_queue_refuses_is_sent_again_until_there_is_room() {
    let database = Database::sqlite().off_the_disk();
    let server = Process::start(&database, &["--queue", "q=pull:"]).await;
    // Nothing is remembered of what is done: whatever was sent again although it was taken would come again.
    server.client().patch_queue("q", &json!({"max_messages": 10, "dedup_window": "0s"})).await;
    let (end, taken) = squeeze(&server, LINES).await;
    assert_eq!(end.code, Some(0), "{end:?}");
    assert_eq!(["sent", "duplicates", "refused"].map(|name| end.count(name)), [25, 0, 0]);
    assert_eq!(taken, (0..25).collect::<Vec<_>>());
    assert!(take(&server).await.is_empty(), "and no more than these");
    assert_eq!(end.times("trying again"), 1, "{end:?}");
    assert_eq!(end.times("max_messages"), 1, "it says why: {end:?}");
}

#[tokio::test]
async fn a_repeat_of_what_a_full_queue_took_bit_by_bit_is_a_repeat() {
    let database = Database::sqlite().off_the_disk();
    let server = Process::start(&database, &["--queue", "q=pull:"]).await;
    server.client().patch_queue("q", &json!({"max_messages": 10})).await;
    let (end, taken) = squeeze(&server, LINES_WITH_KEY).await;
    assert_eq!(["sent", "duplicates", "refused"].map(|name| end.count(name)), [25, 0, 0]);
    assert_eq!(taken, (0..25).collect::<Vec<_>>());
    let again = send(&server, LINES_WITH_KEY, numbered(0..25)).await;
    assert_eq!(["sent", "duplicates", "refused"].map(|name| again.count(name)), [0, 25, 0]);
    assert!(take(&server).await.is_empty(), "nothing has come twice");
}

#[tokio::test]
async fn every_refused_line_is_named_by_its_place_in_the_input() {
    let database = Database::sqlite().off_the_disk();
    let server = Process::start(&database, &["--queue", "q=pull:"]).await;
    let wrong = "\n{\"payload\":1,\"delay\":\"soon\"}\r\n   \n{\"payload\":2}\n".repeat(600);
    let end = send(&server, LINES, wrong).await;
    assert_eq!(end.code, Some(1), "{end:?}");
    assert_eq!((end.count("sent"), end.count("refused")), (600, 600));
    let named = end.said.lines().filter_map(|line| line.strip_prefix("line ")?.split_once(": "));
    let named = named.map(|(number, _)| number.parse().expect("a number")).collect::<Vec<u64>>();
    assert_eq!(named, (0..600).map(|block| 4 * block + 2).collect::<Vec<_>>());
}

#[tokio::test]
async fn with_a_key_the_same_lines_are_the_same_batches_however_fast_they_come() {
    let database = Database::sqlite().off_the_disk();
    let server = Process::start(&database, &["--queue", "q=pull:"]).await;
    let mut slow = Running::start(server.address(), LINES_WITH_KEY);
    slow.feed(numbered(0..3)).await;
    pass(Duration::from_millis(700)).await;
    slow.feed(numbered(3..6)).await;
    assert_eq!(slow.end().await.count("sent"), 6);
    let fast = send(&server, LINES_WITH_KEY, numbered(0..6)).await;
    assert_eq!((fast.count("sent"), fast.count("duplicates")), (0, 6));

    let mut follower = Running::start(server.address(), LINES);
    follower.feed(numbered(0..1)).await;
    let come = async || server.client().queue("q").await["stats"]["ready"] == 7;
    eventually("without a key a line goes while others are waited for", come).await;
    follower.end().await;
}

#[tokio::test]
async fn a_line_that_is_no_text_is_named_and_the_others_are_sent() {
    let database = Database::sqlite().off_the_disk();
    let server = Process::start(&database, &["--queue", "q=pull:"]).await;
    let end = send(&server, LINES, b"{\"payload\":1}\n\n\"\xff\xfe\"\n{\"payload\":2}").await;
    assert_eq!(end.code, Some(1), "{end:?}");
    assert_eq!((end.count("sent"), end.count("refused")), (2, 1));
    assert!(end.said.contains("line 3: ") && end.said.contains("UTF-8"), "{end:?}");
}

#[tokio::test]
async fn a_line_that_no_request_has_room_for_is_refused_and_the_others_are_sent() {
    let database = Database::sqlite().off_the_disk();
    let server =
        Process::start(&database, &["--queue", "q=discard:", "--body-limit", "16MiB"]).await;
    // As a batch by itself, with its line break, the first is a byte too long, and the second just fits.
    let long = |bytes: usize| format!("{{\"payload\":\"{}\"}}", "x".repeat(bytes - 14));
    const MAX: usize = 16 << 20;
    let lines = [&*numbered(1..3), &long(MAX), "\n", &long(MAX - 1), "\n", &*numbered(4..6)];
    let end = send(&server, LINES, lines.concat()).await;
    assert_eq!(end.code, Some(1), "{}", end.said);
    assert_eq!((end.count("sent"), end.count("refused")), (5, 1));
    let named = end.said.lines().filter(|line| line.starts_with("line "));
    let named = named.map(|line| line.split(": ").next()).collect::<Vec<_>>();
    assert_eq!(named, [Some("line 3")], "{}", end.said);
}

#[tokio::test]
async fn an_address_that_cannot_be_meant_is_wrong_usage_and_not_tried_again() {
    for url in ["127.0.0.1:8080", "ftp://127.0.0.1", "http://", "http://a b", "http://h/?x=1", ""] {
        let mut running = Running::start("127.0.0.1:1", &[LINES, &["--url", url]].concat());
        running.feed("{}\n").await;
        let end = running.end().await;
        assert_eq!(end.code, Some(2), "{url:?}: {end:?}");
        assert!(end.said.contains("http://127.0.0.1:8080"), "it shows a good one: {end:?}");
    }
}

#[tokio::test]
async fn a_server_that_is_busy_is_asked_again_with_the_same_and_one_that_says_no_is_not() {
    const BATCH: &str = "/v1/queues/q/messages/batch";
    let server = Receiver::start().await;
    let answers = std::sync::Mutex::new(vec![
        Mood::Answer(Reply::new(207).body("{\"items\":[{\"status\":201},{\"status\":200}]}")),
        Mood::Close,
        Mood::status(503),
        Mood::status(429),
    ]);
    let next = move || answers.lock().expect("no test panics with it").pop();
    server.set(BATCH, Mood::by(move |_| next().unwrap_or_else(|| Mood::status(404))));
    let address = server.url("").replace("http://", "");
    let mut running = Running::start(&address, LINES_WITH_KEY);
    running.feed(numbered(0..2)).await;
    let end = running.end().await;
    assert_eq!(end.code, Some(0), "{end:?}");
    assert_eq!((end.count("sent"), end.count("duplicates")), (1, 1));
    assert_eq!(end.times("trying again"), 1, "once for one trouble: {end:?}");
    let asked = server.deliveries(BATCH);
    assert_eq!(asked.len(), 4);
    for one in &asked {
        let first = &asked[0];
        let same = |name| one.header(name) == first.header(name) && !one.header(name).is_empty();
        assert!(same("idempotency-key") && one.body == first.body, "{one:?}");
    }

    let mut running = Running::start(&address, LINES);
    running.feed(numbered(0..2)).await;
    let end = running.end().await;
    assert_eq!((end.code, end.count("sent")), (Some(1), 0), "the summary comes all the same");
    assert!(end.said.contains("404 Not Found") && end.said.contains("lines 1 to 2"), "{end:?}");
    assert_eq!((server.deliveries(BATCH).len(), end.times("trying again")), (5, 0));
}

/// Answers each batch by this, which is given the number of the request.
async fn scripted(answer: impl Fn(usize) -> Value + Send + Sync + 'static) -> (Receiver, String) {
    let server = Receiver::start().await;
    let asked = AtomicUsize::new(0);
    let mood = move |_: &Delivery| {
        let answer = answer(asked.fetch_add(1, Ordering::Relaxed));
        Mood::Answer(Reply::new(207).body(answer.to_string()))
    };
    server.set(BATCH, Mood::by(mood));
    let address = server.url("").replace("http://", "");
    (server, address)
}

const BATCH: &str = "/v1/queues/q/messages/batch";

fn items(statuses: &[u16]) -> Value {
    let item = |status: &u16| json!({"status": status, "problem": {"code": "c", "detail": "d"}});
    json!({"items": statuses.iter().map(item).collect::<Vec<_>>()})
}

/// Its key alone would tell a repeat of what was kept and not told.
#[tokio::test]
async fn what_may_have_been_kept_goes_again_under_its_key() {
    let all = [items(&[201, 503]), items(&[200, 201])];
    let (server, address) = scripted(move |asked| all[asked.min(1)].clone()).await;
    let mut running = Running::start(&address, LINES);
    running.feed(numbered(0..2)).await;
    let end = running.end().await;
    assert_eq!((end.code, end.count("sent"), end.count("refused")), (Some(0), 2, 0), "{end:?}");
    let said = server.deliveries(BATCH);
    let of = |at: usize| (said[at].header("idempotency-key").to_owned(), said[at].body.clone());
    assert_eq!((said.len(), of(0)), (2, of(1)));
}

/// Twelve batches, of each of which the half gets in at the second try: more tries than there is patience for one.
#[tokio::test]
async fn patience_is_for_those_that_do_not_get_in_at_all() {
    let answer = |asked| if asked % 2 == 0 { items(&[201, 429]) } else { items(&[201]) };
    let (server, address) = scripted(answer).await;
    let mut running = Running::start(&address, LINES);
    for _ in 0..12 {
        let before = server.deliveries(BATCH).len();
        running.feed(numbered(0..2)).await;
        let done = async || server.deliveries(BATCH).len() == before + 2;
        eventually("they are sent", done).await;
    }
    let end = running.end().await;
    assert_eq!((end.code, end.count("sent"), end.count("refused")), (Some(0), 24, 0), "{end:?}");
}

/// A line that is done is done once, or it is said that it was not.
#[tokio::test]
async fn what_is_taken_twice_is_told() {
    let all = [items(&[201, 429]), items(&[201, 201])];
    let (_server, address) = scripted(move |asked| all[asked.min(1)].clone()).await;
    let mut running = Running::start(&address, LINES_WITH_KEY);
    running.feed(numbered(0..2)).await;
    let end = running.end().await;
    assert!(end.said.contains("line 1 is there twice"), "{end:?}");
}
