//! The log's only door to the disk: two small traits, and the directory that implements them.
//!
//! Called by recovery, the committer, the preparer and reads. Tests put filters and a simulated disk behind the same
//! traits. Knows no format.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, FlockOperation, OFlags};
use rustix::io::ReadWriteFlags;

use super::aligned::AlignedBuffer;
use super::config::WalError;
use super::format::SECTOR;

/// Bytes written at once while a new file is filled with zeros.
const ZERO_CHUNK: usize = 1 << 20;
/// Held locked while the directory is open.
const LOCK_FILE: &str = "lock";
/// Written and removed at open, to see whether direct IO is possible.
const PROBE_FILE: &str = "probe";

/// A directory of fixed-size files.
pub trait Disk: Send + Sync + 'static {
    /// Names of all files.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Opens an existing file.
    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>>;
    /// Creates a file of `bytes` zeros, durable with its name when this returns. Leaves nothing behind on error.
    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn DiskFile>>;
    /// Deletes a file. Not necessarily durable.
    fn remove(&self, name: &str) -> io::Result<()>;
}

/// An open file. Offsets and lengths are multiples of 512 bytes, buffers lie at multiples of 4096.
pub trait DiskFile: Send + Sync + 'static {
    /// Size in bytes.
    fn bytes(&self) -> u64;
    /// Fills `buffer` from `offset`; a short file is an error.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `bytes` at `offset` and returns when they survive a power cut.
    fn write_durable(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
}

/// How bytes reach the disk and become durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteMode {
    /// O_DIRECT and one write with RWF_DSYNC.
    DirectDsync,
    /// O_DIRECT write, then fdatasync.
    DirectSync,
    /// Write through the page cache, then fdatasync: where the filesystem refuses direct IO of 512 bytes.
    BufferedSync,
}

/// A real directory, locked against a second process.
pub struct Directory {
    path: PathBuf,
    mode: WriteMode,
    _lock: File,
}

impl Directory {
    /// Opens or creates `path`, locks it, and finds out whether it takes direct IO.
    pub fn open(path: &Path) -> Result<Directory, WalError> {
        Directory::open_with(path, None)
    }

    /// Like [`Directory::open`], with a write mode of the caller's choice (measurements).
    pub fn open_with(path: &Path, mode: Option<WriteMode>) -> Result<Directory, WalError> {
        let failed = |action| move |source| WalError::Io { action, path: path.to_owned(), source };
        std::fs::create_dir_all(path).map_err(failed("create directory"))?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.join(LOCK_FILE))
            .map_err(failed("open lock file"))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(WalError::InUse(path.to_owned())),
            Err(error) => return Err(failed("lock directory")(error.into())),
        }
        let mode = match mode {
            Some(mode) => mode,
            None => probe(&path.join(PROBE_FILE)).map_err(failed("probe direct io"))?,
        };
        tracing::info!(path = %path.display(), ?mode, "write-ahead log directory opened");
        Ok(Directory { path: path.to_owned(), mode, _lock: lock })
    }

    fn options(&self) -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if self.mode != WriteMode::BufferedSync {
            options.custom_flags(OFlags::DIRECT.bits() as i32);
        }
        options
    }
}

/// Tries a direct 512-byte write; refusal of any kind means the page cache.
fn probe(path: &Path) -> io::Result<WriteMode> {
    let _ = std::fs::remove_file(path);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).custom_flags(OFlags::DIRECT.bits() as i32);
    let buffer = AlignedBuffer::zeroed(SECTOR);
    let tried = options.open(path).and_then(|file| file.write_all_at(buffer.as_ref(), SECTOR as u64));
    match tried {
        Ok(()) => {
            std::fs::remove_file(path)?;
            Ok(WriteMode::DirectSync)
        }
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {
            tracing::warn!(path = %path.display(), "direct io refused, using the page cache");
            let _ = std::fs::remove_file(path);
            Ok(WriteMode::BufferedSync)
        }
        // A full disk is no verdict on direct io; segments that exist stay usable, so assume the usual.
        Err(error) if error.kind() == io::ErrorKind::StorageFull => {
            let _ = std::fs::remove_file(path);
            Ok(WriteMode::DirectSync)
        }
        Err(error) => Err(error),
    }
}

impl Disk for Directory {
    fn list(&self) -> io::Result<Vec<String>> {
        std::fs::read_dir(&self.path)?
            .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
            .collect()
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.options().open(self.path.join(name))?;
        let bytes = file.metadata()?.len();
        Ok(Arc::new(DirectoryFile { file, bytes, mode: self.mode }))
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn DiskFile>> {
        let path = self.path.join(name);
        let file = self.options().create_new(true).open(&path)?;
        let filled = fill(&file, bytes).and_then(|()| File::open(&self.path)?.sync_all());
        if let Err(error) = filled {
            let _ = std::fs::remove_file(&path);
            return Err(error);
        }
        Ok(Arc::new(DirectoryFile { file, bytes, mode: self.mode }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))
    }
}

/// Allocates and writes zeros: later writes then change no filesystem metadata, so a sync need not wait for its journal.
fn fill(file: &File, bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
        Err(error) => return Err(error.into()),
    }
    let zeros = AlignedBuffer::zeroed(ZERO_CHUNK);
    let mut offset = 0;
    while offset < bytes {
        let length = (bytes - offset).min(ZERO_CHUNK as u64);
        file.write_all_at(&zeros.as_ref()[..length as usize], offset)?;
        offset += length;
    }
    file.sync_all()
}

struct DirectoryFile {
    file: File,
    bytes: u64,
    mode: WriteMode,
}

impl DiskFile for DirectoryFile {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    fn write_durable(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.mode != WriteMode::DirectDsync {
            self.file.write_all_at(bytes, offset)?;
            return self.file.sync_data();
        }
        let mut done = 0;
        while done < bytes.len() {
            let rest = [IoSlice::new(&bytes[done..])];
            match rustix::io::pwritev2(&self.file, &rest, offset + done as u64, ReadWriteFlags::DSYNC) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => done += written,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
