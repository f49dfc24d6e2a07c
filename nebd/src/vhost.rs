//! The vhost-user-blk export: a guest's virtio disk (virtio 1.2, 5.2) over QEMU's vhost-user protocol.
//!
//! Called by `lib.rs`. One thread, control, speaks vhost-user with the front-end; workers, each with a link to the gateway of
//! its own, serve groups of queues, so that no lock is shared between queues.
//!
//! Knows: vhost-user, virtqueues, guest memory. Must not know: NBD, the link's encoding beyond its frames, the cluster.
//! `guest_cannot_crash_us`: what a guest writes is copied once, then checked, then used.

pub mod inflight;
pub mod memory;
pub mod order;
pub mod queue;
pub mod request;
pub mod status;
pub mod stream;
pub mod worker;

#[cfg(test)]
mod driver;
#[cfg(test)]
mod gateway;
