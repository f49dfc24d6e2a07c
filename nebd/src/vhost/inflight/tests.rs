use super::*;
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::rc::Rc;

const SIZE: u16 = 8;
/// Where the simulated used index lies: behind the part.
const USED: u64 = part_bytes(SIZE);

/// Memory that survives, written by a process that dies after a number of stores.
#[derive(Clone, Debug)]
struct Mortal {
    bytes: Rc<RefCell<Vec<u8>>>,
    stores_left: Rc<RefCell<usize>>,
}

impl Mortal {
    fn new(bytes: Vec<u8>, stores: usize) -> Self {
        Self { bytes: Rc::new(RefCell::new(bytes)), stores_left: Rc::new(RefCell::new(stores)) }
    }

    fn store(&self, at: u64, value: &[u8]) {
        let mut left = self.stores_left.borrow_mut();
        if *left > 0 {
            *left -= 1;
            self.bytes.borrow_mut()[at as usize..at as usize + value.len()].copy_from_slice(value);
        }
    }

    fn load<const N: usize>(&self, at: u64) -> [u8; N] {
        self.bytes.borrow()[at as usize..at as usize + N].try_into().expect("N bytes")
    }

    fn lives(&self) -> bool {
        *self.stores_left.borrow() > 0
    }

    fn used(&self) -> u16 {
        self.load_u16(USED)
    }
}

impl Cells for Mortal {
    fn load_u8(&self, at: u64) -> u8 {
        self.load::<1>(at)[0]
    }
    fn load_u16(&self, at: u64) -> u16 {
        u16::from_ne_bytes(self.load(at))
    }
    fn load_u64(&self, at: u64) -> u64 {
        u64::from_ne_bytes(self.load(at))
    }
    fn store_u8(&mut self, at: u64, value: u8) {
        self.store(at, &[value]);
    }
    fn store_u16(&mut self, at: u64, value: u16) {
        self.store(at, &value.to_ne_bytes());
    }
    fn store_u64(&mut self, at: u64, value: u64) {
        self.store(at, &value.to_ne_bytes());
    }
    fn is_damaged(&self) -> bool {
        false
    }
}

