use super::*;
use crate::listener::Listener;
use crate::metrics::Families;
use crate::status_file::StatusFile;
use crate::vhost::gateway::Gateway;
use crate::vhost::memory::RegionPlace;
use crate::vhost::order::QueueStart;
use prometheus_client::registry::Registry;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use spline_link::{Identity, LinkVersion, Mode, VolumeTraits};
use spline_types::{BlockSize, Epoch, Geometry, OnUnavailable};
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;

/// How long a test waits for what must come.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it looks for what must not.
const GLANCE: Duration = Duration::from_millis(50);

const USER: u64 = 0x7f00_0000_0000;
const BYTES: u64 = 1 << 20;

fn is_readable(fd: BorrowedFd<'_>, wait: Duration) -> bool {
    let limit = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
    poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&limit)).expect("polls") > 0
}

fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd")
}

/// Control at work, with a test in the workers' place.
struct Rig {
    _dir: tempfile::TempDir,
    path: PathBuf,
    orders: Vec<Arc<Mailbox<Order>>>,
    reports: Arc<Mailbox<Report>>,
    stop: OwnedFd,
    serving: Receiver<Serving>,
    thread: JoinHandle<anyhow::Result<()>>,
    metrics: Metrics,
}

impl Rig {
    fn new(workers: usize) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("vhost.sock");
        let orders: Vec<_> = (0..workers).map(|_| Arc::new(Mailbox::new().expect("eventfd"))).collect();
        let (reports, stop) = (Arc::new(Mailbox::new().expect("eventfd")), eventfd());
        let (tell, serving) = channel();
        let families = Families::new(&mut Registry::default());
        let setup = Setup {
            export: Export {
                name: "disk0".into(),
                description: String::new(),
                geometry: Geometry { size: 0, block_size: BlockSize::B4096 },
                traits: VolumeTraits::default(),
                read_only: false,
            },
            device: CheckedVhost {
                socket: path.clone(),
                queues: 4,
                queue_size_max: 128,
                threads: workers as u16,
                serial: "serial".into(),
            },
            doors: VhostDoors {
                listener: Listener::unix(&path).expect("binds"),
                status: StatusFile::claim(dir.path(), Kind::Vhost, "disk0").expect("claims"),
            },
            hello: Gateway::hello(false),
            workers: orders.clone(),
            reports: Arc::clone(&reports),
            metrics: families.of("disk0", "vhost"),
            stop: stop.try_clone().expect("duplicates"),
            serving: tell,
        };
        let thread = std::thread::spawn(move || run(setup));
        let metrics = families.of("disk0", "vhost");
        Self { _dir: dir, path, orders, reports, stop, serving, thread, metrics }
    }

    /// One that serves.
    fn open(workers: usize) -> Self {
        let rig = Self::new(workers);
        rig.accept(1 << 30);
        let serving = rig.serving.recv_timeout(PATIENCE).expect("serves");
        assert_eq!(serving.uris, [rig.path.display().to_string()]);
        for worker in 1..workers {
            let hello = rig.join(worker);
            assert_eq!((hello.mode, hello.force), (Mode::Open, false));
            assert_eq!(hello.identity, Some(Identity::new(0, 7).expect("not zero")));
            assert_ne!(hello.instance, Gateway::hello(false).instance);
        }
        rig
    }

    /// A worker's gateway serves the volume.
    fn accept(&self, size: u64) {
        self.reports.put(Report::Accepted(Box::new(Accepted {
            version: LinkVersion::V3,
            features: 0,
            epoch: Epoch::new(1),
            identity: Identity::new(0, 7).expect("not zero"),
            geometry: Geometry { size, block_size: BlockSize::B4096 },
            traits: VolumeTraits::default(),
            on_unavailable: OnUnavailable::Wait,
            request_bytes_max: 32 << 20,
            requests_max: 1024,
            bytes_max: 64 << 20,
        })));
    }

    fn obeyed(&self, worker: usize, done: Done) {
        self.reports.put(Report::Obeyed { worker, done });
    }

    /// The next orders of a worker.
    fn told(&self, worker: usize) -> Vec<Order> {
        assert!(is_readable(self.orders[worker].bell(), PATIENCE), "worker {worker} is told nothing");
        self.orders[worker].take().into()
    }

    /// The next start, which is all that a worker is told.
    fn start(&self, worker: usize) -> QueueStart {
        match self.told(worker).pop() {
            Some(Order::Start(start)) => *start,
            other => panic!("a start, not {other:?}"),
        }
    }

    /// A worker opens the volume, which another has opened.
    fn join(&self, worker: usize) -> Hello {
        let Some(Order::Join(hello)) = self.told(worker).pop() else { panic!("not told to join") };
        self.obeyed(worker, Done::Other);
        *hello
    }

    fn is_told_nothing(&self, worker: usize) -> bool {
        !is_readable(self.orders[worker].bell(), GLANCE)
    }

    fn connect(&self) -> FrontEnd {
        let socket = UnixStream::connect(&self.path).expect("connects");
        socket.set_read_timeout(Some(PATIENCE)).expect("sets");
        FrontEnd(socket)
    }

    fn end(self) -> anyhow::Result<()> {
        rustix::io::write(&self.stop, &1u64.to_ne_bytes()).expect("writes");
        self.thread.join().expect("does not panic")
    }
}

