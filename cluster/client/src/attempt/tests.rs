//! Tests of the floor rule against a model of a copyset's fence.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const A: CopysetId = CopysetId::new(1);
const B: CopysetId = CopysetId::new(2);

#[test]
fn the_floor_is_the_oldest_attempt_of_the_copyset() {
    let mut ledger = Ledger::default();
    assert_eq!(ledger.begin(A), (Seq::new(1), Seq::new(1)));
    assert_eq!(ledger.begin(A), (Seq::new(2), Seq::new(1)));
    // Another copyset is not held back.
    assert_eq!(ledger.begin(B), (Seq::new(3), Seq::new(3)));
    ledger.end(A, Seq::new(1));
    assert_eq!(ledger.begin(A), (Seq::new(4), Seq::new(2)));
    ledger.end(A, Seq::new(2));
    ledger.end(A, Seq::new(4));
    assert_eq!(ledger.floor(A), Seq::new(5));
}

proptest! {
    /// Attempts never carry a floor above their own seq, floors never fall, and an attempt that is waited for is never
    /// below a floor that was handed out.
    #[test]
    fn floors_only_rise_and_spare_the_living(steps in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..200)) {
        let (mut ledger, mut live, mut highest) = (Ledger::default(), BTreeSet::new(), Seq::new(0));
        for (begin, which) in steps {
            if begin || live.is_empty() {
                let (seq, floor) = ledger.begin(A);
                live.insert(seq);
                prop_assert!(floor <= seq && floor >= highest);
                highest = floor;
                prop_assert!(live.iter().all(|&alive| alive >= highest));
            } else {
                let seq = *which.get(&live.iter().copied().collect::<Vec<_>>());
                live.remove(&seq);
                ledger.end(A, seq);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_attempt_is_settled_when_the_older_ones_have_ended() {
    let attempts = Attempts::new(Epoch::new(1));
    let older = attempts.begin(A);
    let abandoned = attempts.begin(A);
    let seq = abandoned.fence.seq;
    drop(abandoned);
    let mut settled = std::pin::pin!(attempts.settled(A, seq));
    tokio::select! {
        biased;
        () = &mut settled => panic!("the older attempt still holds the floor"),
        () = tokio::task::yield_now() => {}
    }
    // A younger one does not matter, nor does one of another copyset.
    let _younger = attempts.begin(A);
    let _elsewhere = attempts.begin(B);
    drop(older);
    settled.await;
    assert!(attempts.begin(A).fence.floor > seq);
}
