//! The copysets of a data directory: `copysets/<id>/` with `meta`, `chunks/`, while a replica is copied `incoming/`, and
//! while what was copied is put in place `adoption`.
//!
//! Called by the service (look-up) and the heartbeat (create, remove). Must not know: frames, the metadata server.

use crate::copyset::{Copyset, ServerState};
use crate::metrics::Metrics;
use crate::state_machine::meta::{FILE_NAME, Meta};
use crate::state_machine::snapshot::INCOMING;
use crate::state_machine::{CHUNKS, CopysetMachine, Shared, adoption};
use crate::store::Disk;
use crate::store::chunk_store::list;
use anyhow::Context;
use spline_raft::{GroupId, RaftHost};
use spline_types::CopysetId;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLock};

/// All replicas of this server.
pub struct Copysets {
    host: RaftHost,
    disk: Arc<Disk>,
    server: Arc<ServerState>,
    metrics: Arc<Metrics>,
    dir: PathBuf,
    running: RwLock<BTreeMap<CopysetId, Arc<Copyset>>>,
}

impl Copysets {
    /// No replica runs yet; `dir` is the data directory's `copysets`.
    pub fn new(
        host: RaftHost,
        disk: Arc<Disk>,
        server: Arc<ServerState>,
        metrics: Arc<Metrics>,
        dir: PathBuf,
    ) -> Self {
        Self { host, disk, server, metrics, dir, running: RwLock::default() }
    }

    /// Starts every replica found on disk. One that can not be started is logged and left alone.
    ///
    /// # Errors
    /// If the directory can not be read.
    pub async fn start_found(&self) -> anyhow::Result<()> {
        for id in found(&self.dir)? {
            if let Err(error) = self.start(id).await {
                tracing::error!(copyset = %id, error = format!("{error:#}"), "replica could not be started");
            }
        }
        Ok(())
    }

    /// Creates an empty replica and starts it; nothing if it runs.
    ///
    /// # Errors
    /// If the disk fails or the group can not be started.
    pub async fn create(&self, id: CopysetId) -> anyhow::Result<Arc<Copyset>> {
        if let Some(copyset) = self.get(id) {
            return Ok(copyset);
        }
        let dir = self.path(id);
        anyhow::ensure!(!dir.join(FILE_NAME).exists(), "replica is on disk but did not start: copyset={id}");
        fs::create_dir_all(dir.join(CHUNKS))?;
        Meta::default().save(&dir, id)?;
        File::open(&self.dir)?.sync_all()?;
        self.start(id).await
    }

    /// Stops a replica and gives its files back.
    ///
    /// # Errors
    /// If the disk fails.
    pub async fn remove(&self, id: CopysetId) -> anyhow::Result<()> {
        let removed = self.running.write().expect("no panic under the lock").remove(&id);
        let Some(copyset) = removed else { return Ok(()) };
        copyset.shared().stop.cancel();
        // The meta file goes first: without it a crash leaves only files to clean up, not a replica that has forgotten
        // its log.
        let dir = self.path(id);
        fs::remove_file(dir.join(FILE_NAME))?;
        File::open(&dir)?.sync_all()?;
        self.host.remove_group(GroupId(id.get())).await?;
        tokio::task::spawn_blocking(move || copyset.shared().store.destroy()).await??;
        self.clear_leftovers(id)
    }

    /// A running replica.
    pub fn get(&self, id: CopysetId) -> Option<Arc<Copyset>> {
        self.running.read().expect("no panic under the lock").get(&id).cloned()
    }

    /// All running replicas.
    pub fn all(&self) -> Vec<(CopysetId, Arc<Copyset>)> {
        let running = self.running.read().expect("no panic under the lock");
        running.iter().map(|(id, copyset)| (*id, Arc::clone(copyset))).collect()
    }

    /// Tells every replica that the process stops.
    pub fn stop(&self) {
        for (_, copyset) in self.all() {
            copyset.shared().stop.cancel();
        }
    }

    /// The disk that all replicas lie on.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// The raft host that all replicas run on.
    pub fn host(&self) -> &RaftHost {
        &self.host
    }

    async fn start(&self, id: CopysetId) -> anyhow::Result<Arc<Copyset>> {
        let dir = self.path(id);
        if !dir.join(FILE_NAME).exists() {
            self.clear_leftovers(id)?;
            anyhow::bail!("replica was being removed, the rest of it is gone now: copyset={id}");
        }
        let (store, meta) = adoption::open(Arc::clone(&self.disk), id, &dir)?;
        let shared = Arc::new(Shared::new(id, dir, store, meta, Arc::clone(&self.metrics)));
        let group =
            self.host.start_group(GroupId(id.get()), CopysetMachine::new(Arc::clone(&shared))).await?;
        // What is in the log now is what may have been applied before the start.
        let until = group.status().last_log.map_or(0, |position| position.index);
        shared.replay_until.store(until, Ordering::Release);
        let copyset = Arc::new(Copyset::new(shared, group, Arc::clone(&self.server)));
        self.running.write().expect("no panic under the lock").insert(id, Arc::clone(&copyset));
        Ok(copyset)
    }

    /// Gives the files of a removed replica back.
    fn clear_leftovers(&self, id: CopysetId) -> anyhow::Result<()> {
        let dir = self.path(id);
        for part in [CHUNKS, INCOMING].map(|part| dir.join(part)) {
            let chunks = if part.is_dir() { list(&part)? } else { continue };
            for chunk in chunks {
                self.disk.pool.give_back(&part.join(crate::store::chunk_store::file_name(chunk)))?;
            }
        }
        fs::remove_dir_all(&dir).with_context(|| format!("could not remove path={}", dir.display()))
    }

    fn path(&self, id: CopysetId) -> PathBuf {
        self.dir.join(id.get().to_string())
    }
}

/// Copysets that have a directory.
fn found(dir: &Path) -> anyhow::Result<Vec<CopysetId>> {
    fs::create_dir_all(dir)?;
    let mut ids = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        match name.to_str().and_then(|name| name.parse().ok()) {
            Some(id) => ids.push(CopysetId::new(id)),
            None => tracing::warn!(path = %dir.join(name).display(), "not a copyset, left alone"),
        }
    }
    Ok(ids)
}

/// Chunk files that the copysets in `dir` hold, those of unfinished copies included.
///
/// # Errors
/// If a directory can not be read.
pub fn count_chunk_files(dir: &Path) -> anyhow::Result<u64> {
    let mut count = 0;
    for id in found(dir)? {
        for part in [CHUNKS, INCOMING] {
            let part = dir.join(id.get().to_string()).join(part);
            count += if part.is_dir() { list(&part)?.len() as u64 } else { 0 };
        }
    }
    Ok(count)
}
