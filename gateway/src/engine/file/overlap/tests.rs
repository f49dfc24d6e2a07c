//! Claims that meet, and those that only seem to.

use super::*;
use futures_util::FutureExt;
use proptest::prelude::*;

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).expect("fits")
}

#[test]
fn neighbours_in_a_page_wait_and_others_do_not() {
    let overlaps = Overlaps::default();
    let direct = overlaps.hold(range(4096, 4096), false).now_or_never().expect("free");
    let also = overlaps.hold(range(4096, 4096), false).now_or_never().expect("shared");
    overlaps.hold(range(0, 512), true).now_or_never().expect("another page");
    let mut small = Box::pin(overlaps.hold(range(8191, 1), true));
    assert!((&mut small).now_or_never().is_none());
    let mut later = Box::pin(overlaps.hold(range(4096, 4096), false));
    assert!((&mut later).now_or_never().is_none(), "no overtaking");
    drop(direct);
    assert!((&mut small).now_or_never().is_none());
    drop(also);
    let small = small.now_or_never().expect("its turn");
    assert!((&mut later).now_or_never().is_none());
    drop(small);
    later.now_or_never().expect("its turn");
}

#[test]
fn one_that_gives_up_waiting_blocks_nobody() {
    let overlaps = Overlaps::default();
    let first = overlaps.hold(range(0, 512), true).now_or_never().expect("free");
    let mut second = Box::pin(overlaps.hold(range(512, 512), true));
    let mut third = Box::pin(overlaps.hold(range(1024, 512), true));
    assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());
    drop(second);
    drop(first);
    third.now_or_never().expect("its turn");
}

proptest! {
    #[test]
    fn holds_never_conflict_and_all_are_served(
        claims in prop::collection::vec((0u64..6, 1u64..3, any::<bool>()), 1..40),
        order in prop::collection::vec(any::<prop::sample::Index>(), 80),
    ) {
        let overlaps = Overlaps::default();
        let mut waiting: Vec<_> = claims
            .iter()
            .map(|(page, pages, alone)| overlaps.hold(range(page * 4096, pages * 4096), *alone).boxed())
            .collect();
        let mut held = Vec::new();
        let mut picks = order.iter();
        for _ in 0..=claims.len() {
            waiting.retain_mut(|hold| match hold.now_or_never() {
                Some(hold) => { held.push(hold); false }
                None => true,
            });
            let table = overlaps.table();
            let now: Vec<Claim> = table.held.iter().flatten().copied().collect();
            drop(table);
            for (at, claim) in now.iter().enumerate() {
                prop_assert!(now[at + 1..].iter().all(|other| !other.conflicts(claim)));
            }
            if let (false, Some(pick)) = (held.is_empty(), picks.next()) {
                let at = pick.index(held.len());
                drop(held.swap_remove(at));
            }
        }
        held.clear();
        while !waiting.is_empty() {
            let before = waiting.len();
            waiting.retain_mut(|hold| hold.now_or_never().is_none());
            prop_assert!(waiting.len() < before, "somebody waits for ever");
        }
    }
}

#[test]
fn lanes_do_not_wait_and_are_waited_for() {
    let overlaps = Overlaps::default();
    let write = overlaps.claim(range(4096, 8192), true).expect("free");
    assert_eq!(overlaps.claim(range(8192, 512), false), None, "a page of the write's");
    let flush = overlaps.claim(range(0, 0), false).expect("meets nobody");
    let read = overlaps.claim(range(0, 4096), false).expect("free");
    let mut next = Box::pin(overlaps.hold(range(0, 8192), true));
    assert!((&mut next).now_or_never().is_none());
    assert_eq!(overlaps.claim(range(0, 512), false), None, "no overtaking");
    overlaps.release([write, read].into_iter());
    let next = next.now_or_never().expect("its turn");
    let closer = std::thread::spawn({
        let overlaps = overlaps.clone();
        move || overlaps.close()
    });
    while !overlaps.table().closed {
        std::thread::yield_now();
    }
    assert_eq!(overlaps.claim(range(1 << 30, 512), false), None, "closed");
    assert!(!closer.is_finished(), "a flush is under way");
    overlaps.release([flush].into_iter());
    assert!(closer.join().expect("ends"), "whoever waits by himself is not waited for");
    drop(next);
}

#[test]
fn what_is_never_given_back_ends_the_wait() {
    let overlaps = Overlaps::default();
    let _never = overlaps.claim(range(0, 4096), true).expect("free");
    let closer = std::thread::spawn({
        let overlaps = overlaps.clone();
        move || overlaps.close()
    });
    overlaps.abandon();
    assert!(!closer.join().expect("ends"));
}

proptest! {
    #[test]
    fn the_filter_never_hides_a_conflict_and_forgets_what_is_gone(
        claims in prop::collection::vec((0u64..1 << 20, 1u64..40_000, any::<bool>()), 1..20),
        asked in (0u64..1 << 20, 1u64..40_000, any::<bool>()),
    ) {
        let claim = |(page, pages, alone)| Claim::of(range(page * 4096, pages * 4096), alone);
        let mut filter = Filter::default();
        let asked = claim(asked);
        let held: Vec<Claim> = claims.into_iter().map(claim).collect();
        held.iter().for_each(|claim| filter.add(claim));
        if held.iter().any(|held| held.conflicts(&asked)) {
            prop_assert!(!filter.is_clear(&asked));
        }
        held.iter().for_each(|claim| filter.remove(claim));
        prop_assert!(filter.is_clear(&asked));
    }
}
