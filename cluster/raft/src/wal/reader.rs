//! Reads entries that are no longer in memory: neighbours in one segment with one disk read.
//!
//! Called by the handle, outside the lock; the segments it holds cannot be recycled meanwhile.

use std::io;

use super::aligned::AlignedBuffer;
use super::config::WalEntry;
use super::format::{RawRecord, Record, SECTOR};
use super::group::Location;
use super::segments::Segment;
use super::state::Found;
use crate::command::GroupId;

/// Most bytes of one disk read, unless a single record is larger.
const READ_LIMIT: u64 = 1 << 20;
/// Records of other groups between two wanted ones are read along up to this many bytes.
const GAP_LIMIT: u64 = 32 << 10;

/// The entries, in order. A record that is not what was written there is `InvalidData`.
pub(super) fn load(group: GroupId, found: Vec<Found>) -> io::Result<Vec<WalEntry>> {
    let mut entries = Vec::with_capacity(found.len());
    let mut window = Window::default();
    for at in 0..found.len() {
        match &found[at] {
            Found::Cached(entry) => entries.push(entry.clone()),
            Found::OnDisk { index, location, segment } => {
                if !window.holds(location) {
                    window.read(segment, location, end_of_run(&found[at..]))?;
                }
                entries.push(window.entry(group, *index, location, segment)?);
            }
        }
    }
    Ok(entries)
}

fn end(location: &Location) -> u64 {
    u64::from(location.offset) + u64::from(location.length)
}

/// Where a read that starts with the first of `found` may usefully end.
fn end_of_run(found: &[Found]) -> u64 {
    let mut run: Option<(Location, u64)> = None;
    for next in found {
        let Found::OnDisk { location, .. } = next else { break };
        run = match run {
            None => Some((*location, end(location))),
            Some((first, reached)) => {
                let behind = location.generation == first.generation && u64::from(location.offset) >= reached;
                let near = u64::from(location.offset) <= reached + GAP_LIMIT;
                if !behind || !near || end(location) > u64::from(first.offset) + READ_LIMIT {
                    break;
                }
                Some((first, end(location)))
            }
        };
    }
    run.map_or(0, |(_, reached)| reached)
}

/// The bytes read last.
#[derive(Default)]
struct Window {
    generation: u64,
    start: u64,
    buffer: AlignedBuffer,
}

impl Window {
    fn holds(&self, location: &Location) -> bool {
        let reached = self.start + self.buffer.as_ref().len() as u64;
        self.generation == location.generation
            && u64::from(location.offset) >= self.start
            && end(location) <= reached
    }

    fn read(&mut self, segment: &Segment, first: &Location, end: u64) -> io::Result<()> {
        let start = u64::from(first.offset) / SECTOR as u64 * SECTOR as u64;
        let length = end.next_multiple_of(SECTOR as u64) - start;
        self.buffer.clear();
        self.buffer.resize(length as usize);
        segment.file.read_at(self.buffer.as_mut(), start)?;
        self.generation = segment.generation;
        self.start = start;
        Ok(())
    }

    fn entry(&self, group: GroupId, index: u64, at: &Location, segment: &Segment) -> io::Result<WalEntry> {
        let start = (u64::from(at.offset) - self.start) as usize;
        let bytes = &self.buffer.as_ref()[start..start + at.length as usize];
        let raw = RawRecord::decode(bytes).filter(|raw| raw.group == group && raw.length() == bytes.len());
        match raw.and_then(RawRecord::to_record) {
            Some(Record::Entry(entry)) if entry.index == index => Ok(entry),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "write-ahead log record is damaged; rebuild this replica from its peers, segment={} offset={} \
                     group={group} index={index}",
                    segment.name, at.offset
                ),
            )),
        }
    }
}
