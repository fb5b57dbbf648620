//! What the tests share: servers and databases of their own. No test is in here.

pub(crate) mod postgres;
