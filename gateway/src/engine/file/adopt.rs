//! A file goes on to the next process of the gateway as an open descriptor, and its lock with it: a lock belongs to the open file,
//! not to a process, so that nobody else can have it in between.
//!
//! Called by the engines' factory and by the file engine. Must not know who the other process is.

use super::open::choose;
use super::{Disk, FileEngine};
use crate::engine::file::Files;
use crate::engine::{Legacy, OpenError, Passed};
use std::path::Path;

impl Files {
    /// Serves a file that another process of this gateway has opened. It must be the one that it was, and lie below a root by
    /// its name. Blocks.
    ///
    /// # Errors
    /// As [`Files::open`].
    pub(crate) fn adopt(&self, path: &Path, legacy: Legacy) -> Result<FileEngine, OpenError> {
        let shown = path.display();
        let file = legacy.passed.file.ok_or_else(|| {
            OpenError::Internal(format!("file was passed on without a descriptor: path={shown}"))
        })?;
        self.may_serve(path)?;
        let opened = self.lock_and_look(path, file, !legacy.read_only, Some(legacy.identity))?;
        self.serve(path, opened, choose)
    }
}

impl Disk {
    /// The descriptor that holds the lock.
    pub(super) fn pass(&self) -> Result<Passed, OpenError> {
        let file = self.files.buffered.try_clone().map_err(|error| {
            let path = self.path.display();
            OpenError::Internal(format!("no descriptor to pass a file on by: path={path} error={error}"))
        })?;
        Ok(Passed { file: Some(file) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;
    use crate::config::FileIo;
    use crate::engine::{Engine, Wanted};
    use spline_types::Epoch;

    #[tokio::test]
    async fn a_file_is_passed_on_with_its_lock() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let root = dir.path().canonicalize().expect("exists");
        let path = root.join("disk.img");
        std::fs::File::create(&path).expect("creates").set_len(1 << 20).expect("sizes");
        let files = || Files::new(vec![root.clone()], FileIo::Direct, BufferPool::new());
        let old = files().open(&path, Wanted::default()).expect("opens");
        let legacy = |identity| {
            let passed = old.disk.pass().expect("passes");
            Legacy { epoch: Epoch::new(0), identity, read_only: false, passed }
        };
        let elsewhere = Files::new(vec!["/nowhere".into()], FileIo::Direct, BufferPool::new());
        let refused = elsewhere.adopt(&path, legacy(old.traits().identity)).map(drop);
        assert!(matches!(refused, Err(OpenError::NotFound(_))), "{refused:?}");
        let other = spline_link::Identity::new(1, 1).expect("an identity");
        let refused = files().adopt(&path, legacy(other)).map(drop);
        assert!(matches!(refused, Err(OpenError::Replaced(_))), "{refused:?}");

        let new = files().adopt(&path, legacy(old.traits().identity)).expect("adopts");
        assert!(old.release().await, "nothing runs");
        drop(old);
        let waiting = files().waiting(std::time::Duration::ZERO);
        let refused = waiting.open(&path, Wanted::default()).map(drop);
        assert!(matches!(refused, Err(OpenError::Held(_))), "{refused:?}");
        new.close().await;
        let poisoned = waiting.open(&path, Wanted::default()).expect("is given back");
        poisoned.disk.poison();
        assert!(!poisoned.release().await, "what was lost must not look as if it were not");
    }
}