/// What a queue does: fetch some, then answer some of those that are open, in any order.
#[derive(Clone, Debug)]
enum Step {
    Fetch(usize),
    Answer(Vec<usize>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let fetch = (1..4usize).prop_map(Step::Fetch);
    let answer = prop::collection::vec(0..16usize, 1..5).prop_map(Step::Answer);
    prop::collection::vec(prop_oneof![fetch, answer], 1..14)
}

/// Runs the steps until the process dies; answers the heads that are open according to what the guest sees, in the order in which
/// they were fetched.
fn run(cells: &mut Mortal, mut open: Vec<u16>, steps: &[Step]) -> Vec<u16> {
    let mut track = Track::new(cells.clone(), SIZE);
    let mut recovered = Vec::new();
    track.recover(cells.used(), &mut recovered).expect("an honest record");
    if !cells.lives() {
        return open;
    }
    assert_eq!(recovered, open);
    for step in steps {
        match step {
            Step::Fetch(count) => {
                for _ in 0..*count {
                    let Some(head) = (0..SIZE).find(|head| !open.contains(head)) else { break };
                    // The last of its stores decides.
                    let stores = *cells.stores_left.borrow();
                    track.fetched(head);
                    if stores >= 2 {
                        open.push(head);
                    }
                }
            }
            Step::Answer(picks) => {
                let mut left = open.clone();
                let mut batch = Vec::new();
                for pick in picks {
                    if !left.is_empty() {
                        batch.push(left.remove(pick % left.len()));
                    }
                }
                batch.iter().for_each(|head| track.batch(*head));
                let used = cells.used().wrapping_add(batch.len() as u16);
                if cells.lives() {
                    cells.store_u16(USED, used);
                    open.retain(|head| !batch.contains(head));
                }
                track.published(used);
            }
        }
        if !cells.lives() {
            break;
        }
    }
    open
}

proptest! {
    /// `complete_once`: wherever the process dies, again and again, exactly the unanswered come back, oldest first.
    #[test]
    fn exactly_the_unanswered_come_back(
        lives in prop::collection::vec((steps(), 0..60usize), 1..6),
        first_used in any::<u16>(),
    ) {
        let mut bytes = vec![0; USED as usize + 2];
        bytes[USED as usize..].copy_from_slice(&first_used.to_ne_bytes());
        let (mut open, mut fetched_once) = (Vec::new(), BTreeSet::new());
        for (steps, stores) in lives {
            let mut cells = Mortal::new(bytes, stores);
            open = run(&mut cells, open, &steps);
            fetched_once.extend(open.iter().copied());
            bytes = cells.bytes.borrow().clone();
        }
        let cells = Mortal::new(bytes, usize::MAX);
        let mut recovered = Vec::new();
        Track::new(cells.clone(), SIZE).recover(cells.used(), &mut recovered).expect("an honest record");
        prop_assert_eq!(&recovered, &open);
        prop_assert!(recovered.iter().all(|head| fetched_once.contains(head)));
    }

    /// `guest_cannot_crash_us`: whatever a region holds, recovery ends, and what it answers are heads of the queue, each once.
    #[test]
    fn any_bytes_are_survived(
        bytes in prop::collection::vec(any::<u8>(), USED as usize),
        honest_head in any::<bool>(),
        used in any::<u16>(),
        ahead in 0..=SIZE,
    ) {
        let mut bytes = bytes;
        if honest_head {
            bytes[..8].fill(0);
            bytes[8..10].copy_from_slice(&VERSION.to_ne_bytes());
            bytes[10..12].copy_from_slice(&SIZE.to_ne_bytes());
            bytes[12..14].copy_from_slice(&(used % SIZE).to_ne_bytes());
            bytes[14..16].copy_from_slice(&used.wrapping_sub(ahead).to_ne_bytes());
        }
        let mut out = Vec::new();
        let mut track = Track::new(Mortal::new(bytes, usize::MAX), SIZE);
        if track.recover(used, &mut out).is_ok() {
            let heads: BTreeSet<u16> = out.iter().copied().collect();
            prop_assert_eq!(heads.len(), out.len());
            prop_assert!(out.iter().all(|head| *head < SIZE));
            for head in 0..SIZE {
                track.fetched(head);
                track.batch(head);
            }
            track.published(used.wrapping_add(SIZE));
            track.recover(used.wrapping_add(SIZE), &mut out).expect("made good by use");
            prop_assert!(out.is_empty());
        }
    }
}

/// Every crash of one short life, store by store: the case by which the others are understood.
#[test]
fn each_store_may_be_the_last() {
    let steps = [Step::Fetch(3), Step::Answer(vec![1, 0]), Step::Fetch(2)];
    let mut seen = BTreeSet::new();
    for stores in 0..60 {
        let mut cells = Mortal::new(vec![0; USED as usize + 2], stores);
        let open = run(&mut cells, Vec::new(), &steps);
        let survivor = Mortal::new(cells.bytes.borrow().clone(), usize::MAX);
        let mut recovered = Vec::new();
        Track::new(survivor.clone(), SIZE)
            .recover(survivor.used(), &mut recovered)
            .expect("an honest record");
        assert_eq!(recovered, open, "died after {stores} stores");
        seen.insert(recovered);
    }
    assert!(seen.len() >= 5, "deaths at different times leave different things open: {seen:?}");
}

#[test]
fn a_record_lies_as_the_specification_says() {
    let (fd, bytes) = InflightRegion::create(2, 4).expect("creates");
    assert_eq!(bytes, 2 * 128);
    let region = Arc::new(InflightRegion::adopt(fd.as_fd(), (0, bytes), 2, 4).expect("adopts"));
    let mut record = region.queue(1, 4).expect("has queue 1");
    let mut open = Vec::new();
    assert_eq!(record.recover(7, &mut open).expect("fresh"), Recovered::Fresh);
    for head in [2, 0, 3] {
        record.fetched(head);
    }
    record.batch(3);
    record.batch(2);
    record.published(9);
    let mut seen = [0; 256];
    region.mapping.read(0, &mut seen);
    assert_eq!(seen[..128], [0; 128], "queue 0 was never started");
    #[rustfmt::skip]
    let expected: [u8; 80] = [
        0, 0, 0, 0, 0, 0, 0, 0,  1, 0,  4, 0,  2, 0,  9, 0,
        1, 0, 0, 0, 0, 0,  0, 0,  1, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0,  0, 0,  0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0,  3, 0,  0, 0, 0, 0, 0, 0, 0, 0,
        0, 0, 0, 0, 0, 0,  0, 0,  2, 0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(seen[128..208], expected);
    let again = Arc::new(InflightRegion::adopt(fd.as_fd(), (0, bytes), 2, 4).expect("adopts"));
    let mut record = again.queue(1, 4).expect("has queue 1");
    assert_eq!(record.recover(9, &mut open).expect("known"), Recovered::Known);
    assert_eq!(open, [0]);
}

#[test]
fn a_new_region_keeps_its_size() {
    let (fd, bytes) = InflightRegion::create(16, 1024).expect("creates");
    assert!(rustix::fs::ftruncate(&fd, 0).is_err());
    assert!(rustix::fs::ftruncate(&fd, bytes + 1).is_err());
}

#[test]
fn impossible_regions_are_refused() {
    for (queues, size) in [(0, 128), (17, 128), (1, 0), (1, 100), (1, 1025), (1, 2048), (u16::MAX, u16::MAX)]
    {
        assert!(matches!(InflightRegion::create(queues, size), Err(InflightError::Shape { .. })));
    }
    let (fd, bytes) = InflightRegion::create(1, 128).expect("creates");
    let adopt =
        |offset, bytes, queues, size| InflightRegion::adopt(fd.as_fd(), (offset, bytes), queues, size);
    assert!(matches!(adopt(0, bytes - 1, 1, 128), Err(InflightError::Small { .. })));
    assert!(matches!(adopt(0, u64::MAX, 2, 128), Err(InflightError::Map(MapError::PastFile { .. }))));
    assert!(matches!(adopt(64, bytes, 1, 128), Err(InflightError::Map(MapError::PastFile { .. }))));
    assert!(matches!(adopt(1, bytes, 1, 128), Err(InflightError::Map(_))));
    assert!(matches!(adopt(u64::MAX - 63, bytes, 1, 128), Err(InflightError::Map(MapError::Wraps { .. }))));
    let region = Arc::new(adopt(0, bytes, 1, 128).expect("adopts"));
    assert!(region.queue(1, 128).is_none() && region.queue(0, 256).is_none());
    assert!(region.queue(0, 64).is_some(), "a queue may be smaller than its part");
}

#[test]
fn a_region_that_makes_no_sense_breaks_its_queue() {
    let honest = || {
        let mut bytes = vec![0; USED as usize];
        bytes[8] = 1;
        bytes[10] = SIZE as u8;
        bytes
    };
    for (at, value, what) in
        [(0, 1, "features"), (8, 2, "version"), (10, 9, "descriptors"), (12, SIZE as u8, "last_batch_head")]
    {
        let mut bytes = honest();
        bytes[at] = value;
        let refused = Track::new(Mortal::new(bytes, usize::MAX), SIZE).recover(0, &mut Vec::new());
        assert!(refused.expect_err(what).to_string().contains(what));
    }
    let mut track = Track::new(Mortal::new(honest(), usize::MAX), SIZE);
    assert!(track.recover(SIZE + 1, &mut Vec::new()).expect_err("ahead").to_string().contains("batch"));
    let mut bytes = honest();
    // A list whose second entry is nowhere.
    bytes[(HEAD_BYTES + 6) as usize] = SIZE as u8;
    let mut track = Track::new(Mortal::new(bytes, usize::MAX), SIZE);
    assert!(track.recover(2, &mut Vec::new()).expect_err("nowhere").to_string().contains("next"));
}
