//! The status files that nebd processes leave in `<runtime_dir>/nebd/`: `<name>.json`, or `<name>.vhost.json`.
//!
//! Called by `export`, `nbd`, `vhost` and `dev`. Foreign input: a file that does not parse is skipped with a warning, and an empty
//! one without: its export does not serve yet, or no longer.

use anyhow::Context;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::{Path, PathBuf};

/// How guests see a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// NBD.
    Nbd,
    /// A vhost-user-blk device.
    Vhost,
}

impl Kind {
    /// The command that exports so: `spline nbd`, `spline vhost`.
    pub fn command(self) -> &'static str {
        match self {
            Self::Nbd => "nbd",
            Self::Vhost => "vhost",
        }
    }
}

/// One export; its process may have others.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExportStatus {
    /// How guests see it.
    pub kind: Kind,
    /// Its process id.
    pub pid: u32,
    /// The volume it serves.
    pub volume: String,
    /// Where it listens: NBD URIs, or the path of a vhost-user socket.
    pub sockets: Vec<String>,
    /// Most queues of a vhost-user-blk device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// Serial number of a vhost-user-blk device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Its version.
    pub version: String,
    /// Whether the process lives: it holds a lock on the file.
    #[serde(default, skip_deserializing)]
    pub alive: bool,
    /// Where this was read.
    #[serde(skip)]
    pub file: PathBuf,
}

/// Reads all status files of a kind, by volume name. No directory means no exports.
///
/// # Errors
/// If the directory is there and can not be read.
pub fn read_all(runtime_dir: &Path, kind: Kind) -> anyhow::Result<Vec<ExportStatus>> {
    let dir = runtime_dir.join("nebd");
    let entries = match std::fs::read_dir(&dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.with_context(|| format!("can not read status files: path={}", dir.display()))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        // Removed meanwhile: its nebd has ended.
        let Ok(mut file) = File::open(&path) else { continue };
        let text = std::io::read_to_string(&mut file).unwrap_or_default();
        if text.is_empty() {
            continue;
        }
        match serde_json::from_str::<ExportStatus>(&text) {
            Ok(status) if status.kind != kind => {}
            Ok(status) => found.push(ExportStatus { alive: is_locked(&file), file: path, ..status }),
            Err(error) => tracing::warn!(path = %path.display(), %error, "status file is skipped"),
        }
    }
    found.sort_by(|a, b| a.volume.cmp(&b.volume));
    Ok(found)
}

/// Whether the nebd that wrote the file lives. Its process id alone does not tell: the system gives numbers out again.
fn is_locked(file: &File) -> bool {
    flock(file, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_living_and_dead_processes_are_read() {
        let dir = tempfile::tempdir().expect("temporary directory");
        assert_eq!(read_all(dir.path(), Kind::Nbd).expect("reads"), []);
        let nebd = dir.path().join("nebd");
        std::fs::create_dir(&nebd).expect("makes");
        let write = |name: &str, text: &str| std::fs::write(nebd.join(name), text).expect("writes");
        let file = |pid: u32, volume: &str| {
            let more = r#""sockets":["/s"],"version":"1","more":1"#;
            format!(r#"{{"kind":"nbd","pid":{pid},"volume":"{volume}",{more}}}"#)
        };
        write("b.json", &file(7, "b"));
        let locked = File::open(nebd.join("b.json")).expect("opens");
        flock(&locked, FlockOperation::NonBlockingLockExclusive).expect("locks");
        write("a.json", &file(u32::MAX, "a"));
        // The number belongs to another program by now.
        write("d.json", &file(std::process::id(), "d"));
        write("c.json", "{half");
        write("c.log", "no status");
        write("e.json", "");
        write("a.vhost.json", &file(7, "a").replace("nbd", "vhost"));
        let found = read_all(dir.path(), Kind::Nbd).expect("reads");
        assert_eq!(
            found.iter().map(|e| (e.volume.as_str(), e.alive)).collect::<Vec<_>>(),
            [("a", false), ("b", true), ("d", false)]
        );
        let devices = read_all(dir.path(), Kind::Vhost).expect("reads");
        assert_eq!(devices.iter().map(|e| e.volume.as_str()).collect::<Vec<_>>(), ["a"]);
    }
}
