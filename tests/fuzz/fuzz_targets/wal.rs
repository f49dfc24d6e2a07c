//! Recovery of a write-ahead log from whatever lies in its segment files. Random bytes never have a right checksum, so an
//! input is a script ([`script`]) that writes segments, batches and records with right ones and damages them.
//!
//! Recovery answers a log or an error. A log must be readable entry by entry, take a new entry, and still have all of it
//! after it was opened again (`acked_is_durable`). An error leaves every byte where it was.
#![no_main]

#[path = "wal/memory.rs"]
mod memory;
#[path = "wal/script.rs"]
mod script;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use memory::Memory;
use prometheus_client::registry::Registry;
use spline_raft::wal::{GroupLog, Recovered, Wal, WalDone, WalEntry, WalError};
use spline_raft::{GroupId, LogCommand, WalConfig};
use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Bytes of a segment: the least that is allowed.
pub const SEGMENT_BYTES: u64 = 16 << 10;
/// Longest wait for one small write to memory; it is a defect to wait longer.
const LIMIT: Duration = Duration::from_secs(15);

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
    let memory = Memory::new(script::run(bytes));
    let before = memory.image();
    let (wal, recovered) = match open(&memory) {
        Ok(opened) => opened,
        Err(WalError::Corrupt { .. } | WalError::Version { .. }) => {
            assert!(memory.image() == before, "an error changed the files");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let mut found: BTreeMap<u32, (GroupLog, Vec<WalEntry>)> = BTreeMap::new();
    for (group, log) in &recovered {
        assert_eq!(wal.group(*group).as_ref(), Some(log));
        found.insert(group.0, (log.clone(), entries(&wal, *group, log)));
    }
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
        told.recv_timeout(LIMIT).expect("an append ends").expect("an append that continues the log succeeds");
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
});

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
