//! Clocks that send: over changes of the clocks on walls, over times at which nobody was there, over replicas.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use pumphouse::clock::ManualClock;
use pumphouse::model::{QueueName, QueueSettings};
use pumphouse::pump::Pumphouse;
use pumphouse::store::{Filter, Page, Precondition, Sqlite};
use serde_json::{Value, json};

use crate::support::client::{number, text};
use crate::support::process::{Database, Process};
use crate::support::scene::Scene;
use crate::support::{eventually, on_both};

on_both! {
    a_schedule_sends_once_however_many_processes_turn_it
    changes_at_one_time_are_all_made
}

/// A house on a file, with a clock that the test owns.
struct Owned {
    _directory: tempfile::TempDir,
    url: String,
    clock: Arc<ManualClock>,
    pump: Pumphouse,
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

impl Owned {
    async fn new(start: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}", directory.path().join("house.db").display());
        let clock = Arc::new(ManualClock::new(at(start), 0.5));
        let pump = Self::open(&url, &clock).await;
        let queue = QueueName::parse("ticks").unwrap();
        pump.store().put_queue(&queue, QueueSettings::default(), Precondition::None).await.unwrap();
        Self { _directory: directory, url, clock, pump }
    }

    async fn open(url: &str, clock: &Arc<ManualClock>) -> Pumphouse {
        let store = Arc::new(Sqlite::open(url, clock.clone()).await.unwrap());
        Pumphouse::builder(store).clock(clock.clone()).start().await.unwrap()
    }

    async fn schedule(&self, name: &str, cron: &str, zone: &str, missed: Value) {
        let schedule = json!({
            "timetable": {"cron": {"expression": cron, "time_zone": zone}},
            "message": {"queue": "ticks", "payload": name, "type": name},
            "missed": missed, "paused": false,
        });
        let schedule = serde_json::from_value(schedule).unwrap();
        let name = pumphouse::model::ScheduleName::parse(name).unwrap();
        self.pump.put_schedule(&name, schedule, Precondition::None).await.unwrap();
    }

    /// Moves the clock to these moments, one after the other, and lets the pump look at each.
    async fn pass_through(&self, moments: &[&str]) {
        for moment in moments {
            use pumphouse::clock::Clock;
            let to = at(moment).as_microsecond();
            self.clock.advance_micros(to - self.clock.now().as_microsecond());
            self.pump.look_at_schedules().await.unwrap();
        }
    }

    /// For which times messages of this schedule were sent, in order.
    async fn sent(&self, name: &str) -> Vec<String> {
        let filter = Filter { kind: Some(name.to_owned()), ..Filter::default() };
        let page = Page { limit: 1000, after: None };
        let listed = self.pump.store().messages(filter, page).await.unwrap();
        let mut times = listed.items.iter().map(|it| it.head.enqueued_at).collect::<Vec<_>>();
        times.sort_unstable();
        times.iter().map(ToString::to_string).collect()
    }

    /// The process dies, and another is started when the clock shows that.
    async fn is_down_until(&mut self, moment: &str) {
        use pumphouse::clock::Clock;
        self.pump.shut_down(Duration::from_secs(1)).await;
        self.pump.store().close().await;
        let to = at(moment).as_microsecond();
        self.clock.advance_micros(to - self.clock.now().as_microsecond());
        self.pump = Self::open(&self.url, &self.clock).await;
        self.pump.look_at_schedules().await.unwrap();
    }
}

