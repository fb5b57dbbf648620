//! Hostile and broken requests: each is answered as the protocol says, and changes nothing.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::client::{ENVELOPE, ask};
use crate::support::eventually_within;
use crate::support::scene::Scene;
use crate::support::wire::{Parsed, send_bytes};

const JSON: &str = "application/json";
const NDJSON: &str = "application/x-ndjson";
const PATCH: &str = "application/merge-patch+json";
const SEND: &str = "/v1/queues/q/messages";
const BATCH: &str = "/v1/queues/q/messages/batch";
const QUEUE: &str = "/admin/v1/queues/q";
const NOBODY: &str = "/v1/messages/0197a4c2-7d3e-7000-8000-000000000000";

/// A request, and the status that is right for it.
type Case =
    (&'static str, &'static str, &'static [(&'static str, &'static str)], &'static [u8], u16);

/// What is asked, in the order: method, path, headers, body, right answer.
const CASES: &[Case] = &[
    // Routes and methods.
    ("GET", "/nothing", &[], b"", 404),
    ("GET", "/v1", &[], b"", 404),
    ("GET", "/v2/queues", &[], b"", 404),
    ("GET", "/v1/queues/q/messages/../../../etc/passwd", &[], b"", 404),
    ("GET", "/%2e%2e/%2e%2e/etc/passwd", &[], b"", 404),
    ("PUT", SEND, &[], b"x", 405),
    ("PATCH", SEND, &[], b"x", 405),
    ("GET", BATCH, &[], b"", 405),
    ("POST", "/livez", &[], b"", 405),
    ("DELETE", "/metrics", &[], b"", 405),
    ("TRACE", SEND, &[], b"", 405),
    // Names.
    ("POST", "/v1/queues/UPPER/messages", &[], b"x", 422),
    ("POST", "/v1/queues/%00/messages", &[], b"x", 422),
    ("POST", "/v1/queues/%ff%fe/messages", &[], b"x", 400),
    ("POST", "/v1/queues/a%20b/messages", &[], b"x", 422),
    ("POST", "/v1/queues/'%3Bdrop%20table%20messages%3B--/messages", &[], b"x", 422),
    ("PUT", "/admin/v1/queues/-x", &[("content-type", JSON)], b"{}", 422),
    ("PUT", "/admin/v1/queues/%F0%9F%98%80", &[("content-type", JSON)], b"{}", 422),
    ("POST", "/v1/queues/nobody/messages", &[], b"x", 404),
    // Ids.
    ("GET", "/v1/messages/1", &[], b"", 404),
    ("GET", "/v1/messages/%00", &[], b"", 404),
    ("GET", NOBODY, &[], b"", 404),
    ("DELETE", NOBODY, &[], b"", 404),
    // Options in headers.
    ("POST", SEND, &[("pumphouse-delay", "soon")], b"x", 422),
    ("POST", SEND, &[("pumphouse-delay", "-1s")], b"x", 422),
    ("POST", SEND, &[("pumphouse-delay", "NaN")], b"x", 422),
    ("POST", SEND, &[("pumphouse-delay", "9223372036854775808")], b"x", 422),
    ("POST", SEND, &[("pumphouse-delay", "367d")], b"x", 422),
    ("POST", SEND, &[("pumphouse-deliver-at", "tomorrow")], b"x", 422),
    ("POST", SEND, &[("pumphouse-deliver-at", "9999-12-31T23:59:59Z")], b"x", 422),
    (
        "POST",
        SEND,
        &[("pumphouse-delay", "1s"), ("pumphouse-deliver-at", "2030-01-01T00:00:00Z")],
        b"x",
        422,
    ),
    ("POST", SEND, &[("pumphouse-expires-in", "never")], b"x", 422),
    ("POST", SEND, &[("pumphouse-priority", "101")], b"x", 422),
    ("POST", SEND, &[("pumphouse-priority", "high")], b"x", 422),
    ("POST", SEND, &[("pumphouse-priority", "1e9")], b"x", 422),
    ("POST", SEND, &[("pumphouse-colour", "red")], b"x", 422),
    ("POST", SEND, &[("pumphouse-priority", "1"), ("pumphouse-priority", "2")], b"x", 422),
    ("POST", SEND, &[("content-encoding", "gzip")], b"x", 415),
    ("PATCH", QUEUE, &[("content-type", PATCH), ("content-encoding", "br")], b"{}", 415),
    ("POST", SEND, &[("pumphouse-forward-host", "evil")], b"x", 422),
    ("POST", SEND, &[("pumphouse-forward-content-length", "1")], b"x", 422),
    ("POST", SEND, &[("pumphouse-forward-transfer-encoding", "chunked")], b"x", 422),
    ("POST", SEND, &[("pumphouse-forward-webhook-id", "1")], b"x", 422),
    ("POST", SEND, &[("pumphouse-forward-ce-id", "1")], b"x", 422),
    ("POST", SEND, &[("pumphouse-forward-pumphouse-attempt", "1")], b"x", 422),
    ("POST", SEND, &[("idempotency-key", "")], b"x", 422),
    ("POST", SEND, &[("idempotency-key", "\"open")], b"x", 422),
    // Envelopes.
    ("POST", SEND, &[("content-type", ENVELOPE)], b"", 400),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"{", 400),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"\xff\xfe", 400),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"[]", 422),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"{}", 422),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"{\"payload\":1,\"colour\":\"red\"}", 422),
    (
        "POST",
        SEND,
        &[("content-type", ENVELOPE)],
        b"{\"payload\":1,\"payload_base64\":\"eA==\"}",
        422,
    ),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"{\"payload_base64\":\"?\"}", 422),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"{\"payload\":1,\"priority\":\"1\"}", 422),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"{\"payload\":1,\"priority\":1e400}", 400),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"{\"payload\":1,\"priority\":1.5}", 422),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"{\"payload\":1,\"delay\":-1}", 422),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"{\"payload\":1,\"delay\":1e300}", 422),
    (
        "POST",
        SEND,
        &[("content-type", ENVELOPE)],
        b"{\"payload\":1,\"headers\":{\"host\":\"x\"}}",
        422,
    ),
    (
        "POST",
        SEND,
        &[("content-type", ENVELOPE)],
        b"{\"payload\":1,\"headers\":{\"a b\":\"x\"}}",
        422,
    ),
    (
        "POST",
        SEND,
        &[("content-type", ENVELOPE)],
        b"{\"payload\":1,\"headers\":{\"a\":\"x\\r\\ny: z\"}}",
        422,
    ),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"{\"payload\":1,\"headers\":[]}", 422),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"{\"payload\":1,\"type\":\"a\\u0000b\"}", 422),
    ("POST", SEND, &[("content-type", ENVELOPE)], b"{\"payload\":1,\"type\":\"\\ud800\"}", 400),
    // Batches.
    ("POST", BATCH, &[("content-type", JSON)], b"", 400),
    ("POST", BATCH, &[("content-type", JSON)], b"nonsense", 400),
    ("POST", BATCH, &[("content-type", JSON)], b"{\"messages\":{}}", 422),
    ("POST", BATCH, &[("content-type", JSON)], b"{\"messages\":[],\"more\":1}", 422),
    ("POST", BATCH, &[("content-type", JSON)], b"{\"messages\":[1],\"atomic\":true}", 422),
    ("POST", BATCH, &[("content-type", "text/xml")], b"<!DOCTYPE a>", 415),
    ("POST", BATCH, &[], b"x", 415),
    ("POST", BATCH, &[("content-type", NDJSON), ("idempotency-key", "")], b"{\"payload\":1}", 422),
    // Settings.
    ("PUT", QUEUE, &[("content-type", JSON)], b"", 400),
    ("PUT", QUEUE, &[("content-type", JSON)], b"[1", 400),
    ("PUT", QUEUE, &[("content-type", JSON)], b"[]", 422),
    ("PATCH", QUEUE, &[("content-type", PATCH)], b"[]", 422),
    ("PUT", QUEUE, &[("content-type", JSON)], b"\xc3\x28", 400),
    ("PUT", QUEUE, &[("content-type", "text/plain")], b"{}", 415),
    ("PUT", QUEUE, &[("content-type", JSON)], b"{\"colour\":\"red\"}", 422),
    ("PUT", QUEUE, &[("content-type", JSON)], b"{\"concurrency\":{\"limit\":-1}}", 422),
    ("PUT", QUEUE, &[("content-type", JSON)], b"{\"concurrency\":{\"limit\":100001}}", 422),
    (
        "PUT",
        QUEUE,
        &[("content-type", JSON)],
        b"{\"handler\":{\"kind\":\"http\",\"url\":\"ftp://x\"}}",
        422,
    ),
    (
        "PUT",
        QUEUE,
        &[("content-type", JSON)],
        b"{\"handler\":{\"kind\":\"http\",\"url\":\"http://u:p@x\"}}",
        422,
    ),
    ("PUT", QUEUE, &[("content-type", JSON)], b"{\"handler\":{\"kind\":\"carrier pigeon\"}}", 422),
    (
        "PUT",
        QUEUE,
        &[("content-type", JSON)],
        b"{\"recovery\":{\"backoff\":{\"base\":\"soon\"}}}",
        422,
    ),
    ("PATCH", QUEUE, &[("content-type", PATCH)], b"{\"lease\":\"1s\"}", 422),
    ("PATCH", QUEUE, &[("content-type", PATCH)], b"{\"max_messages\":0}", 422),
    ("PATCH", QUEUE, &[("content-type", PATCH)], b"{\"recovery\":{\"max_attempts\":0}}", 422),
    ("PATCH", QUEUE, &[("content-type", PATCH)], b"{\"a\":", 400),
    ("POST", "/admin/v1/queues/q/stop", &[("content-type", JSON)], b"{\"mode\":\"gently\"}", 422),
    ("POST", "/admin/v1/queues/q/stop", &[("content-type", JSON)], b"{\"deadline\":\"soon\"}", 422),
    ("POST", "/admin/v1/queues/nobody/stop", &[], b"", 404),
    ("POST", "/admin/v1/queues/nobody/start", &[], b"", 404),
    ("DELETE", "/admin/v1/queues/nobody", &[], b"", 404),
    (
        "PATCH",
        "/admin/v1/pump",
        &[("content-type", PATCH)],
        b"{\"concurrency\":{\"limit\":\"many\"}}",
        422,
    ),
    // Lists.
    ("GET", "/v1/messages?limit=0", &[], b"", 422),
    ("GET", "/v1/messages?limit=many", &[], b"", 422),
    ("GET", "/v1/messages?limit=-1", &[], b"", 422),
    ("GET", "/v1/messages?cursor=nonsense", &[], b"", 422),
    ("GET", "/v1/messages?cursor=%00%ff", &[], b"", 422),
    ("GET", "/v1/messages?state=gone", &[], b"", 422),
    ("GET", "/v1/messages?queue=NO", &[], b"", 422),
    ("GET", "/v1/messages?type=%00", &[], b"", 422),
    ("GET", "/v1/messages?correlation_id=", &[], b"", 422),
    ("GET", "/admin/v1/dead-letters?type=a%0Ab", &[], b"", 422),
    ("GET", "/v1/messages?since=yesterday", &[], b"", 422),
    ("GET", "/v1/messages?colour=red", &[], b"", 422),
    ("GET", "/admin/v1/dead-letters?cursor=!!", &[], b"", 422),
    ("POST", "/admin/v1/dead-letters/nonsense/redrive", &[], b"", 404),
];

