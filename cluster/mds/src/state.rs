//! The metadata as a pure state machine: [`MetaState::apply`] changes it by one [`Command`], deterministically.
//!
//! Called by [`crate::machine`] (apply) and read by the operations. Commands bring time and choices with them, so that
//! every replica and every replay ends alike (`replicas_identical`). A refused command changes nothing.
//! Must never know: disk, network, clocks, randomness, raft.
//!
//! Parts: [`record`] the rows, `rows` rows to and from JSON, `volumes` and `copysets` the commands' effects.

mod copysets;
pub mod record;
pub mod rows;
mod volumes;

use crate::command::{Answer, Command, Outcome};
use record::{Chunkserver, Copyset, Counters, Deletion, Segment, Volume};
use rows::Key;
use spline_types::{ChunkserverId, CopysetId, SegmentIndex, VolumeId, VolumeName};
use std::collections::{BTreeMap, BTreeSet};

/// All metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetaState {
    counters: Counters,
    volumes: BTreeMap<VolumeId, Volume>,
    names: BTreeMap<VolumeName, VolumeId>,
    segments: BTreeMap<VolumeId, BTreeMap<SegmentIndex, Segment>>,
    deletions: BTreeMap<VolumeId, Deletion>,
    chunkservers: BTreeMap<ChunkserverId, Chunkserver>,
    copysets: BTreeMap<CopysetId, Copyset>,
    /// Rows changed since the last [`MetaState::take_changed`].
    changed: BTreeSet<Key>,
}

impl MetaState {
    /// Carries a command out, or refuses it without any change.
    pub fn apply(&mut self, command: &Command) -> Outcome {
        match command {
            Command::Found { cluster } => {
                if self.counters.cluster.is_empty() {
                    self.counters.cluster.clone_from(cluster);
                    self.changed.insert(Key::Counters);
                }
                Ok(Answer::Done)
            }
            Command::CreateVolume { name, size, block_size, on_unavailable, now_ms } => {
                self.create_volume(name, *size, *block_size, *on_unavailable, *now_ms)
            }
            Command::ResizeVolume { volume, size } => self.resize_volume(*volume, *size),
            Command::RenameVolume { volume, name } => self.rename_volume(*volume, name),
            Command::DeleteVolume { volume, epoch } => self.delete_volume(*volume, *epoch),
            Command::Reclaimed { volume, copysets } => self.reclaimed(*volume, copysets),
            Command::OpenSession { volume, epoch, gateway, resumes, now_ms } => {
                self.open_session(*volume, *epoch, gateway, *resumes, *now_ms)
            }
            Command::CloseSession { volume, epoch } => self.close_session(*volume, *epoch),
            Command::AllocateSegment { volume, epoch, index, copysets } => {
                self.allocate_segment(*volume, *epoch, *index, copysets)
            }
            Command::RegisterChunkserver { store_uuid, address, zone, election_max_ms, now_ms } => {
                self.one_election_time(address, *election_max_ms)?;
                self.register_chunkserver(store_uuid, address, zone, *now_ms)
            }
            Command::MoveChunkserver { chunkserver, address } => self.move_chunkserver(*chunkserver, address),
            Command::CreateCopysets { copysets } => self.create_copysets(copysets),
            Command::CopysetsReported { reports } => self.copysets_reported(reports),
            Command::StartReplace { copyset, add, remove } => self.start_replace(*copyset, *add, *remove),
            Command::AbortReplace { copyset, add } => self.abort_replace(*copyset, *add),
        }
    }

    /// The cluster's id; empty before it is founded.
    pub fn cluster(&self) -> &str {
        &self.counters.cluster
    }

    /// A volume by id.
    pub fn volume(&self, id: VolumeId) -> Option<&Volume> {
        self.volumes.get(&id)
    }

    /// A volume by name.
    pub fn volume_named(&self, name: &VolumeName) -> Option<&Volume> {
        self.names.get(name).and_then(|id| self.volumes.get(id))
    }

    /// All volumes, by name.
    pub fn volumes(&self) -> impl Iterator<Item = &Volume> {
        self.names.values().filter_map(|id| self.volumes.get(id))
    }

    /// Number of volumes.
    pub fn volume_count(&self) -> usize {
        self.volumes.len()
    }

    /// The allocated segments of a volume, in order.
    pub fn segments(&self, volume: VolumeId) -> impl Iterator<Item = (SegmentIndex, &[CopysetId])> {
        self.segments
            .get(&volume)
            .into_iter()
            .flatten()
            .map(|(index, segment)| (*index, segment.0.as_slice()))
    }

    /// Number of allocated segments of a volume.
    pub fn segment_count(&self, volume: VolumeId) -> u32 {
        self.segments.get(&volume).map_or(0, |segments| segments.len() as u32)
    }

    /// One allocated segment.
    pub fn segment(&self, volume: VolumeId, index: SegmentIndex) -> Option<&[CopysetId]> {
        self.segments.get(&volume)?.get(&index).map(|segment| segment.0.as_slice())
    }

    /// Deleted volumes whose chunks are not all removed.
    pub fn deletions(&self) -> impl Iterator<Item = (VolumeId, &Deletion)> {
        self.deletions.iter().map(|(id, deletion)| (*id, deletion))
    }

    /// A chunkserver.
    pub fn chunkserver(&self, id: ChunkserverId) -> Option<&Chunkserver> {
        self.chunkservers.get(&id)
    }

    /// All chunkservers, gone ones included.
    pub fn chunkservers(&self) -> impl Iterator<Item = &Chunkserver> {
        self.chunkservers.values()
    }

    /// A copyset.
    pub fn copyset(&self, id: CopysetId) -> Option<&Copyset> {
        self.copysets.get(&id)
    }

    /// All copysets.
    pub fn copysets(&self) -> impl Iterator<Item = (CopysetId, &Copyset)> {
        self.copysets.iter().map(|(id, copyset)| (*id, copyset))
    }

    /// Number of copysets; 0 before they are created.
    pub fn copyset_count(&self) -> usize {
        self.copysets.len()
    }

    /// The rows changed since the last call, each once.
    pub fn take_changed(&mut self) -> BTreeSet<Key> {
        std::mem::take(&mut self.changed)
    }
}

#[cfg(test)]
mod tests;
