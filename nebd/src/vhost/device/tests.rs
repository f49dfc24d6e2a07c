use super::*;
use crate::vhost::memory::RegionPlace;
use crate::vhost::message::decode;
use crate::vhost::order::QueueStart;
use proptest::prelude::*;
use rustix::event::EventfdFlags;
use rustix::fs::MemfdFlags;
use spline_link::VolumeTraits;
use spline_types::{BlockSize, Geometry};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

const SHAPE: Shape = Shape { queues: 4, queue_size_max: 256 };
const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7f00_0000_0000;
const BYTES: u64 = 1 << 20;
const SIZE: u16 = 16;
const MODERN: u64 = config::VERSION_1 | config::PROTOCOL;
const SET_OWNER: u32 = 3;

fn export() -> Export {
    Export {
        name: "disk0".into(),
        description: String::new(),
        geometry: Geometry { size: 1 << 30, block_size: BlockSize::B4096 },
        traits: VolumeTraits::default(),
        read_only: false,
    }
}

fn file(bytes: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&fd, bytes).expect("grows");
    fd
}

fn bell() -> OwnedFd {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd")
}

fn place(page: u64, bytes: u64) -> RegionPlace {
    RegionPlace {
        guest_address: GUEST + page * 4096,
        length: bytes,
        user_address: USER + page * 4096,
        offset: 0,
    }
}

/// Queue `queue`'s rings, a page for each.
fn addresses(queue: u32) -> QueueAddresses {
    let at = USER + u64::from(queue) * 3 * 4096;
    QueueAddresses { descriptors: at, available: at + 4096, used: at + 8192, used_log: None }
}

impl Device {
    fn fresh(held: bool) -> Self {
        Self::new(&export(), SHAPE, held)
    }

    /// A device whose front-end has accepted everything of the protocol, and has shared its memory.
    fn agreed(held: bool) -> Self {
        let mut device = Self::fresh(held);
        device.does(Request::SetFeatures(MODERN));
        device.does(Request::SetProtocolFeatures(config::PROTOCOL_FEATURES));
        device.does(Request::SetMemTable(vec![(place(0, BYTES), file(BYTES))]));
        device
    }

    fn say(&mut self, request: Request, need_reply: bool) -> Result<Turn, Refusal> {
        // The number matters only for requests with a reply of their own.
        let number = match &request {
            Request::GetFeatures => 1,
            Request::GetVringBase { .. } => 11,
            Request::GetConfig { .. } => 24,
            _ => SET_OWNER,
        };
        self.message(&Header { request: number, need_reply, payload: 0 }, request)
    }

    fn does(&mut self, request: Request) -> Turn {
        self.say(request, false).expect("is not refused")
    }

    fn refuses(&mut self, request: Request) -> Refusal {
        self.say(request, false).expect_err("is refused")
    }

    fn prepare(&mut self, queue: u32) {
        self.does(Request::SetVringNum(QueueNumber { queue, number: SIZE.into() }));
        self.does(Request::SetVringAddr { queue, addresses: addresses(queue) });
    }

    fn kicked(&mut self, queue: u32) -> Turn {
        self.does(Request::SetVringKick { queue, fd: Some(bell()) })
    }

    fn run(&mut self, queue: u32) -> QueueStart {
        self.prepare(queue);
        started(self.kicked(queue).orders)
    }
}

fn started(mut orders: Vec<Order>) -> QueueStart {
    match (orders.pop(), orders.is_empty()) {
        (Some(Order::Start(start)), true) => *start,
        other => panic!("one start, not {other:?} after {orders:?}"),
    }
}

fn number_of(turn: &Turn) -> u64 {
    match &turn.reply {
        Some(Reply { body: Body::Number(number), .. }) => *number,
        other => panic!("a number, not {other:?}"),
    }
}

fn base_of(reply: Option<&Reply>) -> u32 {
    match reply {
        Some(Reply { request: 11, body: Body::Base(base) }) => base.number,
        other => panic!("a base, not {other:?}"),
    }
}