/// A front-end that says what a test has it say.
struct FrontEnd(UnixStream);

impl FrontEnd {
    fn send(&mut self, request: u32, flags: u32, words: &[u64], fd: Option<&OwnedFd>) {
        let mut bytes: Vec<u8> =
            [request, flags, 8 * words.len() as u32].iter().flat_map(|word| word.to_ne_bytes()).collect();
        words.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().map(AsFd::as_fd).collect();
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL).expect("sends");
    }

    fn reply(&mut self) -> (u32, Vec<u8>) {
        let mut head = [0; 12];
        self.0.read_exact(&mut head).expect("a reply");
        let word = |at| u32::from_ne_bytes(head[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(word(4), 5, "version 1, a reply");
        let mut payload = vec![0; word(8) as usize];
        self.0.read_exact(&mut payload).expect("its payload");
        (word(0), payload)
    }

    fn number(&mut self, request: u32) -> u64 {
        let (number, payload) = self.reply();
        assert_eq!(number, request);
        u64::from_ne_bytes(payload.try_into().expect("eight bytes"))
    }

    fn ask(&mut self, request: u32) -> u64 {
        self.send(request, 1, &[], None);
        self.number(request)
    }

    /// Features, protocol features and a memory.
    fn agree(&mut self) {
        self.send(16, 1, &[crate::vhost::config::PROTOCOL_FEATURES], None);
        self.send(2, 1, &[1 << 32 | 1 << 30], None);
        let memory = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("memfd");
        rustix::fs::ftruncate(&memory, BYTES).expect("grows");
        let place = RegionPlace { guest_address: 0, length: BYTES, user_address: USER, offset: 0 };
        self.send(
            5,
            1,
            &[1, place.guest_address, place.length, place.user_address, place.offset],
            Some(&memory),
        );
    }

    fn start(&mut self, queue: u64) {
        self.send(8, 1, &[queue | 16 << 32], None);
        self.send(9, 1, &[queue, USER, USER + 8192, USER + 4096, 0], None);
        self.send(12, 1, &[queue], Some(&eventfd()));
    }

    fn is_closed(&mut self) -> bool {
        self.0.read(&mut [0; 1]).is_ok_and(|count| count == 0)
    }
}

#[test]
fn nobody_comes_before_the_volume_is_served() {
    let rig = Rig::new(1);
    assert!(UnixStream::connect(&rig.path).is_err());
    rig.accept(1 << 30);
    rig.serving.recv_timeout(PATIENCE).expect("serves");
    let mut front = rig.connect();
    assert_eq!(front.ask(17), 4, "queues");
    rig.end().expect("ends well");
}

#[test]
fn the_next_front_end_waits_until_the_first_is_gone() {
    let rig = Rig::open(1);
    let mut first = rig.connect();
    first.ask(1);
    let mut second = rig.connect();
    second.send(17, 1, &[], None);
    assert!(!is_readable(second.0.as_fd(), GLANCE));
    assert_eq!(first.ask(17), 4, "the first is served on");
    drop(first);
    assert_eq!(second.number(17), 4);
    assert_eq!(rig.metrics.connects.get(), 2);
    rig.end().expect("ends well");
}

#[test]
fn a_broken_message_closes_the_connection_and_nothing_else() {
    let rig = Rig::open(1);
    for (request, flags, words) in
        [(1, 0, vec![]), (1, 5, vec![]), (99, 1, vec![]), (2, 1, vec![1]), (8, 1, vec![]), (12, 1, vec![0])]
    {
        let mut front = rig.connect();
        front.send(request, flags, &words, None);
        assert!(front.is_closed(), "{request} {flags} {words:?}");
    }
    let mut front = rig.connect();
    front.send(16, 1, &[8], None);
    front.send(99, 9, &[], None);
    assert_eq!(front.number(99), 1, "an unknown request, and the front-end asked for an answer");
    front.send(2, 9, &[1], None);
    assert_eq!(front.number(2), 1);
    front.ask(1);
    assert_eq!((rig.metrics.protocol_errors.get(), rig.metrics.refused_messages.get()), (6, 2));
    rig.end().expect("ends well");
}

#[test]
fn queues_go_to_their_workers_which_have_joined_before() {
    let rig = Rig::open(2);
    let mut front = rig.connect();
    front.agree();
    front.start(0);
    assert_eq!(rig.start(0).queue, 0);
    front.start(3);
    assert_eq!(rig.start(1).queue, 3);
    front.start(1);
    assert_eq!(rig.start(1).queue, 1);
    rig.obeyed(1, Done::Started { queue: 1 });
    drop(front);
    let abandoned = |orders: Vec<Order>| matches!(orders[..], [Order::Abandon]);
    assert!(abandoned(rig.told(0)) && abandoned(rig.told(1)));
    rig.obeyed(0, Done::Abandoned);
    rig.obeyed(1, Done::Abandoned);
    rig.end().expect("ends well");
}

#[test]
fn a_new_front_end_is_served_when_nothing_is_left_of_the_old() {
    let rig = Rig::open(2);
    let mut old = rig.connect();
    old.agree();
    old.start(0);
    rig.start(0);
    drop(old);
    assert!(matches!(rig.told(0)[..], [Order::Abandon]));
    let mut new = rig.connect();
    new.agree();
    new.start(0);
    new.start(1);
    assert_eq!(new.ask(17), 4, "messages are taken");
    assert!(rig.is_told_nothing(0) && rig.is_told_nothing(1), "no_late_duplicate");
    rig.obeyed(0, Done::Abandoned);
    assert_eq!(rig.start(0).queue, 0);
    assert_eq!(rig.start(1).queue, 1);
    drop(new);
    rig.told(0);
    rig.told(1);
    rig.obeyed(0, Done::Abandoned);
    rig.obeyed(1, Done::Abandoned);
    rig.end().expect("ends well");
}

#[test]
fn a_base_is_told_when_the_queue_is_drained() {
    let rig = Rig::open(1);
    let mut front = rig.connect();
    front.agree();
    front.start(2);
    rig.start(0);
    front.send(11, 1, &[2], None);
    front.send(17, 1, &[], None);
    assert!(matches!(rig.told(0)[..], [Order::Stop { queue: 2 }]));
    assert!(!is_readable(front.0.as_fd(), GLANCE), "something is still open");
    rig.obeyed(0, Done::Stopped { queue: 2, next_available: 9 });
    let (request, payload) = front.reply();
    assert_eq!((request, payload), (11, [2u32.to_ne_bytes(), 9u32.to_ne_bytes()].concat()));
    assert_eq!(front.number(17), 4, "the message behind it");
    rig.end().expect("ends well");
}

#[test]
fn a_front_end_may_go_while_a_queue_is_drained() {
    let rig = Rig::open(1);
    let mut front = rig.connect();
    front.agree();
    front.start(2);
    rig.start(0);
    front.send(11, 1, &[2], None);
    rig.told(0);
    drop(front);
    assert!(matches!(rig.told(0)[..], [Order::Abandon]));
    let mut next = rig.connect();
    assert_eq!(next.ask(17), 4, "the stop is not waited for");
    rig.obeyed(0, Done::Abandoned);
    rig.end().expect("ends well");
}

#[test]
fn an_acknowledgement_comes_when_the_workers_have_obeyed() {
    let rig = Rig::open(1);
    let mut front = rig.connect();
    front.agree();
    front.start(0);
    rig.start(0);
    front.send(18, 9, &[1 << 32], None);
    assert!(matches!(rig.told(0)[..], [Order::Enable { queue: 0, enabled: true }]));
    assert!(!is_readable(front.0.as_fd(), GLANCE));
    rig.obeyed(0, Done::Other);
    assert_eq!(front.number(18), 0);
    front.send(34, 9, &[], None);
    assert!(matches!(rig.told(0)[..], [Order::Abandon]));
    assert!(!is_readable(front.0.as_fd(), GLANCE), "requests may still write into the guest's memory");
    rig.obeyed(0, Done::Abandoned);
    assert_eq!(front.number(34), 0);
    rig.end().expect("ends well");
}

#[test]
fn a_guest_is_told_of_a_new_size() {
    let rig = Rig::open(1);
    let mut front = rig.connect();
    front.agree();
    let (mut ours, theirs) = UnixStream::pair().expect("sockets");
    front.send(21, 9, &[], Some(&theirs.into()));
    assert_eq!(front.number(21), 0);
    rig.reports.put(Report::Resized { size: 2 << 30 });
    rig.accept(2 << 30);
    // Said by a gateway before it grew, to another worker.
    rig.accept(1 << 30);
    let mut message = [0; 12];
    ours.set_read_timeout(Some(PATIENCE)).expect("sets");
    ours.read_exact(&mut message).expect("is told");
    assert_eq!(message, crate::vhost::message::config_changed());
    front.send(24, 1, &[8 << 32, 0], None);
    assert!(front.is_closed(), "a config space with half a word too much");
    let mut front = rig.connect();
    front.send(16, 1, &[1 << 9], None);
    let mut bytes: Vec<u8> = [24u32, 1, 20, 0, 8, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend([0; 8]);
    std::io::Write::write_all(&mut front.0, &bytes).expect("sends");
    assert_eq!(front.reply().1[12..], (2u64 << 21).to_le_bytes(), "sectors");
    assert!(!is_readable(ours.as_fd(), GLANCE) || ours.read(&mut message).is_ok_and(|count| count == 0));
    rig.end().expect("ends well");
}

#[test]
fn a_lost_volume_is_wanted_back_by_the_next_front_end() {
    let rig = Rig::open(1);
    rig.reports.put(Report::Lost { worker: 0 });
    rig.accept(1 << 30);
    let mut front = rig.connect();
    assert!(matches!(rig.told(0)[..], [Order::Reopen]));
    rig.obeyed(0, Done::Other);
    assert_eq!(front.ask(17), 4);
    rig.end().expect("ends well");
}

#[test]
fn a_stop_gives_open_requests_a_moment() {
    let rig = Rig::open(1);
    let mut front = rig.connect();
    front.agree();
    front.start(0);
    rig.start(0);
    rustix::io::write(&rig.stop, &1u64.to_ne_bytes()).expect("writes");
    assert!(matches!(rig.told(0)[..], [Order::Stop { queue: 0 }]));
    assert!(!rig.thread.is_finished());
    rig.obeyed(0, Done::Stopped { queue: 0, next_available: 0 });
    rig.thread.join().expect("does not panic").expect("ends well");
    assert!(!rig.path.exists(), "the socket is removed");
    assert!(front.is_closed());
}

#[test]
fn it_ends_with_a_worker_that_can_not_go_on() {
    let rig = Rig::new(1);
    rig.reports.put(Report::Ended(Err(anyhow::anyhow!("no such volume"))));
    let error = rig.thread.join().expect("does not panic").expect_err("ends");
    assert_eq!(error.to_string(), "no such volume");
}

#[test]
fn the_log_is_not_the_front_ends_to_fill() {
    let mut lines = Lines::default();
    let start = Instant::now();
    assert_eq!(lines.allow(start), Some(0));
    assert_eq!((lines.allow(start), lines.allow(start + LINE_EVERY / 2)), (None, None));
    assert_eq!(lines.allow(start + LINE_EVERY), Some(2));
}

#[test]
fn a_front_end_that_may_not_know_the_size_is_told_when_it_starts_a_queue() {
    let rig = Rig::open(1);
    for reads in [true, false] {
        let mut front = rig.connect();
        front.agree();
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        front.send(21, 1 | 8, &[], Some(&theirs.into()));
        assert_eq!(front.number(21), 0);
        if reads {
            // Offset 0, 60 bytes, no flags, and room for them.
            front.send(24, 1, &[60 << 32, 0, 0, 0, 0, 0, 0, 0, 0], None);
            assert_eq!(front.reply().0, 24);
        }
        front.start(0);
        rig.start(0);
        // QEMU reads the space when it makes its device, not when it connects again.
        assert_eq!(is_readable(ours.as_fd(), if reads { GLANCE } else { PATIENCE }), !reads);
        drop(front);
        rig.told(0);
        rig.obeyed(0, Done::Abandoned);
    }
    rig.end().expect("ends well");
}

#[test]
fn more_messages_than_a_turn_takes_are_all_answered() {
    let rig = Rig::open(1);
    let mut front = rig.connect();
    front.agree();
    let count = 3 * MESSAGES_PER_TURN;
    // They lie there before the first is taken, so that one turn could take them all.
    (0..count).for_each(|_| front.send(17, 1, &[], None));
    for _ in 0..count {
        assert_eq!(front.reply().0, 17);
    }
    rig.end().expect("ends well");
}
