//! The standard streams of a process that goes on as something else: what it was given on its standard input is taken, its log
//! goes elsewhere.
//!
//! Called by a process that takes over from another one. Must not know what the streams carry.
#![allow(unsafe_code)]

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Takes what the standard input is, and leaves nothing to be read in its place.
///
/// # Errors
/// If there is no descriptor left.
pub fn take_stdin() -> io::Result<OwnedFd> {
    let taken = io::stdin().as_fd().try_clone_to_owned()?;
    let nothing = std::fs::File::open("/dev/null")?;
    replace(0, nothing.as_fd())?;
    Ok(taken)
}

/// Writes what is logged from now on to `log`.
///
/// # Errors
/// Those of dup2(2).
pub fn replace_stderr(log: BorrowedFd<'_>) -> io::Result<()> {
    replace(2, log)
}

fn replace(standard: RawFd, with: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the standard library keeps these numbers open from before `main` on, and here none is closed: dup2 puts another
    // file behind the number at once.
    let mut standard = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(standard) });
    Ok(rustix::io::dup2(with, &mut standard)?)
}
