//! Reservations: the chunks that changes under way will make, so that no more are promised than the pool can give.
//!
//! Called by the copyset before a change is logged: an entry once logged must be carried out. Must not know: the log.
//! A reservation covers this disk alone; of the peers' disks only what the metadata server says is known.
//! Invariants: `bounded`.

use super::Disk;
use spline_types::{ChunkId, CopysetId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// How many changes under way need each chunk that does not exist yet.
pub(super) type Promised = Mutex<HashMap<(CopysetId, ChunkId), usize>>;

/// Space for a chunk that is about to be made. Held until the change that makes it was answered.
pub struct Reservation {
    disk: Arc<Disk>,
    key: (CopysetId, ChunkId),
}

impl Disk {
    /// Reserves space for a new chunk; `None` if the disk has no room for all that are reserved and this one. Changes of
    /// one chunk share its space.
    pub fn reserve(self: &Arc<Self>, copyset: CopysetId, chunk: ChunkId) -> Option<Reservation> {
        let key = (copyset, chunk);
        let mut promised = self.promised.lock().expect("no panic under the lock");
        let wanted = promised.len() + usize::from(!promised.contains_key(&key));
        if !self.pool.has_room_for(wanted) {
            return None;
        }
        *promised.entry(key).or_default() += 1;
        Some(Reservation { disk: Arc::clone(self), key })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut promised = self.disk.promised.lock().expect("no panic under the lock");
        let Some(count) = promised.get_mut(&self.key) else { return };
        *count -= 1;
        if *count == 0 {
            promised.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Pool;
    use super::super::layout::FILE_BYTES;
    use super::*;
    use prometheus_client::metrics::counter::Counter;
    use spline_types::{ChunkIndex, VolumeId};

    #[test]
    fn no_more_chunks_are_promised_than_fit() {
        let dir = tempfile::tempdir().expect("tempdir");
        // Three files may exist; whether they are ready yet makes no difference.
        let pool = Pool::open(&dir.path().join("pool"), 1, 3 * FILE_BYTES, 0).expect("opens");
        let disk = Disk::new(pool, 16, Counter::default());
        let reserve = |copyset, index| {
            let chunk = ChunkId { volume: VolumeId::new(1), index: ChunkIndex::new(index) };
            disk.reserve(CopysetId::new(copyset), chunk)
        };
        // A file that is being made is neither room nor ready: wait for the one spare file.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while disk.pool.status().free == 0 {
            assert!(std::time::Instant::now() < end, "no file is ready");
            std::thread::yield_now();
        }
        let (first, again) = (reserve(1, 0).expect("one"), reserve(1, 0).expect("the same chunk"));
        let held = (reserve(1, 1).expect("two"), reserve(2, 0).expect("three: of another copyset"));
        assert!(reserve(1, 2).is_none(), "a fourth does not fit");
        drop(first);
        assert!(reserve(1, 2).is_none(), "the first chunk is still needed");
        assert!(reserve(1, 0).is_some(), "what is reserved can be shared");
        drop(again);
        let freed = reserve(1, 2).expect("the first is not needed any more");
        drop((held, freed));
        assert!(disk.promised.lock().expect("unpoisoned").is_empty());
    }
}
