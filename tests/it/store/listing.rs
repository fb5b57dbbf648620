//! Promises about looking: lists, pages, depths.

use std::collections::BTreeSet;

use pumphouse::model::{MessageId, NewMessage, Record, Settlement, State};
use pumphouse::store::{Depth, Filter, Listed, Page, ROWS_LOOKED_AT_MAX};

use crate::support::stage::{
    ALL, LONG, SHORT, Stage, dead_letter, message, message_in, of_queue, queue_name,
};

pub(crate) async fn what_is_not_there_is_not_found(stage: Stage) {
    let id = MessageId::new();
    assert_eq!(stage.look(id).await, None);
    assert_eq!(stage.store.payload(id).await.unwrap(), None);
    assert_eq!(stage.list(&Filter::default(), ALL).await, []);
    assert_eq!(stage.store.depths().await.unwrap(), []);
}

pub(crate) async fn messages_are_listed_newest_first_as_they_are_found_one_by_one(stage: Stage) {
    let (queue, other) = (stage.queue("letters").await, stage.queue("parcels").await);
    let mut sent = Vec::new();
    for number in 0..10 {
        let queue = if number % 3 == 0 { &other } else { &queue };
        let message = NewMessage { priority: number, ..message(queue, &number.to_string()) };
        sent.push(stage.send(message).await.id);
    }
    let leased = stage.claim(&queue, 2).await;
    stage.must_settle(&leased[0], Settlement::Retry { after: LONG }).await;
    let listed = stage.list(&Filter::default(), ALL).await;
    sent.reverse();
    assert_eq!(ids(&listed), sent);
    for record in listed {
        assert_eq!(record, stage.record(record.head.id).await);
    }
}

pub(crate) async fn a_filter_shows_what_it_means(stage: Stage) {
    let (queue, other) = (stage.queue("letters").await, stage.queue("parcels").await);
    let sent = |queue, kind: &str, correlation: &str| NewMessage {
        kind: Some(kind.to_owned()),
        correlation_id: Some(correlation.to_owned()),
        ..message(queue, "filtered")
    };
    let a = stage.send(sent(&queue, "order.placed", "1")).await;
    stage.pass(SHORT).await;
    let b = stage.send(sent(&queue, "order.paid", "1")).await;
    stage.pass(SHORT).await;
    let c = stage.send(sent(&other, "order.placed", "2")).await;
    let d = stage.send(message(&other, "plain")).await;
    let leased = stage.claim_one(&other).await;
    stage.must_settle(&leased, dead_letter("a test")).await;

    let all = Filter::default;
    let text = |text: &str| Some(text.to_owned());
    for (what, filter, expected) in [
        ("all", all(), vec![d.id, c.id, b.id, a.id]),
        ("queue", of_queue(&queue), vec![b.id, a.id]),
        ("no queue", of_queue(&queue_name("nowhere")), vec![]),
        ("type", Filter { kind: text("order.placed"), ..all() }, vec![c.id, a.id]),
        ("no such type", Filter { kind: text("order"), ..all() }, vec![]),
        ("conversation", Filter { correlation_id: text("1"), ..all() }, vec![b.id, a.id]),
        ("ready", Filter { state: Some(State::Ready), ..all() }, vec![d.id, b.id, a.id]),
        ("dead", Filter { state: Some(State::Dead), ..all() }, vec![c.id]),
        ("leased", Filter { state: Some(State::Leased), ..all() }, vec![]),
        ("since", Filter { since: Some(b.enqueued_at), ..all() }, vec![d.id, c.id, b.id]),
        ("until", Filter { until: Some(b.enqueued_at), ..all() }, vec![a.id]),
        ("ids", Filter { ids: vec![a.id, MessageId::new(), d.id], ..all() }, vec![d.id, a.id]),
        (
            "several at once",
            Filter { kind: text("order.placed"), ids: vec![a.id, b.id], ..of_queue(&queue) },
            vec![a.id],
        ),
        ("both do not match", Filter { state: Some(State::Dead), ..of_queue(&queue) }, vec![]),
    ] {
        for limit in [1, 2, ALL] {
            assert_eq!(ids(&stage.list(&filter, limit).await), expected, "{what} by {limit}");
        }
    }
}

pub(crate) async fn pages_show_each_message_once(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_all((0..20).map(|n| message(&queue, &n.to_string())).collect()).await;
    let whole = ids(&stage.list(&of_queue(&queue), ALL).await);
    assert_eq!(whole.len(), 20);
    for limit in [1, 3, 19, 20, 21] {
        assert_eq!(ids(&stage.list(&of_queue(&queue), limit).await), whole, "by {limit}");
    }
    let whole_in_one = page(&stage, ALL, None).await;
    assert_eq!(whole_in_one.next, None, "nothing follows");
}

