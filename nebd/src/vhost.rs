//! The vhost-user-blk export: a guest's virtio disk (virtio 1.2, 5.2) over QEMU's vhost-user protocol.
//!
//! Called by `lib.rs`. One thread, [`control`], speaks vhost-user with the front-end; workers, each with a link to the gateway
//! of its own, serve groups of queues, so that no lock is shared between queues.
//!
//! Modules in the order in which a front-end and its requests meet them: [`control`] over [`connection`] and [`message`] →
//! [`device`] with [`config`], [`memory`] and [`inflight`] → [`order`] → [`worker`] → [`queue`] → [`request`] → [`ringed`], or
//! [`stream`] where there is no ring → the gateway, and back through [`status`].
//!
//! Knows: vhost-user, virtqueues, guest memory. Must not know: NBD, the link's encoding beyond its frames, the cluster.
//! `guest_cannot_crash_us`: what a guest writes is copied once, then checked, then used.

pub mod config;
pub mod connection;
pub mod control;
pub mod device;
pub mod inflight;
pub mod memory;
pub mod message;
pub mod order;
pub mod queue;
pub mod request;
pub mod ringed;
pub mod status;
pub mod stream;
pub mod worker;

#[cfg(test)]
mod driver;
#[cfg(test)]
mod gateway;

use crate::config::{Checked, CheckedVhost};
use crate::doors::VhostDoors;
use crate::metrics::Families;
use crate::{Nebd, Stopper};
use anyhow::Context;
use order::{Mailbox, Order};
use spline_link::{FEATURE_RING, Hello};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::Builder;

/// Starts the threads of one export.
///
/// # Errors
/// If there are no descriptors or threads left.
pub(crate) fn spawn(
    export: &Checked,
    device: CheckedVhost,
    doors: VhostDoors,
    families: &Families,
) -> anyhow::Result<Nebd> {
    let volume = export.volume.as_str();
    let hello = Hello { features: FEATURE_RING, ..export.hello() };
    let (reports, size) = (Arc::new(Mailbox::new()?), Arc::default());
    let (mut mailboxes, mut workers) = (Vec::new(), Vec::new());
    for number in 0..usize::from(device.threads) {
        let orders = Arc::new(Mailbox::new()?);
        let thread = format!("vhost-{number}");
        let setup = worker::Setup {
            number,
            gateway: export.gateway_socket.clone(),
            export: export.shown(),
            size: Arc::clone(&size),
            serial: device.serial.clone(),
            metrics: families.of(volume, &thread),
            orders: Arc::clone(&orders),
            reports: Arc::clone(&reports),
        };
        mailboxes.push(orders);
        workers.push((thread, worker::Worker::new(setup, (number == 0).then(|| hello.clone()))?));
    }
    let stop = Stopper::new()?;
    let (tell, serving) = channel();
    let setup = control::Setup {
        export: export.shown(),
        device,
        doors,
        hello,
        workers: mailboxes.clone(),
        reports,
        metrics: families.of(volume, "vhost"),
        stop: stop.descriptor()?,
        serving: tell,
    };
    let thread = Builder::new().name("vhost".into()).spawn(move || serve(setup, workers, &mailboxes))?;
    Ok(Nebd { stop, thread: Some(thread), serving })
}

/// Runs control until it ends, and the workers for as long.
fn serve(
    setup: control::Setup,
    workers: Vec<(String, worker::Worker)>,
    mailboxes: &[Arc<Mailbox<Order>>],
) -> anyhow::Result<()> {
    let mut threads = Vec::new();
    let mut started = Ok(());
    for (name, worker) in workers {
        match Builder::new().name(name).spawn(|| worker.run()) {
            Ok(thread) => threads.push(thread),
            Err(error) => started = Err(error).context("start a worker"),
        }
    }
    // Workers must not go on for a connection that nobody has.
    let run = || started.and_then(|()| control::run(setup));
    let result =
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(anyhow::anyhow!("control panicked")));
    mailboxes.iter().for_each(|orders| orders.put(Order::End));
    // Each is waited for.
    let panicked = threads.into_iter().filter_map(|thread| thread.join().err()).count();
    anyhow::ensure!(panicked == 0, "a worker panicked");
    result
}
