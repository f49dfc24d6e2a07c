//! A chunkserver whose disk is full: writes that need room are refused with a clear error, everything else goes on, nothing
//! acknowledged is lost, and it goes on by itself once there is room. Needs root, for a file system of its own.

use anyhow::{bail, ensure};
use spline_fault::block;
use spline_fault::history::History;
use spline_fault::workload::RECOVERY_LIMIT;
use spline_harness::nbd::{Connection, Kind, errno};
use spline_harness::small_disk::SmallDisk;
use spline_harness::{Cluster, Export, Shape, wait_until};

/// Room for the log's segments (three of 32 MiB), the reserve (64 MiB) and some twenty chunks.
const DISK_BYTES: u64 = 512 << 20;
/// One block in each chunk of the volume.
const CHUNKS: usize = 64;
const CHUNK_BYTES: u64 = 16 << 20;
/// Chunks that are written before the disk is full.
const FIRST: usize = 6;
/// Chunks of a volume that is deleted: more than the reserve, which has to be made up first.
const OTHER: u64 = 9;
/// Rounds of one MiB in each of them, several times what the log's segments hold.
const LOG_ROUNDS: usize = 60;
/// Position of the chunkserver on the small disk.
const SMALL: usize = 0;

/// Writes and reads one block per chunk, and judges what it sees.
struct Checker {
    client: Connection,
    history: History,
}

impl Checker {
    /// Writes the block of a chunk; true if it was acknowledged, false if there was no room.
    fn write(&mut self, chunk: usize) -> anyhow::Result<bool> {
        let data = block::fill(chunk as u64, self.history.begin_write(chunk));
        let offset = chunk as u64 * CHUNK_BYTES;
        let (error, _) = self.client.call(Kind::Write, offset, data.len() as u32, &data)?;
        match error {
            0 => self.history.acknowledged(chunk),
            errno::ENOSPC => self.history.lost(chunk),
            other => bail!("neither written nor refused for want of room: chunk={chunk} errno={other}"),
        }
        Ok(error == 0)
    }

    fn verify(&mut self) -> anyhow::Result<()> {
        for chunk in 0..CHUNKS {
            let offset = chunk as u64 * CHUNK_BYTES;
            let data = self.client.succeed(Kind::Read, offset, block::BYTES as u32, &[])?;
            let version = block::read(chunk as u64, &data).map_err(anyhow::Error::msg)?;
            self.history.read(chunk, version).map_err(anyhow::Error::msg)?;
        }
        Ok(())
    }

    /// Fills a MiB of a chunk that has its file, so that the log grows; true if that was acknowledged, false if there was
    /// no room in the log.
    fn overwrite(&mut self, chunk: usize) -> anyhow::Result<bool> {
        let data = vec![chunk as u8 + 1; 1 << 20];
        let offset = chunk as u64 * CHUNK_BYTES + (1 << 20);
        let (error, _) = self.client.call(Kind::Write, offset, data.len() as u32, &data)?;
        ensure!(error == 0 || error == errno::ENOSPC, "chunk={chunk} errno={error}");
        if error == 0 {
            let found = self.client.succeed(Kind::Read, offset, data.len() as u32, &[])?;
            ensure!(found == data, "reads something else: chunk={chunk}");
        }
        Ok(error == 0)
    }
}

/// A cluster whose first chunkserver lies on a disk that can be filled.
struct Lab {
    // Dropped in this order: the processes first.
    checker: Checker,
    _export: Export,
    cluster: Cluster,
    disk: SmallDisk,
}

impl Lab {
    /// With a block in each of the first chunks, and log and pool prepared.
    fn new() -> anyhow::Result<Self> {
        let disk = SmallDisk::mount(DISK_BYTES)?;
        let first_data_dir = Some(disk.path().join("data"));
        let cluster = Cluster::start_as(&Shape { first_data_dir, checkpoint_log: "1M", ..Shape::default() })?;
        cluster.create_volume("disk", "1G")?;
        let export = cluster.export("disk", false)?;
        let client = Connection::open(&export.socket, "disk", RECOVERY_LIMIT)?;
        let mut checker = Checker { client, history: History::new(CHUNKS) };
        for chunk in 0..FIRST {
            ensure!(checker.write(chunk)?, "there is room");
        }
        Ok(Self { checker, _export: export, cluster, disk })
    }

    /// Fills the disk; afterwards every chunkserver knows that this one can not take another chunk.
    fn fill(&mut self) -> anyhow::Result<()> {
        wait_until("log and pool to be prepared", RECOVERY_LIMIT, || {
            let segments = self.cluster.metric(SMALL, "spline_wal_segments_ready")?;
            let files = self.cluster.metric(SMALL, "spline_chunkserver_pool_files")?;
            ensure!(segments >= 2.0 && files >= 2.0, "segments={segments} files={files}");
            Ok(Some(()))
        })?;
        self.disk.fill()?;
        // Takes a spare file that can not be replaced.
        ensure!(self.checker.write(FIRST)?, "there are spare files");
        self.wait_until_full(true)?;
        self.cluster.wait_until_told()
    }

