//! Does everything that the picture of senders, receivers and publishers shows work through the public doors?

mod publishing;
mod many_copies;
mod pulling;
mod pulling_replicas;
mod schedules;
mod events;
mod results;
mod push;
mod clients;
