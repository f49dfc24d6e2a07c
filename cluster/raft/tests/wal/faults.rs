//! A disk that fails or runs full, and the limits of the log.

use std::io;
use std::sync::mpsc;
use std::thread;

use bytes::Bytes;
use futures_util::FutureExt as _;
use prometheus_client::registry::Registry;
use spline_raft::wal::disk::{Directory, WriteMode};
use spline_raft::wal::{Wal, WalConfig, WalDone, WalError};
use spline_raft::{GroupId, LogCommand};
use tokio::sync::oneshot::Receiver;

use crate::model::{Model, entry};
use crate::sim::{Image, SimDisk, config, open};

fn append(wal: &Wal, group: u32, index: u64, bytes: usize) -> Receiver<io::Result<()>> {
    let (done, receiver) = WalDone::oneshot();
    wal.append(GroupId(group), vec![entry(index, bytes, index as u8)], done);
    receiver
}

fn until(condition: impl Fn() -> bool) {
    while !condition() {
        thread::yield_now();
    }
}

#[test]
fn a_failed_write_poisons_for_good() {
    let disk = SimDisk::new(Image::new());
    let (wal, _) = open(&disk, config()).unwrap();
    append(&wal, 1, 0, 100).blocking_recv().unwrap().unwrap();
    disk.settle();
    assert!(wal.failed().now_or_never().is_none());
    disk.fail_next_write();
    append(&wal, 1, 1, 100).blocking_recv().unwrap().unwrap_err();
    assert!(wal.poisoned() && !wal.spare());
    let cause = wal.failed().now_or_never().expect("known before anybody is told");
    assert!(cause.contains("medium error"), "{cause}");
    let error = append(&wal, 1, 2, 100).blocking_recv().unwrap().unwrap_err();
    assert!(error.to_string().contains("medium error"), "{error}");
    let (done, receiver) = WalDone::oneshot();
    wal.save_vote(GroupId(1), Bytes::new(), done);
    receiver.blocking_recv().unwrap().unwrap_err();
    drop(wal);
    let (wal, recovered) = open(&SimDisk::new(disk.image()), config()).unwrap();
    let model = Model::of(&wal, &recovered);
    assert_eq!(model.0[&1].entries, [entry(0, 100, 0)]);
}

#[test]
fn a_full_disk_is_told_before_it_hurts_and_heals_by_itself() {
    let disk = SimDisk::new(Image::new());
    disk.set_room(3);
    let (wal, _) = open(&disk, config()).unwrap();
    let mut index = 0;
    while wal.spare() {
        append(&wal, 1, index, 1000).blocking_recv().unwrap().unwrap();
        index += 1;
    }
    // Entries that were under way still fit into the last segment.
    append(&wal, 1, index, 1000).blocking_recv().unwrap().unwrap();
    disk.set_room(4);
    until(|| wal.spare());
    append(&wal, 1, index + 1, 1000).blocking_recv().unwrap().unwrap();
}

#[test]
fn a_purge_makes_room_while_entries_wait_for_it() {
    let disk = SimDisk::new(Image::new());
    disk.set_room(3);
    let (wal, _) = open(&disk, config()).unwrap();
    let mut waiting: Vec<_> = (0..60).map(|index| append(&wal, 1, index, 1000)).collect();
    let (mut durable, mut purged) = (0, 0);
    // Three segments take some 25 of these; each purge of what is durable lets more in. One purge each: a queue of many
    // would be in the way.
    for (index, receiver) in waiting.drain(..).enumerate() {
        let mut receiver = receiver;
        loop {
            match receiver.try_recv() {
                Ok(outcome) => {
                    outcome.unwrap();
                    durable = index as u64;
                    break;
                }
                Err(_) => {
                    if !wal.spare() && durable > purged {
                        wal.purge(GroupId(1), durable, Bytes::from_static(b"p"));
                        purged = durable;
                    }
                    thread::yield_now();
                }
            }
        }
    }
    wal.close();
    let (wal, recovered) = open(&SimDisk::new(disk.image()), config()).unwrap();
    assert_eq!(Model::of(&wal, &recovered).next(1), 60);
}

#[test]
fn votes_find_room_when_entries_do_not() {
    let disk = SimDisk::new(Image::new());
    disk.set_room(2);
    let (wal, _) = open(&disk, config()).unwrap();
    let _waiting: Vec<_> = (0..60).map(|index| append(&wal, 1, index, 1000)).collect();
    until(|| !wal.spare());
    let (done, receiver) = WalDone::oneshot();
    wal.save_vote(GroupId(2), Bytes::from_static(b"v"), done);
    receiver.blocking_recv().unwrap().unwrap();
}

