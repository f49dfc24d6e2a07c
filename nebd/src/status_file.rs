//! The status file of a serving nebd, for `spline nbd ls`: `<runtime_dir>/nebd/<name>.json`.
//!
//! Written once it serves, locked while it lives, removed when it ends: a file without a lock is of a nebd that died. Must not know: the event loop.

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What the file says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The process.
    pub pid: u32,
    /// The volume.
    pub volume: String,
    /// The export's name.
    pub export: String,
    /// Where clients connect, as NBD URIs.
    pub sockets: Vec<String>,
    /// Spline's version.
    pub version: String,
}

/// The file; dropping it removes it.
#[derive(Debug)]
pub struct StatusFile {
    path: PathBuf,
    _locked: File,
}

impl StatusFile {
    /// Where the status of `volume` lies. Volume names have no `+`, so names with `/` stay distinct.
    pub fn path(runtime_dir: &Path, volume: &str) -> PathBuf {
        runtime_dir.join("nebd").join(format!("{}.json", volume.replace('/', "+")))
    }

    /// Writes it, atomically: a reader sees all of it or nothing.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(runtime_dir: &Path, status: &Status) -> io::Result<Self> {
        let path = Self::path(runtime_dir, &status.volume);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let partial = path.with_extension("json.new");
        let mut file = File::create(&partial)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        file.write_all(&serde_json::to_vec_pretty(status)?)?;
        std::fs::rename(&partial, &path)?;
        Ok(Self { path, _locked: file })
    }
}

impl Drop for StatusFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_lives_as_long_as_its_owner() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let status = Status {
            pid: 7,
            volume: "vm/disk0".into(),
            export: "disk".into(),
            sockets: vec!["nbd://127.0.0.1:10809".into()],
            version: "0".into(),
        };
        let file = StatusFile::write(dir.path(), &status).expect("writes");
        let path = dir.path().join("nebd/vm+disk0.json");
        let read: Status = serde_json::from_slice(&std::fs::read(&path).expect("reads")).expect("parses");
        assert_eq!(read, status);
        drop(file);
        assert!(!path.exists());
    }
}
