//! The state as rows: each row's key and its JSON, for the tables and for snapshots.
//!
//! Called by [`crate::store`] and [`crate::machine`]. What can be derived (names, chunk counts) is not stored but
//! rebuilt by [`MetaState::from_rows`].

use super::MetaState;
use super::record::{Chunkserver, Copyset, Counters, Deletion, Segment, Volume};
use crate::json::id;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use spline_types::{ChunkserverId, CopysetId, SegmentIndex, VolumeId};

/// Which row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Key {
    /// The one row of counters.
    Counters,
    /// A volume.
    Volume(#[serde(with = "id")] VolumeId),
    /// A segment of a volume.
    Segment(#[serde(with = "id")] VolumeId, #[serde(with = "id")] SegmentIndex),
    /// What is left of a deleted volume.
    Deletion(#[serde(with = "id")] VolumeId),
    /// A chunkserver.
    Chunkserver(#[serde(with = "id")] ChunkserverId),
    /// A copyset.
    Copyset(#[serde(with = "id")] CopysetId),
}

impl MetaState {
    /// Keys of all rows there are.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        let segments = self
            .segments
            .iter()
            .flat_map(|(volume, of)| of.keys().map(|index| Key::Segment(*volume, *index)));
        std::iter::once(Key::Counters)
            .chain(self.volumes.keys().copied().map(Key::Volume))
            .chain(segments)
            .chain(self.deletions.keys().copied().map(Key::Deletion))
            .chain(self.chunkservers.keys().copied().map(Key::Chunkserver))
            .chain(self.copysets.keys().copied().map(Key::Copyset))
    }

    /// A row's JSON; `None` if there is no such row (any more).
    pub fn row(&self, key: Key) -> Option<Vec<u8>> {
        match key {
            Key::Counters => Some(write(&self.counters)),
            Key::Volume(id) => self.volumes.get(&id).map(write),
            Key::Segment(id, index) => self.segments.get(&id)?.get(&index).map(write),
            Key::Deletion(id) => self.deletions.get(&id).map(write),
            Key::Chunkserver(id) => self.chunkservers.get(&id).map(write),
            Key::Copyset(id) => self.copysets.get(&id).map(write),
        }
    }

    /// The state that consists of these rows, in any order.
    ///
    /// # Errors
    /// A row that can not be read or does not fit the others, named.
    pub fn from_rows(rows: impl IntoIterator<Item = (Key, Vec<u8>)>) -> Result<Self, String> {
        let mut state = Self::default();
        for (key, row) in rows {
            state.put(key, &row)?;
        }
        state.derive()?;
        Ok(state)
    }

    fn put(&mut self, key: Key, row: &[u8]) -> Result<(), String> {
        match key {
            Key::Counters => self.counters = read::<Counters>(key, row)?,
            Key::Volume(id) => {
                self.volumes.insert(id, read::<Volume>(key, row)?);
            }
            Key::Segment(id, index) => {
                self.segments.entry(id).or_default().insert(index, read::<Segment>(key, row)?);
            }
            Key::Deletion(id) => {
                self.deletions.insert(id, read::<Deletion>(key, row)?);
            }
            Key::Chunkserver(id) => {
                self.chunkservers.insert(id, read::<Chunkserver>(key, row)?);
            }
            Key::Copyset(id) => {
                self.copysets.insert(id, read::<Copyset>(key, row)?);
            }
        }
        Ok(())
    }

    fn derive(&mut self) -> Result<(), String> {
        for volume in self.volumes.values() {
            // Counters of format 1 do not tell it.
            self.counters.last_epoch = self.counters.last_epoch.max(volume.epoch.get());
            if let Some(other) = self.names.insert(volume.name.clone(), volume.id) {
                return Err(format!(
                    "two volumes have one name: name={} ids={other},{}",
                    volume.name, volume.id
                ));
            }
        }
        let allocated = self.segments.values().flat_map(|of| of.values()).flat_map(|segment| &segment.0);
        let deleted = self.deletions.values().flat_map(|deletion| &deletion.remaining);
        let counts = allocated
            .map(|copyset| (*copyset, 1))
            .chain(deleted.map(|(copyset, chunks)| (CopysetId::new(*copyset), u64::from(*chunks))));
        for (copyset, chunks) in counts {
            let Some(copyset) = self.copysets.get_mut(&copyset) else {
                return Err(format!("chunks lie in a copyset that does not exist: copyset={copyset}"));
            };
            copyset.chunks += chunks;
        }
        Ok(())
    }
}

fn write<T: Serialize>(row: &T) -> Vec<u8> {
    serde_json::to_vec(row).expect("rows hold only what JSON can write")
}

fn read<T: DeserializeOwned>(key: Key, row: &[u8]) -> Result<T, String> {
    serde_json::from_slice(row).map_err(|error| format!("damaged metadata row: key={key:?} error={error}"))
}
