//! nebd between a real client socket and a gateway that misbehaves: what the guest sees, and what the gateway gets. Whether the
//! link has a ring makes no difference to that: `RING` of the test says which it is.

use crate::RING;
use crate::client::{Client, request};
use crate::gateway::{FakeGateway, Manner};
use prometheus_client::registry::Registry;
use spline_link::{Identity, Message, Mode, Refusal};
use spline_nebd::config::ExportConfig;
use spline_nebd::doors::Doors;
use spline_nebd::metrics::Families;
use spline_nebd::nbd::protocol::*;
use spline_nebd::status_file::{Kind, StatusFile};
use spline_nebd::{Config, Nebd};
use spline_types::{BlockRequest, Epoch, Fault, OnUnavailable};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

const SIZE: u64 = 64 << 20;

pub(crate) struct Place {
    dir: tempfile::TempDir,
    pub(crate) gateway: FakeGateway,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let gateway = FakeGateway::new(&dir.path().join("gateway.sock"), SIZE, RING);
        Self { dir, gateway }
    }

    pub(crate) fn nbd(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }

    fn spawn(&self) -> Nebd {
        self.spawn_counted(&mut Registry::default())
    }

    fn spawn_counted(&self, registry: &mut Registry) -> Nebd {
        let export = ExportConfig {
            volume: "disk0".into(),
            listen_unix: Some(self.nbd()),
            handshake_seconds: 1,
            stuck_seconds: 1,
            ..ExportConfig::default()
        };
        let config = Config {
            gateway_socket: self.dir.path().join("gateway.sock"),
            runtime_dir: self.dir.path().to_owned(),
            exports: vec![export],
            ..Config::default()
        };
        let export = config.check().expect("good").remove(0);
        let doors = Doors::take(&export).expect("free");
        Nebd::spawn(&export, doors, &Families::new(registry)).expect("starts").remove(0)
    }

    fn status_file(&self) -> PathBuf {
        StatusFile::path(self.dir.path(), Kind::Nbd, "disk0")
    }

    /// A gateway and a nebd that serve.
    pub(crate) fn serving() -> (Self, Nebd) {
        let place = Self::new();
        place.gateway.listen();
        let mut nebd = place.spawn();
        nebd.wait_ready().expect("no error").expect("is ready");
        (place, nebd)
    }
}

#[test]
fn what_is_written_is_read_back_by_another_client() {
    let (place, _nebd) = Place::serving();
    let (mut one, mut two) = (Client::connect(&place.nbd()), Client::connect(&place.nbd()));
    for (cookie, length) in [(1, 1), (2, 4096), (3, 100_000), (4, 9 << 20)] {
        let data: Vec<u8> = (0..length).map(|at| (at * 7 + cookie as usize) as u8).collect();
        one.write(cookie, 513, &data);
        assert_eq!(one.reply(), (cookie, 0));
        assert!(two.read(cookie, 513, length as u32) == data, "{length} bytes");
    }
    for command in [CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE] {
        one.send(command, 9, 0, if command == CMD_FLUSH { 0 } else { 8192 });
        assert_eq!(one.reply(), (9, 0));
    }
    assert_eq!(two.read(5, 0, 8192), vec![0; 8192]);
    one.send(CMD_DISC, 0, 0, 0);
    assert_eq!(one.closed(), 0);
}

