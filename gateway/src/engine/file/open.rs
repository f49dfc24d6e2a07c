//! Opens files and block devices as volumes: only below the configured roots, once for writing.
//!
//! Called by the engines' factory, on a thread that may block.

use super::job::Descriptors;
use super::overlap::Overlaps;
use super::ring::Ring;
use super::threads::Threads;
use super::{Disk, Executor, FileEngine};
use crate::buffer::{ALIGNMENT, BufferPool};
use crate::config::FileIo;
use crate::engine::{EngineTraits, OpenError, Standing, Wanted, replaced};
use crate::shared::RawPiece;
use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, ResolveFlags, SeekFrom, Stat, StatxFlags, fcntl_setfl,
    flock, fstat, ioctl_blksszget, major, minor, open, openat2, seek, statx,
};
use rustix::io::Errno;
use spline_link::Identity;
use spline_types::limits::{VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};
use spline_types::{BlockSize, Epoch, Geometry, OnUnavailable};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tracing::{info, warn};

/// How long a file that is locked is waited for. A gateway that was killed holds its files a little longer than it
/// lives: the kernel ends its io_uring, and the requests in it, after the process is gone. Far below the time that a nebd
/// waits for a welcome.
const LOCK_LIMIT: Duration = Duration::from_secs(5);
/// How often a locked file is tried.
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// Where files may lie, and how they are used.
pub(crate) struct Files {
    roots: Vec<PathBuf>,
    io: FileIo,
    buffers: BufferPool,
    lock_limit: Duration,
}

/// An open, locked file.
pub(super) struct Opened {
    files: Descriptors,
    device: bool,
    read_only: bool,
    rotational: bool,
    geometry: Geometry,
    identity: Identity,
}

impl Files {
    pub(crate) fn new(roots: Vec<PathBuf>, io: FileIo, buffers: BufferPool) -> Self {
        Self { roots, io, buffers, lock_limit: LOCK_LIMIT }
    }

    /// As `self`, but waits another time for a locked file.
    #[cfg(test)]
    pub(super) fn waiting(self, lock_limit: Duration) -> Self {
        Self { lock_limit, ..self }
    }

    /// Opens a file for writing, or for reading only if it can not be written and nobody wants to. Blocks.
    ///
    /// # Errors
    /// `NotFound` if it is not there or not below a root, `Held` if someone else has it open, `Replaced` if it is not the
    /// known one, `Internal` otherwise.
    pub(crate) fn open(&self, path: &Path, wanted: Wanted) -> Result<FileEngine, OpenError> {
        self.open_with(path, wanted, choose)
    }

    pub(super) fn open_with(
        &self,
        path: &Path,
        wanted: Wanted,
        executor: impl FnOnce(&Arc<Descriptors>) -> std::io::Result<Executor>,
    ) -> Result<FileEngine, OpenError> {
        self.serve(path, self.open_locked(path, wanted)?, executor)
    }

    pub(super) fn serve(
        &self,
        path: &Path,
        opened: Opened,
        executor: impl FnOnce(&Arc<Descriptors>) -> std::io::Result<Executor>,
    ) -> Result<FileEngine, OpenError> {
        let internal = |error| {
            OpenError::Internal(format!("can not serve a file: path={} error={error}", path.display()))
        };
        let files = Arc::new(opened.files);
        let executor = executor(&files).map_err(internal)?;
        info!(
            path = %path.display(),
            direct = files.direct.is_some(),
            ring = matches!(executor, Executor::Ring(_)),
            "file is open"
        );
        let disk = Disk {
            path: path.to_owned(),
            alignment: alignment(&files),
            files,
            executor,
            overlaps: Overlaps::default(),
            buffers: self.buffers.clone(),
            device: opened.device,
            block_size: opened.geometry.block_size,
            size: AtomicU64::new(opened.geometry.size),
            standing: watch::Sender::new(Standing { size: opened.geometry.size, lost: false }),
            poisoned: AtomicBool::new(false),
        };
        let traits = EngineTraits {
            volatile_cache: true,
            read_only: opened.read_only,
            fast_zero: true,
            rotational: opened.rotational,
            identity: opened.identity,
            epoch: Epoch::new(0),
            run_since: Epoch::new(0),
            on_unavailable: OnUnavailable::Wait,
        };
        Ok(FileEngine { disk: Arc::new(disk), traits })
    }

