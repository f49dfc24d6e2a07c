//! Why an upgrade did not happen, each in one line.

use crate::upgrade::channel::ChannelError;
use spline_types::VolumeName;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Why an upgrade did not happen. But for the last, the old process serves on. If one has failed in preparation, sessions of the
/// cluster are opened anew first: until a metadata server has done that, links that begin and segments that are not allocated wait.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpgradeError {
    /// One at a time.
    #[error("an upgrade is under way already")]
    Busy,
    /// One was given up, and its sessions are not as they were yet.
    #[error("sessions of the last upgrade are not opened anew yet, wait until the metadata server answers")]
    Reopening,
    /// It must not be run.
    #[error("{0}")]
    Binary(String),
    /// There is no such process.
    #[error("new process can not be started: binary={} error={error}", .binary.display())]
    Start { binary: PathBuf, error: std::io::Error },
    /// It did not make it to the commit.
    #[error("{why}: phase={phase} binary={} {said}", .binary.display())]
    Failed {
        phase: Phase,
        why: Why,
        binary: PathBuf,
        /// How it ended and what it said last.
        said: String,
    },
    /// It failed after the commit: neither process can go on.
    #[error("upgrade failed after the commit, the gateway must be started again: {why} {said}")]
    Broken { why: String, said: String },
}

/// How far it had come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    Proof,
    Preparation,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Proof => "proof",
            Self::Preparation => "preparation",
        })
    }
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Why {
    #[error("new process has ended before it said {0:?}")]
    Ended(&'static str),
    #[error("new process did not get so far in time: limit={0:?}")]
    Slow(Duration),
    #[error(
        "a volume is being opened or closed, which does not end: volume={0}; see what its disk or servers do, then try again"
    )]
    Held(VolumeName),
    /// Its own words, or ours about it.
    #[error("new process does not fit: {0}")]
    Unfit(String),
    #[error("new process does not speak as agreed: {0}")]
    Channel(#[from] ChannelError),
    #[error("a session can not be passed on: {0}")]
    Ours(String),
    #[error("this gateway was told to stop")]
    Stopped,
}