#[test]
fn replay_before_new() {
    let (place, _nebd) = Place::serving();
    let gateway = &place.gateway;
    gateway.lock().manner = Manner::Hold;
    let mut client = Client::connect(&place.nbd());
    for cookie in 1..=3u64 {
        client.write(cookie, cookie * 4096, &[cookie as u8; 4096]);
    }
    gateway.wait("the first link has three requests", |control| control.received.len() == 3);
    gateway.kill();
    client.write(4, 4 * 4096, &[4; 4096]);
    gateway.lock().manner = Manner::Answer;
    gateway.listen();
    let mut answered: Vec<_> = (0..4).map(|_| client.reply()).collect();
    answered.sort_unstable();
    assert_eq!(answered, [(1, 0), (2, 0), (3, 0), (4, 0)], "complete_once");
    let control = gateway.lock();
    assert_eq!(control.links, [Mode::Open, Mode::Resume { epoch: Epoch::new(1) }]);
    let on = |link| control.received.iter().filter(move |(at, _)| *at == link).map(|(_, request)| *request);
    let block = |request: BlockRequest| request.range.offset() / 4096;
    assert_eq!(on(0).map(block).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(on(1).map(block).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert!(on(0).zip(on(1)).all(|(first, again)| first == again), "a replay is the same request");
    assert!(on(1).map(|request| request.id).is_sorted(), "ids grow");
    drop(control);
    assert_eq!(client.read(5, 3 * 4096, 1), [3]);
}

#[test]
fn a_leaving_gateway_withdraws_and_the_guest_learns_nothing() {
    let (place, _nebd) = Place::serving();
    let gateway = &place.gateway;
    gateway.lock().manner = Manner::Withdraw;
    let mut client = Client::connect(&place.nbd());
    client.write(1, 0, b"abc");
    gateway.wait("the request was withdrawn", |control| control.received.len() == 1);
    gateway.say(&Message::Leaving);
    client.send(CMD_FLUSH, 2, 0, 0);
    gateway.lock().manner = Manner::Answer;
    gateway.kill();
    gateway.listen();
    let mut answered = [client.reply(), client.reply()];
    answered.sort_unstable();
    assert_eq!(answered, [(1, 0), (2, 0)]);
    assert_eq!(client.read(3, 0, 3), b"abc");
}

#[test]
fn faults_become_errors_and_the_connection_goes_on() {
    let (place, _nebd) = Place::serving();
    let mut client = Client::connect(&place.nbd());
    for (fault, error) in [(Fault::NoSpace, 28), (Fault::Fenced, 108), (Fault::Corrupt, 5)] {
        place.gateway.lock().manner = Manner::Fail(fault);
        client.send(CMD_READ, 7, 0, 512);
        assert_eq!(client.reply(), (7, error));
    }
    place.gateway.lock().manner = Manner::Answer;
    assert_eq!(client.read(8, 0, 2), [0, 0]);
}

#[test]
fn a_lying_gateway_is_left_and_tried_again() {
    let (place, _nebd) = Place::serving();
    place.gateway.lock().manner = Manner::Lie;
    let mut client = Client::connect(&place.nbd());
    client.send(CMD_READ, 1, 0, 16);
    place.gateway.wait("nebd comes back", |control| control.links.len() > 1);
    place.gateway.lock().manner = Manner::Answer;
    assert_eq!(client.reply(), (1, 0));
}

#[test]
fn fail_after_ends_the_wait_while_no_gateway_is_there() {
    let place = Place::new();
    place.gateway.lock().on_unavailable = OnUnavailable::FailAfter(Duration::from_millis(200));
    place.gateway.listen();
    let mut nebd = place.spawn();
    nebd.wait_ready().expect("no error").expect("is ready");
    let mut client = Client::connect(&place.nbd());
    place.gateway.lock().manner = Manner::Hold;
    client.send(CMD_READ, 1, 0, 512);
    place.gateway.wait("the request came", |control| control.received.len() == 1);
    place.gateway.kill();
    assert_eq!(client.reply(), (1, 5));
    client.send(CMD_READ, 2, 0, 512);
    assert_eq!(client.reply(), (2, 5));
    place.gateway.lock().manner = Manner::Answer;
    place.gateway.listen();
    place.gateway.wait("nebd is back", |control| control.links.len() == 2);
    assert_eq!(client.read(3, 0, 1), [0]);
}

#[test]
fn a_refused_volume_ends_the_start_with_the_reason() {
    for refusal in [Refusal::NotFound, Refusal::Held, Refusal::Replaced, Refusal::Version, Refusal::Internal]
    {
        let place = Place::new();
        place.gateway.lock().refuse = Some(refusal);
        place.gateway.listen();
        let error = place.spawn().wait_ready().expect_err("refused");
        assert!(error.to_string().contains(&format!("refused as {refusal:?}")), "{error:#}");
        assert!(!place.nbd().exists());
    }
}

#[test]
fn clients_are_let_in_only_once_the_gateway_serves() {
    let place = Place::new();
    let mut nebd = place.spawn();
    place.gateway.lock().refuse = Some(Refusal::Unavailable);
    place.gateway.listen();
    place.gateway.wait("nebd was told to wait", |control| !control.links.is_empty());
    assert!(UnixStream::connect(place.nbd()).is_err());
    assert!(std::fs::read(place.status_file()).expect("claimed").is_empty());
    place.gateway.lock().refuse = None;
    let uris = nebd.wait_ready().expect("no error").expect("is ready");
    assert_eq!(uris, [format!("nbd+unix:///?socket={}", place.nbd().display())]);
    Client::connect(&place.nbd());
    assert!(!std::fs::read(place.status_file()).expect("is there").is_empty());
    assert_eq!(place.gateway.lock().links.last(), Some(&Mode::Open), "it never had the volume before");
}

#[test]
fn a_stop_while_waiting_for_the_gateway_is_no_error() {
    let place = Place::new();
    let mut nebd = place.spawn();
    nebd.stopper().expect("has one").stop();
    assert!(nebd.wait_ready().expect("no error").is_none());
}

#[test]
fn a_lost_session_fails_everything_as_shutting_down() {
    let (place, _nebd) = Place::serving();
    place.gateway.lock().manner = Manner::Hold;
    let mut client = Client::connect(&place.nbd());
    client.send(CMD_READ, 1, 0, 512);
    place.gateway.wait("the request came", |control| control.received.len() == 1);
    place.gateway.say(&Message::Lost);
    assert_eq!(client.reply(), (1, 108));
    client.write(2, 0, b"x");
    assert_eq!(client.reply(), (2, 108));
}

#[test]
fn a_resumed_session_that_is_held_elsewhere_is_lost() {
    let (place, _nebd) = Place::serving();
    place.gateway.kill();
    place.gateway.lock().refuse = Some(Refusal::Held);
    place.gateway.listen();
    let mut client = Client::connect(&place.nbd());
    client.send(CMD_READ, 1, 0, 512);
    assert_eq!(client.reply(), (1, 108));
}

#[test]
fn after_a_loss_only_clients_that_come_later_are_served() {
    let (place, _nebd) = Place::serving();
    place.gateway.lock().manner = Manner::Hold;
    let mut old = Client::connect(&place.nbd());
    old.write(1, 0, b"old");
    place.gateway.wait("the request came", |control| control.received.len() == 1);
    place.gateway.kill();
    place.gateway.lock().manner = Manner::Answer;
    place.gateway.lock().refuse = Some(Refusal::Held);
    place.gateway.listen();
    assert_eq!(old.reply(), (1, 108));
    // While the other still has it, nobody is served, and nebd does not ask by itself.
    let mut early = Client::connect(&place.nbd());
    early.send(CMD_READ, 2, 0, 512);
    assert_eq!(early.reply(), (2, 108));
    let asked = place.gateway.lock().links.len();
    place.gateway.lock().refuse = None;
    for client in [&mut old, &mut early] {
        client.send(CMD_READ, 3, 0, 512);
        assert_eq!(client.reply(), (3, 108));
    }
    assert_eq!(place.gateway.lock().links.len(), asked);
    let mut late = Client::connect(&place.nbd());
    assert_eq!(late.read(4, 0, 3), [0; 3], "what the old one wrote was not replayed");
    let control = place.gateway.lock();
    let resumed = Mode::Resume { epoch: Epoch::new(1) };
    assert_eq!(control.links, [Mode::Open, resumed, Mode::Open, Mode::Open]);
    drop(control);
    old.send(CMD_READ, 5, 0, 512);
    assert_eq!(old.reply(), (5, 108));
    late.write(6, 0, b"new");
    assert_eq!(late.reply(), (6, 0));
}

#[test]
fn what_waited_does_not_go_to_another_volume_of_the_name() {
    let (place, _nebd) = Place::serving();
    let gateway = &place.gateway;
    let first = gateway.lock().identity;
    gateway.lock().manner = Manner::Hold;
    let mut old = Client::connect(&place.nbd());
    old.write(1, 0, b"old");
    gateway.wait("the request came", |control| control.received.len() == 1);
    gateway.kill();
    old.write(2, 4096, b"old");
    let mut control = gateway.lock();
    (control.manner, control.identity) = (Manner::Answer, Identity::new(0, 2).expect("not 0"));
    drop(control);
    gateway.listen();
    let mut answered = [old.reply(), old.reply()];
    answered.sort_unstable();
    assert_eq!(answered, [(1, 108), (2, 108)]);
    // What a client was told of is not the other volume either.
    let mut late = Client::connect(&place.nbd());
    late.send(CMD_READ, 3, 0, 512);
    assert_eq!(late.reply(), (3, 108));
    assert_eq!(gateway.lock().received.len(), 1, "nothing went to the other volume");
    gateway.lock().identity = first;
    let mut back = Client::connect(&place.nbd());
    assert_eq!(back.read(4, 0, 3), [0; 3], "the name is its own again");
}

#[test]
fn a_resized_volume_is_served_to_its_new_end() {
    let (place, _nebd) = Place::serving();
    let mut client = Client::connect(&place.nbd());
    client.send(CMD_READ, 1, SIZE - 512, 1024);
    assert_eq!(client.reply(), (1, 22));
    place.gateway.say(&Message::Resized { size: SIZE / 2 });
    // The message overtakes nothing: an answer on the same link comes after it.
    assert_eq!(client.read(2, 0, 1), [0]);
    client.write(3, SIZE / 2, b"x");
    assert_eq!(client.reply(), (3, 28));
}

#[test]
fn a_client_that_never_reads_stalls_only_itself() {
    let (place, _nebd) = Place::serving();
    let _greedy = greedy(&place, 50);
    place.gateway.wait("its first reads came", |control| !control.received.is_empty());
    let mut polite = Client::connect(&place.nbd());
    for cookie in 0..50 {
        assert_eq!(polite.read(cookie, 4096, 4096), vec![0; 4096]);
    }
    let asked = place.gateway.lock().received.iter().filter(|(_, r)| r.range.length() == 8 << 20).count();
    assert!(asked < 20, "its unread replies hold it back: asked={asked}");
}

#[test]
fn a_half_closed_client_still_gets_its_answers() {
    let (place, _nebd) = Place::serving();
    place.gateway.lock().manner = Manner::Hold;
    let mut client = Client::connect(&place.nbd());
    // The same cookie twice: the server answers both and does not care.
    client.write(7, 0, b"abc");
    client.write(7, 0, b"abd");
    client.stream.shutdown(Shutdown::Write).expect("closes its side");
    place.gateway.wait("both came", |control| control.received.len() == 2);
    place.gateway.kill();
    place.gateway.lock().manner = Manner::Answer;
    place.gateway.listen();
    assert_eq!([client.reply(), client.reply()], [(7, 0), (7, 0)]);
    assert_eq!(client.closed(), 0);
    let mut next = Client::connect(&place.nbd());
    assert_eq!(next.read(1, 0, 3), b"abd");
}

#[test]
fn a_client_that_breaks_the_protocol_is_cut_and_others_are_not() {
    let (place, _nebd) = Place::serving();
    let mut good = Client::connect(&place.nbd());
    let mut garbage = Client::connect(&place.nbd());
    garbage.stream.write_all(&[0x55; 28]).expect("writes");
    assert_eq!(garbage.closed(), 0);
    let mut silent = Client::knock(&place.nbd());
    assert_eq!(silent.closed(), 0, "a handshake that takes too long");
    let mut oldstyle = Client::knock(&place.nbd());
    oldstyle.stream.write_all(&request(CMD_READ, 0, 0, 512)).expect("writes");
    assert_eq!(oldstyle.closed(), 0);
    assert_eq!(good.read(1, 0, 1), [0]);
}

#[test]
fn too_long_writes_are_refused_and_the_stream_stays_in_step() {
    let (place, _nebd) = Place::serving();
    let mut client = Client::connect(&place.nbd());
    client.write(1, 0, &vec![1; (32 << 20) + 1]);
    assert_eq!(client.reply(), (1, 22));
    assert_eq!(client.read(2, 0, 1), [0]);
}

#[test]
fn a_clean_stop_says_goodbye_and_leaves_nothing_behind() {
    let (place, nebd) = Place::serving();
    let mut client = Client::connect(&place.nbd());
    client.write(1, 0, b"abc");
    assert_eq!(client.reply(), (1, 0));
    nebd.shutdown().expect("ends well");
    assert_eq!(client.closed(), 0);
    place.gateway.wait("nebd said goodbye", |control| control.detached);
    assert!(!place.nbd().exists());
    assert!(!place.status_file().exists());
}

/// Asks for 8 MiB `count` times and reads none of it.
fn greedy(place: &Place, count: usize) -> Client {
    let mut client = Client::connect(&place.nbd());
    client.stream.write_all(&request(CMD_READ, 1, 0, 8 << 20).repeat(count)).expect("writes");
    client
}

fn asked_for(place: &Place, length: u64) -> usize {
    place.gateway.lock().received.iter().filter(|(_, request)| request.range.length() == length).count()
}

fn page(registry: &Registry) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).expect("encodes");
    text
}