#[tokio::test]
async fn clocks_that_are_put_forward_and_back_send_once_a_night() {
    // Each: the zone, when its clocks change, moments around that, and when the time between two and three is due.
    let cases = [
        // Forward: there is no half past two.
        (
            "Europe/Berlin",
            "30 2 * * *",
            "2026-03-28T20:00:00Z",
            &[
                "2026-03-29T00:59:59Z",
                "2026-03-29T01:00:00Z",
                "2026-03-29T01:30:00Z",
                "2026-03-30T00:29:59Z",
                "2026-03-30T00:30:00Z",
            ][..],
            &["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"][..],
        ),
        // Back: there are two.
        (
            "Europe/Berlin",
            "30 2 * * *",
            "2026-10-24T20:00:00Z",
            &[
                "2026-10-25T00:29:59Z",
                "2026-10-25T00:30:00Z",
                "2026-10-25T01:29:59Z",
                "2026-10-25T01:30:00Z",
                "2026-10-26T01:30:00Z",
            ],
            &["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"],
        ),
        (
            "America/New_York",
            "30 2 * * *",
            "2026-03-07T20:00:00Z",
            &[
                "2026-03-08T06:59:59Z",
                "2026-03-08T07:00:00Z",
                "2026-03-08T07:30:00Z",
                "2026-03-09T06:30:00Z",
            ],
            &["2026-03-08T07:00:00Z", "2026-03-09T06:30:00Z"],
        ),
        (
            "America/New_York",
            "30 1 * * *",
            "2026-10-31T20:00:00Z",
            &[
                "2026-11-01T05:30:00Z",
                "2026-11-01T06:29:59Z",
                "2026-11-01T06:30:00Z",
                "2026-11-02T06:30:00Z",
            ],
            &["2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"],
        ),
    ];
    for (zone, cron, start, moments, due) in cases {
        let house = Owned::new(start).await;
        house.schedule("nightly", cron, zone, json!("once")).await;
        house.pass_through(moments).await;
        assert_eq!(house.sent("nightly").await, due, "{zone} from {start}");
        house.pump.shut_down(Duration::ZERO).await;
    }
}

#[tokio::test]
async fn what_is_due_every_hour_is_due_in_both_hours_that_look_alike() {
    for (zone, start, moments) in [
        (
            "Europe/Berlin",
            "2026-10-24T23:30:00Z",
            [
                "2026-10-25T00:00:00Z",
                "2026-10-25T01:00:00Z",
                "2026-10-25T02:00:00Z",
                "2026-10-25T03:00:00Z",
            ],
        ),
        (
            "America/New_York",
            "2026-03-08T05:30:00Z",
            [
                "2026-03-08T06:00:00Z",
                "2026-03-08T07:00:00Z",
                "2026-03-08T08:00:00Z",
                "2026-03-08T09:00:00Z",
            ],
        ),
    ] {
        let house = Owned::new(start).await;
        house.schedule("hourly", "0 * * * *", zone, json!("once")).await;
        house.pass_through(&moments).await;
        assert_eq!(house.sent("hourly").await, moments, "{zone}");
        house.pump.shut_down(Duration::ZERO).await;
    }
}

#[tokio::test]
async fn an_hour_without_a_process_is_made_up_for_as_the_policy_says() {
    let mut house = Owned::new("2026-01-01T11:55:00Z").await;
    let every = "*/10 * * * *";
    house.schedule("skipped", every, "UTC", json!("skip")).await;
    house.schedule("once", every, "UTC", json!("once")).await;
    house.schedule("some", every, "UTC", json!({"all": {"max": 2}})).await;
    house.schedule("all", every, "UTC", json!({"all": {"max": 100}})).await;
    house.pass_through(&["2026-01-01T12:00:00Z"]).await;
    house.is_down_until("2026-01-01T13:05:00Z").await;
    let made_up = "2026-01-01T13:05:00Z";
    assert_eq!(house.sent("skipped").await, ["2026-01-01T12:00:00Z"]);
    assert_eq!(house.sent("once").await, ["2026-01-01T12:00:00Z", made_up]);
    assert_eq!(house.sent("some").await.len(), 1 + 2);
    assert_eq!(house.sent("all").await.len(), 1 + 6);
    let schedules = house.pump.store().schedules().await.unwrap();
    let of = |name: &str| schedules.iter().find(|it| it.name.as_str() == name).unwrap();
    let all = of("all").state.firings.iter().rev().map(|it| it.due_at.to_string());
    let due = ["12:00", "12:10", "12:20", "12:30", "12:40", "12:50", "13:00"];
    let due = due.map(|time| format!("2026-01-01T{time}:00Z"));
    assert_eq!(all.collect::<Vec<_>>(), due);
    assert_eq!(
        (of("once").state.firings[0].skipped, of("skipped").state.firings[0].skipped),
        (5, 6)
    );
    assert!(of("skipped").state.firings[0].message_id.is_none());
    // And again from its next time on.
    house.pass_through(&["2026-01-01T13:10:00Z"]).await;
    for (name, count) in [("skipped", 2), ("once", 3), ("some", 4), ("all", 8)] {
        assert_eq!(house.sent(name).await.len(), count, "{name}");
    }
    house.pump.shut_down(Duration::ZERO).await;
}

