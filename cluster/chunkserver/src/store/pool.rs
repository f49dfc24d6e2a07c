//! The pool: chunk files made ahead of need, so that the IO path takes one by a rename and formats nothing.
//!
//! Called by [`super::chunk_store`]. Must not know: chunks, copysets. A thread keeps `spare` files ready and takes freed
//! ones back; when the disk has no room the pool says [`Pool::full`] and looks again each second, so space that comes
//! back is used by itself. Files are all zeros when they leave the pool: a freed file is zeroed and synced before its
//! name says that it is free, so a crash can never bring old content into a new chunk.
//! Invariants: `bounded`.

use super::StoreError;
use super::layout::FILE_BYTES;
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::Duration;

/// How often a full disk is looked at again.
const RETRY: Duration = Duration::from_secs(1);
/// How long a taker waits for the thread to make a file, or to find that there is no room. Far above what a busy disk
/// needs: a taker that gives up takes the disk for full.
const TAKE_WAIT: Duration = Duration::from_secs(30);
/// Bytes of the filesystem that are never given to chunks: the log, checkpoints and logs of others need some.
const HEADROOM: u64 = 64 << 20;

/// Ready chunk files of one data directory.
pub struct Pool {
    dir: PathBuf,
    spare: usize,
    /// Chunk files that may exist, in use and spare.
    limit: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    free: Vec<PathBuf>,
    trash: Vec<PathBuf>,
    /// Chunk files that exist, in use, spare and in the trash.
    files: u64,
    next: u64,
    no_room: bool,
    stopping: bool,
}

/// Numbers for metrics and heartbeats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStatus {
    /// Files ready.
    pub free: u64,
    /// Chunk files that hold chunks, or wait to be freed.
    pub used: u64,
    /// Bytes that chunks may take in all.
    pub capacity: u64,
}

