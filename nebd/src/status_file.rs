//! The status file of an export, for `spline nbd ls` and `spline vhost ls`: `<runtime_dir>/nebd/<volume>.json` for NBD,
//! `<runtime_dir>/nebd/<volume>.vhost.json` for vhost-user-blk.
//!
//! Claimed before this process gives up its privileges ([`crate::doors`]), written once the volume is served, locked while
//! the process lives, removed when it ends. Readers take an empty file for an export that does not serve yet or no longer, and
//! a file without a lock for one whose process died. Must not know: the event loop.

use anyhow::{Context, bail};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// How guests see the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// NBD.
    Nbd,
    /// A vhost-user-blk device.
    Vhost,
}

/// What the file says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// How guests see the volume.
    pub kind: Kind,
    /// The process.
    pub pid: u32,
    /// The volume.
    pub volume: String,
    /// The export's name.
    pub export: String,
    /// Where clients connect: NBD URIs, or the path of the vhost-user socket.
    pub sockets: Vec<String>,
    /// Most queues of the device; vhost only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// The device's serial number; vhost only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Spline's version.
    pub version: String,
}

/// The file; dropping it removes it.
#[derive(Debug)]
pub struct StatusFile {
    path: PathBuf,
    file: File,
}

impl StatusFile {
    /// Where the status of `volume` lies. Volume names have no `+`, so names with `/` stay distinct.
    pub fn path(runtime_dir: &Path, kind: Kind, volume: &str) -> PathBuf {
        let ending = match kind {
            Kind::Nbd => "json",
            Kind::Vhost => "vhost.json",
        };
        runtime_dir.join("nebd").join(format!("{}.{ending}", volume.replace('/', "+")))
    }

    /// Takes the file, empty and locked. What a dead process left is replaced.
    ///
    /// # Errors
    /// If a living process has it, and those of the file system.
    pub fn claim(runtime_dir: &Path, kind: Kind, volume: &str) -> anyhow::Result<Self> {
        let path = Self::path(runtime_dir, kind, volume);
        Self::claim_path(&path)
            .with_context(|| format!("take the status file, check runtime_dir: path={}", path.display()))
    }

    fn claim_path(path: &Path) -> anyhow::Result<Self> {
        let taken = "another nebd exports this volume, stop it or choose another runtime_dir";
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let partial = path.with_extension("json.new");
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&partial)?;
        if !lock(&file)? {
            bail!(taken);
        }
        // Only whoever holds the new file's lock looks at the old one, so two that start at once do not both take it.
        match File::open(path) {
            Ok(old) if !lock(&old)? => {
                let _ = std::fs::remove_file(&partial);
                bail!(taken);
            }
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        file.set_len(0)?;
        std::fs::rename(&partial, path)?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Writes it, at once: a reader sees all of it or nothing.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn publish(&self, status: &Status) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(status)?;
        // One call into an empty file, whose length changes after its bytes are there.
        match self.file.write_at(&text, 0)? {
            written if written == text.len() => Ok(()),
            _ => Err(ErrorKind::WriteZero.into()),
        }
    }

    /// Where it lies.
    pub fn location(&self) -> &Path {
        &self.path
    }
}

impl Drop for StatusFile {
    fn drop(&mut self) {
        // Emptied first: a user that may not remove it shall not be listed as dead after a clean stop.
        let _ = self.file.set_len(0);
        let ours = self.file.metadata().map(|file| (file.dev(), file.ino()));
        let found = std::fs::symlink_metadata(&self.path).map(|file| (file.dev(), file.ino()));
        if let (Ok(ours), Ok(found)) = (ours, found)
            && ours == found
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "status file stays behind, empty");
        }
    }
}

/// Whether the file is now locked by this process alone.
fn lock(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        Status {
            kind: Kind::Nbd,
            pid: 7,
            volume: "vm/disk0".into(),
            export: "disk".into(),
            sockets: vec!["nbd://127.0.0.1:10809".into()],
            queues: None,
            serial: None,
            version: "0".into(),
        }
    }

    #[test]
    fn the_file_lives_as_long_as_its_owner() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = StatusFile::claim(dir.path(), Kind::Nbd, "vm/disk0").expect("claims");
        let path = dir.path().join("nebd/vm+disk0.json");
        assert_eq!(std::fs::read(&path).expect("reads"), b"", "nothing is served yet");
        file.publish(&status()).expect("writes");
        let read: Status = serde_json::from_slice(&std::fs::read(&path).expect("reads")).expect("parses");
        assert_eq!(read, status());
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_living_owner_keeps_it_and_a_dead_one_does_not() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("nebd/a.json");
        let living = StatusFile::claim(dir.path(), Kind::Nbd, "a").expect("claims");
        living.publish(&status()).expect("writes");
        let refused = format!("{:#}", StatusFile::claim(dir.path(), Kind::Nbd, "a").expect_err("taken"));
        assert!(refused.contains("another nebd exports this volume"), "{refused}");
        assert!(!std::fs::read(&path).expect("reads").is_empty(), "a refused one leaves it alone");
        StatusFile::claim(dir.path(), Kind::Vhost, "a").expect("the other kind is another file");
        drop(living);
        std::fs::write(&path, "left by one that died").expect("writes");
        let _next = StatusFile::claim(dir.path(), Kind::Nbd, "a").expect("replaces it");
        assert_eq!(std::fs::read(&path).expect("reads"), b"");
    }
}