    fn open_locked(&self, path: &Path, wanted: Wanted) -> Result<Opened, OpenError> {
        let (buffered, writable) = match self.resolve(path, OFlags::RDWR) {
            Ok(fd) => (fd, true),
            Err(Errno::ROFS | Errno::ACCESS | Errno::PERM) if wanted.read_only => {
                (self.resolve(path, OFlags::RDONLY).map_err(|error| refused(path, error))?, false)
            }
            Err(error) => return Err(refused(path, error)),
        };
        self.lock_and_look(path, buffered, writable, wanted.known)
    }

    /// Locks an open file, unless it is locked by the same descriptor already, and looks what it is.
    pub(super) fn lock_and_look(
        &self,
        path: &Path,
        buffered: OwnedFd,
        writable: bool,
        known: Option<Identity>,
    ) -> Result<Opened, OpenError> {
        let shown = path.display();
        let failed =
            |error: Errno| OpenError::Internal(format!("can not use a file: path={shown} error={error}"));
        let lock = if writable {
            FlockOperation::NonBlockingLockExclusive
        } else {
            FlockOperation::NonBlockingLockShared
        };
        self.lock(&buffered, lock).map_err(|error| match error {
            Errno::WOULDBLOCK => {
                OpenError::Held(format!("file is in use by another process: path={shown}; see lslocks"))
            }
            error => failed(error),
        })?;
        let stat = fstat(&buffered).map_err(failed)?;
        let device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            _ => return Err(OpenError::NotFound(format!("not a file or block device: path={shown}"))),
        };
        let identity = identity(&stat, device)
            .ok_or_else(|| OpenError::Internal(format!("file has neither device nor inode: path={shown}")))?;
        if let Some(known) = known.filter(|known| *known != identity) {
            return Err(replaced(shown, identity, known));
        }
        // It was for opening alone: io_uring would not wait for a device that is busy.
        fcntl_setfl(&buffered, OFlags::empty()).map_err(failed)?;
        let geometry = geometry(&buffered, device).map_err(failed)?;
        if !(VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&geometry.size) {
            return Err(OpenError::NotFound(format!(
                "file is too small or too large for a volume: path={shown} bytes={} allowed={VOLUME_BYTES_MIN}..={VOLUME_BYTES_MAX}",
                geometry.size
            )));
        }
        let direct = match self.io {
            FileIo::Direct => direct(&buffered, writable, path),
            FileIo::Buffered => None,
        };
        let rotational = rotational(if device { stat.st_rdev } else { stat.st_dev });
        Ok(Opened {
            files: Descriptors { buffered, direct },
            device,
            read_only: !writable,
            rotational,
            geometry,
            identity,
        })
    }

    /// Locks a file; waits a little for one that is held.
    fn lock(&self, file: &OwnedFd, lock: FlockOperation) -> Result<(), Errno> {
        let give_up_at = Instant::now() + self.lock_limit;
        loop {
            match flock(file, lock) {
                Err(Errno::WOULDBLOCK) if Instant::now() < give_up_at => std::thread::sleep(LOCK_RETRY),
                Err(Errno::INTR) => {}
                locked => return locked,
            }
        }
    }

    /// Whether a path lies below a root, going by its name.
    pub(super) fn may_serve(&self, path: &Path) -> Result<(), OpenError> {
        match self.roots.iter().any(|root| path.starts_with(root)) {
            true => Ok(()),
            false => Err(refused(path, Errno::XDEV)),
        }
    }

    /// Opens a path below the first root that it lies in; links that lead out of the root are not followed.
    fn resolve(&self, path: &Path, access: OFlags) -> Result<OwnedFd, Errno> {
        // Not blocking: a fifo must not hold the thread. It means nothing for files and devices.
        let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        for root in &self.roots {
            let Ok(inside) = path.strip_prefix(root) else { continue };
            let root = open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
            return openat2(&root, inside, flags, Mode::empty(), resolve);
        }
        Err(Errno::XDEV)
    }
}