#[tokio::test]
async fn many_missed_times_for_many_subscribers_are_sent_in_parts() {
    let mut house = Owned::new("2026-01-01T00:00:00Z").await;
    let topic = pumphouse::model::TopicName::parse("many").unwrap();
    // So of a thousand times 250 are one part.
    const SUBSCRIBERS: usize = 40;
    for number in 0..SUBSCRIBERS {
        let name = format!("s{number}");
        let queue = QueueName::parse(&name).unwrap();
        let store = house.pump.store();
        store.put_queue(&queue, QueueSettings::default(), Precondition::None).await.unwrap();
        let subscription = pumphouse::model::Subscription {
            topic: topic.clone(),
            name: pumphouse::model::SubscriptionName::parse(&name).unwrap(),
            queue,
            filter: Default::default(),
        };
        store.put_subscription(subscription).await.unwrap();
    }
    let schedule = json!({
        "timetable": {"cron": {"expression": "* * * * *", "time_zone": "UTC"}},
        "message": {"topic": "many", "payload": 1},
        "missed": {"all": {"max": 1000}}, "paused": false,
    });
    let name = pumphouse::model::ScheduleName::parse("minutely").unwrap();
    let schedule = serde_json::from_value(schedule).unwrap();
    house.pump.put_schedule(&name, schedule, Precondition::None).await.unwrap();
    let record = async |house: &Owned| house.pump.schedule(&name).await.unwrap().unwrap();
    let before = record(&house).await;
    let each_once = async |house: &Owned| {
        let depths = house.pump.store().depths().await.unwrap();
        let subscribed = depths.iter().filter(|depth| depth.queue.as_str() != "ticks");
        let ready = subscribed.map(|depth| depth.ready).collect::<Vec<_>>();
        assert_eq!(ready, [1000; SUBSCRIBERS], "each time once in each queue");
    };
    house.is_down_until("2026-01-01T16:40:30Z").await;
    each_once(&house).await;
    let after = record(&house).await;
    assert_eq!(after.version - before.version, 4, "it was turned after each part");
    assert_eq!(after.state.next_at, Some(at("2026-01-01T16:41:00Z")));
    assert!(after.state.firings.iter().all(|it| it.problem.is_none() && it.skipped == 0));
    // As a crash leaves it between the second part and its turn: what was sent collapses.
    let mut state = after.state.clone();
    state.next_at = Some(at("2026-01-01T04:11:00Z"));
    assert!(house.pump.store().turn_schedule(&name, after.version, state).await.unwrap());
    house.pump.look_at_schedules().await.unwrap();
    each_once(&house).await;
    assert_eq!(record(&house).await.state.next_at, Some(at("2026-01-01T16:41:00Z")));
    house.pump.shut_down(Duration::ZERO).await;
}

#[tokio::test]
async fn a_full_queue_is_tried_again_and_a_missing_one_is_noted() {
    let house = Owned::new("2026-01-01T11:55:00Z").await;
    let queue = QueueName::parse("ticks").unwrap();
    let settings = QueueSettings { max_messages: Some(1), ..QueueSettings::default() };
    house.pump.store().put_queue(&queue, settings, Precondition::None).await.unwrap();
    house.schedule("hourly", "0 * * * *", "UTC", json!("once")).await;
    house
        .pass_through(&["2026-01-01T12:00:00Z", "2026-01-01T13:00:00Z", "2026-01-01T13:00:01Z"])
        .await;
    assert_eq!(house.sent("hourly").await.len(), 1, "the second waits for a place");
    house.pump.store().purge(&queue, 10).await.unwrap();
    house.pass_through(&["2026-01-01T13:00:02Z"]).await;
    // The house looks by itself too, each second, so that nobody knows which look it was that found the place.
    assert_eq!(house.sent("hourly").await.len(), 1, "the second is sent, once");
    let schedule = house.pump.store().schedules().await.unwrap().remove(0);
    let sent = schedule.state.firings.iter().filter(|it| it.message_id.is_some());
    let due = sent.map(|it| it.due_at.to_string()).collect::<Vec<_>>();
    assert_eq!(due, ["2026-01-01T13:00:00Z", "2026-01-01T12:00:00Z"], "for the time it was due");
    house.pump.store().delete_queue(&queue, true, Precondition::None).await.unwrap();
    house.pass_through(&["2026-01-01T14:00:00Z"]).await;
    let schedule = house.pump.store().schedules().await.unwrap().remove(0);
    let problem = schedule.state.firings[0].problem.clone().unwrap();
    assert!(problem.contains("there is no queue ticks"), "{problem}");
    assert_eq!(schedule.state.next_at, Some(at("2026-01-01T15:00:00Z")));
    house.pump.shut_down(Duration::ZERO).await;
}

