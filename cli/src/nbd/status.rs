//! The status files that nebd processes leave in `<runtime_dir>/nebd/<name>.json`.
//!
//! Called by `nbd ls` and by `dev`. Foreign input: a file that does not parse is skipped with a warning.

use crate::nebd::is_alive;
use anyhow::Context;
use serde::{Deserialize, Serialize};
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
    /// Whether the process lives; not in the file.
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
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        match serde_json::from_str::<ExportStatus>(&text) {
            Ok(status) => found.push(ExportStatus { alive: is_nebd(status.pid), file: path, ..status }),
            Err(error) => tracing::warn!(path = %path.display(), %error, "status file is skipped"),
        }
    }
    found.sort_by(|a, b| a.volume.cmp(&b.volume));
    Ok(found)
}

/// Whether a process of this id lives and is a nebd: the system gives numbers out again.
fn is_nebd(pid: u32) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    is_alive(pid) && name.trim_end() == "spline-nebd"
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
        let program = dir.path().join("spline-nebd");
        std::fs::copy("/bin/sleep", &program).expect("copies");
        let mut living = std::process::Command::new(&program).arg("60").spawn().expect("starts");
        write("b.json", &file(living.id(), "b"));
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
        living.kill().expect("ends");
        living.wait().expect("ends");
    }
}
