//! The tables on disk (redb): every row of the state as JSON, and how far the log has been applied.
//!
//! Called by [`crate::machine`]. One transaction per apply batch writes the changed rows together with the applied
//! position, so rows and position never disagree; a batch that is applied again after a restart is recognised by it.
//! Must never know: what rows mean, raft's encodings.

use crate::json;
use crate::state::MetaState;
use crate::state::rows::Key;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};
use spline_raft::{Checkpoint, LogPosition};
use spline_types::{ChunkserverId, CopysetId, SegmentIndex, VolumeId};
use std::io;
use std::path::Path;

/// Formats of the tables, newest first. An unknown one is refused.
///
/// - 2: a volume's row names its run of sessions, the counters the cluster's election time.
/// - 1: the first. Its rows are read, and written as the newest when they change.
pub const FORMATS: &[u32] = &[2, 1];

/// Most memory that redb caches pages in: the state itself is in memory, the tables are only written.
const CACHE_BYTES: usize = 4 << 20;

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const VOLUMES: TableDefinition<u64, &[u8]> = TableDefinition::new("volumes");
const SEGMENTS: TableDefinition<(u64, u32), &[u8]> = TableDefinition::new("segments");
const DELETIONS: TableDefinition<u64, &[u8]> = TableDefinition::new("deletions");
const CHUNKSERVERS: TableDefinition<u32, &[u8]> = TableDefinition::new("chunkservers");
const COPYSETS: TableDefinition<u32, &[u8]> = TableDefinition::new("copysets");

/// Rows of [`META`].
const FORMAT: &str = "format";
const COUNTERS: &str = "counters";
const APPLIED: &str = "applied";
const CHECKPOINT: &str = "checkpoint";

/// The tables. One process at a time: redb locks the file.
pub struct Store {
    database: Database,
}

/// A log position as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Position {
    term: u64,
    node: u64,
    index: u64,
}

#[derive(Serialize, Deserialize)]
struct CheckpointRow {
    position: Option<Position>,
    membership: json::Hex,
}

/// What the tables held when they were opened.
pub struct Loaded {
    /// The state.
    pub state: MetaState,
    /// The last log position that is part of it.
    pub applied: Option<LogPosition>,
    /// The last checkpoint that was recorded.
    pub checkpoint: Checkpoint,
}

impl Store {
    /// Opens the tables, or creates empty ones.
    ///
    /// # Errors
    /// If the file can not be read or written, is in use by another process, or is of an unknown format.
    pub fn open(path: &Path) -> io::Result<Self> {
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(path)
            .map_err(|error| failed(&format!("can not open the tables: path={}", path.display()), error))?;
        let store = Self { database };
        store.check_format()?;
        Ok(store)
    }

    fn check_format(&self) -> io::Result<()> {
        let write = self.begin()?;
        {
            let mut meta = write.open_table(META).map_err(|e| failed("tables", e))?;
            let known = meta.get(FORMAT).map_err(|e| failed("tables", e))?.map(|row| row.value().to_vec());
            if let Some(row) = known {
                let format: u32 = serde_json::from_slice(&row)?;
                if !FORMATS.contains(&format) {
                    return Err(io::Error::other(format!(
                        "tables of an unknown format, start the newer binary that wrote them: format={format} \
                         known={FORMATS:?}"
                    )));
                }
            }
            // From here on rows of the newest format are written, which an older binary must not read.
            let row = serde_json::to_vec(&FORMATS[0])?;
            meta.insert(FORMAT, row.as_slice()).map_err(|e| failed("tables", e))?;
            // All tables exist from here on, so that reads need not care.
            write.open_table(VOLUMES).map_err(|e| failed("tables", e))?;
            write.open_table(SEGMENTS).map_err(|e| failed("tables", e))?;
            write.open_table(DELETIONS).map_err(|e| failed("tables", e))?;
            write.open_table(CHUNKSERVERS).map_err(|e| failed("tables", e))?;
            write.open_table(COPYSETS).map_err(|e| failed("tables", e))?;
        }
        commit(write)
    }

    /// Reads everything.
    ///
    /// # Errors
    /// If the disk fails or a row is damaged.
    pub fn load(&self) -> io::Result<Loaded> {
        let rows = self.rows().map_err(|e| failed("can not read the tables", e))?;
        let state = MetaState::from_rows(rows).map_err(io::Error::other)?;
        let applied = self.meta(APPLIED)?.map(|row| serde_json::from_slice::<Position>(&row)).transpose()?;
        Ok(Loaded { state, applied: applied.map(Into::into), checkpoint: self.checkpoint()? })
    }

    /// The last checkpoint that was recorded.
    ///
    /// # Errors
    /// If the disk fails or the row is damaged.
    pub fn checkpoint(&self) -> io::Result<Checkpoint> {
        let Some(row) = self.meta(CHECKPOINT)? else { return Ok(Checkpoint::default()) };
        let row: CheckpointRow = serde_json::from_slice(&row)?;
        Ok(Checkpoint { position: row.position.map(Into::into), membership: row.membership.0.into() })
    }

    fn meta(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let read = || -> Result<Option<Vec<u8>>, redb::Error> {
            let table = self.database.begin_read()?.open_table(META)?;
            Ok(table.get(name)?.map(|row| row.value().to_vec()))
        };
        read().map_err(|e| failed("can not read the tables", e))
    }

