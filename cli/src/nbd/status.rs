//! The status files that nebd processes leave in `<runtime_dir>/nebd/<name>.json`.
//!
//! Called by `nbd ls` and by `dev`. Foreign input: a file that does not parse is skipped with a warning.

use anyhow::Context;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::path::{Path, PathBuf};

/// One nebd process.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ExportStatus {
    /// Its process id.
    pub pid: u32,
    /// The volume it serves.
    pub volume: String,
    /// Where it listens.
    pub sockets: Vec<String>,
    /// Its version.
    pub version: String,
    /// Whether the process lives: it holds a lock on the file.
    #[serde(default, skip_deserializing)]
    pub alive: bool,
    /// Where this was read.
    #[serde(skip)]
    pub file: PathBuf,
}

/// Reads all status files, by volume name. No directory means no exports.
///
/// # Errors
/// If the directory is there and can not be read.
pub fn read_all(runtime_dir: &Path) -> anyhow::Result<Vec<ExportStatus>> {
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
        match serde_json::from_str::<ExportStatus>(&text) {
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
        assert_eq!(read_all(dir.path()).expect("reads"), []);
        let nebd = dir.path().join("nebd");
        std::fs::create_dir(&nebd).expect("makes");
        let write = |name: &str, text: &str| std::fs::write(nebd.join(name), text).expect("writes");
        let file = |pid: u32, volume: &str| {
            format!(r#"{{"pid":{pid},"volume":"{volume}","sockets":["/s"],"version":"1","more":1}}"#)
        };
        write("b.json", &file(7, "b"));
        let locked = File::open(nebd.join("b.json")).expect("opens");
        flock(&locked, FlockOperation::NonBlockingLockExclusive).expect("locks");
        write("a.json", &file(u32::MAX, "a"));
        // The number belongs to another program by now.
        write("d.json", &file(std::process::id(), "d"));
        write("c.json", "{half");
        write("c.log", "no status");
        let found = read_all(dir.path()).expect("reads");
        assert_eq!(
            found.iter().map(|e| (e.volume.as_str(), e.alive)).collect::<Vec<_>>(),
            [("a", false), ("b", true), ("d", false)]
        );
    }
}
