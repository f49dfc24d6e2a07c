//! One writer: a second gateway is refused; by force it takes the volume, and nothing that the first one had on its way
//! lands any more (`one_writer`), nor what a nebd kept while its gateway was away (`no_late_duplicate`).

use anyhow::Context;
use spline_fault::block;
use spline_fault::workload::RECOVERY_LIMIT;
use spline_harness::nbd::{Connection, Kind, Receiver, Sender};
use spline_harness::{Cluster, Export, Process, Shape, wait_until};

/// ESHUTDOWN: the session is over.
const ESHUTDOWN: u32 = 108;
/// Writes that chunkservers refused because of their epoch.
const REFUSED: &str = "spline_chunkserver_requests_total{op=\"write\",outcome=\"fenced\"}";
/// Blocks in one chunk: one to be held in the network, one in the stopped gateway, one left alone.
const HELD: u64 = 0;
const DELAYED: u64 = 1;
const OTHER: u64 = 2;

fn offset(number: u64) -> u64 {
    number * block::BYTES as u64
}

fn write(client: &mut Connection, number: u64, version: u64) {
    let data = block::fill(number, version);
    client.succeed(Kind::Write, offset(number), data.len() as u32, &data).expect("writes");
}

fn read(client: &mut Connection, number: u64) -> u64 {
    let data = client.succeed(Kind::Read, offset(number), block::BYTES as u32, &[]).expect("reads");
    block::read(number, &data).expect("a whole block")
}

fn send_write(sender: &mut Sender, number: u64, version: u64) {
    let data = block::fill(number, version);
    sender.send(Kind::Write, number, offset(number), data.len() as u32, &data).expect("sends");
}

/// The error numbers of the next `count` answers.
fn answers(mut receiver: Receiver, count: usize) -> anyhow::Result<(Receiver, Vec<u32>)> {
    let thread = std::thread::spawn(move || {
        let errors = (0..count).map(|_| Ok(receiver.reply()?.context("connection ended")?.errno));
        let errors = errors.collect::<anyhow::Result<Vec<u32>>>();
        errors.map(|errors| (receiver, errors))
    });
    wait_until("answers", RECOVERY_LIMIT, || Ok(thread.is_finished().then_some(())))?;
    thread.join().map_err(|_| anyhow::anyhow!("panicked"))?
}

struct Lab {
    cluster: Cluster,
    first: Export,
    _other: Process,
    other_socket: std::path::PathBuf,
}

impl Lab {
    /// A volume that the first gateway serves, with version 1 in every block, and a second gateway that was refused it.
    fn new() -> Self {
        let cluster = Cluster::start_as(&Shape { proxied: true, ..Shape::default() }).expect("cluster");
        cluster.create_volume("disk", "1G").expect("volume");
        let first = cluster.export("disk", false).expect("export");
        let (other, other_socket) = cluster.second_gateway().expect("a second gateway");
        Self { cluster, first, _other: other, other_socket }
    }
}