async fn a_schedule_sends_once_however_many_processes_turn_it(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue("ticks").await;
    // Two on Postgres; a file has one process at a time.
    let other = match &scene.database {
        Database::Postgres(_) => Some(Process::start(&scene.database, &[]).await),
        Database::Sqlite(_) => None,
    };
    let body = json!({"every": "1s", "message": {"queue": "ticks", "payload": {"n":  1}, "type": "tick",
        "headers": {"x-a": "b"}}});
    let path = "/admin/v1/schedules/ticking";
    let shown = scene.client.put(path, &body).await.expect(201).json();
    assert_eq!(shown["next"].as_array().unwrap().len(), 5);
    let deliveries = scene.receiver.wait_for("/ticks", 4).await;
    let mut due =
        deliveries.iter().map(|it| it.header("webhook-id").to_owned()).collect::<Vec<_>>();
    let count = due.len();
    due.sort_unstable();
    due.dedup();
    assert_eq!(due.len(), count, "each once");
    assert_eq!((&deliveries[0].body[..], deliveries[0].header("x-a")), (&b"{\"n\":1}"[..], "b"));
    scene.client.post_nothing(&format!("{path}/pause")).await.expect(200);
    let paused = scene.client.get(path).await.expect(200);
    assert_eq!((&paused.json()["paused"], &paused.json()["next_at"]), (&json!(true), &Value::Null));
    let body = paused.json();
    let firings = body["firings"].as_array().unwrap();
    assert!(firings.len() >= 4);
    let times = firings.iter().map(|it| at(&text(it, "/due_at"))).collect::<Vec<_>>();
    // The latest first.
    for pair in times.windows(2) {
        let apart = pair[0].duration_since(pair[1]);
        let whole = apart.as_millis() % 1000 == 0;
        assert!(whole && apart.is_positive(), "{apart}: each time once, a second or more apart");
    }
    let known = firings.iter().filter_map(|it| it["message_id"].as_str()).collect::<BTreeSet<_>>();
    assert!(
        due.iter().all(|id| known.contains(id.as_str())),
        "nothing came but for one of those times"
    );
    let quiet = scene.receiver.count("/ticks");
    crate::support::pass(Duration::from_millis(2500)).await;
    assert!(scene.receiver.count("/ticks") <= quiet + 1, "one may have been under way");
    let before = scene.receiver.count("/ticks");
    let firing = scene.client.post_nothing(&format!("{path}/run")).await.expect(200).json();
    assert_eq!(firing["by_hand"], json!(true));
    scene.receiver.wait_for("/ticks", before + 1).await;
    scene.client.post_nothing(&format!("{path}/resume")).await.expect(200);
    scene.receiver.wait_for("/ticks", before + 3).await;
    let put_back = scene.client.get(path).await.expect(200);
    scene.client.put(path, &put_back.json()).await.expect(200);
    scene.client.delete(path).await.expect(204);
    scene.client.delete(path).await.expect_problem(404, "no-such-schedule");
    drop(other);
}

async fn changes_at_one_time_are_all_made(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let client = &scene.client;
    let path = "/admin/v1/schedules/s";
    let body = json!({"cron": "30 2 * * *", "message": {"queue": "q", "payload": 0}});
    client.put(path, &body).await.expect(201);
    for round in 1..=10 {
        let paused = round % 2 == 1;
        let (cron, missed) = (format!("{round} 3 * * *"), json!({"all": round}));
        let message = json!({"queue": "q", "payload": round});
        let zone = if paused { "Europe/Berlin" } else { "UTC" };
        let verb = if paused { "pause" } else { "resume" };
        let (a, b, c) =
            (json!({"cron": cron}), json!({"missed": missed}), json!({"time_zone": zone}));
        let (d, pause) = (json!({"message": message}), format!("{path}/{verb}"));
        let answers = tokio::join!(
            client.patch(path, &a),
            client.patch(path, &b),
            client.patch(path, &c),
            client.patch(path, &d),
            client.post_nothing(&pause),
        );
        for answer in [answers.0, answers.1, answers.2, answers.3, answers.4] {
            answer.expect(200);
        }
        let found = client.get(path).await.expect(200).json();
        let said = json!([cron, missed, zone, message, paused]);
        let names = ["cron", "missed", "time_zone", "message", "paused"];
        assert_eq!(json!(names.map(|name| found[name].clone())), said);
    }
    // Who says what it must be hears that it is something else.
    let etag = client.get(path).await.expect(200).header("etag").to_owned();
    let patch = |hour: u32| {
        let request = client.request(http::Method::PATCH, path).header("if-match", &etag);
        let request = request.header("content-type", "application/merge-patch+json");
        request.body(json!({"cron": format!("0 {hour} * * *")}).to_string())
    };
    let ask = crate::support::client::ask;
    let answers = tokio::join!(ask(patch(4)), ask(patch(5)), ask(patch(6)));
    let mut statuses = [answers.0.status, answers.1.status, answers.2.status];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 412, 412]);
}