#[test]
fn clients_that_never_read_share_one_budget() {
    let (place, _nebd) = Place::serving();
    let _greedy: Vec<_> = (0..10).map(|_| greedy(&place, 50)).collect();
    place.gateway.wait("the budget is used up", |control| control.received.len() >= 8);
    let mut polite = Client::connect(&place.nbd());
    for cookie in 0..20 {
        assert!(polite.read(cookie, 4096, 2 << 20) == vec![0; 2 << 20], "its share is its own");
    }
    // 64 MiB and 2 MiB for each of the ten.
    assert!((8..=10).contains(&asked_for(&place, 8 << 20)), "{}", asked_for(&place, 8 << 20));
}

#[test]
fn a_client_that_takes_nothing_is_not_cut_and_holds_up_nobody_s_small_requests() {
    let place = Place::new();
    place.gateway.listen();
    let mut registry = Registry::default();
    let mut nebd = place.spawn_counted(&mut registry);
    nebd.wait_ready().expect("no error").expect("is ready");
    let mut paused: Vec<_> = (0..2).map(|_| greedy(&place, 4)).collect();
    place.gateway.wait("both hold what they may", |control| control.received.len() == 8);
    let mut large = Client::connect(&place.nbd());
    large.send(CMD_READ, 9, 0, 32 << 20);
    // Its own share is enough for this, also behind one that waits, and for as long as it takes.
    let mut small = Client::connect(&place.nbd());
    let data = vec![7; 2 << 20];
    let mut rounds = 0;
    while !page(&registry).contains("stuck_clients_total{volume=\"disk0\",thread=\"nbd\"} 2") {
        small.write(rounds, 0, &data);
        assert_eq!(small.reply(), (rounds, 0));
        rounds += 1;
        assert!(rounds < 100_000, "nobody is told of the paused clients");
    }
    assert_eq!(asked_for(&place, 32 << 20), 0, "there is no memory for it");
    for client in &mut paused {
        for _ in 0..4 {
            assert_eq!(client.reply(), (1, 0));
            let mut data = vec![0; 8 << 20];
            client.stream.read_exact(&mut data).expect("was not cut");
        }
    }
    assert_eq!(large.reply(), (9, 0));
}

