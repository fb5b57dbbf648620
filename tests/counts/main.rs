//! How often memory is asked for on the way of a message: counted and not timed, and held to bounds a bit above
//! what they were when this was written. A program of its own, because it counts for the whole process.

use std::alloc::System;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pumphouse::clock::SystemClock;
use pumphouse::deliver::Delivery;
use pumphouse::model::{NewMessage, QueueName};
use pumphouse::pump::{Pumphouse, Queue, Stop};
use pumphouse::store::{Enqueue, Sqlite};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tower::service_fn;

#[global_allocator]
static COUNTING: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const MESSAGES: usize = 5000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_asks_for_memory_a_bounded_number_of_times() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}", directory.path().join("house.db").display());
    let store = Sqlite::open(&url, Arc::new(SystemClock)).await.unwrap();
    let handled = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&handled);
    let handler = service_fn(move |_: Delivery| {
        count.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Ok::<_, Infallible>(()))
    });
    let queue = Queue::new("letters", handler).unwrap();
    let pump = Pumphouse::builder(Arc::new(store)).queue(queue).start().await.unwrap();
    let letters = QueueName::parse("letters").unwrap();
    let stop = Stop {
        deadline: Duration::from_secs(9),
        by: "a test".to_owned(),
        reason: None,
        until: None,
    };

    // Twice: what is made once is not counted.
    for round in 0..2 {
        pump.stop_queue(&letters, stop.clone()).await.unwrap();
        handled.store(0, Ordering::Relaxed);
        let messages = (0..MESSAGES).map(|_| NewMessage::new(letters.clone(), vec![7; 256]));
        let enqueue = Enqueue { messages: messages.collect(), atomic: false, batch: None };
        let counting = Region::new(COUNTING);
        pump.enqueue(enqueue).await.unwrap();
        let sent = counting.change().allocations;
        let counting = Region::new(COUNTING);
        pump.start_queue(&letters).await.unwrap();
        let drained = async {
            while pump
                .store()
                .depths()
                .await
                .unwrap()
                .iter()
                .any(|depth| depth.ready + depth.leased > 0)
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), drained).await.expect("it is drained");
        assert_eq!(handled.load(Ordering::Relaxed), MESSAGES);
        let delivered = counting.change().allocations;
        if round > 0 {
            at_most("sent", sent, 7.0);
            at_most("claimed, handled and settled", delivered, 26.0);
        }
    }
    pump.shut_down(Duration::from_secs(9)).await;
    pump.store().close().await;
}

/// Fails with what was counted where it is more than the bound.
fn at_most(what: &str, allocations: usize, bound: f64) {
    let each = allocations as f64 / MESSAGES as f64;
    assert!(each <= bound, "{what}: {each:.1} allocations a message, and the bound is {bound}");
}
