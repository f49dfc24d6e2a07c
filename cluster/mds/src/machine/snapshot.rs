//! Snapshots of the metadata: a JSON dump of all rows, cut into items.
//!
//! Called by [`super::Machine`]. The dump tells the position it is part of, so a receiver skips log entries that it
//! holds already.

use crate::state::MetaState;
use crate::state::rows::Key;
use crate::store::{Position, Store};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use spline_raft::{LogPosition, SnapshotSink, SnapshotSource};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

/// Versions of the dump, newest first. An unknown one is refused.
///
/// - 2: rows as in tables of format 2.
/// - 1: the first.
pub(super) const DUMP_VERSIONS: &[u32] = &[2, 1];

/// Bytes of an item; raft takes at most 1 MiB.
const ITEM_BYTES: usize = 1 << 20;
/// Most bytes of a dump that a receiver takes: far more than the largest cluster's metadata.
const DUMP_BYTES_MAX: u64 = 4 << 30;

#[derive(Serialize, Deserialize)]
struct Dump {
    v: u32,
    applied: Option<Position>,
    rows: Vec<(Key, serde_json::Value)>,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    v: u32,
    bytes: u64,
}

/// The state as a dump.
pub(super) fn dump(state: &MetaState, applied: Option<LogPosition>) -> Bytes {
    let row = |key| Some((key, serde_json::from_slice(&state.row(key)?).ok()?));
    let dump = Dump {
        v: DUMP_VERSIONS[0],
        applied: applied.map(Into::into),
        rows: state.keys().filter_map(row).collect(),
    };
    serde_json::to_vec(&dump).expect("rows are JSON").into()
}

/// The state of a dump, and the position it is part of.
pub(super) fn restore(dump: &[u8]) -> io::Result<(MetaState, Option<LogPosition>)> {
    let dump: Dump = serde_json::from_slice(dump)?;
    known(dump.v)?;
    let rows = dump.rows.into_iter().map(|(key, row)| Ok((key, serde_json::to_vec(&row)?)));
    let rows = rows.collect::<io::Result<Vec<_>>>()?;
    let state = MetaState::from_rows(rows).map_err(io::Error::other)?;
    Ok((state, dump.applied.map(Into::into)))
}

fn known(version: u32) -> io::Result<()> {
    match DUMP_VERSIONS.contains(&version) {
        true => Ok(()),
        false => Err(io::Error::other(format!(
            "metadata snapshot of an unknown version: version={version} known={DUMP_VERSIONS:?}"
        ))),
    }
}

/// The sending side.
pub(super) struct Source {
    dump: Bytes,
}

impl Source {
    pub(super) fn new(dump: Bytes) -> Self {
        Self { dump }
    }
}

impl SnapshotSource for Source {
    fn manifest(&self) -> Bytes {
        let manifest = Manifest { v: DUMP_VERSIONS[0], bytes: self.dump.len() as u64 };
        serde_json::to_vec(&manifest).expect("two numbers can be written").into()
    }

    fn read(&mut self, item: u32) -> BoxFuture<'_, io::Result<Bytes>> {
        let start = item as usize * ITEM_BYTES;
        let found = match start < self.dump.len() {
            true => Ok(self.dump.slice(start..self.dump.len().min(start + ITEM_BYTES))),
            false => Err(io::Error::other(format!("no such snapshot item: item={item}"))),
        };
        std::future::ready(found).boxed()
    }
}

/// The receiving side: gathers the dump in memory, replaces the tables at the end.
pub(super) struct Sink {
    store: Arc<Store>,
    bytes: u64,
    items: BTreeMap<u32, Bytes>,
}

impl Sink {
    pub(super) fn new(store: Arc<Store>) -> Self {
        Self { store, bytes: 0, items: BTreeMap::new() }
    }
}

impl SnapshotSink for Sink {
    fn begin(&mut self, manifest: Bytes) -> BoxFuture<'_, io::Result<Vec<u32>>> {
        let mut wanted = || {
            let manifest: Manifest = serde_json::from_slice(&manifest)?;
            known(manifest.v)?;
            if manifest.bytes > DUMP_BYTES_MAX {
                let bytes = manifest.bytes;
                return Err(io::Error::other(format!("metadata snapshot is too large: bytes={bytes}")));
            }
            self.bytes = manifest.bytes;
            Ok((0..manifest.bytes.div_ceil(ITEM_BYTES as u64) as u32).collect())
        };
        std::future::ready(wanted()).boxed()
    }

    fn write(&mut self, item: u32, data: Bytes) -> BoxFuture<'_, io::Result<()>> {
        self.items.insert(item, data);
        std::future::ready(Ok(())).boxed()
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, io::Result<()>> {
        super::blocking(move || {
            let dump: Vec<u8> = self.items.values().flatten().copied().collect();
            if dump.len() as u64 != self.bytes {
                return Err(io::Error::other(format!(
                    "metadata snapshot is incomplete: bytes={} expected={}",
                    dump.len(),
                    self.bytes
                )));
            }
            let (state, applied) = restore(&dump)?;
            self.store.replace(&state, applied)
        })
        .boxed()
    }
}
