//! Sessions for gateways: open, renew, close, and segments on first write.
//!
//! Called by [`crate::service`]. `one_writer`: a session is opened by compare-and-swap of the volume's epoch, so two
//! gateways that race get different epochs; the lease only decides who may try. Renewals stay in memory.
//! Must never know: generated types.

use crate::command::{Answer, Command};
use crate::context::{Context, unix_ms};
use crate::placement::{Slot, place_chunks};
use crate::refusal::{Refusal, RefusalKind};
use crate::state::MetaState;
use crate::state::record::Volume;
use crate::topology::Topology;
use crate::volume::no_such_volume;
use spline_types::limits::SEGMENT_CHUNKS;
use spline_types::{ChunkserverId, CopysetId, Epoch, SegmentIndex, VolumeId, VolumeName};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rounds of an open that raced with other opens before the caller is told to come back.
const OPEN_ROUNDS: usize = 4;
/// Longest gateway id, bytes.
pub const GATEWAY_BYTES_MAX: usize = 255;

/// The operations on sessions.
#[derive(Clone)]
pub struct Sessions {
    context: Arc<Context>,
}

/// An opened session.
#[derive(Clone, Debug)]
pub struct Opened {
    /// The volume, as of the open.
    pub volume: Volume,
    /// What the gateway must show with every command.
    pub epoch: Epoch,
    /// It must renew within this.
    pub lease: Duration,
    /// Nobody else had a session from this one on.
    pub run_since: Epoch,
    /// All allocated segments.
    pub segments: Vec<(SegmentIndex, Vec<CopysetId>)>,
}

/// What a renewal tells about one session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Renewed {
    /// Alive; the volume's size in bytes and its name now.
    Alive(u64, VolumeName),
    /// A newer session exists, it was closed, or the volume is gone.
    Lost,
}

impl Sessions {
    /// Over the shared context.
    pub fn new(context: Arc<Context>) -> Self {
        Self { context }
    }

    /// Opens a session: epoch + 1 and a full lease. With `resumes`, what was sent to that session may be sent again. With
    /// `known`, only of that volume. With `newest`, only as the successor of that session: a call that comes late, after its
    /// caller was given up and another session was opened, opens nothing.
    ///
    /// # Errors
    /// `Precondition` while another gateway's lease is alive, unless `force`; `Fenced` if another gateway had a session
    /// since the resumed one, or if `newest` is not the newest; `Replaced` if the name is another volume's than `known`; `NotFound`; `Invalid` for a gateway
    /// id that does not fit.
    pub async fn open(
        &self,
        name: &VolumeName,
        gateway: &str,
        force: bool,
        resumes: Option<Epoch>,
        known: Option<VolumeId>,
        newest: Option<Epoch>,
    ) -> Result<Opened, Refusal> {
        if gateway.is_empty() || gateway.len() > GATEWAY_BYTES_MAX {
            let bytes = gateway.len();
            return Err(Refusal::invalid(format!(
                "gateway id must have 1 to {GATEWAY_BYTES_MAX} bytes: bytes={bytes}"
            )));
        }
        for _ in 0..OPEN_ROUNDS {
            let volume = self.context.ledger.read(|state| state.volume_named(name).cloned()).await?;
            let volume = volume.ok_or_else(|| no_such_volume(name))?;
            is_known(&volume, known)?;
            may_resume(&volume, resumes)?;
            follows(&volume, newest)?;
            self.may_open(&volume, gateway, force)?;
            let command = Command::OpenSession {
                volume: volume.id,
                epoch: volume.epoch,
                gateway: gateway.to_owned(),
                resumes: resumes.is_some(),
                now_ms: unix_ms(),
            };
            match self.context.ledger.propose(command).await {
                Ok(Answer::Epoch(epoch)) => return self.opened(volume.id, epoch).await,
                Ok(answer) => return Err(unexpected(&answer)),
                Err(refusal) if refusal.kind == RefusalKind::Conflict => {}
                Err(refusal) => return Err(refusal),
            }
        }
        Err(Refusal::unavailable(format!("volume is being opened by others, try again: name={name}")))
    }