fn refused(path: &Path, error: Errno) -> OpenError {
    let shown = path.display();
    match error {
        Errno::XDEV => OpenError::NotFound(format!(
            "file does not lie below a configured root: path={shown}; see file_roots in the gateway's config"
        )),
        Errno::NOENT | Errno::NOTDIR | Errno::ISDIR | Errno::LOOP | Errno::NXIO => {
            OpenError::NotFound(format!("no such file: path={shown} error={error}"))
        }
        Errno::ACCESS | Errno::PERM | Errno::ROFS => {
            OpenError::NotFound(format!("file can not be written: path={shown} error={error}"))
        }
        Errno::BUSY | Errno::TXTBSY => OpenError::Held(format!("file is in use: path={shown} error={error}")),
        error => OpenError::Internal(format!("can not open a file: path={shown} error={error}")),
    }
}

/// Device and inode of a regular file, the number of a block device. A file that was deleted may leave its inode to the next
/// one, and a device its number: what the system tells of them is no more than that.
fn identity(stat: &Stat, device: bool) -> Option<Identity> {
    if device { Identity::new(stat.st_rdev, 0) } else { Identity::new(stat.st_dev, stat.st_ino) }
}

/// Announced as 512 byte blocks unless the device has larger ones: images are usually made on such disks.
pub(super) fn geometry(file: &OwnedFd, device: bool) -> Result<Geometry, Errno> {
    let block_size = match device && ioctl_blksszget(file)? == BlockSize::B4096.bytes() {
        true => BlockSize::B4096,
        false => BlockSize::B512,
    };
    let size = seek(file, SeekFrom::End(0))?;
    // A tail of less than a block can not be addressed by a guest.
    Ok(Geometry { size: size - size % u64::from(block_size.bytes()), block_size })
}

/// A second descriptor of the same file, past the page cache, if the file system offers that.
fn direct(file: &OwnedFd, writable: bool, path: &Path) -> Option<OwnedFd> {
    let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    let same = format!("/proc/self/fd/{}", file.as_raw_fd());
    match open(same, access | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => Some(fd),
        Err(error) => {
            info!(path = %path.display(), %error, "file system has no direct io, the page cache is used");
            None
        }
    }
}

/// What direct IO asks of a piece of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Alignment {
    /// Of its address, bytes.
    pub(super) address: usize,
    /// Of its length, bytes.
    pub(super) length: usize,
}

impl Alignment {
    /// Whether all pieces are as wanted.
    pub(super) fn fits(&self, pieces: &[RawPiece]) -> bool {
        pieces.iter().all(|piece| {
            piece.start.addr().is_multiple_of(self.address) && piece.len.is_multiple_of(self.length)
        })
    }
}

/// What the kernel tells of it (6.1 and later); a page where it does not, which satisfies every disk.
fn alignment(files: &Descriptors) -> Alignment {
    let page = Alignment { address: ALIGNMENT, length: ALIGNMENT };
    let Some(direct) = &files.direct else { return page };
    let Ok(known) = statx(direct, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else { return page };
    let told = StatxFlags::from_bits_retain(known.stx_mask).contains(StatxFlags::DIOALIGN);
    let (address, length) = (known.stx_dio_mem_align as usize, known.stx_dio_offset_align as usize);
    if told && address > 0 && length > 0 { Alignment { address, length } } else { page }
}

/// Whether a device turns; false where nobody knows.
fn rotational(device: u64) -> bool {
    let base = PathBuf::from(format!("/sys/dev/block/{}:{}", major(device), minor(device)));
    // A partition's queue is its disk's.
    ["queue/rotational", "../queue/rotational"]
        .iter()
        .find_map(|place| std::fs::read_to_string(base.join(place)).ok())
        .is_some_and(|text| text.trim() == "1")
}

/// A ring if the kernel has one that is good enough, else threads.
pub(super) fn choose(files: &Arc<Descriptors>) -> std::io::Result<Executor> {
    match Ring::start(files) {
        Ok(ring) => Ok(Executor::Ring(ring)),
        Err(error) => {
            warn!(%error, "no io_uring here, files are served by threads");
            Threads::start(files).map(Executor::Threads)
        }
    }
}
