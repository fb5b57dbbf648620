//! A handler that posts each message where the message itself says.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tower::service_fn;
use url::Url;

use crate::clock::Clock;
use crate::model::{Answer, HttpHandler, PushHandler, Verdict};

use super::connections::Connector;
use super::http::Endpoint;
use super::{Delivery, Handler};

/// How many destinations are remembered with their connections.
const DESTINATIONS_MAX: usize = 1000;

/// A handler that posts each message to its own URL. One that names none cannot be delivered, which is final.
pub fn push_handler(
    connector: Connector,
    to: &PushHandler,
    clock: Arc<dyn Clock>,
    answer_max: usize,
) -> Handler {
    let destinations =
        Arc::new(Destinations { connector, like: to.clone(), answer_max, known: Mutex::default() });
    Handler::new(service_fn(move |delivery: Delivery| {
        let (destinations, clock) = (Arc::clone(&destinations), Arc::clone(&clock));
        async move {
            let url = delivery.message.head.details.url.as_ref();
            match url.and_then(|url| destinations.endpoint(url)) {
                Some(endpoint) => endpoint.post(&*clock, delivery).await,
                None => {
                    let reason = "the message names no URL that can be called".to_owned();
                    Ok(Answer::from(Verdict::DeadLetter { reason }))
                }
            }
        }
    }))
}

/// Where messages were posted lately.
#[derive(Debug)]
struct Destinations {
    connector: Connector,
    /// What is the same for all of them.
    like: PushHandler,
    answer_max: usize,
    known: Mutex<HashMap<Url, Arc<Endpoint>>>,
}

impl Destinations {
    fn endpoint(&self, url: &Url) -> Option<Arc<Endpoint>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(endpoint) = known.get(url) {
            return Some(Arc::clone(endpoint));
        }
        if known.len() >= DESTINATIONS_MAX {
            // Their connections are made again where they are needed.
            known.clear();
        }
        let PushHandler { timeout, headers, format, .. } = self.like.clone();
        let to = HttpHandler { url: url.clone(), timeout, headers, format };
        let endpoint = Endpoint::new(self.connector.clone(), &to, self.answer_max).map(Arc::new)?;
        known.insert(url.clone(), Arc::clone(&endpoint));
        Some(endpoint)
    }
}
