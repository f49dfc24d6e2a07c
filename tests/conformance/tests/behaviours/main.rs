//! What a disk does, whatever it is asked with: one file per behaviour, each tried over NBD and over vhost-user-blk, on
//! files and on a cluster. That the behaviours are those of a disk, and not only of ours, is shown on another's device.

mod discarded;
mod flushed;
mod many_in_flight;
mod past_the_end;
mod random;
mod read_only;
mod says_what_it_is;
mod scattered;
mod several_queues;
mod sizes_and_alignments;
mod stays;
mod zeroed;

use spline_conformance::place::{Behaviour, Front, Place, try_all};
use spline_harness::{Rig, tempdir};

const BEHAVIOURS: [Behaviour; 12] = [
    ("says what it is", says_what_it_is::check),
    ("sizes and alignments", sizes_and_alignments::check),
    ("scattered", scattered::check),
    ("many in flight", many_in_flight::check),
    ("several queues", several_queues::check),
    ("flushed", flushed::check),
    ("discarded", discarded::check),
    ("zeroed", zeroed::check),
    ("past the end", past_the_end::check),
    ("read-only", read_only::check),
    ("stays", stays::check),
    ("random", random::check),
];

#[test]
fn nbd_on_files() -> anyhow::Result<()> {
    try_all(&Place::ours(Front::Nbd, Rig::file()?), &BEHAVIOURS)
}

#[test]
fn nbd_on_a_cluster() -> anyhow::Result<()> {
    try_all(&Place::ours(Front::Nbd, Rig::cluster()?), &BEHAVIOURS)
}

#[test]
fn vhost_on_files() -> anyhow::Result<()> {
    try_all(&Place::ours(Front::Vhost, Rig::file()?), &BEHAVIOURS)
}

#[test]
fn vhost_on_a_cluster() -> anyhow::Result<()> {
    try_all(&Place::ours(Front::Vhost, Rig::cluster()?), &BEHAVIOURS)
}

#[test]
fn vhost_of_qemu_storage_daemon() -> anyhow::Result<()> {
    let dir = tempdir()?;
    try_all(&Place::storage_daemon(dir.path()), &BEHAVIOURS)
}
