//! A name that moves from one volume to another: not while the volume is exported, and what a nebd kept while its gateway
//! was away is meant for its volume, whatever has the name by then.

use spline_fault::block;
use spline_fault::workload::RECOVERY_LIMIT;
use spline_harness::nbd::{Connection, Kind};
use spline_harness::{Cluster, Shape, wait_until};

/// ESHUTDOWN: the session is over.
const ESHUTDOWN: u32 = 108;

fn data(version: u64) -> Vec<u8> {
    block::fill(0, version)
}

/// Renames a volume as soon as nobody holds it any more.
fn rename(cluster: &Cluster, name: &str, new_name: &str) {
    wait_until("nobody to hold the volume", RECOVERY_LIMIT, || {
        Ok(Some(cluster.spline(&["volume", "rename", name, new_name])?))
    })
    .expect("renames");
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
    rename(&cluster, "disk", "old");
    rename(&cluster, "other", "disk");
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

#[test]
fn a_volume_keeps_its_name_while_it_is_exported() {
    let cluster = Cluster::start_as(&Shape::default()).expect("cluster");
    cluster.create_volume("disk", "1G").expect("volume");
    let mut export = cluster.export("disk", false).expect("export");
    let mut client = Connection::open(&export.socket, "disk", RECOVERY_LIMIT).expect("connects");
    client.succeed(Kind::Write, 0, block::BYTES as u32, &data(1)).expect("writes");
    let refused = cluster.spline(&["volume", "rename", "disk", "old"]).expect_err("it is in use");
    assert!(refused.to_string().contains("end its exports there first: name=disk"), "{refused}");
    client.succeed(Kind::Write, 0, block::BYTES as u32, &data(2)).expect("writes on");
    client.close().expect("closes");
    export.nebd.terminate(RECOVERY_LIMIT).expect("ends");

    rename(&cluster, "disk", "old");
    let export = cluster.export("old", false).expect("export");
    let mut client = Connection::open(&export.socket, "old", RECOVERY_LIMIT).expect("connects");
    let found = client.succeed(Kind::Read, 0, block::BYTES as u32, &[]).expect("reads");
    assert!(found == data(2));
}