#[tokio::test]
async fn bad_requests_are_answered_as_they_deserve_and_change_nothing() {
    let mut scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let before = everything(&scene).await;
    let pid = scene.process.pid();
    let mut wrong = Vec::new();
    for (method, path, headers, body, right) in CASES {
        let answer = exchange(&scene, method, path, headers, body).await;
        let what = format!("{method} {path} {headers:?} {:?}", String::from_utf8_lossy(body));
        match answer {
            Some(answer) if answer.status() == *right => {
                wrong.extend(no_problem(&answer).map(|why| format!("{what}: {why}")));
            }
            Some(answer) => wrong.push(format!(
                "{what}: {} {}, not {right}",
                answer.status(),
                String::from_utf8_lossy(&answer.body)
            )),
            None => wrong.push(format!("{what}: closed without an answer")),
        }
    }
    assert!(wrong.is_empty(), "{} of {} wrong:\n{}", wrong.len(), CASES.len(), wrong.join("\n"));
    assert_eq!(everything(&scene).await, before, "nothing changed");
    assert!(scene.process.runs() && scene.process.pid() == pid);
    scene.client.send("q", "still well").await;
}

#[tokio::test]
async fn a_wrong_method_is_told_the_right_ones() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    for (method, path, allowed) in [
        ("PUT", SEND, "POST"),
        ("DELETE", "/livez", "GET"),
        ("POST", QUEUE, "PUT"),
        ("PUT", NOBODY, "DELETE"),
    ] {
        let answer = exchange(&scene, method, path, &[], b"").await.expect("an answer");
        assert_eq!(answer.status(), 405, "{method} {path}");
        let allow = answer.header("allow");
        assert!(allow.split(',').any(|one| one.trim() == allowed), "{method} {path}: {allow}");
    }
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_announced_or_not() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    let limit = 1024 * 1024;
    let exact = vec![b'x'; limit];
    scene.client.send("q", exact.clone()).await;
    let more = vec![b'x'; limit + 1];
    let announced = ask(scene.client.message_to("q", more.clone())).await.expect(413);
    announced.problem();
    let chunks = more.chunks(64 * 1024).map(|part| Ok::<_, std::io::Error>(part.to_vec()));
    let chunks = futures::stream::iter(chunks.collect::<Vec<_>>());
    let streamed = scene.client.message_to("q", reqwest::Body::wrap_stream(chunks));
    ask(streamed).await.expect(413).problem();
    let huge =
        format!("POST {SEND} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10000000000\r\n\r\n");
    let answer = send_bytes(scene.process.address(), huge.as_bytes()).await.expect("an answer");
    assert_eq!(answer.status(), 413, "refused before the body comes");
    assert_eq!(scene.client.all("/v1/messages?queue=q").await.len(), 1);
}

