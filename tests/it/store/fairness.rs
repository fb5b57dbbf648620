//! Fairness: those who wait take turns, by the keys on whose behalf their messages were sent.

use pumphouse::model::{Details, NewMessage, QueueName, Settlement};

use crate::support::stage::{ALL, Stage, bodies_of, message};

fn of(queue: &QueueName, key: &str, body: String) -> NewMessage {
    let details = Details { fairness_key: Some(key.to_owned()), ..Details::default() };
    NewMessage { details, ..message(queue, &body) }
}

/// Sends so many messages for this key, named by it and their place.
async fn send(stage: &Stage, queue: &QueueName, key: &str, count: usize) {
    let messages = (0..count).map(|n| of(queue, key, format!("{key}{n}")));
    stage.send_all(messages.collect()).await;
}

/// The key of each message that is claimed next, claim by claim, until there are none.
async fn drain(stage: &Stage, queue: &QueueName, max: usize) -> Vec<String> {
    let mut claims = Vec::new();
    // The first claim may not know yet that they take turns.
    let mut max = Some(1).into_iter().chain(std::iter::repeat(max));
    loop {
        let leased = stage.claim(queue, max.next().unwrap_or(1)).await;
        if leased.is_empty() {
            return claims;
        }
        claims.push(bodies_of(&leased).concat());
        for leased in &leased {
            stage.must_settle(leased, Settlement::Ack).await;
        }
    }
}

/// Whether this comes before that.
fn place(claims: &[String], body: &str) -> usize {
    claims.concat().find(body).unwrap_or_else(|| panic!("{body} is missing: {claims:?}"))
}

pub(crate) async fn those_who_wait_take_turns(stage: Stage) {
    let queue = stage.queue("letters").await;
    send(&stage, &queue, "a", 9).await;
    send(&stage, &queue, "b", 2).await;
    stage.send_to(&queue, "of nobody").await;
    let claims = drain(&stage, &queue, 3).await;
    assert!(place(&claims, "b0") < place(&claims, "a3"), "{claims:?}");
    assert!(place(&claims, "b1") < place(&claims, "a5"), "{claims:?}");
    assert!(place(&claims, "a5") < place(&claims, "a6"), "in order among themselves: {claims:?}");
}

pub(crate) async fn turns_go_on_where_the_last_claim_ended(stage: Stage) {
    let queue = stage.queue("letters").await;
    for key in ["a", "b", "c", "d", "e"] {
        send(&stage, &queue, key, 4).await;
    }
    let claims = drain(&stage, &queue, 2).await;
    // Eleven messages were claimed; nobody gets more than one turn ahead of anybody.
    let eleven = claims[..6].concat();
    for key in ["a", "b", "c", "d", "e"] {
        let turns = eleven.matches(key).count();
        assert!((2..=3).contains(&turns), "{key} had {turns} turns: {claims:?}");
    }
}

pub(crate) async fn priority_comes_before_fairness(stage: Stage) {
    let queue = stage.queue("letters").await;
    send(&stage, &queue, "a", 3).await;
    send(&stage, &queue, "b", 3).await;
    let urgent = |n| NewMessage { priority: 5, ..of(&queue, "u", format!("u{n}")) };
    stage.send_all((0..2).map(urgent).collect()).await;
    let claims = drain(&stage, &queue, 2).await;
    assert!(place(&claims, "u1") < place(&claims, "a0").max(place(&claims, "b0")), "{claims:?}");
    assert!(place(&claims, "u1") < place(&claims, "a1"), "{claims:?}");
}

pub(crate) async fn without_keys_the_order_is_that_of_arrival(stage: Stage) {
    let queue = stage.queue("letters").await;
    for n in 0..5 {
        stage.send_to(&queue, &n.to_string()).await;
    }
    assert_eq!(drain(&stage, &queue, 2).await, ["0", "12", "34"]);
}

pub(crate) async fn those_who_are_alone_get_everything(stage: Stage) {
    let queue = stage.queue("letters").await;
    send(&stage, &queue, "a", 5).await;
    stage.claim(&queue, 1).await;
    assert_eq!(stage.claim(&queue, ALL).await.len(), 4);
}
