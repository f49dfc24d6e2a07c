//! Bits that flip on a disk: the right data is read all the same, and the block is mended from a peer.

use anyhow::Context;
use spline_fault::block;
use spline_fault::workload::RECOVERY_LIMIT;
use spline_harness::nbd::{Connection, Kind};
use spline_harness::{Cluster, wait_until};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Blocks that are written, all in one chunk.
const BLOCKS: u64 = 64;
/// Blocks that are damaged.
const DAMAGED: [u64; 3] = [3, 4, 40];

/// Where a replica keeps a block: the file, the offset in it, and the copyset that the file belongs to.
fn find(cluster: &Cluster, chunkserver: usize, bytes: &[u8]) -> anyhow::Result<Option<(PathBuf, u64, u64)>> {
    for copyset in fs::read_dir(cluster.data_dir(chunkserver).join("copysets"))? {
        let copyset = copyset?;
        let number: u64 = copyset.file_name().to_string_lossy().parse()?;
        for file in fs::read_dir(copyset.path().join("chunks"))? {
            let file = file?.path();
            let content = fs::read(&file)?;
            let place = content.chunks_exact(block::BYTES).position(|found| found == bytes);
            if let Some(place) = place {
                return Ok(Some((file, (place * block::BYTES) as u64, number)));
            }
        }
    }
    Ok(None)
}

fn damage(cluster: &Cluster, chunkserver: usize, number: u64) -> anyhow::Result<()> {
    let bytes = block::fill(number, 1);
    let (file, offset, _) = find(cluster, chunkserver, &bytes)?.context("no such block")?;
    let file = fs::File::options().write(true).open(file)?;
    Ok(file.write_all_at(&[bytes[100] ^ 4], offset + 100)?)
}

fn read(client: &mut Connection, number: u64) -> u64 {
    let data = client.succeed(Kind::Read, number * block::BYTES as u64, block::BYTES as u32, &[]);
    block::read(number, &data.expect("reads")).expect("a whole block")
}

/// Sum of what a counter says on all servers.
fn mended(cluster: &Cluster) -> f64 {
    cluster.metric_of_all("spline_chunkserver_blocks_mended_total")
}

#[test]
fn blocks_that_two_of_three_replicas_have_damaged_are_read_and_mended() {
    let cluster = Cluster::start().expect("cluster");
    cluster.create_volume("disk", "1G").expect("volume");
    let export = cluster.export("disk", false).expect("export");
    let mut client = Connection::open(&export.socket, "disk", RECOVERY_LIMIT).expect("connects");
    for number in 0..BLOCKS {
        let data = block::fill(number, 1);
        client.succeed(Kind::Write, number * data.len() as u64, data.len() as u32, &data).expect("writes");
    }
    let last = block::fill(BLOCKS - 1, 1);
    let (_, _, copyset) = wait_until("every replica to have applied", RECOVERY_LIMIT, || {
        let places = (0..3).map(|server| find(&cluster, server, &last));
        Ok(places.collect::<anyhow::Result<Option<Vec<_>>>>()?.map(|mut places| places.swap_remove(0)))
    })
    .expect("all apply");
    let status = cluster.status().expect("status");
    let leader = status.leaders[copyset as usize - 1].expect("led");
    let leader = status.servers.iter().find(|server| server.id == leader).and_then(|server| server.number);
    let leader = leader.expect("known");
    let other = (leader + 1) % 3;
    for number in DAMAGED {
        damage(&cluster, leader, number).expect("damages");
        damage(&cluster, other, number).expect("damages");
    }
    for number in 0..BLOCKS {
        assert_eq!(read(&mut client, number), 1);
    }
    assert_eq!(mended(&cluster), DAMAGED.len() as f64);
    for number in DAMAGED {
        let place = find(&cluster, leader, &block::fill(number, 1)).expect("looks");
        assert!(place.is_some(), "block {number} is right on the leader's disk again");
    }
    // What one client writes over a damaged block is there too.
    let data = block::fill(3, 2);
    client.succeed(Kind::Write, 3 * data.len() as u64, data.len() as u32, &data).expect("writes");
    assert_eq!(read(&mut client, 3), 2);
}
