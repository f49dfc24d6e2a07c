use super::*;
use crate::vhost::driver::{BASE, BUFFERS, BYTES, Driver, INDIRECT, NEXT, WRITE};
use crate::vhost::inflight::InflightRegion;
use proptest::prelude::*;
use std::os::fd::AsFd;

fn lengths(segments: &[Segment]) -> Vec<u32> {
    segments.iter().map(|segment| segment.length).collect()
}

#[test]
fn chains_come_out_as_they_were_put_in() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let mut chain = Chain::default();
    assert_eq!(queue.fetch(&mut chain), Ok(false));
    driver.chain(2, &[(BUFFERS, 16, false), (BUFFERS + 64, 100, false), (BUFFERS + 512, 7, true)]);
    driver.offer(2);
    assert_eq!(queue.fetch(&mut chain), Ok(true));
    assert_eq!((chain.head, lengths(&chain.readable), lengths(&chain.writable)), (2, vec![16, 100], vec![7]));
    assert_eq!((chain.readable_bytes, chain.writable_bytes, queue.open()), (116, 7, 1));
    assert_eq!(queue.fetch(&mut chain), Ok(false));
    // The same by an indirect table, which need not be aligned.
    let table: Vec<u8> = [
        Driver::descriptor_bytes(BUFFERS, 16, NEXT, 2),
        Driver::descriptor_bytes(0, 0, 0, 0),
        Driver::descriptor_bytes(BUFFERS + 512, 7, WRITE, 0),
    ]
    .concat();
    driver.put(BUFFERS + 0x1001, &table);
    driver.describe(0, BUFFERS + 0x1001, table.len() as u32, INDIRECT, 0);
    driver.offer(0);
    assert_eq!(queue.fetch(&mut chain), Ok(true));
    assert_eq!((chain.head, lengths(&chain.readable), lengths(&chain.writable)), (0, vec![16], vec![7]));
    queue.add_used(0, 1);
    queue.add_used(2, 8);
    assert_eq!(driver.used(), [], "not before it is published");
    assert!(queue.publish());
    assert_eq!(driver.used(), [(0, 1), (2, 8)]);
    assert_eq!((queue.open(), queue.next_available()), (0, 2));
}

#[test]
fn what_makes_no_sense_breaks_the_queue_and_nothing_else() {
    type Spoil = fn(&mut Driver);
    let cases: [(&str, Spoil); 14] = [
        ("available index", |d| d.set_available(9)),
        ("that is not there: head", |d| d.offer(8)),
        ("goes on", |d| d.describe(0, BUFFERS, 16, NEXT, 8)),
        ("more descriptors", |d| d.describe(0, BUFFERS, 16, NEXT, 0)),
        ("behind a writable", |d| d.chain(0, &[(BUFFERS, 1, true), (BUFFERS, 1, false)])),
        ("not in guest memory", |d| d.chain(0, &[(BASE - 1, 16, false)])),
        ("not in guest memory", |d| d.chain(0, &[(BASE + BYTES - 1, 2, false)])),
        ("not in guest memory", |d| d.chain(0, &[(u64::MAX - 3, 16, false)])),
        ("wrong size", |d| d.describe(0, BUFFERS, 17, INDIRECT, 0)),
        ("wrong size", |d| d.describe(0, BUFFERS, 0, INDIRECT, 0)),
        ("wrong size", |d| d.describe(0, BUFFERS, 16 * 1025, INDIRECT, 0)),
        ("indirect descriptor where", |d| {
            d.put(BUFFERS, &Driver::descriptor_bytes(BUFFERS, 16, INDIRECT, 0));
            d.describe(0, BUFFERS, 16, INDIRECT, 0);
        }),
        ("indirect descriptor where", |d| {
            d.describe(0, BUFFERS, 16, INDIRECT | NEXT, 1);
            d.describe(1, BUFFERS, 16, 0, 0);
        }),
        ("not in guest memory", |d| d.describe(0, BASE + BYTES, 16, INDIRECT, 0)),
    ];
    for (reason, spoil) in cases {
        let mut driver = Driver::new(8);
        let mut queue = driver.queue();
        spoil(&mut driver);
        driver.offer(0);
        if reason == "available index" {
            driver.set_available(9);
        }
        let why = queue.fetch(&mut Chain::default()).expect_err(reason);
        assert!(why.to_string().contains(reason), "{why}");
    }
}

#[test]
fn a_head_that_is_in_use_breaks_the_queue() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    driver.chain(0, &[(BUFFERS, 16, false)]);
    driver.offer(0);
    driver.offer(0);
    let mut chain = Chain::default();
    assert_eq!(queue.fetch(&mut chain), Ok(true));
    assert_eq!(queue.fetch(&mut chain), Err(QueueError::HeadInUse(0)));
}

#[test]
fn without_the_feature_indirect_tables_are_refused() {
    let mut driver = Driver::new(8);
    let mut queue = Queue::start(&mut driver.start(0)).expect("starts");
    driver.describe(0, BUFFERS, 16, INDIRECT, 0);
    driver.offer(0);
    assert_eq!(queue.fetch(&mut Chain::default()), Err(QueueError::Indirect(0)));
}

