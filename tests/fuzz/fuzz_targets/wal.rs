//! Recovery of a write-ahead log from whatever lies in its segment files. Random bytes never have a right checksum, so an
//! input is a script ([`script`]) that writes segments, batches and records with right ones and damages them.
//!
//! Recovery answers a log or an error. A log must be readable entry by entry, take a new entry, and still have all of it
//! after it was opened again (`acked_is_durable`), and what was found at first also after a crash between any two of its
//! changes. An error leaves every byte where it was.
#![no_main]

#[path = "wal/memory.rs"]
mod memory;
#[path = "wal/script.rs"]
mod script;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use memory::{Image, Memory};
use prometheus_client::registry::Registry;
use spline_raft::wal::{GroupLog, Recovered, Wal, WalDone, WalEntry, WalError};
use spline_raft::{GroupId, LogCommand, WalConfig};
use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Bytes of a segment: the least that is allowed.
pub const SEGMENT_BYTES: u64 = 16 << 10;
/// The crash comes before this many changes of the files: opening, appending and closing seldom make more.
const CRASH_WITHIN: u8 = 12;

/// Groups, and what was read of them.
type Found = BTreeMap<u32, (GroupLog, Vec<WalEntry>)>;

fn open(memory: &Memory) -> Result<(Wal, Recovered), WalError> {
    let config = WalConfig {
        segment_bytes: SEGMENT_BYTES,
        spare_segments: 1,
        limit_bytes: 4 * SEGMENT_BYTES,
        max_bytes: 64 << 20,
        cache_bytes: 4 << 10,
        queue_bytes: 1 << 20,
        batch_bytes: 4 << 10,
        retry: Duration::from_millis(5),
    };
    Wal::open_on(Arc::new(memory.clone()), config, &mut Registry::default())
}

fuzz_target!(|bytes: &[u8]| {
    let crash_after = bytes.last().map_or(0, |byte| byte % CRASH_WITHIN);
    let memory = Memory::new(script::run(bytes), crash_after.into());
    let before = memory.image();
    let (wal, recovered) = match open(&memory) {
        Ok(opened) => opened,
        Err(WalError::Corrupt { .. } | WalError::Version { .. }) => {
            assert!(memory.image() == before, "an error changed the files");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let mut found = Found::new();
    for (group, log) in &recovered {
        assert_eq!(wal.group(*group).as_ref(), Some(log));
        found.insert(group.0, (log.clone(), entries(&wal, *group, log)));
    }
    let found_first = found.clone();
    for (group, (log, entries)) in &mut found {
        if log.next == u64::MAX {
            continue;
        }
        let command = LogCommand { meta: Bytes::from_static(b"m"), payload: Bytes::from_static(b"payload") };
        let entry = WalEntry { index: log.next, header: Bytes::from_static(b"header"), command };
        let (tell, told) = mpsc::channel();
        wal.append(
            GroupId(*group),
            vec![entry.clone()],
            WalDone::call(move |outcome| drop(tell.send(outcome))),
        );
        // The fuzzer's own limit of time finds an append that never ends.
        told.recv().expect("an append ends").expect("an append that continues the log succeeds");
        // A log without entries and purges starts where its first entry is.
        log.first = if entries.is_empty() { entry.index } else { log.first };
        log.next += 1;
        entries.push(entry);
    }
    drop(wal);
    let (wal, recovered) =
        open(&memory).unwrap_or_else(|error| panic!("opened before, but not again: {error}"));
    for (group, (log, wanted)) in &found {
        let group = GroupId(*group);
        let again = recovered.get(&group).expect("a group was forgotten");
        assert_eq!(again, log);
        assert_eq!(&entries(&wal, group, again), wanted);
    }
    check_crash(memory.crashed(), &found_first);
});

/// A crash takes nothing of what was found before it. Entries that were appended meanwhile may be there or not.
fn check_crash(image: Image, found_first: &Found) {
    let (wal, recovered) = open(&Memory::new(image, 0))
        .unwrap_or_else(|error| panic!("opened before, but not after a crash: {error}"));
    for (group, (log, wanted)) in found_first {
        let again = recovered.get(&GroupId(*group)).cloned().unwrap_or_default();
        assert_eq!((&again.vote, &again.purged), (&log.vote, &log.purged));
        let entries = entries(&wal, GroupId(*group), &again);
        assert!(entries.starts_with(wanted) && entries.len() <= wanted.len() + 1, "{again:?} {log:?}");
    }
}

/// All entries of a group, which must be there without a gap.
fn entries(wal: &Wal, group: GroupId, log: &GroupLog) -> Vec<WalEntry> {
    assert!(log.first <= log.next, "{log:?}");
    if let Some((upto, _)) = &log.purged {
        assert!(log.first > *upto, "{log:?}");
    }
    let entries = wal.read(group, log.first..log.next, u64::MAX).expect("what was recovered is readable");
    assert!(entries.iter().map(|entry| entry.index).eq(log.first..log.next), "{log:?}");
    entries
}
