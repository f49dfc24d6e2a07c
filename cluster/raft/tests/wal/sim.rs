//! A disk in memory that can lose power in the middle of a write, run full, and fail.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use prometheus_client::registry::Registry;
use spline_raft::WalConfig;
use spline_raft::wal::disk::{Disk, DiskFile};
use spline_raft::wal::{Recovered, Wal, WalError};

/// Small segments, so that a few records roll and recycle them.
pub(crate) fn config() -> WalConfig {
    WalConfig {
        segment_bytes: 16 << 10,
        spare_segments: 2,
        limit_bytes: 64 << 10,
        max_bytes: 64 << 20,
        cache_bytes: 8 << 10,
        queue_bytes: 64 << 20,
        batch_bytes: 8 << 10,
        retry: std::time::Duration::from_millis(5),
    }
}

pub(crate) fn open(disk: &SimDisk, config: WalConfig) -> Result<(Wal, Recovered), WalError> {
    Wal::open_on(Arc::new(disk.clone()), config, &mut Registry::default())
}

/// The content of all files.
pub(crate) type Image = BTreeMap<String, Vec<u8>>;

#[derive(Default)]
struct Power {
    image: Image,
    /// Durable operations left before the power goes, and which sectors of the last one still reach the disk (bit n of
    /// the mask: sectors n, n + 64, …).
    cut: Option<(u64, u64)>,
    off: bool,
    /// Most files there is room for.
    room: usize,
    fail_next_write: bool,
}

#[derive(Clone)]
pub(crate) struct SimDisk(Arc<Mutex<Power>>);

impl SimDisk {
    pub(crate) fn new(image: Image) -> SimDisk {
        SimDisk(Arc::new(Mutex::new(Power { image, room: usize::MAX, ..Power::default() })))
    }

    pub(crate) fn image(&self) -> Image {
        self.0.lock().unwrap().image.clone()
    }

    pub(crate) fn cut_power(&self, after: u64, mask: u64) {
        self.0.lock().unwrap().cut = Some((after, mask));
    }

    pub(crate) fn is_off(&self) -> bool {
        self.0.lock().unwrap().off
    }

    pub(crate) fn set_room(&self, files: usize) {
        self.0.lock().unwrap().room = files;
    }

    /// Waits until the preparer has made its spare segments, so that the next write is the committer's.
    pub(crate) fn settle(&self) {
        let spare = config().spare_segments as usize;
        let ready = |image: &Image| image.values().filter(|bytes| bytes[0] != 0).count() > spare;
        while !ready(&self.image()) {
            std::thread::yield_now();
        }
    }

    pub(crate) fn flip(&self, name: &str, offset: usize) {
        self.0.lock().unwrap().image.get_mut(name).unwrap()[offset] ^= 1;
    }

    pub(crate) fn fail_next_write(&self) {
        self.0.lock().unwrap().fail_next_write = true;
    }
}

fn no_power() -> io::Error {
    io::Error::other("no power")
}

impl Power {
    /// Counts a durable operation; `Some(mask)` if the power goes during it.
    fn step(&mut self) -> io::Result<Option<u64>> {
        if self.off {
            return Err(no_power());
        }
        match &mut self.cut {
            Some((0, mask)) => {
                self.off = true;
                Ok(Some(*mask))
            }
            Some((left, _)) => {
                *left -= 1;
                Ok(None)
            }
            None => Ok(None),
        }
    }
}

impl Disk for SimDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().unwrap().image.keys().cloned().collect())
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let bytes = self.0.lock().unwrap().image.get(name).ok_or(io::ErrorKind::NotFound)?.len() as u64;
        Ok(Arc::new(SimFile { disk: self.clone(), name: name.to_owned(), bytes }))
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn DiskFile>> {
        let mut power = self.0.lock().unwrap();
        if power.image.len() >= power.room {
            return Err(io::ErrorKind::StorageFull.into());
        }
        assert!(!power.image.contains_key(name), "created twice: {name}");
        let torn = power.step()?;
        let length = if torn.is_some() { bytes / 3 } else { bytes };
        power.image.insert(name.to_owned(), vec![0; length as usize]);
        match torn {
            Some(_) => Err(no_power()),
            None => Ok(Arc::new(SimFile { disk: self.clone(), name: name.to_owned(), bytes })),
        }
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut power = self.0.lock().unwrap();
        match power.step()? {
            Some(_) => Err(no_power()),
            None => power.image.remove(name).map(drop).ok_or(io::ErrorKind::NotFound.into()),
        }
    }
}

struct SimFile {
    disk: SimDisk,
    name: String,
    bytes: u64,
}

impl DiskFile for SimFile {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let power = self.disk.0.lock().unwrap();
        let file = power.image.get(&self.name).ok_or(io::ErrorKind::NotFound)?;
        let part =
            file.get(offset as usize..offset as usize + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(part);
        Ok(())
    }

    fn write_durable(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        assert!(bytes.as_ptr().addr().is_multiple_of(4096));
        assert!(bytes.len().is_multiple_of(512) && offset.is_multiple_of(512));
        let mut power = self.disk.0.lock().unwrap();
        let torn = power.step()?;
        if std::mem::take(&mut power.fail_next_write) {
            return Err(io::Error::other("medium error"));
        }
        let file = power.image.get_mut(&self.name).ok_or(io::ErrorKind::NotFound)?;
        for (at, sector) in bytes.chunks(512).enumerate() {
            if torn.is_none_or(|mask| mask >> (at % 64) & 1 == 1) {
                let start = offset as usize + at * 512;
                file[start..start + 512].copy_from_slice(sector);
            }
        }
        torn.map_or(Ok(()), |_| Err(no_power()))
    }
}