#[test]
fn notifications_are_suppressed_as_asked() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    driver.chain(0, &[(BUFFERS, 1, true)]);
    let mut chain = Chain::default();
    for quiet in [false, true] {
        driver.set_no_interrupt(quiet);
        driver.offer(0);
        queue.ignore();
        assert_eq!(driver.used_flags(), 1, "no kicks while we look anyhow");
        assert_eq!(queue.fetch(&mut chain), Ok(true));
        queue.add_used(0, 0);
        assert_eq!(queue.publish(), !quiet);
        assert!(!queue.publish(), "nothing new");
        assert!(!queue.listen());
        assert_eq!(driver.used_flags(), 0);
    }
    driver.offer(0);
    assert!(queue.listen(), "of what came before no kick will tell");
}

#[test]
fn a_queue_goes_on_where_the_process_before_left_it() {
    let (fd, length) = InflightRegion::create(1, 8).expect("creates");
    let region = || Arc::new(InflightRegion::adopt(fd.as_fd(), (0, length), 1, 8).expect("adopts"));
    let mut driver = Driver::new(8);
    let start = |driver: &Driver| {
        let mut start = driver.start(0);
        start.record = region().queue(0, 8);
        Queue::start(&mut start).expect("starts")
    };
    let mut queue = start(&driver);
    let mut chain = Chain::default();
    for head in [3, 1, 6, 2] {
        driver.chain(head, &[(BUFFERS, 16, false)]);
        driver.offer(head);
        assert_eq!(queue.fetch(&mut chain), Ok(true));
    }
    queue.add_used(1, 0);
    queue.publish();
    // Used, but the guest does not see it yet.
    queue.add_used(6, 0);
    driver.chain(5, &[(BUFFERS, 16, false)]);
    driver.offer(5);
    drop(queue);
    let mut queue = start(&driver);
    assert_eq!(queue.orphans(), 3);
    let mut heads = Vec::new();
    while queue.fetch(&mut chain) == Ok(true) {
        heads.push(chain.head);
    }
    assert_eq!(heads, [3, 6, 2, 5], "what was not answered, oldest first, then what is new");
    for head in heads {
        queue.add_used(head, 0);
    }
    queue.publish();
    assert_eq!(driver.used().iter().map(|(head, _)| *head).collect::<Vec<_>>(), [1, 3, 6, 2, 5]);
    assert_eq!(start(&driver).orphans(), 0);
}

proptest! {
    /// virtio 1.2, 2.7.7.2: a notification is due if the wanted index lies among those used since the last time.
    #[test]
    fn event_indexes_ask_for_the_right_notifications(batches in proptest::collection::vec((1u16..8, -3i32..10), 1..40)) {
        let mut driver = Driver::new(8);
        let mut queue = driver.queue_with_events();
        let (mut chain, mut total) = (Chain::default(), 0u16);
        for head in 0..8 {
            driver.chain(head, &[(BUFFERS, 1, true)]);
        }
        for (count, wish) in batches {
            let wanted = total.wrapping_add(wish as u16);
            driver.want(wanted);
            for head in 0..count {
                driver.offer(head);
            }
            prop_assert!(queue.listen());
            for head in 0..count {
                prop_assert_eq!(queue.fetch(&mut chain), Ok(true));
                queue.add_used(head, 0);
            }
            prop_assert!(!queue.listen());
            prop_assert_eq!(driver.wanted(), queue.next_available());
            prop_assert_eq!(queue.publish(), (0..count).any(|at| total.wrapping_add(at) == wanted));
            total = total.wrapping_add(count);
        }
        prop_assert_eq!(driver.used().last().map(|_| ()), Some(()));
    }

    /// Whatever the guest writes, fetching ends, and what comes out lies in its memory.
    #[test]
    fn any_bytes_are_survived(
        table in proptest::collection::vec((0..3u64, any::<u16>(), 0u16..8, 0u16..12), 16),
        heads in proptest::collection::vec(0u16..20, 0..8),
        indirect in proptest::collection::vec(any::<u8>(), 256),
    ) {
        let mut driver = Driver::new(16);
        let mut queue = driver.queue();
        driver.put(BUFFERS, &indirect);
        for (at, (place, length, flags, next)) in table.iter().enumerate() {
            let address = match place { 0 => BUFFERS, 1 => BASE + BYTES - 1000, _ => u64::MAX - 100 };
            driver.describe(at as u16, address, u32::from(*length), *flags, *next);
        }
        for head in heads {
            driver.offer(head);
        }
        let mut chain = Chain::default();
        while queue.fetch(&mut chain) == Ok(true) {
            for segment in chain.readable.iter().chain(&chain.writable) {
                prop_assert!(segment.offset + u64::from(segment.length) <= BYTES);
            }
        }
        prop_assert!(queue.open() <= 16);
    }
}