    fn rows(&self) -> Result<Vec<(Key, Vec<u8>)>, redb::Error> {
        let read = self.database.begin_read()?;
        let mut rows = Vec::new();
        if let Some(row) = read.open_table(META)?.get(COUNTERS)? {
            rows.push((Key::Counters, row.value().to_vec()));
        }
        for entry in read.open_table(VOLUMES)?.iter()? {
            let (key, row) = entry?;
            rows.push((Key::Volume(VolumeId::new(key.value())), row.value().to_vec()));
        }
        for entry in read.open_table(SEGMENTS)?.iter()? {
            let (key, row) = entry?;
            let (volume, index) = key.value();
            rows.push((Key::Segment(VolumeId::new(volume), SegmentIndex::new(index)), row.value().to_vec()));
        }
        for entry in read.open_table(DELETIONS)?.iter()? {
            let (key, row) = entry?;
            rows.push((Key::Deletion(VolumeId::new(key.value())), row.value().to_vec()));
        }
        for entry in read.open_table(CHUNKSERVERS)?.iter()? {
            let (key, row) = entry?;
            rows.push((Key::Chunkserver(ChunkserverId::new(key.value())), row.value().to_vec()));
        }
        for entry in read.open_table(COPYSETS)?.iter()? {
            let (key, row) = entry?;
            rows.push((Key::Copyset(CopysetId::new(key.value())), row.value().to_vec()));
        }
        Ok(rows)
    }

    /// Writes changed rows (`None`: there is no such row any more) and the position they are part of; durable when
    /// this returns.
    ///
    /// # Errors
    /// If the disk fails; then nothing was written.
    pub fn record(&self, rows: &[(Key, Option<Vec<u8>>)], applied: Option<LogPosition>) -> io::Result<()> {
        let write = self.begin()?;
        put(&write, rows).and_then(|()| put_applied(&write, applied)).map_err(|e| failed("tables", e))?;
        commit(write)
    }

    /// Records a checkpoint; durable when this returns.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn record_checkpoint(&self, checkpoint: &Checkpoint) -> io::Result<()> {
        let row = CheckpointRow {
            position: checkpoint.position.map(Into::into),
            membership: json::Hex(checkpoint.membership.to_vec()),
        };
        let row = serde_json::to_vec(&row)?;
        let write = self.begin()?;
        put_meta(&write, CHECKPOINT, &row).map_err(|e| failed("tables", e))?;
        commit(write)
    }

    /// Replaces all rows, in one transaction; durable when this returns.
    ///
    /// # Errors
    /// If the disk fails; then the old rows are still there.
    pub fn replace(&self, state: &MetaState, applied: Option<LogPosition>) -> io::Result<()> {
        let rows: Vec<_> = state.keys().map(|key| (key, state.row(key))).collect();
        let write = self.begin()?;
        let all = || -> Result<(), redb::Error> {
            write.delete_table(VOLUMES)?;
            write.delete_table(SEGMENTS)?;
            write.delete_table(DELETIONS)?;
            write.delete_table(CHUNKSERVERS)?;
            write.delete_table(COPYSETS)?;
            put(&write, &rows)?;
            put_applied(&write, applied)
        };
        all().map_err(|e| failed("tables", e))?;
        commit(write)
    }

    fn begin(&self) -> io::Result<WriteTransaction> {
        self.database.begin_write().map_err(|e| failed("can not write the tables", e))
    }
}

fn put(write: &WriteTransaction, rows: &[(Key, Option<Vec<u8>>)]) -> Result<(), redb::Error> {
    let mut volumes = write.open_table(VOLUMES)?;
    let mut segments = write.open_table(SEGMENTS)?;
    let mut deletions = write.open_table(DELETIONS)?;
    let mut chunkservers = write.open_table(CHUNKSERVERS)?;
    let mut copysets = write.open_table(COPYSETS)?;
    for (key, row) in rows {
        let row = row.as_deref();
        match key {
            Key::Counters => {
                if let Some(row) = row {
                    put_meta(write, COUNTERS, row)?;
                }
            }
            Key::Volume(id) => put_row(&mut volumes, id.get(), row)?,
            Key::Segment(id, index) => put_row(&mut segments, (id.get(), index.get()), row)?,
            Key::Deletion(id) => put_row(&mut deletions, id.get(), row)?,
            Key::Chunkserver(id) => put_row(&mut chunkservers, id.get(), row)?,
            Key::Copyset(id) => put_row(&mut copysets, id.get(), row)?,
        }
    }
    Ok(())
}

fn put_row<'k, K>(
    table: &mut redb::Table<'_, K, &'static [u8]>,
    key: impl std::borrow::Borrow<K::SelfType<'k>>,
    row: Option<&[u8]>,
) -> Result<(), redb::Error>
where
    K: redb::Key + 'static,
{
    match row {
        Some(row) => table.insert(key, row).map(drop)?,
        None => table.remove(key).map(drop)?,
    }
    Ok(())
}

fn put_meta(write: &WriteTransaction, name: &str, row: &[u8]) -> Result<(), redb::Error> {
    write.open_table(META)?.insert(name, row)?;
    Ok(())
}

fn put_applied(write: &WriteTransaction, applied: Option<LogPosition>) -> Result<(), redb::Error> {
    let Some(applied) = applied else { return Ok(()) };
    let row = serde_json::to_vec(&Position::from(applied)).expect("three numbers can be written");
    put_meta(write, APPLIED, &row)
}

fn commit(write: WriteTransaction) -> io::Result<()> {
    write.commit().map_err(|e| failed("can not write the tables", e))
}

fn failed(what: &str, error: impl Into<redb::Error>) -> io::Error {
    match error.into() {
        redb::Error::Io(error) => error,
        error => io::Error::other(format!("{what}: error={error}")),
    }
}

impl From<LogPosition> for Position {
    fn from(LogPosition { term, node, index }: LogPosition) -> Self {
        Self { term, node, index }
    }
}

impl From<Position> for LogPosition {
    fn from(Position { term, node, index }: Position) -> Self {
        Self { term, node, index }
    }
}
