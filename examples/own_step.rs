//! A step of one's own around a handler, built from nothing: a layer that makes a service of a service.
//!
//! This one keeps messages of a customer who is on holiday from being handled, and counts what passes. It stands outside
//! of the handler and inside of the pump's own steps, which see it as a part of the handler.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use pumphouse::clock::SystemClock;
use pumphouse::deliver::{BoxError, Delivery};
use pumphouse::model::{NewMessage, QueueName, Verdict};
use pumphouse::pump::{Pumphouse, Queue};
use pumphouse::store::Memory;
use tower::{Layer, Service, ServiceBuilder, service_fn};

/// The layer: what is to be known before there is a service.
#[derive(Clone)]
struct Holiday {
    customer: &'static str,
    passed: Arc<AtomicU64>,
}

/// The step itself, around whatever comes next.
#[derive(Clone)]
struct OnHoliday<S> {
    next: S,
    holiday: Holiday,
}

impl<S> Layer<S> for Holiday {
    type Service = OnHoliday<S>;

    fn layer(&self, next: S) -> OnHoliday<S> {
        OnHoliday { next, holiday: self.clone() }
    }
}

impl<S> Service<Delivery> for OnHoliday<S>
where
    S: Service<Delivery, Response = Verdict> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Verdict;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Verdict, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.next.poll_ready(context)
    }

    fn call(&mut self, delivery: Delivery) -> Self::Future {
        if delivery.message.body == self.holiday.customer {
            let reason = "the customer is on holiday".to_owned();
            return Box::pin(async { Ok(Verdict::DeadLetter { reason }) });
        }
        self.holiday.passed.fetch_add(1, Ordering::Relaxed);
        // What poll_ready said was said of this one, and not of a clone of it.
        let clone = self.next.clone();
        let mut next = std::mem::replace(&mut self.next, clone);
        Box::pin(async move { next.call(delivery).await })
    }
}

async fn ship(delivery: Delivery) -> Result<Verdict, BoxError> {
    say(&format!("shipped to {}", std::str::from_utf8(&delivery.message.body)?));
    Ok(Verdict::Ack)
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let holiday = Holiday { customer: "grace", passed: Arc::default() };
    let handler = ServiceBuilder::new().layer(holiday.clone()).service(service_fn(ship));
    let store = Arc::new(Memory::new(Arc::new(SystemClock)));
    let queue = Queue::new("parcels", handler)?;
    let pump = Pumphouse::builder(store).queue(queue).start().await?;
    let parcels = QueueName::parse("parcels")?;
    for customer in ["ada", "grace", "edsger"] {
        pump.send(NewMessage::new(parcels.clone(), customer)).await?;
    }
    while pump.store().depths().await?.iter().any(|queue| queue.ready + queue.leased > 0) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    pump.shut_down(Duration::from_secs(5)).await;
    say(&format!("{} passed", holiday.passed.load(Ordering::Relaxed)));
    Ok(())
}

#[expect(clippy::disallowed_macros, reason = "an example talks to whoever runs it")]
fn say(text: &str) {
    println!("{text}");
}
