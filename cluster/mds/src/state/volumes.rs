//! What commands about volumes, sessions and segments do to the state.

use super::MetaState;
use super::record::{Deletion, Run, Segment, Session, Volume};
use super::rows::Key;
use crate::command::{Answer, Outcome};
use crate::refusal::Refusal;
use spline_types::limits::SEGMENT_CHUNKS;
use spline_types::{
    BlockSize, CopysetId, Epoch, Geometry, OnUnavailable, SegmentIndex, VolumeId, VolumeName,
};

impl MetaState {
    pub(super) fn create_volume(
        &mut self,
        name: &VolumeName,
        size: u64,
        block_size: BlockSize,
        on_unavailable: OnUnavailable,
        now_ms: u64,
    ) -> Outcome {
        self.name_is_free(name)?;
        let id = VolumeId::new(self.counters.last_volume + 1);
        self.counters.last_volume = id.get();
        let epoch = before_first(self.counters.last_epoch);
        self.counters.last_epoch = epoch;
        self.names.insert(name.clone(), id);
        self.volumes.insert(
            id,
            Volume {
                id,
                name: name.clone(),
                size,
                block_size,
                on_unavailable,
                created_ms: now_ms,
                epoch: Epoch::new(epoch),
                session: None,
                run: None,
            },
        );
        self.changed.extend([Key::Counters, Key::Volume(id)]);
        Ok(Answer::Volume(id))
    }

    pub(super) fn resize_volume(&mut self, id: VolumeId, size: u64) -> Outcome {
        let volume = self.volume_mut(id)?;
        if size < volume.size {
            return Err(Refusal::precondition(format!(
                "a volume can not shrink: name={} size={} asked={size}",
                volume.name, volume.size
            )));
        }
        volume.size = size;
        Ok(Answer::Done)
    }

    pub(super) fn rename_volume(&mut self, id: VolumeId, name: &VolumeName) -> Outcome {
        let old = self.existing(id)?.name.clone();
        if old == *name {
            return Ok(Answer::Done);
        }
        self.name_is_free(name)?;
        self.names.remove(&old);
        self.names.insert(name.clone(), id);
        self.volume_mut(id)?.name = name.clone();
        Ok(Answer::Done)
    }

    pub(super) fn delete_volume(&mut self, id: VolumeId, epoch: Epoch) -> Outcome {
        let volume = self.existing(id)?;
        if volume.epoch != epoch {
            return Err(Refusal::conflict(format!(
                "the volume was opened meanwhile, look who uses it: name={} epoch={}",
                volume.name, volume.epoch
            )));
        }
        let name = volume.name.clone();
        let mut deletion = Deletion::default();
        for (index, segment) in self.segments.remove(&id).into_iter().flatten() {
            self.changed.insert(Key::Segment(id, index));
            for copyset in segment.0 {
                *deletion.remaining.entry(copyset.get()).or_insert(0) += 1;
            }
        }
        if !deletion.remaining.is_empty() {
            self.deletions.insert(id, deletion);
            self.changed.insert(Key::Deletion(id));
        }
        self.names.remove(&name);
        self.volumes.remove(&id);
        self.changed.insert(Key::Volume(id));
        Ok(Answer::Done)
    }

    pub(super) fn reclaimed(&mut self, id: VolumeId, copysets: &[CopysetId]) -> Outcome {
        let Some(deletion) = self.deletions.get_mut(&id) else {
            return Ok(Answer::Done);
        };
        for copyset in copysets {
            let chunks = deletion.remaining.remove(&copyset.get()).unwrap_or(0);
            if let Some(copyset) = self.copysets.get_mut(copyset) {
                copyset.chunks = copyset.chunks.saturating_sub(u64::from(chunks));
            }
        }
        if deletion.remaining.is_empty() {
            self.deletions.remove(&id);
        }
        self.changed.insert(Key::Deletion(id));
        Ok(Answer::Done)
    }