#[test]
fn a_front_end_brings_it_up_as_qemu_does() {
    let mut device = Device::fresh(false);
    let offered = number_of(&device.does(Request::GetFeatures));
    assert_eq!(offered, config::features(&export()));
    device.does(Request::SetProtocolFeatures(config::PROTOCOL_FEATURES));
    device.does(Request::SetOwner);
    assert_eq!(number_of(&device.does(Request::GetQueueNum)), 4);
    assert_eq!(number_of(&device.does(Request::GetMaxMemSlots)), 509);
    device.does(Request::SetBackendReqFd(bell()));
    // Masked interrupts: a call comes long before anything else of the queue.
    device.does(Request::SetVringCall { queue: 1, fd: Some(bell()) });
    device.does(Request::SetVringErr { queue: 1, fd: Some(bell()) });
    device.does(Request::SetFeatures(offered & !config::LOG_ALL));
    let wish = InflightPlace { bytes: 0, offset: 0, queues: 4, queue_size: SIZE };
    let Some(Reply { body: Body::Inflight(region, fd), .. }) =
        device.does(Request::GetInflightFd(wish)).reply
    else {
        panic!("a region")
    };
    device.does(Request::SetInflightFd(region, fd));
    device.does(Request::SetMemTable(vec![(place(0, BYTES), file(BYTES))]));
    device.does(Request::SetVringBase(QueueNumber { queue: 1, number: 7 }));
    let start = device.run(1);
    assert_eq!((start.queue, start.size, start.next_available), (1, SIZE, 7));
    assert!(start.kick.is_some() && start.call.is_some() && start.error.is_some() && start.record.is_some());
    assert!(!start.enabled, "with protocol features queues start disabled");
    assert_eq!(start.features, offered & !config::LOG_ALL);
    let turn = device.does(Request::SetVringEnable { queue: 1, enabled: true });
    assert!(matches!(turn.orders[..], [Order::Enable { queue: 1, enabled: true }]));
    let turn = device.does(Request::SetVringCall { queue: 1, fd: Some(bell()) });
    assert!(matches!(turn.orders[..], [Order::Bell { queue: 1, bell: Bell::Call, fd: Some(_) }]));
}

#[test]
fn what_comes_too_early_is_refused_and_may_come_again() {
    let mut device = Device::fresh(false);
    let kick = |device: &mut Device| device.refuses(Request::SetVringKick { queue: 0, fd: Some(bell()) });
    assert!(matches!(kick(&mut device), Refusal::Early("size")));
    let early = device.refuses(Request::SetVringAddr { queue: 0, addresses: addresses(0) });
    assert!(matches!(early, Refusal::Early("size")));
    device.does(Request::SetVringNum(QueueNumber { queue: 0, number: SIZE.into() }));
    assert!(matches!(kick(&mut device), Refusal::Early("addresses")));
    device.does(Request::SetVringAddr { queue: 0, addresses: addresses(0) });
    assert!(matches!(kick(&mut device), Refusal::Early("memory")));
    device.does(Request::SetMemTable(vec![(place(0, BYTES), file(BYTES))]));
    started(device.kicked(0).orders);
}

#[test]
fn sizes_and_indexes_that_no_queue_has_are_refused() {
    let mut device = Device::agreed(false);
    for number in [0, 3, 257, 512, 1024, 65535, 65536, 65536 + 16, u32::MAX] {
        let refused = device.refuses(Request::SetVringNum(QueueNumber { queue: 0, number }));
        assert!(matches!(refused, Refusal::Size { .. }), "{number}");
    }
    for number in [1, 2, 256] {
        device.does(Request::SetVringNum(QueueNumber { queue: 0, number }));
    }
    let refused = device.refuses(Request::SetVringBase(QueueNumber { queue: 0, number: 65536 }));
    assert!(matches!(refused, Refusal::Base(65536)));
    for queue in [4, 255, 65536, u32::MAX] {
        let number = QueueNumber { queue, number: 16 };
        for request in [
            Request::SetVringNum(number),
            Request::SetVringBase(number),
            Request::SetVringAddr { queue, addresses: addresses(0) },
            Request::SetVringKick { queue, fd: Some(bell()) },
            Request::SetVringCall { queue, fd: Some(bell()) },
            Request::SetVringErr { queue, fd: None },
            Request::SetVringEnable { queue, enabled: true },
            Request::GetVringBase { queue },
        ] {
            assert!(matches!(device.refuses(request), Refusal::Queue { .. }));
        }
    }
}

