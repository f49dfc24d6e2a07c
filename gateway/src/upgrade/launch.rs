//! How this process was started, so that the next one can be started alike, and which binaries an operator may name for that.
//!
//! Called by `main` and by the hand-over. Must not know what the next process does.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Others than the owner may write.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// Only owners may rename and remove what lies in a directory.
const STICKY: u32 = 0o1000;

/// How a process was started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Launch {
    /// The path that was given, absolute, links and all: what it leads to may be another file by the time of an upgrade.
    pub binary: PathBuf,
    /// Arguments without the first, which is the binary.
    pub arguments: Vec<OsString>,
}

impl Launch {
    /// How this process was started. To be asked at the start: relative paths are the current directory's.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn of_this_process() -> std::io::Result<Self> {
        let mut arguments = std::env::args_os();
        let given = arguments.next().unwrap_or_default();
        let search = std::env::var_os("PATH").unwrap_or_default();
        let binary = match found(&given, &search) {
            Some(path) => std::path::absolute(path)?,
            None => std::env::current_exe()?,
        };
        Ok(Self { binary, arguments: arguments.collect() })
    }
}

/// The path that a first argument stands for: itself, or what the shell found by it.
fn found(given: &OsStr, search: &OsStr) -> Option<PathBuf> {
    let path = Path::new(given);
    if path.components().count() > 1 {
        return path.is_file().then(|| path.to_owned());
    }
    std::env::split_paths(search).map(|dir| dir.join(path)).find(|path| path.is_file())
}

/// Refused if anybody but root and this process's user could have put something else into the file's place: whoever can ask for
/// an upgrade must not get to run what he likes as this user.
///
/// # Errors
/// What is wrong, in one line.
pub(crate) fn check(binary: &Path) -> Result<(), String> {
    let shown = binary.display();
    if !binary.is_absolute() {
        return Err(format!("path of the new binary is not absolute: binary={shown}"));
    }
    let real =
        binary.canonicalize().map_err(|error| format!("no such binary: binary={shown} error={error}"))?;
    let user = rustix::process::geteuid().as_raw();
    for path in real.ancestors() {
        let found = path
            .symlink_metadata()
            .map_err(|error| format!("can not look at path={} error={error}", path.display()))?;
        let open = found.mode() & WRITABLE_BY_OTHERS != 0 && !(found.is_dir() && found.mode() & STICKY != 0);
        if open || ![0, user].contains(&found.uid()) {
            return Err(format!(
                "binary can be changed by others, it must be root's or the gateway's own up to the root: binary={shown} path={} \
                 uid={} mode={:o}",
                path.display(),
                found.uid(),
                found.mode() & 0o7777
            ));
        }
    }
    match real.metadata() {
        Ok(found) if found.is_file() && found.mode() & 0o111 != 0 => Ok(()),
        _ => Err(format!("not a file that can be run: binary={shown}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn with_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("sets");
    }

    #[test]
    fn only_what_others_can_not_change_is_run() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let root = dir.path().canonicalize().expect("exists");
        let binary = root.join("gateway");
        std::fs::write(&binary, "#!/bin/true").expect("writes");
        with_mode(&binary, 0o755);
        assert_eq!(check(&binary), Ok(()));
        std::os::unix::fs::symlink(&binary, root.join("link")).expect("links");
        assert_eq!(check(&root.join("link")), Ok(()), "what it leads to is looked at");
        for (path, mode) in [(&binary, 0o775), (&binary, 0o644), (&root, 0o777)] {
            let before = path.metadata().expect("is there").mode();
            with_mode(path, mode);
            let refused = check(&binary).expect_err("refused");
            assert!(refused.contains("binary="), "{refused}");
            with_mode(path, before);
        }
        for path in [Path::new("gateway"), &root.join("none"), &root] {
            check(path).expect_err("refused");
        }
    }

    #[test]
    fn the_path_is_remembered_as_it_was_given() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("gateway");
        std::fs::write(&path, "").expect("writes");
        let search = dir.path().as_os_str();
        assert_eq!(found(OsStr::new("gateway"), search), Some(path.clone()));
        assert_eq!(found(path.as_os_str(), OsStr::new("")), Some(path.clone()));
        assert_eq!(found(OsStr::new("gateway"), OsStr::new("/nowhere")), None);
        std::fs::remove_file(&path).expect("removes");
        assert_eq!(found(path.as_os_str(), OsStr::new("")), None);
    }
}