impl Pool {
    /// Opens the pool in `dir` and starts its thread, which ends when the pool is dropped or stopped. `used` chunk
    /// files exist outside of it; chunk files may take `capacity` bytes in all (0: what the filesystem has).
    ///
    /// # Errors
    /// If the directory can not be read.
    pub fn open(dir: &Path, spare: usize, capacity: u64, used: u64) -> io::Result<Arc<Self>> {
        fs::create_dir_all(dir)?;
        let mut state = State { files: used, ..State::default() };
        for entry in fs::read_dir(dir)? {
            let (path, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
            let name = name.to_string_lossy();
            // Names are only ever `free-N`, `trash-N` and `new-N`; an unfinished `new-N` was never ready.
            match name.split_once('-') {
                Some(("free", _)) => state.free.push(path),
                Some(("trash" | "new", _)) => state.trash.push(path),
                _ => continue,
            }
            let number = name.rsplit('-').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            state.next = state.next.max(number + 1);
            state.files += 1;
        }
        let limit = if capacity == 0 { u64::MAX } else { capacity / FILE_BYTES };
        let pool = Arc::new(Self {
            dir: dir.to_owned(),
            spare: spare.max(1),
            limit,
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let weak = Arc::downgrade(&pool);
        std::thread::Builder::new().name("chunk-pool".into()).spawn(move || keep_filled(&weak))?;
        Ok(pool)
    }

    /// Moves a ready file to `to` and opens it. If none is ready: `WouldBlock`, or with `wait`, waits a little.
    ///
    /// # Errors
    /// `NoSpace` when the disk has no room for another chunk, `Io`.
    pub fn take(&self, to: &Path, wait: bool) -> Result<File, StoreError> {
        let mut state = self.lock();
        if state.free.is_empty() {
            self.changed.notify_all();
            if !wait {
                return Err(StoreError::WouldBlock);
            }
            let pending = |state: &mut State| state.free.is_empty() && !state.no_room && !state.stopping;
            let waited = self.changed.wait_timeout_while(state, TAKE_WAIT, pending);
            state = waited.expect("no panic under the lock").0;
        }
        let path = state.free.pop().ok_or(StoreError::NoSpace)?;
        drop(state);
        self.changed.notify_all();
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        let moved = opened.and_then(|file| fs::rename(&path, to).map(|()| file));
        // Not lost: a directory that can not grow on a full disk takes it later.
        moved.inspect_err(|_| self.lock().free.push(path)).map_err(StoreError::from)
    }

    /// Takes the chunk file at `path` back.
    ///
    /// # Errors
    /// If it can not be renamed.
    pub fn give_back(&self, path: &Path) -> io::Result<()> {
        let to = self.name("trash");
        fs::rename(path, &to)?;
        self.lock().trash.push(to);
        self.changed.notify_all();
        Ok(())
    }

    /// Whether new chunks must be refused: the spare files could not be topped up. The few that are left serve
    /// writes which other replicas have already accepted.
    pub fn full(&self) -> bool {
        let state = self.lock();
        state.no_room && state.free.len() < self.spare
    }

    /// Whether `chunks` more chunks can be made, with files that are ready or that the disk has room for. A file that is
    /// being made this moment may be missed.
    pub fn has_room_for(&self, chunks: usize) -> bool {
        if self.full() {
            return false;
        }
        let (here, more) = {
            let state = self.lock();
            (state.free.len() + state.trash.len(), self.limit.saturating_sub(state.files))
        };
        let Some(missing) = chunks.checked_sub(here).filter(|missing| *missing > 0) else { return true };
        missing as u64 <= more.min(self.room())
    }

    /// Chunk files that the filesystem has room for.
    fn room(&self) -> u64 {
        available(&self.dir).unwrap_or(0).saturating_sub(HEADROOM) / FILE_BYTES
    }

    /// How full it is.
    pub fn status(&self) -> PoolStatus {
        let state = self.lock();
        let (free, files) = (state.free.len() as u64, state.files);
        drop(state);
        let capacity = self.limit.min(files.saturating_add(self.room())).saturating_mul(FILE_BYTES);
        PoolStatus { free, used: files.saturating_sub(free), capacity }
    }

    /// Ends the thread; what is ready can still be taken.
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under the lock")
    }

    fn name(&self, kind: &str) -> PathBuf {
        let mut state = self.lock();
        state.next += 1;
        self.dir.join(format!("{kind}-{}", state.next))
    }

    /// One step of the thread. Returns whether there may be more to do at once.
    fn work(&self) -> bool {
        let (trash, wanted, room) = {
            let mut state = self.lock();
            let wanted = state.free.len() < self.spare;
            (state.trash.pop(), wanted, state.files < self.limit)
        };
        let made = match (trash, wanted) {
            (Some(path), true) => self.recycle(&path),
            (Some(path), false) => {
                self.remove(&path);
                return true;
            }
            (None, true) if room => self.make(),
            (None, true) => Err(io::ErrorKind::StorageFull.into()),
            (None, false) => {
                self.lock().no_room = false;
                return false;
            }
        };
        let mut state = self.lock();
        let was = state.no_room;
        match made {
            Ok(path) => {
                state.free.push(path);
                state.no_room = state.no_room && state.free.len() < self.spare;
            }
            Err(error) => {
                state.no_room = true;
                if !was {
                    let (free, files) = (state.free.len(), state.files);
                    tracing::warn!(%error, free, files, "no room for more chunks, free or add disk space");
                }
            }
        }
        let again = !state.no_room || !state.trash.is_empty();
        drop(state);
        self.changed.notify_all();
        again
    }

    fn make(&self) -> io::Result<PathBuf> {
        if available(&self.dir)? < FILE_BYTES + HEADROOM {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let new = self.name("new");
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&new)?;
        let ready = fallocate(&file, FallocateFlags::empty(), 0, FILE_BYTES).map_err(io::Error::from);
        let ready = ready.and_then(|()| file.sync_data()).and_then(|()| self.rename_free(&new));
        match ready {
            Ok(_) => self.lock().files += 1,
            Err(_) => drop(fs::remove_file(&new)),
        }
        ready
    }

    fn recycle(&self, path: &Path) -> io::Result<PathBuf> {
        let zeroed = OpenOptions::new().write(true).open(path).and_then(|file| {
            if file.metadata()?.len() != FILE_BYTES {
                return Err(io::ErrorKind::InvalidData.into());
            }
            fallocate(&file, FallocateFlags::ZERO_RANGE, 0, FILE_BYTES)?;
            file.sync_data()
        });
        match zeroed.and_then(|()| self.rename_free(path)) {
            Ok(path) => Ok(path),
            // Not every filesystem can zero a range, and a damaged file is of no use: make a new one instead.
            Err(_) => {
                self.remove(path);
                self.make()
            }
        }
    }

    fn rename_free(&self, path: &Path) -> io::Result<PathBuf> {
        let free = self.name("free");
        fs::rename(path, &free).map(|()| free)
    }

    fn remove(&self, path: &Path) {
        match fs::remove_file(path) {
            Ok(()) => {
                let mut state = self.lock();
                state.files = state.files.saturating_sub(1);
            }
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "could not remove a freed chunk file")
            }
        }
    }
}

