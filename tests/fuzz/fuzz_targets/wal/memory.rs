//! A disk in memory, which remembers what a crash at one moment would have left.

use spline_raft::wal::disk::{Disk, DiskFile};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

/// Files and their content.
pub type Image = BTreeMap<String, Vec<u8>>;

/// The disk; clones are the same one.
#[derive(Clone)]
pub struct Memory(Arc<Mutex<Content>>);

struct Content {
    image: Image,
    /// Changes still to come before the crash.
    left: usize,
    /// What the crash left.
    crashed: Option<Image>,
}

impl Content {
    /// Called before each change.
    fn change(&mut self) -> &mut Image {
        if self.left == 0 {
            self.crashed.get_or_insert_with(|| self.image.clone());
        }
        self.left = self.left.saturating_sub(1);
        &mut self.image
    }
}

impl Memory {
    /// A disk whose crash comes after so many changes.
    pub fn new(image: Image, crash_after: usize) -> Self {
        Self(Arc::new(Mutex::new(Content { image, left: crash_after, crashed: None })))
    }

    pub fn image(&self) -> Image {
        self.lock().image.clone()
    }

    /// What the crash left, or would leave now if it has not come.
    pub fn crashed(&self) -> Image {
        let content = self.lock();
        content.crashed.as_ref().unwrap_or(&content.image).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        self.0.lock().expect("nobody panicked with it")
    }

    fn file(&self, name: &str, bytes: u64) -> Arc<dyn DiskFile> {
        Arc::new(MemoryFile { memory: self.clone(), name: name.to_owned(), bytes })
    }
}

impl Disk for Memory {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.lock().image.keys().cloned().collect())
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let bytes = self.lock().image.get(name).ok_or(io::ErrorKind::NotFound)?.len() as u64;
        Ok(self.file(name, bytes))
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn DiskFile>> {
        let old = self.lock().change().insert(name.to_owned(), vec![0; bytes as usize]);
        assert!(old.is_none(), "created over an old file: {name}");
        Ok(self.file(name, bytes))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.lock().change().remove(name).map(drop).ok_or(io::ErrorKind::NotFound.into())
    }
}

struct MemoryFile {
    memory: Memory,
    name: String,
    bytes: u64,
}

impl DiskFile for MemoryFile {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let content = self.memory.lock();
        let file = content.image.get(&self.name).ok_or(io::ErrorKind::NotFound)?;
        let part = file.get(offset as usize..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_durable(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut content = self.memory.lock();
        let file = content.change().get_mut(&self.name).ok_or(io::ErrorKind::NotFound)?;
        let part = file.get_mut(offset as usize..).and_then(|rest| rest.get_mut(..bytes.len()));
        part.expect("written past the end of a segment").copy_from_slice(bytes);
        Ok(())
    }
}
