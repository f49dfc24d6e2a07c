//! What a nebd kept while its gateway was away is meant for its volume, not for the one that has the name by then.

use spline_fault::block;
use spline_fault::workload::RECOVERY_LIMIT;
use spline_harness::nbd::{Connection, Kind};
use spline_harness::{Cluster, Shape};

/// ESHUTDOWN: the session is over.
const ESHUTDOWN: u32 = 108;

fn data(version: u64) -> Vec<u8> {
    block::fill(0, version)
}

#[test]
fn what_waited_does_not_land_in_another_volume_of_the_name() {
    let mut cluster = Cluster::start_as(&Shape::default()).expect("cluster");
    cluster.create_volume("disk", "1G").expect("volume");
    cluster.create_volume("other", "1G").expect("volume");
    let export = cluster.export("disk", false).expect("export");
    let mut client = Connection::open(&export.socket, "disk", RECOVERY_LIMIT).expect("connects");
    client.succeed(Kind::Write, 0, block::BYTES as u32, &data(1)).expect("writes");

    cluster.gateway.kill9().expect("dies");
    let (mut sender, mut receiver) = client.split().expect("splits");
    sender.send(Kind::Write, 7, 0, block::BYTES as u32, &data(2)).expect("sends");
    for (name, new_name) in [("disk", "old"), ("other", "disk")] {
        cluster.spline(&["volume", "rename", name, new_name]).expect("renames");
    }
    cluster.gateway.start().expect("starts");
    let answer = receiver.reply().expect("is answered").expect("is not cut");
    assert_eq!(answer.errno, ESHUTDOWN);
    drop(export);

    for (name, version) in [("disk", None), ("old", Some(1))] {
        let export = cluster.export(name, false).expect("export");
        let mut client = Connection::open(&export.socket, name, RECOVERY_LIMIT).expect("connects");
        let found = client.succeed(Kind::Read, 0, block::BYTES as u32, &[]).expect("reads");
        assert!(found == version.map_or(vec![0; block::BYTES], data), "volume {name}");
    }
}
