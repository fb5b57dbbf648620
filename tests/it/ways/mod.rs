//! Does everything that the picture of senders, receivers and publishers shows work through the public doors?

mod publishing;
mod pulling;
mod schedules;
mod events;
mod results;
mod push;
mod clients;
