//! From the files of a directory to the state of a log, after a clean end or a crash alike.
//!
//! Called once, by the handle's `open`. Reads every segment, finds the chain of batches by sequence number, replays it.
//!
//! `acked_is_durable`: batches are written one after the other, each synced before the next, so only the very last may be
//! torn. A bad place with a valid batch of this log behind it is damage to acknowledged records: reported as
//! [`WalError::Corrupt`], never cut. Bytes of a recycled segment's earlier use carry an older generation and do not count.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use super::aligned::AlignedBuffer;
use super::committer::Cursor;
use super::config::{WalConfig, WalError};
use super::disk::{Disk, DiskFile};
use super::format::{
    BATCH_HEADER, BatchHeader, HeaderError, RawRecord, Record, SECTOR, SEGMENT_HEADER, SegmentHeader,
};
use super::group::{Group, Location, Slot};
use super::segments::{Segment, Segments, file_number};
use crate::command::GroupId;

/// What recovery found.
pub(super) struct Recovery {
    pub(super) groups: HashMap<GroupId, Group>,
    pub(super) segments: Segments,
    pub(super) cursor: Option<Cursor>,
    /// Random number of the log; `None` for a new one.
    pub(super) log: Option<u64>,
    /// Sequence of the next batch.
    pub(super) sequence: u64,
    /// The last durable batch's `oldest`.
    pub(super) announced: u64,
}

/// A record as replay needs it: entries by place, the rest by content.
enum Seen {
    Entry(GroupId, u64, Location),
    Control(GroupId, Record, u64),
}

/// The unbroken batches at the start of a segment.
struct Run {
    segment: Arc<Segment>,
    /// Sequence of the first batch; `None` if there is none.
    first: Option<u64>,
    /// Sequence after the last batch.
    next: u64,
    /// Offset after the last batch.
    end: u64,
    /// Offset of the last batch.
    last: u64,
    /// The last batch's `oldest`.
    oldest: u64,
    /// A batch of this use of the segment lies behind `end`, or the file is cut short.
    damaged: bool,
    seen: Vec<Seen>,
}

/// A segment file without a readable header: torn while it was recycled, or damaged.
struct Stray {
    segment: Arc<Segment>,
    bytes: AlignedBuffer,
}

fn io_failed(action: &'static str, name: &str) -> impl FnOnce(std::io::Error) -> WalError {
    move |source| WalError::Io { action, path: PathBuf::from(name), source }
}

fn corrupt<T>(segment: &Segment, offset: u64) -> Result<T, WalError> {
    Err(WalError::Corrupt { segment: segment.name.clone(), offset })
}

/// Recovers the log that `disk` holds.
pub(super) fn recover(disk: &dyn Disk, config: &WalConfig) -> Result<Recovery, WalError> {
    let names = disk.list().map_err(io_failed("list segments", "."))?;
    let mut numbered: Vec<_> =
        names.iter().filter_map(|name| Some((file_number(name)?, name.as_str()))).collect();
    numbered.sort_unstable();
    let next_file = numbered.last().map_or(0, |(number, _)| number + 1);
    let (log, mut runs, strays) = scan_all(disk, &numbered)?;
    runs.sort_by_key(|run| run.segment.generation);
    let next_generation = runs.last().map_or(1, |run| run.segment.generation + 1);

    let oldest = runs.iter().filter(|run| run.first.is_some()).map(|run| run.oldest).max().unwrap_or(0);
    let (freed, chain): (Vec<Run>, Vec<Run>) =
        runs.into_iter().partition(|run| run.segment.generation < oldest);
    check_chain(&chain, oldest)?;
    // Only a batch proves which log this is. Segments without one may be deleted or recycled before the strays are, and the
    // next recovery would find a file that it must refuse: so this one refuses it.
    let proven = log.filter(|_| chain.iter().any(|run| run.first.is_some()));
    for stray in &strays {
        if holds_batch(stray.bytes.as_ref(), proven, oldest) {
            return corrupt(&stray.segment, 0);
        }
    }

    let groups = replay(&chain)?;
    let mut segments = Segments { next_generation, next_file, ..Segments::default() };
    segments.free.extend(freed.into_iter().map(|run| run.segment));
    segments.free.extend(strays.into_iter().map(|stray| stray.segment));
    let (sequence, cursor) = sort_segments(chain, &mut segments, config)?;
    let live = segments.live.len();
    tracing::info!(groups = groups.len(), live, sequence, "write-ahead log recovered");
    Ok(Recovery { groups, segments, cursor, log, sequence, announced: oldest })
}

