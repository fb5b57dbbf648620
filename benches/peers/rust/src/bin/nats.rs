//! NATS JetStream by async-nats: one work queue stream on disk.

use anyhow::Result;
use async_nats::jetstream::{self, consumer, stream};
use futures::StreamExt;
use pumphouse_bench_peers::{Ask, Handled, Job, Peer, measure};

const QUEUE: &str = "bench";
const UNACKNOWLEDGED_MAX: i64 = 2_000;
const FETCH_MAX: usize = 500;

#[derive(Clone)]
struct Nats {
    version: String,
    jetstream: jetstream::Context,
}

#[tokio::main]
async fn main() -> Result<()> {
    measure(connect).await
}

async fn connect(ask: Ask) -> Result<Nats> {
    let client = async_nats::connect(&ask.url).await?;
    let version = client.server_info().version;
    let jetstream = jetstream::new(client);
    jetstream
        .create_stream(stream::Config {
            name: QUEUE.to_owned(),
            subjects: vec![QUEUE.to_owned()],
            storage: stream::StorageType::File,
            retention: stream::RetentionPolicy::WorkQueue,
            ..Default::default()
        })
        .await?;
    Ok(Nats { version, jetstream })
}

impl Peer for Nats {
    fn describe(&self, measure: &str) -> (String, String) {
        let settings = match measure {
            "enqueue" => "file storage, sync_interval always; publish, ack awaited".to_owned(),
            "bulk" => "file storage, sync_interval always; 1000 published, then all acks awaited"
                .to_owned(),
            _ => format!(
                "file storage, sync_interval always; pull consumer, {FETCH_MAX} a fetch, ack each"
            ),
        };
        (self.version.clone(), settings)
    }

    async fn enqueue(&mut self, job: Job) -> Result<()> {
        self.jetstream.publish(QUEUE, serde_json::to_vec(&job)?.into()).await?.await?;
        Ok(())
    }

    async fn bulk(&mut self, jobs: Vec<Job>) -> Result<()> {
        let mut acks = Vec::with_capacity(jobs.len());
        for job in jobs {
            acks.push(self.jetstream.publish(QUEUE, serde_json::to_vec(&job)?.into()).await?);
        }
        for ack in acks {
            ack.await?;
        }
        Ok(())
    }

    async fn work(&mut self, _: &Ask, handled: Handled) -> Result<()> {
        let consumer = self
            .jetstream
            .create_consumer_on_stream(
                consumer::pull::Config {
                    durable_name: Some(QUEUE.to_owned()),
                    max_ack_pending: UNACKNOWLEDGED_MAX,
                    ..Default::default()
                },
                QUEUE,
            )
            .await?;
        let mut messages = consumer.stream().max_messages_per_batch(FETCH_MAX).messages().await?;
        tokio::spawn(async move {
            while let Some(message) = messages.next().await {
                let message = message.expect("the consumer lost its server");
                let job: Job = serde_json::from_slice(&message.payload).expect("a job of ours");
                handled.handled(job.n);
                message.ack().await.expect("the consumer lost its server");
            }
        });
        Ok(())
    }
}
