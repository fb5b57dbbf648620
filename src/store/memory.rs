//! stub
use super::*;
/// stub
#[derive(Debug)]
pub struct Memory;
impl Memory {
    /// stub
    pub fn new(_clock: Arc<dyn Clock>) -> Self {
        Self
    }
}
#[async_trait]
impl Store for Memory {
    async fn enqueue(&self, _enqueue: Enqueue) -> Result<EnqueueOutcome> {
        unimplemented!()
    }
    async fn lease(&self, _claim: Claim) -> Result<Vec<Leased>> {
        unimplemented!()
    }
    async fn settle(&self, _settle: Settle) -> Result<Settled> {
        unimplemented!()
    }
    async fn renew(&self, _leases: Vec<Lease>, _duration: Duration) -> Result<Vec<bool>> {
        unimplemented!()
    }
    async fn promote(&self, _max: usize) -> Result<Promoted> {
        unimplemented!()
    }
    async fn reap(&self, _max: usize) -> Result<Vec<Reaped>> {
        unimplemented!()
    }
    async fn sweep(&self, _max: usize) -> Result<Swept> {
        unimplemented!()
    }
    async fn attend(&self, _attendance: Attendance) -> Result<Attended> {
        unimplemented!()
    }
    async fn message(&self, _id: MessageId) -> Result<Option<(Record, Vec<DeliveryRecord>)>> {
        unimplemented!()
    }
    async fn payload(&self, _id: MessageId) -> Result<Option<Bytes>> {
        unimplemented!()
    }
    async fn messages(&self, _filter: Filter, _page: Page) -> Result<Listed> {
        unimplemented!()
    }
    async fn depths(&self) -> Result<Vec<Depth>> {
        unimplemented!()
    }
    async fn amend(&self, _id: MessageId, _amendment: Amendment) -> Result<Amended> {
        unimplemented!()
    }
    async fn redrive(&self, _filter: Filter, _max: usize) -> Result<Vec<MessageId>> {
        unimplemented!()
    }
    async fn delete_dead(&self, _id: MessageId) -> Result<Amended> {
        unimplemented!()
    }
    async fn purge(&self, _queue: &QueueName, _max: usize) -> Result<u64> {
        unimplemented!()
    }
    async fn queues(&self) -> Result<Vec<QueueRecord>> {
        unimplemented!()
    }
    async fn queue(&self, _name: &QueueName) -> Result<Option<QueueRecord>> {
        unimplemented!()
    }
    async fn put_queue(
        &self,
        _name: &QueueName,
        _settings: QueueSettings,
        _precondition: Precondition,
    ) -> Result<PutQueue> {
        unimplemented!()
    }
    async fn delete_queue(
        &self,
        _name: &QueueName,
        _force: bool,
        _precondition: Precondition,
    ) -> Result<DeleteQueue> {
        unimplemented!()
    }
    async fn set_run_state(&self, _queue: Option<&QueueName>, _state: RunState) -> Result<bool> {
        unimplemented!()
    }
    async fn pump(&self) -> Result<PumpRecord> {
        unimplemented!()
    }
    async fn set_ceiling(&self, _ceiling: u32) -> Result<()> {
        unimplemented!()
    }
    async fn check(&self) -> Result<()> {
        unimplemented!()
    }
    fn news(&self) -> &News {
        unimplemented!()
    }
    async fn close(&self) {
        unimplemented!()
    }
}
