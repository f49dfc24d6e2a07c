//! `make bench`: fio's nbd engine, a load generator of its own and a guest's driver against Spline and its peers, in interleaved
//! rounds of one run.
//!
//! Knows: fio, /proc, the peers' command lines, medians and ratios. Must never know: how a server works inside.
//! Modules: [`fio`], [`load`] and [`guest`] run one workload, [`rest`] looks at servers that rest, [`exports`] starts many,
//! [`upgrade`] sees what becomes of those that are [`asking`] when the gateway is replaced, [`idle`] what the others cost, [`cpu`] accounts for the servers, [`peers`] starts the others,
//! [`floor`] tells what the disk takes, [`report`] makes tables. `src/main.rs` puts them together. [`direct`] is a server of our own
//! parts without a link, which the split is measured against.

pub mod asking;
pub mod cpu;
pub mod direct;
pub mod exports;
pub mod fio;
pub mod floor;
pub mod guest;
pub mod idle;
pub mod load;
pub mod peers;
pub mod report;
pub mod rest;
pub mod upgrade;