#[tokio::test]
async fn deep_json_is_a_payload_like_any_other_and_no_settings() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    for (depth, as_settings) in [(100, 422), (120, 422), (1_000, 400), (100_000, 400)] {
        let deep = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        let raw = scene.client.message_to("q", deep.clone()).header("content-type", JSON);
        let id = ask(raw).await.expect(201).id();
        scene.client.get(&format!("/v1/messages/{id}")).await.expect(200);
        let envelope = format!("{{\"payload\": {deep}}}");
        let request = scene.client.message_to("q", envelope).header("content-type", ENVELOPE);
        ask(request).await.expect(201);
        let settings = format!("{{\"handler\": {deep}}}");
        let request = scene.client.request(reqwest::Method::PUT, QUEUE).body(settings);
        ask(request.header("content-type", JSON)).await.expect(as_settings).problem();
    }
    scene.client.all("/v1/messages?queue=q&include=payload").await;
}

#[tokio::test]
async fn what_is_no_http_ends_its_own_connection_only() {
    let mut scene = Scene::new().await;
    scene.queue("q").await;
    let hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03";
    let cases: [&[u8]; 9] = [
        hello,
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"EHLO example.org\r\n\r\n",
        b"*1\r\n$4\r\nPING\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/queues/q/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx",
        b"POST /v1/queues/q/messages HTTP/1.1\r\nhost: localhost\r\ncontent-length: x\r\n\r\nx",
        b"POST /v1/queues/q/messages HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n\r\n",
    ];
    for bytes in cases {
        let mut stream = TcpStream::connect(scene.process.address()).await.expect("it listens");
        stream.write_all(bytes).await.expect("a few bytes fit");
        stream.shutdown().await.expect("a socket can be half closed");
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut answer));
        let closed = read.await.is_ok();
        assert!(closed, "not closed: {}", String::from_utf8_lossy(bytes));
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    assert!(scene.process.runs());
    assert_eq!(scene.client.all("/v1/messages?queue=q").await.len(), 0);
}

