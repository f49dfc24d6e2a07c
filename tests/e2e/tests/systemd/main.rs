//! Spline under a real systemd: installed by `make install` on a [`host`], used by clients with a verifying [`load`]. One file
//! per side of it.
//!
//! Each test boots a machine of its own ([`spline_harness::machine`]).

mod boot;
mod broken_builds;
mod cluster;
mod crash;
mod host;
mod installed;
mod load;
mod nebd_replaced;
mod qemu;
mod runbook;
#[path = "../guest/scripts.rs"]
mod scripts;
mod stop;
mod upgrade;