#[tokio::test]
async fn schedules_are_made_changed_and_refused() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let client = &scene.client;
    let message = json!({"queue": "q", "payload": 1});
    let path = "/admin/v1/schedules/s";
    for (body, pointer) in [
        (json!({"message": message}), "/cron"),
        (json!({"cron": "* * * * *", "every": "1s", "message": message}), "/cron"),
        (json!({"cron": "nonsense", "message": message}), "/cron"),
        (json!({"cron": "0 0 30 2 *", "message": message}), "/cron"),
        (
            json!({"cron": "* * * * *", "time_zone": "Mars/Olympus", "message": message}),
            "/time_zone",
        ),
        (json!({"every": "1s", "time_zone": "UTC", "message": message}), "/time_zone"),
        (json!({"every": "10ms", "message": message}), "/every"),
        (json!({"cron": "* * * * *", "from": "2026-01-01T00:00:00Z", "message": message}), "/from"),
        (json!({"every": "1s", "message": {"payload": 1}}), "/message/queue"),
        (json!({"every": "1s", "message": {"queue": "missing", "payload": 1}}), "/message/queue"),
        (
            json!({"every": "1s", "message": {"queue": "q", "payload": 1, "reply_to": "missing"}}),
            "/message/reply_to",
        ),
        (json!({"every": "1s", "message": {"queue": "q"}}), "/message/payload"),
        (json!({"every": "1s", "message": {"queue": "q", "payload": 1, "x": 1}}), "/message/x"),
        (
            json!({"every": "1s", "message": {"queue": "q", "payload": 1, "idempotency_key": "k"}}),
            "/message/idempotency_key",
        ),
        (json!({"every": "1s", "message": message, "missed": {"all": 0}}), "/missed/all"),
    ] {
        let answer = client.put(path, &body).await.expect(422);
        assert_eq!(answer.pointers(), [pointer], "{body}");
    }
    client.get(path).await.expect_problem(404, "no-such-schedule");
    let body = json!({"cron": "30 2 * * *", "time_zone": "Europe/Berlin", "message": message, "missed": {"all": 3}});
    let made = client.put(path, &body).await.expect(201);
    let etag = made.header("etag").to_owned();
    assert_eq!(made.json()["missed"], json!({"all": 3}));
    let changed = client.patch(path, &json!({"paused": true, "missed": "skip"})).await.expect(200);
    assert_eq!(
        (&changed.json()["cron"], &changed.json()["paused"]),
        (&json!("30 2 * * *"), &json!(true))
    );
    let stale = client.request(http::Method::PUT, path).header("if-match", etag).json(&body);
    crate::support::client::ask(stale).await.expect_problem(412, "precondition-failed");
    let every =
        client.patch(path, &json!({"every": "2h", "paused": false})).await.expect(200).json();
    assert_eq!((text(&every, "/every"), every.get("cron")), ("2h".to_owned(), None));
    client.patch(path, &json!({"message": {"queue": "q"}})).await.expect(422);
    let unanswered = json!({"message": {"queue": "q", "payload": 1, "reply_to": "missing"}});
    let refused = client.patch(path, &unanswered).await.expect(422);
    assert_eq!(refused.pointers(), ["/message/reply_to"]);
    let listed = client.get("/admin/v1/schedules").await.expect(200).json();
    assert_eq!(listed["items"].as_array().unwrap().len(), 1);
    assert_eq!(listed["items"][0]["next_at"], every["next_at"]);
    // To a topic.
    client.put("/admin/v1/topics/t/subscriptions/q", &json!({"queue": "q"})).await.expect(201);
    let body = json!({"every": "1h", "message": {"topic": "t", "payload": 1}});
    client.put("/admin/v1/schedules/topical", &body).await.expect(201);
    client.post_nothing("/admin/v1/schedules/topical/run").await.expect(200);
    eventually("it is published", async || number(&client.queue("q").await, "/stats/ready") == 1)
        .await;
}
