//! A volume that grows while it is exported: clients that are connected go on as they are, those that come see the new
//! size, on every link of the session, and after a gateway that was away meanwhile.

use spline_fault::workload::RECOVERY_LIMIT;
use spline_harness::nbd::{Connection, Kind, errno};
use spline_harness::vhost::Shown;
use spline_harness::virtio::{VirtioDisk, Wish};
use spline_harness::{Cluster, Export, Rig, Shape, wait_until};
use std::time::Duration;

const GIB: u64 = 1 << 30;
const BLOCK: u32 = 4096;

fn connect(export: &Export) -> Connection {
    Connection::open(&export.socket, &export.volume, RECOVERY_LIMIT).expect("connects")
}

/// Connects until the export is as large as said.
fn connect_to(export: &Export, size: u64) -> Connection {
    wait_until("the new size to be seen", RECOVERY_LIMIT, || {
        let connection = Connection::open(&export.socket, &export.volume, Duration::from_secs(10))?;
        Ok((connection.size() == size).then_some(connection))
    })
    .expect("the export grows")
}

/// The last block of a volume of this size is written, and read back by another client.
fn last_block_is_served(writer: &mut Connection, reader: &mut Connection, size: u64) {
    let data = vec![(size / GIB) as u8; BLOCK as usize];
    writer.succeed(Kind::Write, size - u64::from(BLOCK), BLOCK, &data).expect("writes");
    let found = reader.succeed(Kind::Read, size - u64::from(BLOCK), BLOCK, &[]).expect("reads");
    assert!(found == data);
}

#[test]
fn a_volume_of_the_cluster_grows_under_its_exports() {
    let mut cluster = Cluster::start_as(&Shape::default()).expect("cluster");
    cluster.create_volume("disk", "1G").expect("volume");
    let (export, reader) =
        (cluster.export("disk", false).expect("export"), cluster.export("disk", true).expect("export"));
    let mut early = connect(&export);
    assert_eq!(early.size(), GIB);
    let (past, _) = early.call(Kind::Write, GIB, BLOCK, &[0; BLOCK as usize]).expect("is answered");
    assert_eq!(past, errno::ENOSPC);

    cluster.spline(&["volume", "resize", "disk", "2G"]).expect("grows");
    // Two links of one session: both hear of it.
    let (mut late, mut other) = (connect_to(&export, 2 * GIB), connect_to(&reader, 2 * GIB));
    last_block_is_served(&mut late, &mut other, 2 * GIB);
    early.succeed(Kind::Write, 0, BLOCK, &[5; BLOCK as usize]).expect("goes on");
    assert_eq!(other.succeed(Kind::Read, 0, BLOCK, &[]).expect("reads"), [5; BLOCK as usize]);

    cluster.gateway.kill9().expect("dies");
    cluster.spline(&["volume", "resize", "disk", "3G"]).expect("grows");
    cluster.gateway.start().expect("starts");
    let (mut late, mut other) = (connect_to(&export, 3 * GIB), connect_to(&reader, 3 * GIB));
    last_block_is_served(&mut late, &mut other, 3 * GIB);
    early.succeed(Kind::Read, 0, BLOCK, &[]).expect("goes on");
}

#[test]
fn a_file_grows_under_its_exports() {
    let mut rig = Rig::file().expect("gateway");
    let volume = rig.create("disk", GIB).expect("volume");
    let path = volume.strip_prefix("file:").expect("a file").to_owned();
    let grow = |size| {
        let file = std::fs::File::options().write(true).open(&path).expect("opens");
        file.set_len(size).expect("grows");
    };
    let (export, reader) =
        (rig.export(&volume, false).expect("export"), rig.export(&volume, true).expect("export"));
    let mut early = connect(&export);
    assert_eq!(early.size(), GIB);

    grow(2 * GIB);
    let (mut late, mut other) = (connect_to(&export, 2 * GIB), connect_to(&reader, 2 * GIB));
    last_block_is_served(&mut late, &mut other, 2 * GIB);
    early.succeed(Kind::Write, 0, BLOCK, &[5; BLOCK as usize]).expect("goes on");

    rig.gateway_mut().kill9().expect("dies");
    grow(3 * GIB);
    rig.gateway_mut().start().expect("starts");
    let (mut late, mut other) = (connect_to(&export, 3 * GIB), connect_to(&reader, 3 * GIB));
    last_block_is_served(&mut late, &mut other, 3 * GIB);
    early.succeed(Kind::Read, 0, BLOCK, &[]).expect("goes on");
}

/// Writes the last block of a device and reads it back.
fn last_block_of(disk: &mut VirtioDisk, size: u64) {
    let fill = (size / GIB) as u8;
    let (from, to) = (
        disk.slot(0, &[BLOCK as usize]).expect("room"),
        disk.slot(BLOCK as usize, &[BLOCK as usize]).expect("room"),
    );
    disk.fill(0, &[fill; BLOCK as usize]).expect("fills");
    let mut answers = Vec::new();
    disk.write(0, size - u64::from(BLOCK), &from, 1);
    disk.reap(0, 1, RECOVERY_LIMIT, &mut answers).expect("is answered");
    disk.read(0, size - u64::from(BLOCK), &to, 2);
    disk.reap(0, 1, RECOVERY_LIMIT, &mut answers).expect("is answered");
    assert!(answers.iter().all(|answer| answer.result == 0), "{answers:?}");
    let mut found = [0; BLOCK as usize];
    disk.take(BLOCK as usize, &mut found).expect("takes");
    assert_eq!(found, [fill; BLOCK as usize]);
}

#[test]
fn a_device_grows_under_its_guest() {
    let mut rig = Rig::file().expect("gateway");
    let volume = rig.create("disk", GIB).expect("volume");
    let path = volume.strip_prefix("file:").expect("a file").to_owned();
    let grow = |size| {
        let file = std::fs::File::options().write(true).open(&path).expect("opens");
        file.set_len(size).expect("grows");
    };
    let export = rig.export_to_guest(&volume, Shown::default()).expect("device");
    let wish = Wish { queues: 1, queue_size: 16, read_only: false, memory: 1 << 20 };
    let mut disk = VirtioDisk::open(&export.socket, wish).expect("connects");
    assert_eq!(disk.facts().size, GIB);
    let grown_to = |disk: &VirtioDisk, size| {
        wait_until("the new size to be seen", RECOVERY_LIMIT, || Ok((disk.size_now()? == size).then_some(())))
    };
    grow(2 * GIB);
    grown_to(&disk, 2 * GIB).expect("the device grows");
    last_block_of(&mut disk, 2 * GIB);

    rig.gateway_mut().kill9().expect("dies");
    grow(3 * GIB);
    rig.gateway_mut().start().expect("starts");
    grown_to(&disk, 3 * GIB).expect("the device grows");
    last_block_of(&mut disk, 3 * GIB);
}