#[test]
fn rings_outside_memory_or_misaligned_are_refused() {
    let good = addresses(0);
    for bad in [
        QueueAddresses { descriptors: good.descriptors + 8, ..good },
        QueueAddresses { used: good.used + 2, ..good },
        QueueAddresses { available: good.available + 1, ..good },
        QueueAddresses { used: USER + BYTES - 8, ..good },
        QueueAddresses { descriptors: GUEST, ..good },
        QueueAddresses { descriptors: u64::MAX - 15, ..good },
        QueueAddresses { descriptors: 0, used: 0, available: 0, used_log: None },
    ] {
        let mut device = Device::agreed(false);
        device.prepare(0);
        device.does(Request::SetVringAddr { queue: 0, addresses: bad });
        let refused = device.refuses(Request::SetVringKick { queue: 0, fd: Some(bell()) });
        assert!(matches!(refused, Refusal::Ring(_)), "{bad:?}");
        let mut device = Device::agreed(false);
        device.run(0);
        let refused = device.refuses(Request::SetVringAddr { queue: 0, addresses: bad });
        assert!(matches!(refused, Refusal::Ring(_)), "{bad:?} while it runs");
        device.does(Request::SetMemTable(vec![(place(0, BYTES), file(BYTES))]));
    }
}

#[test]
fn features_are_judged_and_do_not_change_under_a_queue() {
    let mut device = Device::agreed(false);
    assert!(matches!(device.refuses(Request::SetFeatures(1)), Refusal::Features(1)));
    assert!(matches!(device.refuses(Request::SetFeatures(u64::MAX)), Refusal::Features(_)));
    assert!(matches!(device.refuses(Request::SetProtocolFeatures(1 << 16)), Refusal::ProtocolFeatures(_)));
    device.does(Request::SetFeatures(MODERN));
    device.run(0);
    device.does(Request::SetFeatures(MODERN));
    let refused = device.refuses(Request::SetFeatures(MODERN | 1 << 28));
    assert!(matches!(refused, Refusal::Serving("features")));
    for refused in [
        device.refuses(Request::SetVringNum(QueueNumber { queue: 0, number: 8 })),
        device.refuses(Request::SetVringBase(QueueNumber { queue: 0, number: 8 })),
    ] {
        assert!(matches!(refused, Refusal::Serving(_)));
    }
}

#[test]
fn without_protocol_features_a_queue_starts_enabled() {
    let mut device = Device::fresh(false);
    device.does(Request::SetFeatures(config::VERSION_1));
    device.does(Request::SetMemTable(vec![(place(0, BYTES), file(BYTES))]));
    assert!(device.run(0).enabled);
    let mut device = Device::agreed(false);
    device.does(Request::SetVringEnable { queue: 0, enabled: true });
    assert!(device.run(0).enabled, "enabled before it was kicked");
}

#[test]
fn acknowledgements_are_sent_only_where_they_are_awaited() {
    let mut device = Device::fresh(false);
    let quiet = device.say(Request::SetOwner, true).expect("taken");
    assert!(quiet.reply.is_none(), "not negotiated");
    let quiet = device.say(Request::SetProtocolFeatures(config::PROTOCOL_FEATURES), true).expect("taken");
    assert!(quiet.reply.is_none(), "negotiated by this very message");
    assert_eq!(number_of(&device.say(Request::SetOwner, true).expect("taken")), 0);
    assert!(device.say(Request::SetOwner, false).expect("taken").reply.is_none());
    let refused = device.say(Request::SetFeatures(1), true).expect("told by a reply");
    assert_eq!(number_of(&refused), 1);
    assert!(matches!(refused.refused, Some(Refusal::Features(1))));
    // A reply of its own is the only one.
    assert_eq!(number_of(&device.say(Request::GetFeatures, true).expect("taken")), device.offered);
    assert!(device.say(Request::GetVringBase { queue: 9 }, true).is_err(), "no reply can say so");
}

#[test]
fn messages_of_features_that_were_not_negotiated_are_refused() {
    let mut device = Device::fresh(false);
    let wish = InflightPlace { bytes: 128, offset: 0, queues: 1, queue_size: 4 };
    for request in [
        Request::GetMaxMemSlots,
        Request::AddMemReg(place(0, 4096), file(4096)),
        Request::RemMemReg(place(0, 4096)),
        Request::GetInflightFd(wish),
        Request::SetInflightFd(wish, file(4096)),
        Request::ResetDevice,
        Request::SetBackendReqFd(bell()),
        Request::SetLogBase { bytes: 4096, offset: 0, fd: file(4096) },
        Request::GetConfig { offset: 0, bytes: 60, flags: 0 },
    ] {
        assert!(matches!(device.refuses(request), Refusal::NotNegotiated(_)));
    }
}

