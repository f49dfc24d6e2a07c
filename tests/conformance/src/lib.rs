//! What clients that nobody here wrote see: nbdinfo, nbdcopy, qemu-img, qemu-io, fio and the `nbd` crate of NBD; the `blkio`
//! crate and the `vhost` crate's front-end of vhost-user-blk.
//!
//! One file per behaviour: those that NBD and vhost-user-blk share are in `tests/behaviours/`, each written once against
//! a [`disk`] and tried on every [`place`]; those that only NBD has lie under `tests/`. One file per bad input:
//! `tests/bad_input/` for NBD, where [`raw`] speaks byte by byte and [`stage`] watches nebd meanwhile; `tests/bad_guest/`
//! and `tests/bad_message/` for vhost-user-blk, where [`guest`] is driver and front-end and [`guest::stage`] watches. Must
//! never know: how Spline works.

pub mod disk;
pub mod guest;
pub mod place;
pub mod raw;
pub mod stage;

use anyhow::{Context, ensure};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;

/// Bytes that differ from place to place and from seed to seed.
pub fn pattern(seed: u64, offset: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes.next_multiple_of(8)];
    for (at, word) in out.chunks_exact_mut(8).enumerate() {
        let z = (seed ^ (offset + at as u64 * 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&(z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_le_bytes());
    }
    out.truncate(bytes);
    out
}

/// Makes a sparse image: `parts` (offset, bytes) hold data, all else is holes. Answers the bytes of data.
///
/// # Errors
/// Those of the file system.
pub fn sparse_image(path: &Path, bytes: u64, parts: &[(u64, usize)]) -> anyhow::Result<u64> {
    let file = File::create(path)?;
    file.set_len(bytes)?;
    for (offset, length) in parts {
        file.write_all_at(&pattern(7, *offset, *length), *offset)?;
    }
    Ok(parts.iter().map(|(_, length)| *length as u64).sum())
}

/// Whether two files hold the same bytes.
///
/// # Errors
/// Where they differ, or those of the file system.
pub fn same_content(a: &Path, b: &Path) -> anyhow::Result<()> {
    let (a, b) = (File::open(a)?, File::open(b)?);
    let bytes = a.metadata()?.len();
    ensure!(bytes == b.metadata()?.len(), "sizes differ: {bytes} {}", b.metadata()?.len());
    let (mut left, mut right) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(MIB) as usize;
        a.read_exact_at(&mut left[..length], at)?;
        b.read_exact_at(&mut right[..length], at)?;
        ensure!(left[..length] == right[..length], "contents differ: within the MiB at offset={at}");
        at += length as u64;
    }
    Ok(())
}

/// Bytes that a file takes on the disk.
///
/// # Errors
/// Those of the file system.
pub fn allocated(path: &Path) -> anyhow::Result<u64> {
    Ok(std::fs::metadata(path).with_context(|| path.display().to_string())?.blocks() * 512)
}