#[tokio::test]
async fn a_connection_that_says_too_little_is_closed() {
    let scene = Scene::new().await;
    // Nothing; what may become HTTP/2 or a POST; half a head.
    let cases: [&[u8]; 4] = [b"", b"P", b"PRI * HTTP/2.0\r\n", b"POST / HTTP/1.1\r\nhost: "];
    let silent = cases.map(async |bytes| {
        let mut stream = TcpStream::connect(scene.process.address()).await.expect("it listens");
        stream.write_all(bytes).await.expect("a few bytes fit");
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut answer));
        (String::from_utf8_lossy(bytes).into_owned(), read.await.is_ok())
    });
    for (said, closed) in futures::future::join_all(silent).await {
        assert!(closed, "still open after {said:?}");
    }
}

#[tokio::test]
async fn a_message_is_whole_or_nothing_when_its_sender_vanishes() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    for _ in 0..20 {
        let mut stream = TcpStream::connect(scene.process.address()).await.expect("it listens");
        let half =
            format!("POST {SEND} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\nhalf");
        stream.write_all(half.as_bytes()).await.expect("a few bytes fit");
    }
    let soon = Duration::from_secs(2);
    eventually_within("it answers", soon, async || scene.client.get("/livez").await.status == 200)
        .await;
    let id = scene.client.send("q", "whole").await;
    let kept = scene.client.all("/v1/messages?queue=q").await;
    assert_eq!(kept.iter().map(|item| item["id"].clone()).collect::<Vec<_>>(), [json!(id)]);
}

