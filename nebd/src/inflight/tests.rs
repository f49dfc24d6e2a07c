//! The table against its invariants: `complete_once`, `replay_before_new`, `bounded`.

use super::*;
use proptest::prelude::*;
use spline_types::Fault;
use std::collections::BTreeSet;
use std::time::Duration;

const WIDE: Limits = Limits { requests: 64, bytes: 1 << 30 };

fn range(length: u64) -> ByteRange {
    ByteRange::new(0, length).expect("fits")
}

fn write(table: &mut Inflight<u32>, context: u32, now: Instant) -> RequestId {
    table.admit((BlockOp::Write, range(4096), false), context, now)
}

/// Contexts of what is sent.
fn send_all(table: &mut Inflight<u32>, window: Limits) -> Vec<u32> {
    std::iter::from_fn(|| table.next_to_send(window).map(|entry| entry.context)).collect()
}

#[test]
fn a_lost_link_replays_oldest_first_before_new() {
    let now = Instant::now();
    let mut table = Inflight::new(WIDE);
    let ids: Vec<_> = (1..=4).map(|context| write(&mut table, context, now)).collect();
    assert_eq!(send_all(&mut table, WIDE), [1, 2, 3, 4]);
    assert!(matches!(table.complete(ids[1], &Completion::Done(())), Outcome::Answer(_)));
    assert!(matches!(table.complete(ids[2], &Completion::Withdrawn), Outcome::Kept));
    assert!(matches!(table.complete(ids[2], &Completion::Done(())), Outcome::Unknown));
    assert_eq!(send_all(&mut table, WIDE), [] as [u32; 0], "withdrawn requests wait for the next link");
    // It gets the place of the second, and still comes last.
    write(&mut table, 9, now);
    assert_eq!(table.link_lost(), 3);
    assert_eq!(send_all(&mut table, WIDE), [1, 3, 4, 9]);
}

#[test]
fn what_was_withdrawn_is_sent_again_on_a_link_that_was_taken_over() {
    let now = Instant::now();
    let mut table = Inflight::new(WIDE);
    let ids: Vec<_> = (1..=4).map(|context| write(&mut table, context, now)).collect();
    assert_eq!(send_all(&mut table, WIDE), [1, 2, 3, 4]);
    for id in [ids[2], ids[0]] {
        assert!(matches!(table.complete(id, &Completion::Withdrawn), Outcome::Kept));
    }
    write(&mut table, 9, now);
    assert_eq!(table.renew(), 2);
    assert_eq!(send_all(&mut table, WIDE), [1, 3, 9], "the second and the fourth are still under way");
    assert!(matches!(table.complete(ids[3], &Completion::Done(())), Outcome::Answer(_)));
    assert_eq!(table.renew(), 0);
}

#[test]
fn a_request_that_takes_long_does_not_make_the_table_grow() {
    let now = Instant::now();
    let mut table = Inflight::new(WIDE);
    write(&mut table, 0, now);
    for context in 1..10_000 {
        let id = write(&mut table, context, now);
        send_all(&mut table, WIDE);
        assert!(matches!(table.complete(id, &Completion::Done(())), Outcome::Answer(_)));
    }
    assert!(table.places.len() == 2 && table.order.len() <= 32, "order={}", table.order.len());
    assert_eq!(table.drain().iter().map(|entry| entry.context).collect::<Vec<_>>(), [0]);
}

#[test]
fn limits_hold_but_one_request_always_fits() {
    let mut table = Inflight::new(Limits { requests: 2, bytes: 1000 });
    assert!(table.has_room(BlockOp::Write, range(5000)));
    write(&mut table, 0, Instant::now());
    assert!(!table.has_room(BlockOp::Read, range(1)));
    assert!(table.has_room(BlockOp::Flush, range(0)));
    table.admit((BlockOp::Flush, range(0), false), 1, Instant::now());
    assert!(!table.has_room(BlockOp::Flush, range(0)));
    assert_eq!(send_all(&mut table, Limits { requests: 1, bytes: 1 }), [0], "the link's window is one");
}

#[test]
fn waiting_requests_expire_oldest_first() {
    let start = Instant::now();
    let later = start + Duration::from_secs(10);
    let mut table = Inflight::new(WIDE);
    write(&mut table, 0, start);
    send_all(&mut table, WIDE);
    assert!(table.expire(start, later).is_none(), "it is on the link");
    table.link_lost();
    write(&mut table, 1, later);
    let down = start + Duration::from_secs(5);
    assert!(table.expire(down, start + Duration::from_secs(4)).is_none());
    assert_eq!(table.expire(down, down).map(|entry| entry.context), Some(0));
    assert!(table.expire(down, down).is_none());
    assert_eq!(send_all(&mut table, WIDE), [1]);
    assert_eq!(table.drain().iter().map(|entry| entry.context).collect::<Vec<_>>(), [1]);
    assert!(table.is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Admit,
    Send,
    Complete(usize),
    Fail(usize),
    Withdraw(usize),
    Lose,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Admit),
        3 => Just(Step::Send),
        2 => (0usize..8).prop_map(Step::Complete),
        1 => (0usize..8).prop_map(Step::Fail),
        1 => (0usize..8).prop_map(Step::Withdraw),
        1 => Just(Step::Lose),
    ]
}

proptest! {
    #[test]
    fn complete_once_and_replay_before_new(steps in proptest::collection::vec(step(), 0..200)) {
        let now = Instant::now();
        let limits = Limits { requests: 16, bytes: 40_000 };
        let mut table = Inflight::new(limits);
        let (mut open, mut on_link, mut last_sent) = (BTreeSet::new(), Vec::new(), 0);
        for step in steps {
            let completion = match step {
                Step::Fail(_) => Completion::Failed(Fault::Internal),
                Step::Withdraw(_) => Completion::Withdrawn,
                _ => Completion::Done(()),
            };
            match step {
                Step::Admit if table.has_room(BlockOp::Write, range(4096)) => {
                    open.insert(write(&mut table, 0, now));
                }
                Step::Admit => prop_assert!(open.len() >= 9),
                Step::Send => {
                    if let Some(entry) = table.next_to_send(Limits { requests: 4, bytes: 1 << 20 }) {
                        let id = entry.request.id;
                        prop_assert!(id.get() > last_sent, "order on one link");
                        last_sent = id.get();
                        on_link.push(id);
                        prop_assert!(on_link.len() <= 4);
                    }
                }
                Step::Complete(at) | Step::Fail(at) | Step::Withdraw(at) => {
                    if at < on_link.len() {
                        let id = on_link.remove(at);
                        match table.complete(id, &completion) {
                            Outcome::Answer(entry) => {
                                prop_assert_eq!(entry.request.id, id);
                                prop_assert!(open.remove(&id), "answered twice");
                            }
                            Outcome::Kept => prop_assert_eq!(&completion, &Completion::Withdrawn),
                            Outcome::Unknown => prop_assert!(false, "a sent request is known"),
                        }
                        prop_assert!(matches!(table.complete(id, &completion), Outcome::Unknown));
                    }
                }
                Step::Lose => {
                    table.link_lost();
                    on_link.clear();
                    last_sent = 0;
                }
            }
            prop_assert_eq!(table.len(), open.len());
        }
        table.link_lost();
        let left: Vec<_> = std::iter::from_fn(|| table.next_to_send(WIDE).map(|e| e.request.id)).collect();
        prop_assert_eq!(left, open.into_iter().collect::<Vec<_>>());
    }
}
