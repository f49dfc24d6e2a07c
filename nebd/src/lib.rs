//! nebd: the guest's process. Serves one or more volumes, each as an export of its own; stands between a guest that must not
//! notice anything and a gateway that may be upgraded or die at any moment.
//!
//! Knows: NBD, vhost-user-blk, the link, the in-flight table, replay.
//! Must never know: the cluster, its clients and servers, gRPC, raft, tokio. It is rarely released and an upgrade never
//! restarts it, so it stays small: a thread for NBD, a few for a device, a handful of descriptors, under 8 MiB resident.
//!
//! Modules in the order in which a request meets them: [`config`], [`doors`], [`confine`] (once) → [`event_loop`] over
//! [`poller`] → [`listener`] → [`nbd`] ([`nbd::connection`], [`nbd::handshake`], [`nbd::transmission`]) reading by [`receive`]
//! into the [`area`] → [`export`] → [`volume`] → [`inflight`] → [`link`] → the gateway, and back through [`nbd::reply`] and
//! [`send_queue`]; for a device [`vhost`] in place of [`event_loop`] to [`volume`]. [`budget`] bounds the memory of all clients together. [`vectored`], [`metrics`], [`memory`] and [`status_file`] stand beside.

pub mod area;
pub mod budget;
pub mod config;
pub mod confine;
pub mod doors;
pub mod event_loop;
pub mod export;
pub mod inflight;
pub mod link;
pub mod listener;
pub mod memory;
pub mod metrics;
pub mod nbd;
pub mod poller;
pub mod receive;
pub mod send_queue;
pub mod status_file;
pub mod vectored;
pub mod vhost;
pub mod volume;

pub use config::Config;

use crate::budget::Budget;
use crate::config::{Checked, CheckedNbd};
use crate::doors::{Doors, NbdDoors};
use crate::event_loop::{EventLoop, Serving};
use crate::export::Export;
use crate::inflight::{Inflight, Limits};
use crate::link::Link;
use crate::metrics::Families;
use crate::volume::{Volume, area_for};
use anyhow::{Context, anyhow};
use rustix::event::EventfdFlags;
use spline_link::{FEATURE_RING, Hello, InstanceId, Mode, VersionRange, VolumeTraits};
use spline_types::limits::VOLUME_INFLIGHT_REQUESTS;
use spline_types::{BlockSize, Geometry};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{Builder, JoinHandle};
use std::time::Instant;

/// One way in which guests see a volume, running: over NBD, or as a vhost-user-blk device. Dropping it stops it.
#[derive(Debug)]
pub struct Nebd {
    stop: Stopper,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    serving: Receiver<Serving>,
}

/// Tells a [`Nebd`] to stop, from any thread.
#[derive(Debug)]
pub struct Stopper(OwnedFd);

impl Stopper {
    fn new() -> anyhow::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self(rustix::event::eventfd(0, flags).context("create an eventfd")?))
    }

    /// What becomes readable then.
    fn descriptor(&self) -> anyhow::Result<OwnedFd> {
        self.0.try_clone().context("duplicate the stop descriptor")
    }

    /// Open requests are given a moment; then the link says goodbye and the thread ends. Does not wait for that.
    pub fn stop(&self) {
        if let Err(error) = rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
            tracing::error!(%error, "thread can not be told to stop");
        }
    }
}

/// Names a link; a fresh hasher is keyed at random, and that is all it needs.
pub(crate) fn random_instance() -> InstanceId {
    InstanceId(RandomState::new().build_hasher().finish())
}

impl Checked {
    /// The first hello of a link.
    pub(crate) fn hello(&self) -> Hello {
        Hello {
            versions: VersionRange::OURS,
            features: 0,
            mode: Mode::Open,
            read_only: self.read_only,
            force: self.force,
            instance: random_instance(),
            identity: None,
            volume: self.volume.clone(),
        }
    }

    /// What guests are told. Size and traits are known from the first welcome on; nobody is served before.
    pub(crate) fn shown(&self) -> Export {
        Export {
            name: self.name.clone(),
            description: self.description.clone(),
            geometry: Geometry { size: 0, block_size: BlockSize::B4096 },
            traits: VolumeTraits::default(),
            read_only: self.read_only,
        }
    }
}

impl Nebd {
    /// Starts serving one export, in each of its ways, and returns at once; clients may come after
    /// [`wait_ready`](Self::wait_ready).
    ///
    /// # Errors
    /// If there are no descriptors or threads left.
    pub fn spawn(export: &Checked, doors: Doors, families: &Families) -> anyhow::Result<Vec<Self>> {
        let mut running = Vec::new();
        if let (Some(nbd), Some(doors)) = (&export.nbd, doors.nbd) {
            running.push(Self::spawn_nbd(export.clone(), nbd.clone(), doors, families)?);
        }
        if let (Some(device), Some(doors)) = (&export.vhost, doors.vhost) {
            running.push(vhost::spawn(export, device.clone(), doors, families)?);
        }
        Ok(running)
    }

    fn spawn_nbd(
        export: Checked,
        nbd: CheckedNbd,
        doors: NbdDoors,
        families: &Families,
    ) -> anyhow::Result<Self> {
        let (stop, (tell, serving)) = (Stopper::new()?, channel());
        let metrics = families.of(export.volume.as_str(), "nbd");
        let their_stop = stop.descriptor()?;
        let thread = Builder::new().name("nbd".into()).spawn(move || {
            let now = Instant::now();
            // What their data holds is the budget's to bound: it gives it out in turn.
            let limits = Limits { requests: VOLUME_INFLIGHT_REQUESTS, bytes: u64::MAX };
            let hello = Hello { features: FEATURE_RING, ..export.hello() };
            let link = Link::new(export.gateway_socket.clone(), hello, now);
            let (inflight, budget) = (Inflight::new(limits), Budget::default());
            let area = area_for(nbd.max_connections).context("memory for the data of clients")?;
            let volume = Volume { export: export.shown(), inflight, budget, area, lost: false, metrics, now };
            EventLoop::new((export, nbd), doors, (link, volume), their_stop, tell)?.run()
        })?;
        Ok(Self { stop, thread: Some(thread), serving })
    }

    /// Waits until the gateway has accepted the volume and clients may come; answers where they connect (NBD
    /// URIs, the path of a vhost-user socket), or `None` if it was stopped before.
    ///
    /// # Errors
    /// If the gateway refuses the volume, or clients can not be listened for.
    pub fn wait_ready(&mut self) -> anyhow::Result<Option<Vec<String>>> {
        match self.serving.recv() {
            Ok(serving) => Ok(Some(serving.uris)),
            Err(_) => self.join().map(|()| None),
        }
    }

    /// Something to stop it with from another thread.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn stopper(&self) -> anyhow::Result<Stopper> {
        self.stop.descriptor().map(Stopper)
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// Why it ended, unless it was stopped.
    pub fn join(&mut self) -> anyhow::Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(anyhow!("its thread panicked")),
            None => Ok(()),
        }
    }

    /// Stops it and waits for that.
    ///
    /// # Errors
    /// Those of [`join`](Self::join).
    pub fn shutdown(mut self) -> anyhow::Result<()> {
        self.stop.stop();
        self.join()
    }
}

impl Drop for Nebd {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stop.stop();
            if let Err(error) = self.join() {
                tracing::error!(%error, "nebd ended badly");
            }
        }
    }
}
