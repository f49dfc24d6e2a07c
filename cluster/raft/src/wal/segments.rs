//! The segment files and their uses: live (records are in them, the last one is written to), ready (header written, empty),
//! free (needed no more).
//!
//! Called by the log's state, the committer, the preparer and recovery. Decides; touches no file.
//!
//! A reader clones a segment's `Arc` under the state's lock; a free segment is reused only when nobody else holds it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::config::WalConfig;
use super::disk::DiskFile;

/// One use of one segment file.
pub(super) struct Segment {
    /// Number of this use: unique and growing.
    pub(super) generation: u64,
    /// File name.
    pub(super) name: String,
    pub(super) file: Arc<dyn DiskFile>,
}

/// What the preparer shall do.
pub(super) enum Chore {
    /// Write a new header to a free segment: it becomes ready.
    Recycle(Arc<Segment>, u64),
    /// Create a file; it becomes ready.
    Create(String, u64),
    /// Delete a segment's file: the log shrank, or the configured size changed.
    Delete(Arc<Segment>),
    /// Nothing now; look again after this time or when told.
    Wait(Option<Duration>),
}

/// All segments of a log.
#[derive(Default)]
pub(super) struct Segments {
    /// By generation, ascending.
    pub(super) live: VecDeque<Arc<Segment>>,
    /// By generation, ascending, all above the live ones.
    pub(super) ready: VecDeque<Arc<Segment>>,
    pub(super) free: Vec<Arc<Segment>>,
    /// The next segment could not be made (disk full, size limit).
    pub(super) blocked: bool,
    /// The generation the next prepared segment gets.
    pub(super) next_generation: u64,
    /// Number in the name of the next created file.
    pub(super) next_file: u64,
}

/// Name of the segment file with this number.
pub(super) fn file_name(number: u64) -> String {
    format!("segment-{number:08}.wal")
}

/// Number in a segment's file name; `None` for other files.
pub(super) fn file_number(name: &str) -> Option<u64> {
    name.strip_prefix("segment-")?.strip_suffix(".wal")?.parse().ok()
}

impl Segments {
    /// The live segment of a generation.
    pub(super) fn find(&self, generation: u64) -> Option<&Arc<Segment>> {
        let at = self.live.binary_search_by_key(&generation, |segment| segment.generation).ok()?;
        self.live.get(at)
    }

    /// Bytes of the live segments.
    pub(super) fn live_bytes(&self) -> u64 {
        self.live.iter().map(|segment| segment.file.bytes()).sum()
    }

    fn total_bytes(&self) -> u64 {
        let idle = self.ready.iter().chain(&self.free).map(|segment| segment.file.bytes());
        self.live_bytes() + idle.sum::<u64>()
    }

    /// Frees live segments below `oldest`; true if there was one.
    pub(super) fn release(&mut self, oldest: u64) -> bool {
        let before = self.free.len();
        while self.live.front().is_some_and(|segment| segment.generation < oldest) {
            self.free.extend(self.live.pop_front());
        }
        self.free.len() > before
    }

    /// First generation that may stay when the log shall fit `limit` bytes: holders of older ones are in the way.
    pub(super) fn limit_generation(&self, limit: u64) -> u64 {
        let mut bytes = 0;
        let within = |segment: &&Arc<Segment>| {
            bytes += segment.file.bytes();
            bytes <= limit
        };
        let kept = self.live.iter().rev().take_while(within).last().or(self.live.back());
        kept.map_or(0, |segment| segment.generation)
    }

    /// Never handed out twice, even if the segment then cannot be made: its header may have reached the disk.
    fn new_generation(&mut self) -> u64 {
        self.next_generation += 1;
        self.next_generation - 1
    }

    /// Takes the next chore out of the books; the preparer enters its result.
    pub(super) fn next_chore(&mut self, config: &WalConfig) -> Chore {
        let idle = |segment: &Arc<Segment>| Arc::strong_count(segment) == 1;
        let misfit = |segment: &Arc<Segment>| idle(segment) && segment.file.bytes() != config.segment_bytes;
        if let Some(at) = self.free.iter().position(misfit) {
            return Chore::Delete(self.free.swap_remove(at));
        }
        if self.ready.len() < config.spare_segments as usize {
            if let Some(at) = self.free.iter().position(idle) {
                let segment = self.free.swap_remove(at);
                return Chore::Recycle(segment, self.new_generation());
            }
            if self.total_bytes() + config.segment_bytes <= config.max_bytes {
                let name = file_name(self.next_file);
                self.next_file += 1;
                return Chore::Create(name, self.new_generation());
            }
            self.blocked = true;
            return Chore::Wait(Some(config.retry));
        }
        match self.free.iter().position(idle) {
            Some(at) if self.total_bytes() > config.limit_bytes => Chore::Delete(self.free.swap_remove(at)),
            _ => Chore::Wait(None),
        }
    }
}
