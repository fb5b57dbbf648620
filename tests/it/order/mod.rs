//! Who comes when: groups in their order, and turns for those who share a queue.

mod groups;
mod blocked;
mod fairness;
