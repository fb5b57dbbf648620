//! Tells cargo that the migrations are part of the program.
#![allow(clippy::disallowed_macros)]

fn main() {
    println!("cargo:rerun-if-changed=migrations");
}
