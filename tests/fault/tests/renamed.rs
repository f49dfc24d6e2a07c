//! A name that moves from one volume to another: what a nebd kept while its gateway was away is meant for its volume, and
//! whoever asks by name gets the volume that has it now.

use spline_fault::block;
use spline_fault::workload::RECOVERY_LIMIT;
use spline_harness::nbd::{Connection, Kind};
use spline_harness::{Cluster, Export, Shape};

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

#[test]
fn whoever_asks_by_name_does_not_get_the_volume_that_had_it_before() {
    let cluster = Cluster::start_as(&Shape::default()).expect("cluster");
    cluster.create_volume("disk", "1G").expect("volume");
    cluster.create_volume("other", "1G").expect("volume");
    let mut export = cluster.export("disk", false).expect("export");
    let mut old = Connection::open(&export.socket, "disk", RECOVERY_LIMIT).expect("connects");
    old.succeed(Kind::Write, 0, block::BYTES as u32, &data(1)).expect("writes");
    for (name, new_name) in [("disk", "old"), ("other", "disk")] {
        cluster.spline(&["volume", "rename", name, new_name]).expect("renames");
    }
    // By force, which another gateway would yield to, and here says only that it is the first link of its own.
    let starting = std::thread::scope(|scope| {
        let starting =
            scope.spawn(|| Export::start_by_force(cluster.dir(), &cluster.gateway_socket(), "disk"));
        let log = cluster.dir().join("nebd-disk-forced.log");
        spline_harness::wait_until("the other to be told to wait", RECOVERY_LIMIT, || {
            Ok(std::fs::read_to_string(&log)?.contains("was renamed, end its exports first").then_some(()))
        })
        .expect("is told");
        // The session of the one that was renamed goes on meanwhile, and ends with its export.
        old.succeed(Kind::Write, 0, block::BYTES as u32, &data(2)).expect("writes");
        old.close().expect("closes");
        export.nebd.terminate(RECOVERY_LIMIT).expect("ends");
        starting.join().expect("no panic")
    });
    let export = starting.expect("serves");
    let mut new = Connection::open(&export.socket, "disk", RECOVERY_LIMIT).expect("connects");
    let found = new.succeed(Kind::Read, 0, block::BYTES as u32, &[]).expect("reads");
    assert!(found == vec![0; block::BYTES], "it is the other volume");
}