#[test]
fn a_queue_is_stopped_when_it_is_drained() {
    let mut device = Device::agreed(false);
    device.does(Request::SetVringBase(QueueNumber { queue: 2, number: 5 }));
    assert_eq!(base_of(device.does(Request::GetVringBase { queue: 2 }).reply.as_ref()), 5, "it never ran");
    device.run(2);
    let turn = device.does(Request::GetVringBase { queue: 2 });
    assert!(turn.reply.is_none() && matches!(turn.orders[..], [Order::Stop { queue: 2 }]));
    assert!(device.drained(1, 9).is_none(), "another queue");
    assert_eq!(base_of(device.drained(2, 77).as_ref()), 77);
    assert!(device.drained(2, 78).is_none(), "only once");
    let again = started(device.kicked(2).orders);
    assert_eq!(again.next_available, 77);
    assert!(again.call.is_none(), "descriptors went with the first start");
}

#[test]
fn memory_may_change_under_a_running_queue() {
    let mut device = Device::agreed(false);
    device.run(0);
    device.prepare(1);
    let turn = device.does(Request::AddMemReg(place(512, 4096), file(4096)));
    let [Order::Memory { memory, rings }] = &turn.orders[..] else { panic!("{turn:?}") };
    assert_eq!((memory.regions().len(), rings.len(), rings[0].0), (2, 1, 0));
    let overlap = device.refuses(Request::AddMemReg(place(512, 4096), file(4096)));
    assert!(matches!(overlap, Refusal::Memory(_)));
    let turn = device.does(Request::RemMemReg(place(512, 4096)));
    assert!(matches!(&turn.orders[..], [Order::Memory { memory, .. }] if memory.regions().len() == 1));
    let turn = device.does(Request::SetMemTable(vec![(place(0, BYTES), file(BYTES))]));
    assert!(matches!(turn.orders[..], [Order::Memory { .. }]));
}

#[test]
fn rings_stay_while_a_front_end_rearranges_the_memory_around_them() {
    // QEMU takes a region away and brings a larger one, message by message, while the firmware's queues run.
    let mut device = Device::agreed(false);
    let start = device.run(0);
    start.rings.used.store_u16(2, 0x77, Ordering::Release);
    let used = |turn: &Turn| match &turn.orders[..] {
        [Order::Memory { rings, .. }] => rings[0].1.used.load_u16(2, Ordering::Acquire),
        other => panic!("{other:?}"),
    };
    let turn = device.does(Request::RemMemReg(place(0, BYTES)));
    assert_eq!(used(&turn), 0x77, "still the old place");
    let turn = device.does(Request::AddMemReg(place(0, 2 * BYTES), file(2 * BYTES)));
    assert_eq!(used(&turn), 0, "the new one");
    let elsewhere = device.refuses(Request::SetVringAddr { queue: 0, addresses: addresses(1 << 20) });
    assert!(matches!(elsewhere, Refusal::Ring(_)));
}

#[test]
fn logging_is_switched_while_queues_run() {
    let mut device = Device::agreed(false);
    device.run(0);
    // One bit for each page up to the end of memory: 0x200 pages, 64 bytes.
    let log = |bytes| Request::SetLogBase { bytes, offset: 0, fd: file(4096) };
    assert!(matches!(device.refuses(log(63)), Refusal::LogSize(_)));
    assert!(matches!(device.refuses(log(4097)), Refusal::Log(_)));
    assert!(matches!(device.refuses(log(0)), Refusal::Log(_)));
    let turn = device.does(log(64));
    assert!(matches!(turn.reply, Some(Reply { request: 6, body: Body::Log { bytes: 64, .. } })));
    let is_logged = |turn: &Turn| match &turn.orders[..] {
        [Order::Memory { memory, .. }] => memory.is_logged(),
        other => panic!("{other:?}"),
    };
    assert!(!is_logged(&turn), "not asked for yet");
    assert!(is_logged(&device.does(Request::SetFeatures(MODERN | config::LOG_ALL))));
    let logged = QueueAddresses { used_log: Some(0x1234), ..addresses(0) };
    let turn = device.does(Request::SetVringAddr { queue: 0, addresses: logged });
    let [Order::Memory { rings, .. }] = &turn.orders[..] else { panic!("{turn:?}") };
    assert_eq!(rings[0].1.used_log, Some(0x1234));
    let larger = device.refuses(Request::AddMemReg(place(0x1000, 4096), file(4096)));
    assert!(matches!(larger, Refusal::LogSize(_)), "the log must grow first");
    assert!(!is_logged(&device.does(Request::SetFeatures(MODERN))));
    device.does(Request::AddMemReg(place(0x1000, 4096), file(4096)));
}

