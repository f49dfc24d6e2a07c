//! The fence: which commands are dead. Pure; part of the replicated state.
//!
//! Called by the state machine in `apply` and by the copyset for an early refusal. Must not know chunks or time.
//! Invariants: `one_writer` (an epoch older than the newest seen is refused), `no_late_duplicate` (a seq below the
//! highest floor seen of its epoch is refused), `replicas_identical` (the answer depends on the log alone).

use spline_types::{Epoch, Fault, FenceTag, Seq, Unavailable, VolumeId};
use std::collections::{BTreeMap, BTreeSet};

/// What is remembered of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mark {
    /// The newest epoch seen.
    pub epoch: Epoch,
    /// The highest floor seen of that epoch.
    pub floor: Seq,
}

/// The fence of one copyset: two numbers per volume, and the volumes that were deleted. Ids of deleted volumes are
/// never reused, so they are kept: a late command must not bring a chunk back.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct FenceTable {
    marks: BTreeMap<VolumeId, Mark>,
    deleted: BTreeSet<VolumeId>,
}

impl FenceTable {
    /// A table as it was kept.
    pub fn restore(marks: BTreeMap<VolumeId, Mark>, deleted: BTreeSet<VolumeId>) -> Self {
        Self { marks, deleted }
    }

    /// Judges a command and remembers its epoch and floor.
    ///
    /// # Errors
    /// `Fenced` for an old epoch or a deleted volume. `Unavailable::Unreachable` for a dead attempt of the living
    /// session: nobody waits for it, and were it waited for, a new attempt would be the cure.
    pub fn judge(&mut self, volume: VolumeId, tag: FenceTag) -> Result<(), Fault> {
        self.check_epoch(volume, tag.epoch)?;
        let mark = self.marks.entry(volume).or_default();
        if tag.epoch > mark.epoch {
            *mark = Mark { epoch: tag.epoch, floor: tag.floor };
        }
        mark.floor = mark.floor.max(tag.floor);
        if tag.seq < mark.floor {
            return Err(Fault::Unavailable(Unavailable::Unreachable));
        }
        Ok(())
    }

    /// Remembers an epoch, as a read of a new session asks for.
    ///
    /// # Errors
    /// `Fenced` if it is old or the volume is deleted.
    pub fn advance(&mut self, volume: VolumeId, epoch: Epoch) -> Result<(), Fault> {
        self.check_epoch(volume, epoch)?;
        let mark = self.marks.entry(volume).or_default();
        if epoch > mark.epoch {
            *mark = Mark { epoch, floor: Seq::default() };
        }
        Ok(())
    }

    /// Whether a command of this epoch would be refused; remembers nothing.
    ///
    /// # Errors
    /// `Fenced`.
    pub fn check_epoch(&self, volume: VolumeId, epoch: Epoch) -> Result<(), Fault> {
        if self.deleted.contains(&volume) || epoch < self.epoch(volume) {
            return Err(Fault::Fenced);
        }
        Ok(())
    }

    /// The newest epoch seen of a volume; 0 if none.
    pub fn epoch(&self, volume: VolumeId) -> Epoch {
        self.marks.get(&volume).map_or(Epoch::default(), |mark| mark.epoch)
    }

    /// From now on every command for the volume is refused.
    pub fn delete(&mut self, volume: VolumeId) {
        self.marks.remove(&volume);
        self.deleted.insert(volume);
    }

    /// Whether the volume was deleted.
    pub fn is_deleted(&self, volume: VolumeId) -> bool {
        self.deleted.contains(&volume)
    }

    /// What is remembered, by volume.
    pub fn marks(&self) -> &BTreeMap<VolumeId, Mark> {
        &self.marks
    }

    /// The deleted volumes.
    pub fn deleted(&self) -> &BTreeSet<VolumeId> {
        &self.deleted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tag(epoch: u64, seq: u64, floor: u64) -> FenceTag {
        FenceTag { epoch: Epoch::new(epoch), seq: Seq::new(seq), floor: Seq::new(floor) }
    }

    #[test]
    fn a_new_session_starts_its_own_floor() {
        let (mut fence, volume) = (FenceTable::default(), VolumeId::new(1));
        assert_eq!(fence.judge(volume, tag(1, 9, 9)), Ok(()));
        assert_eq!(fence.judge(volume, tag(1, 8, 1)), Err(Fault::Unavailable(Unavailable::Unreachable)));
        assert_eq!(fence.judge(volume, tag(2, 1, 1)), Ok(()));
        assert_eq!(fence.judge(volume, tag(1, 10, 10)), Err(Fault::Fenced));
        assert_eq!(fence.advance(volume, Epoch::new(3)), Ok(()));
        assert_eq!(fence.judge(volume, tag(2, 5, 1)), Err(Fault::Fenced));
        fence.delete(volume);
        assert_eq!(fence.judge(volume, tag(9, 1, 1)), Err(Fault::Fenced));
        assert_eq!(fence.advance(volume, Epoch::new(9)), Err(Fault::Fenced));
    }

    proptest! {
        #[test]
        fn nothing_dead_ever_lands(tags in prop::collection::vec((0u64..4, 1u64..20, 0u64..20), 1..80)) {
            let (mut fence, volume) = (FenceTable::default(), VolumeId::new(7));
            let mut newest = 0;
            let mut floors = [0u64; 4];
            for (epoch, seq, floor) in tags {
                let floor = floor.min(seq);
                let landed = fence.judge(volume, tag(epoch, seq, floor)).is_ok();
                prop_assert!(!landed || (epoch >= newest && seq >= floors[epoch as usize]));
                prop_assert!(landed || epoch < newest || seq < floors[epoch as usize]);
                newest = newest.max(epoch);
                if epoch == newest {
                    floors[epoch as usize] = floors[epoch as usize].max(floor);
                }
            }
            prop_assert_eq!(fence.epoch(volume), Epoch::new(newest));
        }
    }
}
