//! Links on their way from the old process to the new one, which goes on with their rings and sockets: nebd is not even
//! connected anew.
//!
//! Called by both sides of an upgrade. Must not know how a link is served.

use super::channel::{Channel, ChannelError};
use super::message::{LinkState, Message, REGIONS_MAX, RegionState};
use super::monotonic_ns;
use crate::link::Facts;
use crate::link::ring::Frozen;
use anyhow::{Context, ensure};
use spline_link::LinkVersion;
use spline_link::ring::RingFds;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use tracing::warn;

/// Descriptors of a link without those of its regions and those that it has not looked at.
const FDS_MIN: usize = 4;
/// Links that are believed in: what a gateway accepts at most.
const LINKS_MAX: usize = 4096;

/// Sends a link of a session, under a number of its own.
pub(super) async fn send(
    channel: &Channel,
    session: u32,
    link: u32,
    frozen: &Frozen,
) -> Result<(), ChannelError> {
    let state = LinkState {
        session,
        link,
        version: frozen.facts.version as u16,
        instance: frozen.facts.instance,
        read_only: frozen.facts.read_only,
        position: frozen.position,
        stopped_ns: monotonic_ns().saturating_sub(nanoseconds(frozen.stopped.elapsed())),
        partial: frozen.partial.clone(),
    };
    let RingFds { memory, to_gateway, to_nebd } = &frozen.ring;
    let own = [&frozen.socket, memory, to_gateway, to_nebd];
    let fds: Vec<BorrowedFd<'_>> = own.into_iter().chain(&frozen.fds).map(AsFd::as_fd).collect();
    channel.send(&Message::Link(state), &fds).await?;
    for regions in frozen.regions.chunks(REGIONS_MAX) {
        let told = regions.iter().map(|(number, offset, length, _)| RegionState {
            number: *number,
            offset: *offset,
            length: *length,
        });
        let message = Message::Regions { link, regions: told.collect() };
        let fds: Vec<BorrowedFd<'_>> = regions.iter().map(|(.., file)| file.as_fd()).collect();
        channel.send(&message, &fds).await?;
    }
    Ok(())
}

/// Links that have come, until their sessions may be served.
#[derive(Default)]
pub(super) struct Arriving {
    links: HashMap<u32, (u32, Frozen)>,
}

impl Arriving {
    /// A link has come. One that can not be gone on with is dropped: its nebd connects anew.
    pub(super) fn link(&mut self, state: LinkState, fds: Vec<OwnedFd>) {
        let (session, link) = (state.session, state.link);
        match understand(state, fds) {
            Ok(frozen) if self.links.len() < LINKS_MAX => {
                self.links.insert(link, (session, frozen));
            }
            Ok(_) => warn!(limit = LINKS_MAX, "too many links, one is cut"),
            Err(error) => {
                warn!(error = format!("{error:#}"), "link can not be gone on with, nebd will connect again")
            }
        }
    }

    /// Memory of a link has come.
    pub(super) fn regions(&mut self, link: u32, regions: &[RegionState], fds: Vec<OwnedFd>) {
        let Some((_, frozen)) = self.links.get_mut(&link) else { return };
        if regions.len() != fds.len() {
            warn!(
                regions = regions.len(),
                descriptors = fds.len(),
                "memory of a link is missing, nebd will connect again"
            );
            self.links.remove(&link);
            return;
        }
        let came = regions.iter().zip(fds);
        frozen.regions.extend(came.map(|(region, fd)| (region.number, region.offset, region.length, fd)));
    }

    /// The links of a session.
    pub(super) fn take(&mut self, session: u32) -> Vec<Frozen> {
        let all = self.links.extract_if(|_, (of, _)| *of == session);
        all.map(|(_, (_, frozen))| frozen).collect()
    }
}

fn understand(state: LinkState, fds: Vec<OwnedFd>) -> anyhow::Result<Frozen> {
    ensure!(fds.len() >= FDS_MIN, "descriptors are missing: came={}", fds.len());
    let mut fds = fds.into_iter();
    let mut next = || fds.next().context("descriptors are missing");
    let socket = next()?;
    let ring = RingFds { memory: next()?, to_gateway: next()?, to_nebd: next()? };
    let facts = Facts {
        version: LinkVersion::from_raw(state.version)?,
        instance: state.instance,
        read_only: state.read_only,
    };
    let stopped = Duration::from_nanos(monotonic_ns().saturating_sub(state.stopped_ns));
    let now = Instant::now();
    Ok(Frozen {
        socket,
        partial: state.partial,
        fds: fds.collect(),
        ring,
        position: state.position,
        regions: Vec::new(),
        facts,
        stopped: now.checked_sub(stopped).unwrap_or(now),
        withdrawn: 0,
    })
}

/// A duration as the wire has it.
pub(super) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