#[test]
fn by_force_the_first_is_fenced_with_all_that_it_had_on_its_way() {
    let Lab { mut cluster, first, _other, other_socket } = Lab::new();
    let mut old = Connection::open(&first.socket, "disk", RECOVERY_LIMIT).expect("connects");
    [HELD, DELAYED, OTHER].into_iter().for_each(|number| write(&mut old, number, 1));
    let said = Export::refused(cluster.dir(), &other_socket, "disk").expect("is refused");
    assert!(said.contains("open on another gateway") && said.contains("--force"), "{said}");
    write(&mut old, OTHER, 2);

    // One write hangs in the network, one in the first gateway, which is stopped.
    let (mut sender, receiver) = old.split().expect("splits");
    cluster.hold().arm(&block::fill(HELD, 2)[..256]);
    send_write(&mut sender, HELD, 2);
    cluster.hold().wait_until_held(RECOVERY_LIMIT).expect("is held");
    cluster.gateway.stop().expect("stops");
    send_write(&mut sender, DELAYED, 2);

    let second = Export::start_by_force(cluster.dir(), &other_socket, "disk").expect("takes the volume");
    let mut new = Connection::open(&second.socket, "disk", RECOVERY_LIMIT).expect("connects");
    assert_eq!([HELD, DELAYED, OTHER].map(|number| read(&mut new, number)), [1, 1, 2]);
    [HELD, DELAYED].into_iter().for_each(|number| write(&mut new, number, 3));

    let refused = cluster.metric_of_all(REFUSED);
    cluster.hold().release();
    wait_until("the held write to be refused", RECOVERY_LIMIT, || {
        Ok((cluster.metric_of_all(REFUSED) > refused).then_some(()))
    })
    .expect("a chunkserver refuses it");
    cluster.gateway.cont().expect("goes on");
    let (receiver, errors) = answers(receiver, 2).expect("the first one's client is answered");
    assert_eq!(errors, [ESHUTDOWN; 2]);
    // Nothing stale is read where the session is over.
    sender.send(Kind::Read, 9, offset(HELD), block::BYTES as u32, &[]).expect("sends");
    assert_eq!(answers(receiver, 1).expect("is answered").1, [ESHUTDOWN]);

    let expected = [3, 3, 2];
    assert_eq!([HELD, DELAYED, OTHER].map(|number| read(&mut new, number)), expected);
    cluster.chunkservers.iter_mut().for_each(|server| server.restart().expect("restarts"));
    assert_eq!([HELD, DELAYED, OTHER].map(|number| read(&mut new, number)), expected);
    // The first one does not get it back by itself.
    let said = Export::refused(cluster.dir(), &cluster.gateway_socket(), "disk").expect("is refused");
    assert!(said.contains("open on another gateway"), "{said}");
}

#[test]
fn by_force_it_comes_back_though_the_first_has_not_heard_of_its_loss() {
    let Lab { cluster, first, _other, other_socket } = Lab::new();
    let second = Export::start_by_force(cluster.dir(), &other_socket, "disk").expect("takes the volume");
    let mut new = Connection::open(&second.socket, "disk", RECOVERY_LIMIT).expect("connects");
    write(&mut new, HELD, 1);
    drop(second);
    // At once, before the first gateway has renewed its lease: it still has links of its lost session.
    let third =
        Export::start_by_force(cluster.dir(), &cluster.gateway_socket(), "disk").expect("takes it back");
    let mut newest = Connection::open(&third.socket, "disk", RECOVERY_LIMIT).expect("connects");
    assert_eq!(read(&mut newest, HELD), 1);
    write(&mut newest, HELD, 2);
    assert_eq!(read(&mut newest, HELD), 2);
    drop(first);
}

#[test]
fn what_waited_for_a_gateway_does_not_land_on_what_another_one_wrote() {
    let Lab { mut cluster, first, _other, other_socket } = Lab::new();
    let mut old = Connection::open(&first.socket, "disk", RECOVERY_LIMIT).expect("connects");
    write(&mut old, HELD, 1);
    cluster.gateway.kill9().expect("dies");
    let (mut sender, receiver) = old.split().expect("splits");
    send_write(&mut sender, HELD, 2);

    // Another gateway has the volume meanwhile and gives it back: nobody holds it when the first one returns.
    let mut second = Export::start_by_force(cluster.dir(), &other_socket, "disk").expect("takes the volume");
    let mut new = Connection::open(&second.socket, "disk", RECOVERY_LIMIT).expect("connects");
    write(&mut new, HELD, 3);
    new.close().expect("closes");
    second.nebd.terminate(RECOVERY_LIMIT).expect("ends");
    wait_until("the volume to be given back", RECOVERY_LIMIT, || {
        Ok(cluster.spline(&["volume", "info", "disk"])?["session"].is_null().then_some(()))
    })
    .expect("is given back");

    cluster.gateway.start().expect("starts");
    let (receiver, errors) = answers(receiver, 1).expect("the waiting client is answered");
    assert_eq!(errors, [ESHUTDOWN]);
    // Whoever comes now sees what was written last; the client from before does not get in again.
    let mut fresh = Connection::open(&first.socket, "disk", RECOVERY_LIMIT).expect("connects");
    assert_eq!(read(&mut fresh, HELD), 3);
    write(&mut fresh, HELD, 4);
    send_write(&mut sender, HELD, 5);
    assert_eq!(answers(receiver, 1).expect("is answered").1, [ESHUTDOWN]);
    assert_eq!(read(&mut fresh, HELD), 4);
}
