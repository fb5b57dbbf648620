//! What was meant once is done once: keys that repeat, transactions of somebody else's, conversations.

mod keys;
mod own_transaction;
mod lineage;
