//! The program: hands over to the command line, and ends with its exit code.

use mimalloc::MiMalloc;

/// A request and its answer are many short-lived pieces, of which the C library's allocator made a tenth of the
/// time of a flood of messages.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> std::process::ExitCode {
    pumphouse::cli::run()
}