async fn exchange(
    scene: &Scene,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Option<Parsed> {
    let mut request = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n");
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
    let bytes = [request.as_bytes(), body].concat();
    send_bytes(scene.process.address(), &bytes).await
}

/// Why this is no problem as the protocol wants one, if it is not.
fn no_problem(answer: &Parsed) -> Option<String> {
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    if answer.header("content-type") != "application/problem+json" {
        return Some(format!("no problem: {} {text}", answer.header("content-type")));
    }
    let Ok(problem) = serde_json::from_str::<Value>(&text) else {
        return Some(format!("no JSON: {text}"));
    };
    let whole = ["type", "title", "detail", "code", "request_id"];
    let whole = whole.iter().all(|member| problem[*member].is_string())
        && problem["status"] == answer.status();
    (!whole).then(|| format!("not whole: {text}"))
}

async fn everything(scene: &Scene) -> (Vec<Value>, Value, Vec<Value>) {
    let queues = scene.client.all("/admin/v1/queues").await;
    let mut pump = scene.client.get("/admin/v1/pump").await.expect(200).json();
    // Counted at the moment of asking, and of no interest here.
    if let Some(pump) = pump.as_object_mut() {
        pump.retain(|name, _| matches!(name.as_str(), "state" | "concurrency"));
    }
    (scene.client.all("/v1/messages").await, pump, queues)
}
