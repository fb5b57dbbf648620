//! Groups: one at a time, in order, and nobody else is held up.

use std::time::Duration;

use pumphouse::model::{
    Details, GroupOnDead, Leased, MessageId, NewMessage, QueueName, Settlement, State, When,
};
use pumphouse::store::{Amended, Amendment, DeleteQueue, Filter, Precondition, Settled};

use crate::support::stage::{
    ALL, LONG, SHORT, Stage, bodies_of, dead_letter, message, of_queue, retry_at_once, together,
};

fn grouped(queue: &QueueName, group: &str, body: &str) -> NewMessage {
    let details = Details { group: Some(group.to_owned()), ..Details::default() };
    NewMessage { details, ..message(queue, body) }
}

/// A queue with these messages of one group, sent one by one.
async fn line(stage: &Stage, bodies: &[&str]) -> (QueueName, Vec<MessageId>) {
    line_in(stage, bodies, GroupOnDead::Next).await
}

async fn line_in(
    stage: &Stage,
    bodies: &[&str],
    on_dead: GroupOnDead,
) -> (QueueName, Vec<MessageId>) {
    let queue = stage.queue_with("letters", |it| it.group_on_dead = on_dead).await;
    let mut ids = Vec::new();
    for body in bodies {
        ids.push(stage.send(grouped(&queue, "g", body)).await.id);
    }
    (queue, ids)
}

/// All that can be claimed now.
async fn out(stage: &Stage, queue: &QueueName) -> (Vec<Leased>, Vec<String>) {
    let leased = stage.claim(queue, ALL).await;
    let bodies = bodies_of(&leased);
    (leased, bodies)
}

/// Claims the one that must be alone in going.
async fn only(stage: &Stage, queue: &QueueName, body: &str) -> Leased {
    let (mut leased, bodies) = out(stage, queue).await;
    assert_eq!(bodies, [body]);
    leased.remove(0)
}

async fn nobody(stage: &Stage, queue: &QueueName) {
    assert_eq!(out(stage, queue).await.1, [""; 0]);
}

pub(crate) async fn of_a_group_one_message_is_out_at_a_time_and_in_order(stage: Stage) {
    let (queue, _) = line(&stage, &["1"]).await;
    stage.send_all((2..=3).map(|n| grouped(&queue, "g", &n.to_string())).collect()).await;
    for body in ["1", "2", "3"] {
        let leased = only(&stage, &queue, body).await;
        nobody(&stage, &queue).await;
        stage.must_settle(&leased, Settlement::Ack).await;
    }
    nobody(&stage, &queue).await;
    stage.send(grouped(&queue, "g", "4")).await;
    only(&stage, &queue, "4").await;
}

pub(crate) async fn a_group_holds_up_nobody_else(stage: Stage) {
    let (queue, _) = line(&stage, &["1", "2"]).await;
    let other = stage.queue("others").await;
    stage.send(grouped(&queue, "h", "of another group")).await;
    stage.send_to(&queue, "of no group").await;
    stage.send(grouped(&other, "g", "of another queue")).await;
    let (_, mut bodies) = out(&stage, &queue).await;
    bodies.sort();
    assert_eq!(bodies, ["1", "of another group", "of no group"]);
    only(&stage, &other, "of another queue").await;
}

pub(crate) async fn a_message_that_is_tried_again_keeps_its_place(stage: Stage) {
    let (queue, ids) = line(&stage, &["1", "2"]).await;
    let first = only(&stage, &queue, "1").await;
    stage.must_settle(&first, Settlement::Retry { after: LONG }).await;
    nobody(&stage, &queue).await;
    let hurried = stage.store.amend(ids[0], Amendment::RunNow).await.unwrap();
    assert!(matches!(hurried, Amended::Done(_)), "{hurried:?}");
    let first = only(&stage, &queue, "1").await;
    stage.must_settle(&first, retry_at_once()).await;
    let first = only(&stage, &queue, "1").await;
    stage.must_settle(&first, Settlement::Postpone { after: SHORT }).await;
    stage.pass(SHORT).await;
    stage.store.promote(ALL).await.unwrap();
    let first = only(&stage, &queue, "1").await;
    stage.must_settle(&first, Settlement::Ack).await;
    only(&stage, &queue, "2").await;
}

