use super::*;
use crate::vhost::memory::Mapping;
use rustix::fs::MemfdFlags;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

const PAGE: u64 = 4096;
/// In the environment of the process that dies: how.
const HOW: &str = "SPLINE_TEST_SIGBUS";

fn file(bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("guard", MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, bytes).expect("grows");
    fd
}

/// Dies of a SIGBUS that is none of the guard's, after it has survived one that is.
fn die(how: &str) {
    let guarded = file(PAGE);
    let mapping = Mapping::shared(guarded.as_fd(), 0, PAGE).expect("maps");
    rustix::fs::ftruncate(&guarded, 0).expect("shrinks");
    assert_eq!(mapping.load_u8(0, Ordering::Relaxed), 0);
    assert!(mapping.is_damaged());
    if how == "sent" {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::BUS)
            .expect("sends");
    } else {
        let other = file(PAGE);
        let (protection, flags) = (rustix::mm::ProtFlags::READ, rustix::mm::MapFlags::SHARED);
        // SAFETY: a new mapping; reading it is what is meant to end this process.
        unsafe {
            let place =
                rustix::mm::mmap(ptr::null_mut(), PAGE as usize, protection, flags, &other, 0).expect("maps");
            rustix::fs::ftruncate(&other, 0).expect("shrinks");
            place.cast::<u8>().read_volatile();
        }
    }
}

#[test]
fn a_sigbus_of_others_still_ends_the_process() {
    if let Ok(how) = std::env::var(HOW) {
        return die(&how);
    }
    for how in ["sent", "fault"] {
        let status = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "vhost::memory::guard::tests::a_sigbus_of_others_still_ends_the_process"])
            .env(HOW, how)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("runs");
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{how}: {status}");
    }
}

#[test]
fn places_in_the_table_come_back() {
    let fd = file(PAGE);
    let reached = REACHED.load(Ordering::Acquire);
    for _ in 0..SLOTS * 2 {
        drop(Mapping::shared(fd.as_fd(), 0, PAGE).expect("there is always a place"));
    }
    // Other tests map at the same time.
    assert!(REACHED.load(Ordering::Acquire) < reached + SLOTS / 2);
}
