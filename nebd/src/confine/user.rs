//! Becoming another user, for good.
//!
//! Called by [`confine`](crate::confine). By the C library, which changes all threads of a process and asks every source of
//! users that the machine has.

use anyhow::{Context, bail, ensure};
use std::ffi::{CStr, CString};
use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::path::PathBuf;

/// Room for an account's strings, bytes: far above any real one.
const ACCOUNT_BYTES: usize = 64 << 10;

/// A user of this machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Account {
    name: CString,
    uid: u32,
    gid: u32,
}

impl Account {
    /// The user `name`.
    ///
    /// # Errors
    /// If there is none.
    pub fn find(name: &str) -> anyhow::Result<Self> {
        let text = CString::new(name).context("user's name has a zero byte")?;
        let mut strings = vec![0; ACCOUNT_BYTES];
        let mut entry = MaybeUninit::<libc::passwd>::zeroed();
        let mut found = std::ptr::null_mut();
        // SAFETY: name is a C string; entry and strings are writable, as long as said, and outlive what points into them.
        let failed = unsafe {
            libc::getpwnam_r(
                text.as_ptr(),
                entry.as_mut_ptr(),
                strings.as_mut_ptr(),
                strings.len(),
                &mut found,
            )
        };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed))
                .with_context(|| format!("look for user={name}"));
        }
        ensure!(!found.is_null(), "no such user, create it or leave user out: user={name}");
        // SAFETY: found is not null, so getpwnam_r has filled the entry; all zeros was a valid one before.
        let (uid, gid) = unsafe { ((*found).pw_uid, (*found).pw_gid) };
        Ok(Self { name: text, uid, gid })
    }

    /// Gives it files, so that it can remove them in a directory like `/tmp`, and its group connect to sockets.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn own(&self, files: &[PathBuf]) -> anyhow::Result<()> {
        if self.is_current() {
            return Ok(());
        }
        for file in files {
            // A link is not followed: the directory may be anybody's.
            match std::os::unix::fs::lchown(file, Some(self.uid), Some(self.gid)) {
                Err(error) if error.kind() != ErrorKind::PermissionDenied => {
                    return Err(error).with_context(|| format!("give away {}", file.display()));
                }
                // Who may not give it away may not become another user either, which says so better.
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes this process the user's, with the user's groups. There is no way back.
    ///
    /// # Errors
    /// If this process is neither root's nor the user's.
    pub fn become_it(&self) -> anyhow::Result<()> {
        if self.is_current() {
            return Ok(());
        }
        let name = CStr::to_string_lossy(&self.name);
        if !rustix::process::geteuid().is_root() {
            bail!("only root can become another user, start as root or as that user: user={name}");
        }
        // The order matters: whoever is not root any more may not change groups.
        // SAFETY: name is a C string; initgroups only reads it.
        check(unsafe { libc::initgroups(self.name.as_ptr(), self.gid) })
            .with_context(|| format!("take the groups of user={name}"))?;
        // SAFETY: setgid and setuid take numbers.
        check(unsafe { libc::setgid(self.gid) }).with_context(|| format!("take the group of user={name}"))?;
        // SAFETY: as above.
        check(unsafe { libc::setuid(self.uid) }).with_context(|| format!("become user={name}"))?;
        // SAFETY: as above.
        ensure!(unsafe { libc::setuid(0) } != 0, "root was not given up, this is a defect: user={name}");
        Ok(())
    }

    fn is_current(&self) -> bool {
        let (uid, euid) = (rustix::process::getuid(), rustix::process::geteuid());
        uid.as_raw() == self.uid && euid.as_raw() == self.uid
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name() {
        let root = Account::find("root").expect("every machine has one");
        assert_eq!((root.uid, root.gid), (0, 0));
        let missing = Account::find("no-such-user-here").expect_err("none").to_string();
        assert!(missing.contains("no such user"), "{missing}");
        assert!(Account::find("a\0b").is_err());
    }
}
