//! Volumes for people and orchestrators: create, look, grow, rename, delete.
//!
//! Called by [`crate::service`]. Judges what is asked before it is logged; what only the newest state can judge
//! (names, epochs) is judged again in `apply`. Must never know: generated types.

use crate::command::{Answer, Command};
use crate::context::{Context, unix_ms};
use crate::refusal::Refusal;
use crate::state::record::Volume;
use spline_types::limits::{VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};
use spline_types::{BlockSize, OnUnavailable, VolumeName};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most volumes of a cluster: a listing and the state stay in memory.
pub const VOLUMES_MAX: usize = 100_000;

/// The operations on volumes.
#[derive(Clone)]
pub struct Volumes {
    context: Arc<Context>,
}

/// A volume as it is told to people.
#[derive(Clone, Debug)]
pub struct VolumeInfo {
    /// Its row.
    pub volume: Volume,
    /// Allocated segments.
    pub segments: u32,
    /// What is left of its session's lease.
    pub lease_left: Duration,
    /// One replica's worth, as last reported.
    pub bytes_stored: u64,
}

impl Volumes {
    /// Over the shared context.
    pub fn new(context: Arc<Context>) -> Self {
        Self { context }
    }

    /// Creates a volume.
    ///
    /// # Errors
    /// `Invalid` for a size or block size that does not fit, `Exists` for a name in use.
    pub async fn create(
        &self,
        name: VolumeName,
        size: u64,
        block_size: BlockSize,
        on_unavailable: OnUnavailable,
    ) -> Result<VolumeInfo, Refusal> {
        check_size(size, block_size)?;
        let count = self.context.ledger.read(|state| state.volume_count()).await?;
        if count >= VOLUMES_MAX {
            return Err(Refusal::no_space(format!("too many volumes, delete some: limit={VOLUMES_MAX}")));
        }
        let command =
            Command::CreateVolume { name: name.clone(), size, block_size, on_unavailable, now_ms: unix_ms() };
        let answer = self.context.ledger.propose(command).await?;
        tracing::info!(%name, size, ?answer, "volume created");
        self.get(&name).await
    }

    /// All volumes, by name.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn list(&self) -> Result<Vec<VolumeInfo>, Refusal> {
        let rows = self.context.ledger.read(|state| {
            state.volumes().map(|volume| (volume.clone(), state.segment_count(volume.id))).collect::<Vec<_>>()
        });
        Ok(self.complete(rows.await?))
    }

    /// One volume.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn get(&self, name: &VolumeName) -> Result<VolumeInfo, Refusal> {
        let row = self.context.ledger.read(|state| {
            state.volume_named(name).map(|volume| (volume.clone(), state.segment_count(volume.id)))
        });
        let row = row.await?.ok_or_else(|| no_such_volume(name))?;
        self.complete(vec![row]).pop().ok_or_else(|| no_such_volume(name))
    }

    /// Grows a volume.
    ///
    /// # Errors
    /// `Invalid` for a size that does not fit, `Precondition` for one that is smaller than now.
    pub async fn resize(&self, name: &VolumeName, size: u64) -> Result<VolumeInfo, Refusal> {
        let volume = self.get(name).await?.volume;
        check_size(size, volume.block_size)?;
        self.context.ledger.propose(Command::ResizeVolume { volume: volume.id, size }).await?;
        tracing::info!(%name, size, "volume resized");
        self.get(name).await
    }

    /// Renames a volume. A session that is opened at the same moment goes on under the old name.
    ///
    /// # Errors
    /// `Exists` for a name in use; `Precondition` while a session is alive: its exports know the volume by name.
    pub async fn rename(&self, name: &VolumeName, new_name: VolumeName) -> Result<VolumeInfo, Refusal> {
        let info = self.get(name).await?;
        require_unused(&info)?;
        let volume = info.volume;
        self.context
            .ledger
            .propose(Command::RenameVolume { volume: volume.id, name: new_name.clone() })
            .await?;
        tracing::info!(%name, %new_name, "volume renamed");
        self.get(&new_name).await
    }

    /// Deletes a volume; its space comes back in the background.
    ///
    /// # Errors
    /// `Precondition` while a session is alive.
    pub async fn delete(&self, name: &VolumeName) -> Result<(), Refusal> {
        let info = self.get(name).await?;
        require_unused(&info)?;
        let volume = info.volume;
        let answer = self
            .context
            .ledger
            .propose(Command::DeleteVolume { volume: volume.id, epoch: volume.epoch })
            .await?;
        debug_assert_eq!(answer, Answer::Done);
        self.context.leases().forget(volume.id, volume.epoch);
        tracing::info!(%name, id = %volume.id, "volume deleted");
        Ok(())
    }

    /// Adds what only soft state knows.
    fn complete(&self, rows: Vec<(Volume, u32)>) -> Vec<VolumeInfo> {
        let now = Instant::now();
        let leases = self.context.leases();
        let bytes = self.context.topology().bytes_by_volume();
        let complete = |(volume, segments): (Volume, u32)| VolumeInfo {
            lease_left: leases.left(volume.id, volume.epoch, now),
            bytes_stored: bytes.get(&volume.id).copied().unwrap_or(0),
            volume,
            segments,
        };
        rows.into_iter().map(complete).collect()
    }
}

/// The refusal for a name that no volume has.
pub fn no_such_volume(name: &VolumeName) -> Refusal {
    Refusal::not_found(format!("no such volume: name={name}"))
}

/// Whether a volume may have this size.
///
/// # Errors
/// `Invalid`, with what would fit.
pub fn check_size(size: u64, block_size: BlockSize) -> Result<(), Refusal> {
    if !(VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&size) {
        return Err(Refusal::invalid(format!(
            "size must be from 1 MiB to 64 TiB: size={size} min={VOLUME_BYTES_MIN} max={VOLUME_BYTES_MAX}"
        )));
    }
    if !size.is_multiple_of(u64::from(block_size.bytes())) {
        return Err(Refusal::invalid(format!(
            "size must be a multiple of the block size: size={size} block_size={}",
            block_size.bytes()
        )));
    }
    Ok(())
}

/// Refuses while a session is alive.
fn require_unused(info: &VolumeInfo) -> Result<(), Refusal> {
    match &info.volume.session {
        Some(session) if !info.lease_left.is_zero() => Err(Refusal::precondition(format!(
            "volume is in use, end its exports there first: name={} gateway={} lease_left_ms={}",
            info.volume.name,
            session.gateway,
            info.lease_left.as_millis()
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusal::RefusalKind;

    #[test]
    fn sizes_are_checked() {
        for (size, block_size, fits) in [
            (1 << 20, BlockSize::B4096, true),
            ((1 << 20) - 1, BlockSize::B512, false),
            (64 << 40, BlockSize::B4096, true),
            ((64 << 40) + 4096, BlockSize::B4096, false),
            ((1 << 20) + 512, BlockSize::B512, true),
            ((1 << 20) + 512, BlockSize::B4096, false),
            (0, BlockSize::B512, false),
            (u64::MAX, BlockSize::B512, false),
        ] {
            let refused = check_size(size, block_size).map_err(|refusal| refusal.kind);
            assert_eq!(refused, if fits { Ok(()) } else { Err(RefusalKind::Invalid) }, "{size}");
        }
    }
}
