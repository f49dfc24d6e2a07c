//! A real guest kernel on a volume: what it is used for, and what happens to it. One file per side of it.
//!
//! Guests are `qemu/run-guest` with a script of [`scripts`]; without KVM they are emulated and slow, so the loads are small.

mod block_sizes;
mod command;
mod debian;
mod faults;
mod file_systems;
mod nbd_client;
mod scripts;