pub(crate) async fn a_message_that_comes_back_keeps_its_place(stage: Stage) {
    let (queue, _) = line(&stage, &["1", "2"]).await;
    for _ in 0..2 {
        let first = only(&stage, &queue, "1").await;
        stage.must_settle(&first, Settlement::Release).await;
    }
    let first = only(&stage, &queue, "1").await;
    stage.must_settle(&first, Settlement::Discard { reason: "enough".to_owned() }).await;
    only(&stage, &queue, "2").await;
}

pub(crate) async fn a_message_whose_lease_ran_out_keeps_its_place(stage: Stage) {
    let (queue, _) = line(&stage, &["1", "2"]).await;
    let lost = stage.lose_a_lease(&queue).await;
    nobody(&stage, &queue).await;
    stage.store.reap(ALL).await.unwrap();
    let first = only(&stage, &queue, "1").await;
    assert_eq!(stage.settle(&lost, Settlement::Ack).await, Settled::LeaseLost);
    nobody(&stage, &queue).await;
    stage.must_settle(&first, Settlement::Ack).await;
    only(&stage, &queue, "2").await;
}

pub(crate) async fn after_one_that_is_dead_the_next_one_goes(stage: Stage) {
    let (queue, _) = line(&stage, &["1", "2", "3"]).await;
    let first = only(&stage, &queue, "1").await;
    stage.must_settle(&first, dead_letter("it was not to be")).await;
    stage.queue_with("letters", |it| it.recovery.max_crashes = 1).await;
    let second = stage.lose_a_lease(&queue).await;
    stage.store.reap(ALL).await.unwrap();
    assert_eq!(stage.state(second.lease.id).await, Some(State::Dead));
    only(&stage, &queue, "3").await;
}

async fn blocked(stage: &Stage) -> (QueueName, Vec<MessageId>) {
    let (queue, ids) = line_in(stage, &["1", "2", "3"], GroupOnDead::Block).await;
    let first = only(stage, &queue, "1").await;
    stage.must_settle(&first, dead_letter("it was not to be")).await;
    stage.send(grouped(&queue, "g", "4")).await;
    stage.send(grouped(&queue, "h", "of another group")).await;
    only(stage, &queue, "of another group").await;
    (queue, ids)
}

pub(crate) async fn a_dead_one_blocks_its_group_until_it_is_redriven(stage: Stage) {
    let (queue, _) = blocked(&stage).await;
    stage.store.redrive(of_queue(&queue), ALL).await.unwrap();
    let first = only(&stage, &queue, "1").await;
    stage.must_settle(&first, Settlement::Ack).await;
    only(&stage, &queue, "2").await;
}

pub(crate) async fn a_dead_one_blocks_its_group_until_it_is_deleted(stage: Stage) {
    let (queue, ids) = blocked(&stage).await;
    stage.store.delete_dead(ids[0]).await.unwrap();
    only(&stage, &queue, "2").await;
}

pub(crate) async fn a_dead_one_blocks_its_group_until_the_queue_says_otherwise(stage: Stage) {
    let (queue, ids) = blocked(&stage).await;
    stage.queue_with("letters", |it| it.group_on_dead = GroupOnDead::Block).await;
    nobody(&stage, &queue).await;
    stage.queue("letters").await;
    let second = only(&stage, &queue, "2").await;
    stage.store.redrive(of_queue(&queue), ALL).await.unwrap();
    nobody(&stage, &queue).await;
    stage.must_settle(&second, Settlement::Ack).await;
    assert_eq!(only(&stage, &queue, "1").await.lease.id, ids[0]);
}

pub(crate) async fn a_dead_one_blocks_its_group_until_its_retention_ends(stage: Stage) {
    let (queue, _) = blocked(&stage).await;
    stage
        .queue_with("letters", |it| {
            it.group_on_dead = GroupOnDead::Block;
            it.retention.dead = Duration::ZERO;
        })
        .await;
    stage.pass(SHORT).await;
    stage.store.sweep(ALL).await.unwrap();
    only(&stage, &queue, "2").await;
}

