//! A chunkserver whose disk is full: writes that need room are refused with a clear error, everything else goes on, nothing
//! acknowledged is lost, and it goes on by itself once there is room. Needs root, for a file system of its own.

use anyhow::{bail, ensure};
use spline_fault::block;
use spline_fault::history::History;
use spline_fault::workload::RECOVERY_LIMIT;
use spline_harness::nbd::{Connection, Kind, errno};
use spline_harness::small_disk::SmallDisk;
use spline_harness::{Cluster, Shape, wait_until};

/// Room for the log's segments (three of 32 MiB), the reserve (64 MiB) and some twenty chunks.
const DISK_BYTES: u64 = 512 << 20;
/// One block in each chunk of the volume.
const CHUNKS: usize = 64;
const CHUNK_BYTES: u64 = 16 << 20;
/// Chunks that are written before the disk is full.
const FIRST: usize = 4;
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

    /// Fills a part of a chunk that has its file, so that the log grows past a checkpoint.
    fn overwrite(&mut self, chunk: usize) -> anyhow::Result<()> {
        let data = vec![chunk as u8 + 1; 1 << 20];
        let offset = chunk as u64 * CHUNK_BYTES + (1 << 20);
        self.client.succeed(Kind::Write, offset, data.len() as u32, &data)?;
        let found = self.client.succeed(Kind::Read, offset, data.len() as u32, &[])?;
        ensure!(found == data, "reads something else: chunk={chunk}");
        Ok(())
    }
}

fn wait_until_prepared(cluster: &Cluster) -> anyhow::Result<()> {
    wait_until("log and pool to be prepared", RECOVERY_LIMIT, || {
        let segments = cluster.metric(SMALL, "spline_wal_segments_ready")?;
        let files = cluster.metric(SMALL, "spline_chunkserver_pool_files")?;
        ensure!(segments >= 2.0 && files >= 2.0, "segments={segments} files={files}");
        Ok(Some(()))
    })
}

fn is_full(cluster: &Cluster) -> anyhow::Result<bool> {
    Ok(cluster.status()?.server(SMALL).is_some_and(|server| server.full))
}

#[test]
fn writes_are_refused_and_go_on_when_there_is_room() {
    let disk = SmallDisk::mount(DISK_BYTES).expect("a small file system");
    let shape =
        Shape { first_data_dir: Some(disk.path().join("data")), checkpoint_log: "1M", ..Shape::default() };
    let mut cluster = Cluster::start_as(&shape).expect("cluster");
    cluster.create_volume("disk", "1G").expect("volume");
    let export = cluster.export("disk", false).expect("export");
    let client = Connection::open(&export.socket, "disk", RECOVERY_LIMIT).expect("connects");
    let mut checker = Checker { client, history: History::new(CHUNKS) };
    (0..FIRST).for_each(|chunk| assert!(checker.write(chunk).expect("writes"), "there is room"));
    wait_until_prepared(&cluster).expect("is prepared");
    let process = cluster.chunkservers[SMALL].id();

    disk.fill().expect("fills the disk");
    // Takes a spare file that can not be replaced.
    assert!(checker.write(FIRST).expect("writes"), "there are spare files");
    wait_until("the server to be full", RECOVERY_LIMIT, || Ok(is_full(&cluster)?.then_some(())))
        .expect("cluster status says so");
    cluster.wait_until_told().expect("is told");
    let refused: Vec<usize> =
        (FIRST + 1..FIRST + 6).filter(|chunk| !checker.write(*chunk).expect("a clear answer")).collect();
    assert!(!refused.is_empty(), "nothing was refused on a full disk");
    let said = cluster.chunkservers[SMALL].log().expect("log");
    assert!(said.contains("free or add disk space"), "{said}");

    // What has its place goes on; checkpoints wait, and no replica gives up.
    for round in 0..3 {
        (0..FIRST)
            .for_each(|chunk| checker.overwrite(chunk).unwrap_or_else(|e| panic!("round={round} {e:#}")));
    }
    checker.verify().expect("nothing acknowledged is lost");
    wait_until("a checkpoint to find the disk full", RECOVERY_LIMIT, || {
        Ok(cluster.chunkservers[SMALL].log()?.contains("checkpoint waits for space").then_some(()))
    })
    .expect("a checkpoint waits");

    disk.free().expect("frees the disk");
    wait_until("writes to go on", RECOVERY_LIMIT, || Ok(checker.write(refused[0])?.then_some(())))
        .expect("goes on by itself");
    wait_until("the server to have room", RECOVERY_LIMIT, || Ok((!is_full(&cluster)?).then_some(())))
        .expect("cluster status says so");
    assert_eq!(cluster.chunkservers[SMALL].id(), process, "without a restart");
    checker.verify().expect("nothing acknowledged is lost");

    // The replicas on that disk are alive: with another server away, nothing is acknowledged without them.
    cluster.chunkservers[2].kill9().expect("kills");
    (0..FIRST).for_each(|chunk| assert!(checker.write(chunk).expect("writes"), "a majority is there"));
    checker.verify().expect("nothing acknowledged is lost");
    cluster.restart_all().expect("restarts");
    checker.verify().expect("nor after a cold start");
    drop(cluster);
    drop(disk);
}
