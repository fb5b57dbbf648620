//! Do the stores agree with the reference? Random programs are played on both, step by step, with one
//! clock; a program on which they differ is shrunk and printed whole, so that it can be played again.

use proptest::test_runner::{Config, TestRunner};
use pumphouse::clock::ManualClock;

use super::player::{Player, check};
use super::program::{Action, Director, Step, program};
use crate::support::stage::Stage;
use crate::support::stores;

#[test]
fn the_reference_keeps_its_own_rules() {
    try_programs(256, async |program| {
        let stage = stores::memory().await;
        play_alone(&stage, &program).await;
    });
}

#[test]
fn sqlite_agrees_with_the_reference() {
    try_programs(64, async |program| {
        let clock = stores::clock();
        let (reference, other) = (stores::memory_by(&clock), stores::sqlite_by(&clock).await);
        play_both(&reference, &other, &clock, &program).await;
    });
}

/// Plays a program on one store, and checks after each step what must always hold.
pub(crate) async fn play_alone(stage: &Stage, program: &[Step]) {
    let (mut director, mut player) = (Director::default(), Player::new(stage));
    let mut before = player.look().await;
    for step in program {
        player.play(director.direct(step)).await;
        let after = player.look().await;
        check(&before, &after);
        before = after;
    }
}

/// Plays a program on two stores with one clock, and compares after each step what they say and show.
async fn play_both(reference: &Stage, other: &Stage, clock: &ManualClock, program: &[Step]) {
    let mut director = Director::default();
    let (mut one, mut two) = (Player::new(reference), Player::new(other));
    for step in program {
        let action = director.direct(step);
        if let Action::Pass(time) = action {
            clock.advance_micros(time.as_micros() as i64);
            continue;
        }
        assert_eq!(one.play(action.clone()).await, two.play(action).await, "{step:?}");
        assert_eq!(one.look().await, two.look().await, "after {step:?}");
    }
    let names = director.names();
    assert_eq!(one.look_closely(names).await, two.look_closely(names).await, "at the end");
}

/// Plays so many random programs; panics with the shortest that fails.
fn try_programs(cases: u32, play: impl AsyncFn(Vec<Step>)) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("the machine has room for one thread more");
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let tried = TestRunner::new(config).run(&program(1..80), |program| {
        runtime.block_on(play(program));
        Ok(())
    });
    tried.unwrap_or_else(|failure| panic!("{failure}"));
}
