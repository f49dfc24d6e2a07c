//! Looks whether files have grown, all of them at once: an idle gateway wakes once a second, however many files it has.
//!
//! Used by the engines' factory. Must not know: what a file is read and written by. `bounded`: one look at a time; a file
//! system that does not answer makes the others' news late, nothing else.

use super::{Disk, FileEngine};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// How often: files are grown by people, who wait a second.
const PERIOD: Duration = Duration::from_secs(1);

/// The files that are watched.
#[derive(Default)]
pub(crate) struct Sizes(Arc<Mutex<Watched>>);

#[derive(Default)]
struct Watched {
    disks: Vec<Weak<Disk>>,
    /// A task looks at them.
    running: bool,
}

impl Sizes {
    /// Looks at a file for as long as its engine is there. In a runtime.
    pub(crate) fn watch(&self, engine: &FileEngine) {
        let mut watched = lock(&self.0);
        watched.disks.push(Arc::downgrade(&engine.disk));
        if !std::mem::replace(&mut watched.running, true) {
            tokio::spawn(look_again_and_again(Arc::clone(&self.0)));
        }
    }
}

/// Ends when no file is left.
async fn look_again_and_again(watched: Arc<Mutex<Watched>>) {
    loop {
        tokio::time::sleep(PERIOD).await;
        let disks = {
            let mut watched = lock(&watched);
            watched.disks.retain(|disk| disk.strong_count() > 0);
            if watched.disks.is_empty() {
                watched.running = false;
                return;
            }
            watched.disks.clone()
        };
        let look = move || disks.iter().filter_map(Weak::upgrade).for_each(|disk| disk.look_at_size());
        // The next look is the remedy for one that failed.
        let _ = tokio::task::spawn_blocking(look).await;
    }
}

fn lock(watched: &Mutex<Watched>) -> MutexGuard<'_, Watched> {
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::BufferPool;
    use crate::config::FileIo;
    use crate::engine::file::Files;
    use crate::engine::{Engine, Wanted};

    const SIZE: u64 = 1 << 20;

    fn open(dir: &std::path::Path, name: &str) -> (std::fs::File, FileEngine) {
        let path = dir.join(name);
        let file = std::fs::File::create(&path).expect("creates");
        file.set_len(SIZE).expect("sizes");
        let files = Files::new(vec![dir.to_owned()], FileIo::Buffered, BufferPool::new());
        (file, files.open(&path, Wanted::default()).expect("opens"))
    }

    #[tokio::test]
    async fn all_files_are_watched_until_they_are_gone_and_again_later() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let sizes = Sizes::default();
        for round in 0..2 {
            let engines = ["a", "b", "c"].map(|name| open(dir.path(), &format!("{name}{round}")));
            for (file, engine) in &engines {
                sizes.watch(engine);
                file.set_len(2 * SIZE).expect("grows");
            }
            for (_, engine) in &engines {
                let mut standing = engine.standing();
                let grown = standing.wait_for(|standing| standing.size == 2 * SIZE);
                tokio::time::timeout(Duration::from_secs(30), grown)
                    .await
                    .expect("in time")
                    .expect("is there");
            }
            assert_eq!(lock(&sizes.0).disks.len(), 3);
            drop(engines);
            while lock(&sizes.0).running {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            assert!(lock(&sizes.0).disks.is_empty());
        }
    }
}
