//! Does a message get from A to B? Ten thousand of them, through the running program, on both databases.

mod ten_thousand;