    /// Refused while another gateway's lease is alive.
    fn may_open(&self, volume: &Volume, gateway: &str, force: bool) -> Result<(), Refusal> {
        let Some(session) = volume.session.as_ref().filter(|session| session.gateway != gateway) else {
            return Ok(());
        };
        let left = self.context.leases().left(volume.id, volume.epoch, Instant::now());
        if left.is_zero() || force {
            return Ok(());
        }
        Err(Refusal::precondition(format!(
            "volume is open on another gateway, close it there, wait for its lease, or use --force: name={} gateway={} \
             lease_left_ms={}",
            volume.name,
            session.gateway,
            left.as_millis()
        )))
    }

    async fn opened(&self, id: VolumeId, epoch: Epoch) -> Result<Opened, Refusal> {
        self.context.leases().grant(id, epoch, Instant::now());
        let rows = self.context.ledger.read(|state| {
            let volume = state.volume(id)?.clone();
            Some((volume, state.segments(id).map(|(index, of)| (index, of.to_vec())).collect::<Vec<_>>()))
        });
        // Segments allocated from here on need this epoch, so the list misses none.
        let (volume, segments) = rows
            .await?
            .ok_or_else(|| Refusal::not_found(format!("volume was deleted meanwhile: id={id}")))?;
        tracing::info!(volume = %volume.name, %epoch, gateway = volume.session.as_ref().map(|s| s.gateway.as_str()), "session opened");
        let run_since = volume.run_since();
        Ok(Opened { volume, epoch, lease: self.context.config.lease, run_since, segments })
    }

    /// Renews the leases of a gateway's sessions.
    ///
    /// # Errors
    /// `Unavailable`; a lost session is an answer, not an error.
    pub async fn renew(
        &self,
        gateway: &str,
        sessions: &[(VolumeId, Epoch)],
    ) -> Result<Vec<Renewed>, Refusal> {
        let judged = self.context.ledger.read(|state| {
            let judge = |(id, epoch): &(VolumeId, Epoch)| match state.volume(*id) {
                Some(volume)
                    if volume.epoch == *epoch
                        && volume.session.as_ref().is_some_and(|session| session.gateway == gateway) =>
                {
                    Renewed::Alive(volume.size, volume.name.clone())
                }
                _ => Renewed::Lost,
            };
            sessions.iter().map(judge).collect::<Vec<_>>()
        });
        let judged = judged.await?;
        let now = Instant::now();
        let mut leases = self.context.leases();
        for ((id, epoch), renewed) in sessions.iter().zip(&judged) {
            if matches!(renewed, Renewed::Alive(..)) {
                leases.grant(*id, *epoch, now);
            }
        }
        Ok(judged)
    }

    /// Ends a session. One that is not the newest any more is left to be.
    ///
    /// # Errors
    /// `Unavailable`.
    pub async fn close(&self, id: VolumeId, epoch: Epoch) -> Result<(), Refusal> {
        self.context.ledger.propose(Command::CloseSession { volume: id, epoch }).await?;
        self.context.leases().forget(id, epoch);
        tracing::info!(volume = %id, %epoch, "session closed");
        Ok(())
    }

    /// The copysets of a segment's chunks, chosen now if it has none.
    ///
    /// # Errors
    /// `Fenced` for an old epoch, `Invalid` past the end, `NoSpace` if every copyset is full, `Unavailable` before
    /// there are copysets.
    pub async fn allocate(
        &self,
        id: VolumeId,
        epoch: Epoch,
        index: SegmentIndex,
    ) -> Result<Vec<CopysetId>, Refusal> {
        let now = Instant::now();
        let seen = self.context.ledger.read(|state| {
            let allocated = state.segment(id, index).is_some();
            (allocated, if allocated { Vec::new() } else { slots(state, &self.context.topology(), now) })
        });
        let (allocated, slots) = seen.await?;
        // An allocated segment goes through the log too: there the epoch is judged.
        let copysets = match allocated {
            true => Vec::new(),
            false => self.place(&slots).await?,
        };
        match self
            .context
            .ledger
            .propose(Command::AllocateSegment { volume: id, epoch, index, copysets })
            .await?
        {
            Answer::Segment(copysets) => Ok(copysets),
            answer => Err(unexpected(&answer)),
        }
    }

