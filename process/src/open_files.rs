//! The limit on open files: every process may open as many as it is allowed, not as few as shells start with.
//!
//! Called by [`crate::flags`]. A descriptor costs nothing before it is opened; one that is missing costs a guest its disk.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit to the hard one.
pub(crate) fn raise() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::warn!(%error, ?current, ?maximum, "limit on open files can not be raised");
    }
}
