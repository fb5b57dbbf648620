//! Pumphouse: a durable message pump, as a service and as a library.
//!
//! Hand over a message and go on: it is kept in a database, and a pump delivers it to its queue's handler,
//! at least once, as fast as the gate allows and no faster.
//!
//! ```
//! use std::sync::Arc;
//! use pumphouse::clock::SystemClock;
//! use pumphouse::deliver::{BoxError, Delivery};
//! use pumphouse::model::{NewMessage, QueueName};
//! use pumphouse::pump::{Pumphouse, Queue};
//! use pumphouse::store::Memory;
//!
//! /// An error means: recover by the queue's policy. To return is to acknowledge.
//! async fn welcome(delivery: Delivery) -> Result<(), BoxError> {
//!     let user = std::str::from_utf8(&delivery.message.body)?;
//!     assert_eq!(user, "ada");
//!     Ok(())
//! }
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), BoxError> {
//! let store = Arc::new(Memory::new(Arc::new(SystemClock)));
//! let queue = Queue::new("welcome", tower::service_fn(welcome))?.concurrency(8);
//! let pump = Pumphouse::builder(store).queue(queue).start().await?;
//!
//! pump.send(NewMessage::new(QueueName::parse("welcome")?, "ada")).await?;
//!
//! pump.shut_down(std::time::Duration::from_secs(30)).await;
//! # Ok(())
//! # }
//! ```
//!
//! The rooms, in reading order; each knows only those above it on this page:
//!
//! - [`model`]: the nouns. [`policy`], [`clock`], [`telemetry`]: decisions, time and chance, names of what
//!   we count.
//! - [`store`]: what is promised to be kept, three times over. [`deliver`]: the journey to a handler.
//! - [`pump`]: the engine.
//! - `api`, `cli`: the doors and the command line, with the feature `server`.

pub mod model;
pub mod policy;
pub mod clock;
pub mod telemetry;
pub mod store;
pub mod deliver;
pub mod pump;
#[cfg(feature = "server")]
pub mod api;
#[cfg(feature = "server")]
pub mod cli;