#[test]
fn an_inflight_region_belongs_to_queues_that_fit_it() {
    let mut device = Device::agreed(false);
    let wish = |queues, queue_size| InflightPlace { bytes: 0, offset: 0, queues, queue_size };
    for (queues, size) in [(0, 16), (17, 16), (4, 0), (4, 1025)] {
        assert!(matches!(device.refuses(Request::GetInflightFd(wish(queues, size))), Refusal::Inflight(_)));
    }
    let turn = device.does(Request::GetInflightFd(wish(1, SIZE)));
    let Some(Reply { body: Body::Inflight(region, fd), .. }) = turn.reply else { panic!("a region") };
    let short = InflightPlace { bytes: region.bytes - 1, ..region };
    let copy = || fd.try_clone().expect("duplicates");
    assert!(matches!(device.refuses(Request::SetInflightFd(short, copy())), Refusal::Inflight(_)));
    let past = InflightPlace { offset: 64, ..region };
    assert!(matches!(device.refuses(Request::SetInflightFd(past, copy())), Refusal::Inflight(_)));
    device.does(Request::SetInflightFd(region, copy()));
    device.prepare(1);
    let refused = device.refuses(Request::SetVringKick { queue: 1, fd: Some(bell()) });
    assert!(matches!(refused, Refusal::InflightShape { queue: 1, .. }), "the region has one queue");
    assert!(device.run(0).record.is_some());
    assert!(matches!(device.refuses(Request::SetInflightFd(region, copy())), Refusal::Serving(_)));
    assert!(matches!(device.refuses(Request::GetInflightFd(wish(1, SIZE))), Refusal::Serving(_)));
}

#[test]
fn a_reset_abandons_and_holds_what_comes_after() {
    let mut device = Device::agreed(false);
    assert!(device.does(Request::ResetDevice).orders.is_empty(), "nothing is served");
    device.does(Request::SetFeatures(MODERN));
    device.run(0);
    let turn = device.does(Request::ResetDevice);
    assert!(matches!(turn.orders[..], [Order::Abandon]));
    assert!(matches!(device.refuses(Request::SetVringKick { queue: 0, fd: None }), Refusal::Early("size")));
    device.prepare(0);
    assert!(device.kicked(0).orders.is_empty(), "held: the old requests may still be under way");
    let start = device.release().expect("starts");
    assert_eq!(started(start).features, 0, "features are negotiated anew");
    assert!(matches!(device.does(Request::ResetOwner).orders[..], [Order::Abandon]));
}

#[test]
fn a_held_queue_takes_changes_and_may_be_stopped() {
    let mut device = Device::agreed(true);
    device.prepare(0);
    device.does(Request::SetVringBase(QueueNumber { queue: 0, number: 3 }));
    assert!(device.kicked(0).orders.is_empty());
    assert!(device.does(Request::SetVringCall { queue: 0, fd: Some(bell()) }).orders.is_empty());
    assert!(device.does(Request::SetVringEnable { queue: 0, enabled: true }).orders.is_empty());
    assert!(device.does(Request::AddMemReg(place(512, 4096), file(4096))).orders.is_empty());
    assert!(device.does(Request::RemMemReg(place(0, BYTES))).orders.is_empty());
    assert!(device.does(Request::AddMemReg(place(0, BYTES), file(BYTES))).orders.is_empty());
    device.prepare(1);
    device.kicked(1);
    assert_eq!(base_of(device.does(Request::GetVringBase { queue: 0 }).reply.as_ref()), 3);
    let start = started(device.release().expect("starts"));
    assert_eq!((start.queue, start.memory.regions().len()), (1, 2), "the stopped one is not started");
    let start = started(device.kicked(0).orders);
    assert!(start.enabled && start.call.is_some());
}