fn available(dir: &Path) -> io::Result<u64> {
    let stat = statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn keep_filled(pool: &Weak<Pool>) {
    while let Some(pool) = pool.upgrade() {
        if pool.lock().stopping {
            return;
        }
        if !pool.work() {
            let state = pool.lock();
            if state.stopping {
                return;
            }
            // A wake-up that is missed costs at most the retry time.
            drop(pool.changed.wait_timeout(state, RETRY));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn until(what: &str, condition: impl Fn() -> bool) {
        let end = std::time::Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(std::time::Instant::now() < end, "never happened: {what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn files_are_made_ahead_and_come_back_as_zeros() {
        let dir = tempfile::tempdir().expect("tempdir");
        let pool = Pool::open(&dir.path().join("pool"), 2, 0, 0).expect("opens");
        until("two spare", || pool.status().free == 2);
        let to = dir.path().join("chunk");
        let file = pool.take(&to, true).expect("one is ready");
        file.write_all_at(b"old", 5).expect("writes");
        until("topped up", || pool.status().free == 2);
        pool.take(&dir.path().join("other"), true).expect("another");
        pool.give_back(&to).expect("goes back");
        until("full again", || pool.status() == PoolStatus { free: 2, used: 1, ..pool.status() });
        for entry in fs::read_dir(dir.path().join("pool")).expect("lists") {
            let path = entry.expect("entry").path();
            let bytes = fs::read(path).expect("reads");
            assert_eq!(bytes.len() as u64, FILE_BYTES);
            assert!(bytes.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn a_file_that_can_not_be_moved_stays_ready() {
        let dir = tempfile::tempdir().expect("tempdir");
        let pool = Pool::open(&dir.path().join("pool"), 1, FILE_BYTES, 0).expect("opens");
        until("one spare", || pool.status().free == 1);
        assert!(matches!(pool.take(&dir.path().join("none/chunk"), true), Err(StoreError::Io(_))));
        pool.take(&dir.path().join("chunk"), true).expect("it is still there");
    }

    #[test]
    fn a_full_pool_says_so_and_recovers() {
        let dir = tempfile::tempdir().expect("tempdir");
        let pool = Pool::open(&dir.path().join("pool"), 2, 3 * FILE_BYTES, 0).expect("opens");
        let names: Vec<_> = (0..4).map(|i| dir.path().join(i.to_string())).collect();
        for name in &names[..3] {
            pool.take(name, true).expect("within the limit");
        }
        until("full", || pool.full());
        assert!(matches!(pool.take(&names[3], true), Err(StoreError::NoSpace)));
        assert!(matches!(pool.take(&names[3], false), Err(StoreError::WouldBlock)));
        for name in &names[..3] {
            pool.give_back(name).expect("goes back");
        }
        until("room again", || !pool.full() && pool.status().free == 2);
        pool.take(&names[3], true).expect("there is room");
    }
}