type Scan = (Option<u64>, Vec<Run>, Vec<Stray>);

fn scan_all(disk: &dyn Disk, numbered: &[(u64, &str)]) -> Result<Scan, WalError> {
    let mut log = None;
    let (mut runs, mut strays) = (Vec::new(), Vec::new());
    for (_, name) in numbered {
        let file = disk.open(name).map_err(io_failed("open segment", name))?;
        let bytes = read_whole(file.as_ref(), name)?;
        let segment =
            |generation| Arc::new(Segment { generation, name: (*name).to_owned(), file: file.clone() });
        match SegmentHeader::decode(bytes.as_ref()) {
            Err(HeaderError::Bad) => strays.push(Stray { segment: segment(0), bytes }),
            Err(HeaderError::Version(version)) => {
                return Err(WalError::Version { segment: (*name).to_owned(), version });
            }
            Ok(header) => {
                if *log.get_or_insert(header.log) != header.log {
                    return corrupt(&segment(header.generation), 0);
                }
                runs.push(scan(segment(header.generation), &header, bytes.as_ref()));
            }
        }
    }
    Ok((log, runs, strays))
}

fn read_whole(file: &dyn DiskFile, name: &str) -> Result<AlignedBuffer, WalError> {
    let length = file.bytes() as usize / SECTOR * SECTOR;
    let mut bytes = AlignedBuffer::zeroed(length);
    file.read_at(bytes.as_mut(), 0).map_err(io_failed("read segment", name))?;
    Ok(bytes)
}

/// Follows the batches of one segment until the first that is bad.
fn scan(segment: Arc<Segment>, header: &SegmentHeader, bytes: &[u8]) -> Run {
    let generation = header.generation;
    let mut run = Run {
        segment,
        first: None,
        next: 0,
        end: SEGMENT_HEADER as u64,
        last: 0,
        oldest: 0,
        damaged: (bytes.len() as u64) < header.bytes,
        seen: Vec::new(),
    };
    while let Some(batch) = bytes.get(run.end as usize..).and_then(BatchHeader::decode) {
        let ours = batch.log == header.log && batch.generation == generation;
        if !ours || run.first.is_some_and(|_| batch.sequence != run.next) {
            break;
        }
        let start = run.end as usize;
        let body = &bytes[start..start + batch.length as usize];
        // The oldest segment needed never goes back, and no batch makes its own segment superfluous.
        let sound = (run.oldest..=generation).contains(&batch.oldest);
        if !sound || !read_records(&batch, body, run.end, &mut run.seen) {
            run.damaged = true;
            break;
        }
        run.first.get_or_insert(batch.sequence);
        run.next = batch.sequence + 1;
        run.last = run.end;
        run.end += u64::from(batch.length);
        run.oldest = batch.oldest;
    }
    let rest = bytes.get(run.end as usize..).unwrap_or_default();
    run.damaged |= holds_batch_of(rest, |batch| batch.log == header.log && batch.generation == generation);
    run
}

/// False if an intact batch holds records that cannot be understood.
fn read_records(batch: &BatchHeader, bytes: &[u8], offset: u64, seen: &mut Vec<Seen>) -> bool {
    let mut at = BATCH_HEADER;
    for _ in 0..batch.records {
        let Some(raw) = RawRecord::decode(&bytes[at..]) else { return false };
        if let Some(index) = raw.entry_index() {
            let offset = (offset + at as u64) as u32;
            let location = Location { generation: batch.generation, offset, length: raw.length() as u32 };
            seen.push(Seen::Entry(raw.group, index, location));
        } else if let Some(record) = raw.to_record() {
            seen.push(Seen::Control(raw.group, record, batch.generation));
        } else {
            return false;
        }
        at += raw.length();
    }
    true
}

fn holds_batch_of(bytes: &[u8], wanted: impl Fn(&BatchHeader) -> bool) -> bool {
    (0..bytes.len()).step_by(SECTOR).any(|at| BatchHeader::decode(&bytes[at..]).as_ref().is_some_and(&wanted))
}

