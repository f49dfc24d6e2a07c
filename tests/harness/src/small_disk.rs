//! A small file system of its own, in a file behind a loop device: a disk that a test can fill. Needs root.

use crate::tool;
use anyhow::{Context, ensure};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Bytes that the filler writes at once.
const PIECE_BYTES: usize = 1 << 20;

/// A mounted file system. Dropping it unmounts it; the processes on it must have ended.
#[derive(Debug)]
pub struct SmallDisk {
    mounted: PathBuf,
    /// Holds the image and the mount point.
    _dir: TempDir,
}

impl SmallDisk {
    /// Makes an ext4 of `bytes` in a sparse file and mounts it.
    ///
    /// # Errors
    /// Without root, loop devices or mkfs.ext4: a message that says what is missing. Such a test can not be run there, and
    /// must not pass there.
    pub fn mount(bytes: u64) -> anyhow::Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "this test mounts a file system on a loop device: run it as root"
        );
        let dir = tempfile::Builder::new().prefix("spline-disk-").tempdir()?;
        let (image, mounted) = (dir.path().join("image"), dir.path().join("mounted"));
        File::create(&image)?.set_len(bytes)?;
        std::fs::create_dir_all(&mounted)?;
        // No blocks kept for root, under which the processes of tests run.
        tool::run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image))
            .context("this test needs mkfs.ext4 (Debian: e2fsprogs)")?;
        tool::run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mounted))
            .context("this test needs loop devices: modprobe loop, or a container that may use /dev/loop*")?;
        Ok(Self { mounted, _dir: dir })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mounted
    }

    /// Fills it to the last byte with a file of its own.
    ///
    /// # Errors
    /// If it fails otherwise than for want of space.
    pub fn fill(&self) -> anyhow::Result<()> {
        let mut filler = File::options().create(true).append(true).open(self.filler())?;
        // Large pieces first, then what is left in small ones.
        for piece in [PIECE_BYTES, 4096] {
            let zeros = vec![0; piece];
            let full = loop {
                if let Err(error) = filler.write_all(&zeros).and_then(|()| filler.sync_data()) {
                    break error;
                }
            };
            ensure!(full.kind() == std::io::ErrorKind::StorageFull, "can not fill a disk: {full}");
        }
        Ok(())
    }

    /// Frees what [`SmallDisk::fill`] took.
    ///
    /// # Errors
    /// Those of the system.
    pub fn free(&self) -> anyhow::Result<()> {
        Ok(std::fs::remove_file(self.filler())?)
    }

    fn filler(&self) -> PathBuf {
        self.mounted.join("filler")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The loop device goes with the mount.
        if let Err(error) = tool::run(Command::new("umount").arg("-l").arg(&self.mounted)) {
            eprintln!("can not unmount: {error:#}");
        }
    }
}