    async fn place(&self, slots: &[Slot]) -> Result<Vec<CopysetId>, Refusal> {
        if let Some(copysets) = place_chunks(slots, SEGMENT_CHUNKS as usize, &mut rand::rng()) {
            return Ok(copysets);
        }
        match self.context.ledger.read(MetaState::copyset_count).await? {
            0 => Err(Refusal::unavailable(format!(
                "the cluster has no copysets yet, start chunkservers in distinct zones: needed={}",
                self.context.config.chunkservers_needed()
            ))),
            count => Err(Refusal::no_space(format!(
                "every copyset has a full member, add space: copysets={count}"
            ))),
        }
    }
}

/// Refused if the name is another volume's than the one that the caller knows: what it would send is not meant for this one.
/// The volume keeps its id whatever it is named when the session is opened.
fn is_known(volume: &Volume, known: Option<VolumeId>) -> Result<(), Refusal> {
    match known {
        Some(known) if known != volume.id => Err(Refusal::replaced(format!(
            "another volume has the name now, what was not answered is not written: name={} volume_id={} known_id={known}",
            volume.name, volume.id
        ))),
        _ => Ok(()),
    }
}

/// Refused if another gateway had a session since the resumed one (`no_late_duplicate`): what it wrote is newer than what
/// would be sent again. Judged before the log: the epoch that it is judged by is compared again in `apply`.
fn may_resume(volume: &Volume, resumes: Option<Epoch>) -> Result<(), Refusal> {
    let run = volume.run_since()..=volume.epoch;
    match resumes {
        Some(resumed) if !run.contains(&resumed) => Err(Refusal::fenced(format!(
            "the volume was open on another gateway meanwhile, what was not answered is not written: name={} \
             resumed_epoch={resumed} epoch={} last_gateway={}",
            volume.name,
            volume.epoch,
            volume.run.as_ref().map_or("", |run| run.gateway.as_str())
        ))),
        _ => Ok(()),
    }
}

/// Refused if another session than the one that the caller knows is the newest. Judged before the log, like [`may_resume`].
fn follows(volume: &Volume, newest: Option<Epoch>) -> Result<(), Refusal> {
    match newest {
        Some(known) if known != volume.epoch => Err(Refusal::fenced(format!(
            "another session was opened meanwhile: name={} epoch={} known_epoch={known}",
            volume.name, volume.epoch
        ))),
        _ => Ok(()),
    }
}

/// The copysets that may take new chunks: none of their members is full; those that have a leader now, if any has.
fn slots(state: &MetaState, topology: &Topology, now: Instant) -> Vec<Slot> {
    let members = state.copysets().map(|(_, copyset)| copyset.members.as_slice());
    let shares = crate::placement::count_replicas(members);
    let share = |member: &ChunkserverId| {
        let held = shares.get(member).copied().unwrap_or(1).max(1) as u64;
        (topology.capacity(*member) / held).max(1)
    };
    let usable =
        state.copysets().filter(|(_, copyset)| !copyset.members.iter().any(|id| topology.is_full(*id)));
    let mut slots: Vec<Slot> = usable
        .map(|(id, copyset)| {
            let weight = copyset.members.iter().map(share).min().unwrap_or(1);
            let leader = topology.leader(id, now).map(|leader| leader.chunkserver);
            Slot { copyset: id, leader, weight, chunks: copyset.chunks }
        })
        .collect();
    if slots.iter().any(|slot| slot.leader.is_some()) {
        slots.retain(|slot| slot.leader.is_some());
    }
    slots
}

fn unexpected(answer: &Answer) -> Refusal {
    Refusal::internal(format!("command had another answer than it can have: answer={answer:?}"))
}
