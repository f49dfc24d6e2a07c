//! `make bench`: fio's nbd engine and a load generator of its own against Spline and its peers, in interleaved rounds of one run.
//!
//! Knows: fio, /proc, the peers' command lines, medians and ratios. Must never know: how a server works inside.
//! Modules: [`fio`] and [`load`] run one workload, [`cpu`] accounts for the servers, [`peers`] starts the others,
//! [`floor`] tells what the disk takes, [`report`] makes tables. `src/main.rs` puts them together.

pub mod cpu;
pub mod fio;
pub mod floor;
pub mod load;
pub mod peers;
pub mod report;
