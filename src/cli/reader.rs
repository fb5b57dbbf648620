//! Whoever reads our standard output: whether they have gone away, also while there is nothing to print.

use std::fs::File;
use std::future::pending;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;

use futures::FutureExt;
use tokio::io::Interest;
use tokio::net::unix::pipe::Sender;

/// The reader at the other end of a pipe.
#[derive(Debug)]
pub(super) struct Reader {
    /// Of a terminal or a file nobody goes away.
    pipe: Option<Sender>,
}

impl Reader {
    /// Whoever reads standard output.
    pub(super) fn of_stdout() -> Self {
        // Where it cannot be watched, the next line finds out.
        Self { pipe: pipe().ok().flatten() }
    }

    /// Returns once they have gone.
    pub(super) async fn has_gone(&self) {
        // The one error that comes to whoever writes into a pipe is that nobody reads it.
        match &self.pipe {
            Some(pipe) if pipe.ready(Interest::ERROR).await.is_ok() => (),
            Some(_) | None => pending().await,
        }
    }

    /// Whether they are known to have gone.
    pub(super) fn is_away(&self) -> bool {
        self.has_gone().now_or_never().is_some()
    }
}

fn pipe() -> io::Result<Option<Sender>> {
    let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    if !stdout.metadata()?.file_type().is_fifo() {
        return Ok(None);
    }
    // Unchecked, because that leaves it as it is: lines are printed by writes that wait. This only watches.
    Sender::from_file_unchecked(stdout).map(Some)
}