    pub(super) fn open_session(
        &mut self,
        id: VolumeId,
        seen: Epoch,
        gateway: &str,
        resumes: bool,
        now_ms: u64,
    ) -> Outcome {
        let volume = self.volume_mut(id)?;
        if volume.epoch != seen {
            return Err(Refusal::conflict(format!(
                "another session was opened meanwhile: name={} epoch={}",
                volume.name, volume.epoch
            )));
        }
        let Some(epoch) = seen.next() else {
            return Err(Refusal::internal(format!("epochs are used up: name={}", volume.name)));
        };
        self.counters.last_epoch = self.counters.last_epoch.max(epoch.get());
        self.changed.insert(Key::Counters);
        let volume = self.volume_mut(id)?;
        volume.epoch = epoch;
        volume.session = Some(Session { gateway: gateway.to_owned(), since_ms: now_ms });
        let goes_on = |run: &Run| resumes || run.gateway == gateway;
        let since = volume.run.take().filter(goes_on).map_or(epoch, |run| run.since);
        volume.run = Some(Run { gateway: gateway.to_owned(), since });
        Ok(Answer::Epoch(epoch))
    }

    pub(super) fn close_session(&mut self, id: VolumeId, epoch: Epoch) -> Outcome {
        if let Some(volume) = self.volumes.get_mut(&id)
            && volume.epoch == epoch
            && volume.session.take().is_some()
        {
            self.changed.insert(Key::Volume(id));
        }
        Ok(Answer::Done)
    }

    pub(super) fn allocate_segment(
        &mut self,
        id: VolumeId,
        epoch: Epoch,
        index: SegmentIndex,
        copysets: &[CopysetId],
    ) -> Outcome {
        let volume = self.existing(id)?;
        if volume.epoch != epoch || volume.session.is_none() {
            return Err(Refusal::fenced(format!(
                "the session is not the volume's newest: name={} epoch={epoch} newest={}",
                volume.name, volume.epoch
            )));
        }
        let segments = Geometry { size: volume.size, block_size: volume.block_size }.segments();
        if index.get() >= segments {
            return Err(Refusal::invalid(format!(
                "segment lies past the end of the volume: name={} index={index} segments={segments}",
                volume.name
            )));
        }
        if let Some(allocated) = self.segment(id, index) {
            return Ok(Answer::Segment(allocated.to_vec()));
        }
        if copysets.len() != SEGMENT_CHUNKS as usize {
            let count = copysets.len();
            return Err(Refusal::internal(format!(
                "a segment needs {SEGMENT_CHUNKS} copysets: count={count}"
            )));
        }
        if let Some(unknown) = copysets.iter().find(|copyset| !self.copysets.contains_key(copyset)) {
            return Err(Refusal::internal(format!("no such copyset: copyset={unknown}")));
        }
        for copyset in copysets {
            if let Some(copyset) = self.copysets.get_mut(copyset) {
                copyset.chunks += 1;
            }
        }
        self.segments.entry(id).or_default().insert(index, Segment(copysets.to_vec()));
        self.changed.insert(Key::Segment(id, index));
        Ok(Answer::Segment(copysets.to_vec()))
    }

    fn existing(&self, id: VolumeId) -> Result<&Volume, Refusal> {
        self.volumes.get(&id).ok_or_else(|| Refusal::not_found(format!("no such volume: id={id}")))
    }

    /// The volume, to be changed.
    fn volume_mut(&mut self, id: VolumeId) -> Result<&mut Volume, Refusal> {
        let volume = self
            .volumes
            .get_mut(&id)
            .ok_or_else(|| Refusal::not_found(format!("no such volume: id={id}")))?;
        // Marked even if the caller refuses: writing an unchanged row is harmless.
        self.changed.insert(Key::Volume(id));
        Ok(volume)
    }

    fn name_is_free(&self, name: &VolumeName) -> Result<(), Refusal> {
        match self.names.contains_key(name) {
            true => Err(Refusal::exists(format!("a volume of this name exists: name={name}"))),
            false => Ok(()),
        }
    }
}

/// The epoch of a volume that nobody has opened: above all that there ever was. It is 0 until the first session.
const fn before_first(last_epoch: u64) -> u64 {
    match last_epoch {
        0 => 0,
        last => last.saturating_add(1),
    }
}
