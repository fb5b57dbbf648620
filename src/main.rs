//! The program: hands over to the command line, and ends with its exit code.

use mimalloc::MiMalloc;

/// A request and its answer are many short-lived pieces; measured in docs/performance.md.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> std::process::ExitCode {
    pumphouse::cli::run()
}