#[test]
fn a_large_request_gets_its_turn_among_many_busy_clients() {
    let place = Place::new();
    // The link is not what it waits for.
    place.gateway.lock().bytes_max = 1 << 30;
    place.gateway.lock().manner = Manner::Hold;
    place.gateway.listen();
    let mut nebd = place.spawn();
    nebd.wait_ready().expect("no error").expect("is ready");
    let mut busy: Vec<_> = (0..40).map(|_| Client::connect(&place.nbd())).collect();
    for client in &mut busy {
        client.send(CMD_READ, 1, 0, 1 << 20);
    }
    place.gateway.wait("all are busy", |control| control.received.len() == 40);
    let mut large = Client::connect(&place.nbd());
    large.send(CMD_READ, 2, 0, 32 << 20);
    place.gateway.wait("the large one came", |control| control.received.len() == 41);
}

#[test]
fn a_client_that_must_read_first_does_not_hold_its_turn() {
    let (place, _nebd) = Place::serving();
    let _greedy = [greedy(&place, 4), greedy(&place, 3)];
    place.gateway.wait("both hold what they may", |control| control.received.len() == 7);
    let mut behind = Client::connect(&place.nbd());
    // Comes with the first, so that it waits for memory before there is anything to read.
    let both = [request(CMD_READ, 1, 0, 8 << 20), request(CMD_READ, 2, 0, 20 << 20)].concat();
    behind.stream.write_all(&both).expect("writes");
    place.gateway.wait("its first came", |control| control.received.len() == 8);
    let mut other = Client::connect(&place.nbd());
    assert!(other.read(3, 0, 4 << 20) == vec![0; 4 << 20]);
}

#[test]
fn what_dropped_clients_asked_for_counts_until_it_is_answered() {
    let (place, _nebd) = Place::serving();
    let gateway = &place.gateway;
    gateway.lock().manner = Manner::Hold;
    for count in 1..=5 {
        let mut dropped = Client::connect(&place.nbd());
        dropped.write(1, 0, &vec![1; 8 << 20]);
        gateway.wait("the write came", |control| control.received.len() == count);
    }
    gateway.lock().manner = Manner::Answer;
    let _greedy: Vec<_> = (0..4).map(|_| greedy(&place, 50)).collect();
    gateway.wait("the rest is used up", |control| control.received.len() >= 8);
    let mut polite = Client::connect(&place.nbd());
    for cookie in 0..20 {
        assert_eq!(polite.read(cookie, 4096, 4096), vec![0; 4096]);
    }
    // 24 MiB are left, and 2 MiB for each of the four.
    let reads = asked_for(&place, 8 << 20) - 5;
    assert!((3..=4).contains(&reads), "reads={reads}");
    // Answered by the next gateway, to nobody, they are gone.
    gateway.kill();
    gateway.listen();
    assert!(polite.read(1, 0, 2 << 20) == vec![1; 2 << 20], "what they wrote was replayed");
}