#[test]
fn the_config_space_is_read_in_parts_and_never_written() {
    let mut device = Device::agreed(false);
    let part = |device: &mut Device, offset, bytes| match device
        .does(Request::GetConfig { offset, bytes, flags: 0 })
        .reply
    {
        Some(Reply { body: Body::Config { bytes, .. }, .. }) => bytes,
        other => panic!("a part, not {other:?}"),
    };
    let whole = part(&mut device, 0, 256);
    assert_eq!(whole[..8], (export().geometry.size / 512).to_le_bytes());
    assert_eq!(part(&mut device, 34, 2), [4, 0]);
    for (offset, bytes) in [(0, 257), (256, 1), (u32::MAX, 1), (1, u32::MAX), (u32::MAX, u32::MAX), (0, 0)] {
        assert!(part(&mut device, offset, bytes).is_empty(), "{offset}+{bytes}");
    }
    assert!(matches!(device.refuses(Request::SetConfig), Refusal::Config));
    assert!(!device.update(&export()));
    let mut larger = export();
    larger.geometry.size *= 2;
    assert!(device.update(&larger) && !device.update(&larger));
    assert_eq!(part(&mut device, 0, 8), (larger.geometry.size / 512).to_le_bytes());
    assert!(device.channel().is_none());
    device.does(Request::SetBackendReqFd(bell()));
    assert!(device.channel().is_some());
    device.does(Request::SetProtocolFeatures(config::PROTOCOL_BACKEND_REQ));
    assert!(device.channel().is_none(), "it can not ask for the config space");
}

/// What an arbitrary message brings.
#[derive(Clone, Copy, Debug)]
enum Brings {
    Nothing,
    Pipe,
    Memory,
}

type Words = (u32, Vec<u64>, Brings);

/// What a front-end says in one go: mostly sense, so that the rest meets a device at work.
fn scene() -> impl Strategy<Value = Vec<Words>> {
    let start = |queue: u64| {
        let at = USER + queue * 3 * 4096;
        vec![
            (8, vec![queue | 16 << 32], Brings::Nothing),
            (9, vec![queue, at, at + 8192, at + 4096, 0], Brings::Nothing),
            (12, vec![queue], Brings::Pipe),
        ]
    };
    prop_oneof![
        3 => (0..2u64).prop_map(start),
        1 => (0..2u64).prop_map(|queue| vec![(11, vec![queue], Brings::Nothing)]),
        1 => Just(vec![(34, Vec::new(), Brings::Nothing)]),
        6 => words().prop_map(|words| vec![words]),
    ]
}

fn words() -> impl Strategy<Value = Words> {
    let queue = prop_oneof![8 => 0..2u64, 1 => 2..6u64];
    let region = |page: u64, bytes: u64| vec![GUEST + page * 4096, bytes, USER + page * 4096, 0];
    let ring = prop_oneof![9 => (0..8u64).prop_map(|page| USER + page * 4096), 1 => any::<u64>()];
    prop_oneof![
        1 => (1..45u32).prop_map(|request| (request, Vec::new(), Brings::Nothing)),
        1 => prop_oneof![Just(MODERN), Just(MODERN | config::LOG_ALL), Just(0), any::<u64>()]
            .prop_map(|features| (2, vec![features], Brings::Nothing)),
        1 => prop_oneof![8 => Just(config::PROTOCOL_FEATURES), 1 => Just(8u64), 1 => any::<u64>()]
            .prop_map(|features| (16, vec![features], Brings::Nothing)),
        4 => Just((5, [vec![1], region(0, BYTES)].concat(), Brings::Memory)),
        1 => (0..4u64, 37..39u32).prop_map(move |(page, request)| {
            let message = [vec![0], region(page * 256, BYTES)].concat();
            (request, message, if request == 37 { Brings::Memory } else { Brings::Nothing })
        }),
        1 => (0..200u64).prop_map(|bytes| (6, vec![bytes, 0], Brings::Memory)),
        1 => (queue.clone(), prop_oneof![4 => Just(16u64), 1 => any::<u32>().prop_map(u64::from)], 8..12u32)
            .prop_filter("addresses have a message of their own", |(.., request)| *request != 9)
            .prop_map(|(queue, number, request)| (request, vec![queue | number << 32], Brings::Nothing)),
        4 => (queue.clone(), ring.clone(), ring.clone(), ring, any::<bool>()).prop_map(
            |(queue, descriptors, used, available, log)| {
                (9, vec![queue | u64::from(log) << 32, descriptors, used, available, 77], Brings::Nothing)
            }
        ),
        4 => (queue.clone(), 12..15u32).prop_map(|(queue, request)| (request, vec![queue], Brings::Pipe)),
        1 => (queue.clone(), 12..15u32).prop_map(|(queue, request)| (request, vec![queue | 256], Brings::Nothing)),
        1 => (queue, 0..3u64).prop_map(|(queue, on)| (18, vec![queue | on << 32], Brings::Nothing)),
        1 => Just((21, Vec::new(), Brings::Pipe)),
        1 => (0..6u64, 0..20u64, 31..33u32).prop_map(|(queues, size, request)| {
            let message = vec![BYTES, 0, queues | size << 16];
            (request, message, if request == 32 { Brings::Memory } else { Brings::Nothing })
        }),
    ]
}