    fn wait_until_full(&self, full: bool) -> anyhow::Result<()> {
        wait_until("cluster status to say so", RECOVERY_LIMIT, || {
            let said = self.cluster.status()?.server(SMALL).is_some_and(|server| server.full);
            Ok((said == full).then_some(()))
        })
    }

    /// The replicas on the disk are alive: with another server away, nothing is acknowledged without them.
    fn check_majority_and_cold_start(&mut self) -> anyhow::Result<()> {
        self.checker.verify()?;
        self.cluster.chunkservers[2].kill9()?;
        for chunk in 0..FIRST {
            ensure!(self.checker.write(chunk)?, "a majority has room");
        }
        self.checker.verify()?;
        self.cluster.restart_all()?;
        self.checker.verify()
    }
}

#[test]
fn new_chunks_are_refused_until_there_is_room() {
    let mut lab = Lab::new().expect("lab");
    let process = lab.cluster.chunkservers[SMALL].id();
    lab.fill().expect("fills");
    let refused: Vec<usize> =
        (FIRST + 1..FIRST + 6).filter(|chunk| !lab.checker.write(*chunk).expect("a clear answer")).collect();
    assert!(!refused.is_empty(), "nothing was refused on a full disk");
    let said = lab.cluster.chunkservers[SMALL].log().expect("log");
    assert!(said.contains("free or add disk space"), "{said}");

    // What has its place goes on; checkpoints wait, and no replica gives up.
    for chunk in (0..FIRST).chain(0..FIRST) {
        assert!(lab.checker.overwrite(chunk).expect("a clear answer"), "there is room in the log");
    }
    lab.checker.verify().expect("nothing acknowledged is lost");
    wait_until("a checkpoint to find the disk full", RECOVERY_LIMIT, || {
        Ok(lab.cluster.chunkservers[SMALL].log()?.contains("checkpoint waits for space").then_some(()))
    })
    .expect("a checkpoint waits");

    lab.disk.free().expect("frees the disk");
    wait_until("writes to go on", RECOVERY_LIMIT, || Ok(lab.checker.write(refused[0])?.then_some(())))
        .expect("goes on by itself");
    lab.wait_until_full(false).expect("cluster status says so");
    assert_eq!(lab.cluster.chunkservers[SMALL].id(), process, "without a restart");
    lab.check_majority_and_cold_start().expect("nothing acknowledged is lost");
}

#[test]
fn a_log_that_can_not_grow_refuses_writes_until_there_is_room() {
    let mut lab = Lab::new().expect("lab");
    let process = lab.cluster.chunkservers[SMALL].id();
    lab.fill().expect("fills");
    // Checkpoints can not be made, so the log is never shortened: its last segment fills up.
    let mut refused = 0;
    for _ in 0..LOG_ROUNDS {
        refused += (0..FIRST).filter(|chunk| !lab.checker.overwrite(*chunk).expect("a clear answer")).count();
        if refused > 0 {
            break;
        }
    }
    assert!(refused > 0, "a log that can not grow took everything");
    lab.checker.verify().expect("nothing acknowledged is lost");

    lab.disk.free().expect("frees the disk");
    wait_until("writes to go on", RECOVERY_LIMIT, || {
        let refused = (0..FIRST).filter(|chunk| !lab.checker.overwrite(*chunk).expect("a clear answer"));
        Ok((refused.count() == 0).then_some(()))
    })
    .expect("goes on by itself");
    assert_eq!(lab.cluster.chunkservers[SMALL].id(), process, "without a restart");
    lab.check_majority_and_cold_start().expect("nothing acknowledged is lost");
}

#[test]
fn space_of_a_deleted_volume_comes_back_by_itself() {
    let mut lab = Lab::new().expect("lab");
    lab.cluster.create_volume("other", "1G").expect("volume");
    let mut export = lab.cluster.export("other", false).expect("export");
    let mut other = Connection::open(&export.socket, "other", RECOVERY_LIMIT).expect("connects");
    for chunk in 0..OTHER {
        other.succeed(Kind::Write, chunk * CHUNK_BYTES, 4096, &[7; 4096]).expect("writes");
    }
    other.close().expect("closes");
    assert!(export.nebd.terminate(RECOVERY_LIMIT).expect("ends").success());
    lab.fill().expect("fills");
    wait_until("the volume to be given back", RECOVERY_LIMIT, || {
        lab.cluster.spline(&["volume", "rm", "other", "--yes"]).map(Some)
    })
    .expect("deletes work on a full disk");
    wait_until("its chunk files to be used again", RECOVERY_LIMIT, || {
        Ok(lab.checker.write(FIRST + 1)?.then_some(()))
    })
    .expect("there is room");
    lab.check_majority_and_cold_start().expect("nothing acknowledged is lost");
}
