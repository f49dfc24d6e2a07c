//! Messages that are late: a first attempt that was held back in the network must not undo what came after it.

use spline_fault::block;
use spline_fault::workload::RECOVERY_LIMIT;
use spline_harness::nbd::{Connection, Kind};
use spline_harness::{Cluster, Shape, wait_until};

/// Any block will do.
const BLOCK: u64 = 5;
/// Commands that chunkservers found dead in their logs.
const DEAD: &str = "spline_chunkserver_fenced_total";

fn write(client: &mut Connection, version: u64) {
    let data = block::fill(BLOCK, version);
    client.succeed(Kind::Write, BLOCK * data.len() as u64, data.len() as u32, &data).expect("writes");
}

fn read(client: &mut Connection) -> u64 {
    let data = client.succeed(Kind::Read, BLOCK * block::BYTES as u64, block::BYTES as u32, &[]);
    block::read(BLOCK, &data.expect("reads")).expect("a whole block")
}

#[test]
fn a_first_attempt_does_not_land_after_a_newer_write() {
    let mut cluster = Cluster::start_as(&Shape { proxied: true, ..Shape::default() }).expect("cluster");
    cluster.create_volume("disk", "1G").expect("volume");
    let export = cluster.export("disk", false).expect("export");
    let mut client = Connection::open(&export.socket, "disk", RECOVERY_LIMIT).expect("connects");
    write(&mut client, 1);
    let dead = cluster.metric_of_all(DEAD);

    cluster.hold().arm(&block::fill(BLOCK, 2)[..256]);
    // Its first attempt is held, a later one is answered.
    write(&mut client, 2);
    cluster.hold().wait_until_held(RECOVERY_LIMIT).expect("is held");
    assert_eq!(read(&mut client), 2);
    write(&mut client, 3);
    assert_eq!(cluster.metric_of_all(DEAD), dead, "the first attempt is still on its way");
    cluster.hold().release();
    wait_until("the late attempt to be judged", RECOVERY_LIMIT, || {
        Ok((cluster.metric_of_all(DEAD) > dead).then_some(()))
    })
    .expect("it arrives");
    assert_eq!(read(&mut client), 3);
    // Whoever leads: each server is away once, so the block's copyset has another leader at least once.
    for number in 0..cluster.chunkservers.len() {
        cluster.chunkservers[number].kill9().expect("kills");
        assert_eq!(read(&mut client), 3, "without server {number}");
        cluster.chunkservers[number].start().expect("starts");
        cluster.wait_until_led().expect("comes back");
    }
    cluster.restart_all().expect("restarts");
    assert_eq!(read(&mut client), 3);
}