pub(crate) async fn what_is_redriven_lines_up_again(stage: Stage) {
    let (queue, _) = line(&stage, &["1", "2", "3"]).await;
    let first = only(&stage, &queue, "1").await;
    stage.must_settle(&first, dead_letter("it was not to be")).await;
    let second = only(&stage, &queue, "2").await;
    assert_eq!(stage.store.redrive(of_queue(&queue), ALL).await.unwrap().len(), 1);
    nobody(&stage, &queue).await;
    stage.must_settle(&second, Settlement::Ack).await;
    // It came before all that wait.
    let first = only(&stage, &queue, "1").await;
    stage.must_settle(&first, dead_letter("again")).await;
    let third = only(&stage, &queue, "3").await;
    stage.must_settle(&third, Settlement::Ack).await;
    stage.store.redrive(of_queue(&queue), ALL).await.unwrap();
    only(&stage, &queue, "1").await;
}

pub(crate) async fn who_waits_can_be_cancelled_expire_and_be_purged(stage: Stage) {
    let (queue, ids) = line(&stage, &["1", "2", "3", "4"]).await;
    let first = only(&stage, &queue, "1").await;
    let cancelled = stage.store.amend(ids[1], Amendment::Cancel).await.unwrap();
    assert!(matches!(cancelled, Amended::Done(_)), "{cancelled:?}");
    let short = NewMessage { expires: Some(When::In(SHORT)), ..grouped(&queue, "g", "short") };
    let short = stage.send(short).await.id;
    stage.pass(SHORT).await;
    let swept = stage.store.sweep(ALL).await.unwrap();
    assert_eq!(swept.expired, [(queue.clone(), 1)]);
    assert_eq!(stage.state(short).await, Some(State::Expired));
    stage.must_settle(&first, Settlement::Ack).await;
    // The one whose turn it is, before anybody has claimed it.
    stage.store.amend(ids[2], Amendment::Cancel).await.unwrap();
    let fourth = only(&stage, &queue, "4").await;
    stage.send(grouped(&queue, "g", "5")).await;
    assert_eq!(stage.store.purge(&queue, ALL).await.unwrap(), 1);
    stage.must_settle(&fourth, Settlement::Ack).await;
    nobody(&stage, &queue).await;
    stage.send(grouped(&queue, "g", "6")).await;
    assert_eq!(stage.store.purge(&queue, ALL).await.unwrap(), 1);
    stage.send(grouped(&queue, "g", "7")).await;
    only(&stage, &queue, "7").await;
}

pub(crate) async fn who_waits_in_a_group_cannot_jump_the_queue(stage: Stage) {
    let (queue, ids) = line(&stage, &["1", "2"]).await;
    for id in &ids {
        for amendment in [Amendment::RunNow, Amendment::Reschedule(When::In(LONG))] {
            assert_eq!(stage.store.amend(*id, amendment).await.unwrap(), Amended::InGroup);
        }
    }
    only(&stage, &queue, "1").await;
}

pub(crate) async fn what_is_moved_lines_up_in_the_group_of_the_other_queue(stage: Stage) {
    let (queue, _) = line(&stage, &["1", "2"]).await;
    let other = stage.queue("others").await;
    stage.send(grouped(&other, "g", "was there")).await;
    let there = only(&stage, &other, "was there").await;
    let first = only(&stage, &queue, "1").await;
    let to_other = Settlement::Move { to_queue: other.clone(), reason: "a rule".to_owned() };
    stage.must_settle(&first, to_other).await;
    only(&stage, &queue, "2").await;
    nobody(&stage, &other).await;
    stage.must_settle(&there, Settlement::Ack).await;
    only(&stage, &other, "1").await;
}

pub(crate) async fn what_a_handler_sends_to_its_own_group_comes_after_it(stage: Stage) {
    let (queue, _) = line(&stage, &["1"]).await;
    for (body, next) in [("1", "2"), ("2", "3")] {
        let leased = only(&stage, &queue, body).await;
        let sent = vec![grouped(&queue, "g", next)];
        stage.settle_and_send(&leased, Settlement::Ack, sent).await;
    }
    only(&stage, &queue, "3").await;
}