pub(crate) async fn a_rare_match_is_found_page_by_page(stage: Stage) {
    let queue = stage.queue("haystack").await;
    let rare = NewMessage { kind: Some("a needle".to_owned()), ..message(&queue, "rare") };
    let rare = stage.send(rare).await.id;
    // More than one page looks at, so that the first may come back empty and must lead on.
    for _ in 0..=ROWS_LOOKED_AT_MAX / 1000 {
        stage.send_all(vec![0; 1000].iter().map(|_| message(&queue, "straw")).collect()).await;
    }
    let filter = Filter { kind: Some("a needle".to_owned()), ..Filter::default() };
    assert_eq!(ids(&stage.list(&filter, 1).await), [rare]);
    assert_eq!(ids(&stage.list(&filter, ALL).await), [rare]);
}

pub(crate) async fn a_list_is_stable_while_messages_are_added(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_all((0..9).map(|n| message(&queue, &n.to_string())).collect()).await;
    let before = ids(&stage.list(&Filter::default(), ALL).await);
    let mut seen = Vec::new();
    let mut after = None;
    loop {
        let part = page(&stage, 2, after).await;
        seen.extend(ids(&part.items));
        stage.send_to(&queue, "added in between").await;
        after = part.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!(seen, before, "neither twice nor left out nor added");
}

pub(crate) async fn a_list_is_stable_while_messages_are_deleted(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send_all((0..6).map(|n| message(&queue, &n.to_string())).collect()).await;
    let before = ids(&stage.list(&Filter::default(), ALL).await);
    let first = page(&stage, 3, None).await;
    assert_eq!(ids(&first.items), before[..3]);
    for leased in stage.claim(&queue, ALL).await {
        if before[2..4].contains(&leased.lease.id) {
            stage.must_settle(&leased, dead_letter("a test")).await;
            stage.store.delete_dead(leased.lease.id).await.unwrap();
        }
    }
    let second = page(&stage, 3, first.next).await;
    assert_eq!(ids(&second.items), before[4..]);
}

pub(crate) async fn depths_show_every_queue_also_an_empty_one(stage: Stage) {
    let (empty, queue) = (stage.queue("empty").await, stage.queue("letters").await);
    let nothing = |queue| Depth {
        queue,
        ready: 0,
        behind: 0,
        scheduled: 0,
        leased: 0,
        dead: 0,
        oldest_ready: None,
    };
    assert_eq!(stage.depth(&queue).await, nothing(queue.clone()));
    stage.send_and_settle(&queue, Settlement::Ack).await;
    stage.send_and_settle(&queue, dead_letter("a test")).await;
    stage.send_to(&queue, "leased").await;
    stage.claim_one(&queue).await;
    for number in 0..3 {
        stage.send(message_in(&queue, "scheduled", LONG)).await;
        stage.send_to(&queue, &number.to_string()).await;
        stage.send_to(&queue, &number.to_string()).await;
    }
    let depth = stage.depth(&queue).await;
    assert!(depth.oldest_ready.is_some());
    let expected = Depth { ready: 6, scheduled: 3, leased: 1, dead: 1, ..nothing(queue) };
    assert_eq!(Depth { oldest_ready: None, ..depth }, expected);
    assert_eq!(stage.depth(&empty).await, nothing(empty.clone()));
    let names = stage.store.depths().await.unwrap().into_iter().map(|depth| depth.queue);
    assert_eq!(names.collect::<BTreeSet<_>>().len(), 2, "one for each");
}

pub(crate) async fn a_depth_says_how_long_the_oldest_has_been_due(stage: Stage) {
    let queue = stage.queue("letters").await;
    stage.send(message_in(&queue, "due in the middle", SHORT)).await;
    stage.pass(SHORT * 3).await;
    stage.send(NewMessage { priority: 50, ..message(&queue, "urgent and young") }).await;
    let young = stage.depth(&queue).await.oldest_ready.expect("one is ready");
    stage.store.promote(ALL).await.unwrap();
    let old = stage.depth(&queue).await.oldest_ready.expect("two are ready");
    assert!(old >= SHORT * 2 && old < LONG, "since it was due, and not since it came: {old:?}");
    assert!(young < old, "{young:?} {old:?}");
}

async fn page(stage: &Stage, limit: usize, after: Option<i64>) -> Listed {
    stage.store.messages(Filter::default(), Page { limit, after }).await.unwrap()
}

fn ids(records: &[Record]) -> Vec<MessageId> {
    records.iter().map(|record| record.head.id).collect()
}