/// Whether a file holds anything that may be needed: of `log`, or of any log if it is not known which one this is.
fn holds_batch(bytes: &[u8], log: Option<u64>, oldest: u64) -> bool {
    holds_batch_of(bytes, |batch| log.is_none_or(|log| log == batch.log) && batch.generation >= oldest)
}

/// The chain must start with the oldest segment needed and miss no batch; a generation is of one segment only.
fn check_chain(chain: &[Run], oldest: u64) -> Result<(), WalError> {
    let twice = |pair: &&[Run]| pair[0].segment.generation == pair[1].segment.generation;
    if let Some(pair) = chain.windows(2).find(twice) {
        return corrupt(&pair[1].segment, 0);
    }
    let mut before: Option<&Run> = None;
    for run in chain {
        if run.damaged {
            return corrupt(&run.segment, run.end);
        }
        let Some(first) = run.first else { continue };
        match before {
            None if run.segment.generation != oldest => {
                return corrupt(&chain[0].segment, SEGMENT_HEADER as u64);
            }
            Some(before) if before.next != first => return corrupt(&before.segment, before.end),
            _ => before = Some(run),
        }
    }
    Ok(())
}

fn replay(chain: &[Run]) -> Result<HashMap<GroupId, Group>, WalError> {
    let mut groups: HashMap<GroupId, Group> = HashMap::new();
    for seen in chain.iter().flat_map(|run| &run.seen) {
        match seen {
            Seen::Entry(group, index, location) => {
                let owner = groups.entry(*group).or_default();
                owner.view.replay(*index, Slot { stamp: 0, location: Some(*location), cached: None });
                owner.footprint.entry(*index, location.generation);
            }
            Seen::Control(group, record, generation) => {
                replay_control(groups.entry(*group).or_default(), record, *generation);
            }
        }
    }
    for owner in groups.values_mut() {
        if !owner.view.settle() {
            return corrupt(&chain[0].segment, SEGMENT_HEADER as u64);
        }
    }
    groups.retain(|_, owner| !owner.is_empty());
    Ok(groups)
}

fn replay_control(owner: &mut Group, record: &Record, generation: u64) {
    match record {
        Record::Vote(vote) => {
            owner.view.set_vote(vote.clone());
            owner.footprint.vote(generation);
        }
        Record::Truncate(first_removed) => {
            owner.view.truncate(*first_removed);
            owner.footprint.truncate(*first_removed);
        }
        Record::Purge(upto, state) => {
            owner.view.purge(*upto, state.clone());
            owner.footprint.purge(*upto, generation);
        }
        Record::Remove => {
            owner.view.clear();
            owner.footprint.remove();
        }
        // Entries are seen by place.
        Record::Entry(_) => {}
    }
}

/// Enters the chain's segments and finds where to go on. The last batch is written once more: it may have been read from
/// a cache that a power cut, or a sync that failed before the restart, would belie.
fn sort_segments(
    chain: Vec<Run>,
    segments: &mut Segments,
    config: &WalConfig,
) -> Result<(u64, Option<Cursor>), WalError> {
    let last = chain.iter().rposition(|run| run.first.is_some());
    let (mut sequence, mut cursor) = (1, None);
    for (at, run) in chain.into_iter().enumerate() {
        if run.first.is_some() {
            if Some(at) == last {
                rewrite(&run)?;
                sequence = run.next;
                cursor = Some(Cursor { segment: run.segment.clone(), offset: run.end });
            }
            segments.live.push_back(run.segment);
        } else if last.is_none_or(|last| at > last) && run.segment.file.bytes() == config.segment_bytes {
            segments.ready.push_back(run.segment);
        } else {
            segments.free.push(run.segment);
        }
    }
    Ok((sequence, cursor))
}

fn rewrite(run: &Run) -> Result<(), WalError> {
    let mut batch = AlignedBuffer::zeroed((run.end - run.last) as usize);
    let file = &run.segment.file;
    file.read_at(batch.as_mut(), run.last).map_err(io_failed("read last batch", &run.segment.name))?;
    file.write_durable(batch.as_ref(), run.last).map_err(io_failed("write last batch", &run.segment.name))
}