/// What workers were told: which queues they have.
#[derive(Debug, Default)]
struct Told {
    running: BTreeSet<u16>,
    stopping: Option<u16>,
    abandoning: bool,
    /// Kept, as a worker keeps the descriptors in them.
    orders: Vec<Order>,
}

impl Told {
    fn take(&mut self, orders: Vec<Order>) {
        for order in orders {
            match &order {
                Order::Start(start) => {
                    assert!(!self.abandoning, "held while something is abandoned");
                    assert!(self.running.insert(start.queue), "started once");
                    assert!(start.size.is_power_of_two());
                }
                Order::Stop { queue } => {
                    assert!(self.running.contains(queue));
                    self.stopping = Some(*queue);
                }
                Order::Bell { queue, .. } | Order::Enable { queue, .. } => {
                    assert!(self.running.contains(queue))
                }
                Order::Memory { rings, .. } => {
                    assert!(!rings.is_empty() && rings.iter().all(|(queue, _)| self.running.contains(queue)));
                }
                Order::Abandon => {
                    self.running.clear();
                    self.abandoning = true;
                }
                other => panic!("not for a device: {other:?}"),
            }
            self.orders.push(order);
        }
    }
}

proptest! {
    /// `guest_cannot_crash_us`: any messages in any order leave workers with orders that make sense, and no descriptor is kept
    /// when everything is over.
    #[test]
    fn any_sequence_is_survived(
        scenes in prop::collection::vec((scene(), any::<bool>(), 0..4u8), 1..40),
        held in any::<bool>(),
    ) {
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let mut device = if held { Device::fresh(true) } else { Device::agreed(false) };
        let mut told = Told { abandoning: held, ..Told::default() };
        let messages = scenes
            .into_iter()
            .flat_map(|(scene, need_reply, pace)| scene.into_iter().map(move |words| (words, need_reply, pace)));
        for ((request, payload, brings), need_reply, pace) in messages {
            let mut bytes: Vec<u8> = [request, if need_reply { 9 } else { 1 }, 8 * payload.len() as u32]
                .iter()
                .flat_map(|word| word.to_ne_bytes())
                .collect();
            payload.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
            let fds = match brings {
                Brings::Nothing => Vec::new(),
                Brings::Pipe => vec![writer.try_clone().expect("duplicates")],
                Brings::Memory => vec![file(BYTES)],
            };
            if let Ok((header, request)) = decode(&bytes, fds)
                && let Ok(turn) = device.message(&header, request)
            {
                told.take(turn.orders);
            }
            // Control takes no message before a queue is stopped.
            if let Some(queue) = told.stopping.take() {
                told.running.remove(&queue);
                prop_assert!(device.drained(queue, 1).is_some());
            }
            if told.abandoning && pace == 0 {
                told.abandoning = false;
                told.take(device.release().expect("what was held can be started"));
            }
        }
        drop((device, told, writer));
        prop_assert_eq!(rustix::io::read(&reader, &mut [0; 1]).expect("end of file"), 0);
    }
}
