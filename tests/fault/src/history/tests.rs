//! The checker must find each kind of wrong history, and pass every right one.

use super::*;
use proptest::prelude::*;

#[test]
fn an_acknowledged_write_must_be_there() {
    let mut history = History::new(1);
    assert_eq!(history.begin_write(0), 1);
    history.acknowledged(0);
    assert!(history.clone().read(0, 1).is_ok());
    assert!(history.read(0, 0).expect_err("lost").contains("is lost"));
}

#[test]
fn a_write_without_an_answer_may_be_there_or_not() {
    for shown in [1, 2] {
        let mut history = History::new(1);
        history.begin_write(0);
        history.acknowledged(0);
        history.begin_write(0);
        history.lost(0);
        assert_eq!(history.read(0, shown), Ok(()));
        assert!(history.read(0, 3 - shown).is_err(), "what has been seen stays: {shown}");
    }
}

#[test]
fn a_late_write_must_not_undo_a_newer_one() {
    let mut history = History::new(1);
    history.begin_write(0);
    history.lost(0);
    history.begin_write(0);
    history.acknowledged(0);
    assert!(history.read(0, 1).is_err());
}

#[test]
fn a_write_that_was_never_sent_must_not_be_there() {
    assert!(History::new(1).read(0, 1).expect_err("invented").contains("never sent"));
}

proptest! {
    /// A register that behaves passes, whatever happens to the connection.
    #[test]
    fn every_right_history_passes(steps in proptest::collection::vec((0usize..3, 0u8..4), 0..200)) {
        let mut history = History::new(3);
        let mut disk = [0u64; 3];
        for (block, step) in steps {
            match step {
                0 => {
                    disk[block] = history.begin_write(block);
                    history.acknowledged(block);
                }
                1 => {
                    disk[block] = history.begin_write(block);
                    history.lost(block);
                }
                2 => {
                    history.begin_write(block);
                    history.lost(block);
                }
                _ => prop_assert_eq!(history.read(block, disk[block]), Ok(())),
            }
        }
    }
}