#[test]
fn the_groups_in_the_way_are_named() {
    let (wal, _) = open(&SimDisk::new(Image::new()), config()).unwrap();
    append(&wal, 7, 0, 10).blocking_recv().unwrap().unwrap();
    assert!(wal.pinning().is_empty());
    for index in 0..80 {
        append(&wal, 1, index, 1000).blocking_recv().unwrap().unwrap();
    }
    assert_eq!(wal.pinning(), [GroupId(1), GroupId(7)]);
    wal.purge(GroupId(1), 79, Bytes::new());
    until(|| wal.pinning() == [GroupId(7)]);
    wal.purge(GroupId(7), 0, Bytes::new());
    until(|| wal.pinning().is_empty());
}

#[test]
fn what_does_not_continue_the_log_or_fit_is_refused_alone() {
    let (wal, _) = open(&SimDisk::new(Image::new()), config()).unwrap();
    append(&wal, 1, 0, 10).blocking_recv().unwrap().unwrap();
    for refused in [append(&wal, 1, 2, 10), append(&wal, 1, 0, 10), append(&wal, 1, 1, 16 << 10)] {
        let error = refused.blocking_recv().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
    append(&wal, 1, 1, 10).blocking_recv().unwrap().unwrap();
    assert_eq!(wal.group(GroupId(1)).unwrap().next, 2);
}

#[test]
fn a_contradictory_configuration_is_refused() {
    let wrong = WalConfig { segment_bytes: 5000, ..config() };
    assert!(matches!(open(&SimDisk::new(Image::new()), wrong), Err(WalError::Config(_))));
}

#[test]
fn the_last_handle_may_die_on_the_committing_thread() {
    let disk = SimDisk::new(Image::new());
    let (wal, _) = open(&disk, config()).unwrap();
    let (sender, receiver) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    let inside = wal.clone();
    let done = WalDone::call(move |outcome| {
        gone.recv().unwrap();
        drop(inside);
        sender.send(outcome).unwrap();
    });
    wal.append(GroupId(1), vec![entry(0, 10, 0)], done);
    drop(wal);
    go.send(()).unwrap();
    receiver.recv().unwrap().unwrap();
}

#[test]
fn a_real_directory_in_every_write_mode() {
    for mode in [None, Some(WriteMode::BufferedSync), Some(WriteMode::DirectDsync)] {
        let dir = tempfile::tempdir().unwrap();
        let config = WalConfig { segment_bytes: 1 << 20, limit_bytes: 4 << 20, ..WalConfig::default() };
        let reopen = || {
            let disk = Directory::open_with(dir.path(), mode).unwrap();
            Wal::open_on(std::sync::Arc::new(disk), config.clone(), &mut Registry::default()).unwrap()
        };
        let (wal, recovered) = reopen();
        assert!(recovered.is_empty());
        let refused = Wal::open(dir.path(), config.clone(), &mut Registry::default());
        assert!(matches!(refused, Err(WalError::InUse(_))), "mode {mode:?}");
        let waiting: Vec<_> = (0..300).map(|index| append(&wal, 1, index, 4096)).collect();
        waiting.into_iter().for_each(|receiver| receiver.blocking_recv().unwrap().unwrap());
        drop(wal);
        let (wal, _) = reopen();
        let entries = wal.read(GroupId(1), 0..u64::MAX, u64::MAX).unwrap();
        assert!(entries.len() == 300 && (0..).zip(&entries).all(|(i, e)| *e == entry(i, 4096, i as u8)));
    }
}

#[test]
fn reads_are_bounded_but_never_empty_handed() {
    let (wal, _) = open(&SimDisk::new(Image::new()), config()).unwrap();
    let receivers: Vec<_> = (0..5).map(|index| append(&wal, 1, index, 1000)).collect();
    assert_eq!(wal.read(GroupId(1), 0..5, 1).unwrap().len(), 1);
    assert_eq!(wal.read(GroupId(1), 1..4, u64::MAX).unwrap().len(), 3);
    assert!(wal.read(GroupId(1), 5..9, 1).unwrap().is_empty());
    assert!(wal.read(GroupId(2), 0..9, 1).unwrap().is_empty());
    receivers.into_iter().for_each(|receiver| receiver.blocking_recv().unwrap().unwrap());
    let entry = wal.read(GroupId(1), 2..3, 1).unwrap().remove(0);
    assert_eq!(entry.command, LogCommand { ..crate::model::entry(2, 1000, 2).command });
}
