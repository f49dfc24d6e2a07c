//! The record of a queue's unanswered requests, which comes back from the front-end: full of whatever the input says, it is
//! refused or believed within its bounds; kept by us, it says after every step exactly what is unanswered, oldest first.
//!
//! The first byte of an input says which of the two; the second, how large the queue is. Then bytes of the region, or steps.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spline_nebd::vhost::inflight::{InflightRegion, QueueRecord, Recovered};
use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

fuzz_target!(|bytes: &[u8]| {
    let [mode, size, rest @ ..] = bytes else { return };
    let size = 1u16 << (1 + size % 6);
    let (fd, length) = InflightRegion::create(2, size).expect("a small region");
    if mode & 1 == 0 { foreign(&fd, length, size, rest) } else { own(&fd, length, size, rest) }
});

/// The record as the next process finds it.
fn record(fd: &OwnedFd, length: u64, size: u16) -> QueueRecord {
    let region = InflightRegion::adopt(fd.as_fd(), (0, length), 2, size).expect("our own region");
    Arc::new(region).queue(1, size).expect("the second of two")
}

/// Where the second queue's part lies.
fn part(length: u64) -> u64 {
    length / 2
}

/// Anything may stand in it.
fn foreign(fd: &OwnedFd, length: u64, size: u16, content: &[u8]) {
    let Some((used, content)) = content.split_first_chunk() else { return };
    let used = u16::from_le_bytes(*used);
    let content = &content[..content.len().min(part(length) as usize)];
    rustix::io::pwrite(fd, content, part(length)).expect("writes");
    let mut record = record(fd, length, size);
    let mut heads = Vec::new();
    if record.recover(used, &mut heads).is_err() {
        return;
    }
    assert!(heads.len() <= usize::from(size), "{heads:?}");
    assert!(heads.iter().all(|head| *head < size), "{heads:?} size={size}");
    assert_eq!(heads.iter().collect::<HashSet<_>>().len(), heads.len(), "{heads:?}");
    // From here on it is ours: everything is answered, and nothing is left.
    heads.iter().for_each(|head| record.batch(*head));
    let used = used.wrapping_add(heads.len() as u16);
    record.published(used);
    left(fd, length, size, used, &[]);
}

/// What the next process finds must be that.
fn left(fd: &OwnedFd, length: u64, size: u16, used: u16, expected: &[u16]) {
    let mut heads = Vec::new();
    record(fd, length, size).recover(used, &mut heads).expect("our own record");
    assert_eq!(heads, expected, "used={used}");
}

/// Steps of a queue, with the end of the process wherever the input says.
fn own(fd: &OwnedFd, length: u64, size: u16, steps: &[u8]) {
    let mut record = record(fd, length, size);
    let mut heads = Vec::new();
    assert_eq!(record.recover(0, &mut heads), Ok(Recovered::Fresh));
    // What is unanswered, oldest first; what of it is in a batch that the guest does not see yet; what the guest has seen.
    let (mut open, mut batch, mut used): (Vec<u16>, Vec<u16>, u16) = (Vec::new(), Vec::new(), 0);
    for step in steps {
        match step % 8 {
            0..4 => {
                let head = u16::from(step / 8) % size;
                if !open.contains(&head) {
                    record.fetched(head);
                    open.push(head);
                }
            }
            4 | 5 => {
                let free: Vec<u16> = open.iter().copied().filter(|head| !batch.contains(head)).collect();
                if let Some(head) = free.get(usize::from(step / 8) % free.len().max(1)) {
                    record.batch(*head);
                    batch.push(*head);
                }
            }
            6 => {
                used = used.wrapping_add(batch.len() as u16);
                open.retain(|head| !batch.contains(head));
                batch.clear();
                record.published(used);
            }
            // The process ends, before or after the guest saw the batch; the next one goes on.
            _ => {
                if step & 8 != 0 {
                    used = used.wrapping_add(batch.len() as u16);
                    open.retain(|head| !batch.contains(head));
                }
                batch.clear();
                heads.clear();
                record = self::record(fd, length, size);
                record.recover(used, &mut heads).expect("our own record");
                assert_eq!(heads, open, "used={used}");
            }
        }
    }
}