pub(crate) async fn a_group_with_one_that_cannot_be_handled_forever_is_found_by_its_name(
    stage: Stage,
) {
    let (queue, ids) = blocked(&stage).await;
    let of_group = Filter { group: Some("g".to_owned()), ..Filter::default() };
    let of_both = Filter { queue: Some(queue.clone()), ..of_group.clone() };
    for filter in [&of_group, &of_both] {
        assert_eq!(stage.list(filter, ALL).await.len(), 4, "{filter:?}");
    }
    let dead = Filter { state: Some(State::Dead), ..of_both.clone() };
    let dead = stage.list(&dead, ALL).await;
    assert_eq!(dead.iter().map(|record| record.head.id).collect::<Vec<_>>(), [ids[0]]);
    let strange = Filter { group: Some("none".to_owned()), ..of_both.clone() };
    assert_eq!(stage.list(&strange, ALL).await, []);
    assert_eq!(stage.store.redrive(strange, ALL).await.unwrap(), []);
    assert_eq!(stage.store.redrive(of_both, ALL).await.unwrap(), [ids[0]]);
}

pub(crate) async fn those_who_wait_in_a_group_are_counted(stage: Stage) {
    let (queue, _) = line(&stage, &["1", "2", "3"]).await;
    let first = only(&stage, &queue, "1").await;
    let depth = stage.depth(&queue).await;
    assert_eq!((depth.ready, depth.behind, depth.leased), (2, 2, 1));
    assert!(depth.oldest_ready.is_some());
    stage.queue_with("letters", |it| it.max_messages = Some(3)).await;
    let more = stage.store.enqueue(together(vec![grouped(&queue, "g", "4")])).await.unwrap();
    assert!(format!("{more:?}").contains("QueueFull"), "{more:?}");
    stage.must_settle(&first, Settlement::Ack).await;
    let depth = stage.depth(&queue).await;
    assert_eq!((depth.ready, depth.leased), (2, 0));
}

pub(crate) async fn what_was_purged_is_in_nobodys_way(stage: Stage) {
    let queue = stage.queue("letters").await;
    // Sent one by one: on Postgres each leaves a token.
    for n in 0..300 {
        stage.send(grouped(&queue, &format!("g{}", n % 3), "x")).await;
    }
    while stage.store.purge(&queue, ALL).await.unwrap() > 0 {}
    stage.send_to(&queue, "of no group").await;
    stage.send(grouped(&queue, "g0", "of a group")).await;
    let claimed = stage.claim(&queue, 2).await;
    let more = stage.claim(&queue, 2).await;
    let mut bodies = [bodies_of(&claimed), bodies_of(&more)].concat();
    bodies.sort();
    assert_eq!(bodies, ["of a group", "of no group"]);
    assert_eq!(stage.depth(&queue).await.ready, 0);
}

pub(crate) async fn a_queue_that_is_deleted_takes_its_groups_with_it(stage: Stage) {
    let (queue, _) = line(&stage, &["1", "2"]).await;
    let refused = stage.store.delete_queue(&queue, false, Precondition::None).await.unwrap();
    assert_eq!(refused, DeleteQueue::NotEmpty);
    only(&stage, &queue, "1").await;
    stage.store.delete_queue(&queue, true, Precondition::None).await.unwrap();
    for _ in 0..4 {
        stage.store.sweep(ALL).await.unwrap();
    }
    stage.queue("letters").await;
    stage.send(grouped(&queue, "g", "anew")).await;
    let anew = only(&stage, &queue, "anew").await;
    stage.must_settle(&anew, Settlement::Ack).await;
    nobody(&stage, &queue).await;
    stage.queue_with("letters", |it| it.retention.completed = Duration::ZERO).await;
    stage.pass(SHORT).await;
    stage.store.sweep(ALL).await.unwrap();
    let gone = stage.store.delete_queue(&queue, false, Precondition::None).await.unwrap();
    assert_eq!(gone, DeleteQueue::Deleted, "tokens of groups are no messages");
}
