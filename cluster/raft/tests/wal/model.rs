//! Random operations and power cuts against a model: what is recovered is the state after some prefix of the records
//! queued, and the prefix covers everything acknowledged.

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;
use proptest::prelude::*;
use spline_raft::wal::{Recovered, Wal, WalDone, WalEntry};
use spline_raft::{GroupId, LogCommand};
use tokio::sync::oneshot::Receiver;
use tokio::sync::oneshot::error::TryRecvError;

use crate::sim::{Image, SimDisk, config, open};

/// One record, as the log gets it.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Append(WalEntry),
    Vote(Bytes),
    Truncate(Option<u64>),
    Purge(u64, Bytes),
    Remove,
}

/// What a group should hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Group {
    pub(crate) vote: Option<Bytes>,
    pub(crate) purged: Option<(u64, Bytes)>,
    pub(crate) entries: Vec<WalEntry>,
}

impl Group {
    pub(crate) fn next(&self) -> u64 {
        let floor = self.purged.as_ref().map_or(0, |(upto, _)| upto + 1);
        self.entries.last().map_or(floor, |entry| entry.index + 1)
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Append(entry) => self.entries.push(entry.clone()),
            Step::Vote(vote) => self.vote = Some(vote.clone()),
            Step::Truncate(after) => self.entries.retain(|e| after.is_some_and(|after| e.index <= after)),
            // A purge older than the latest is void.
            Step::Purge(upto, _) if self.purged.as_ref().is_some_and(|(latest, _)| latest > upto) => {}
            Step::Purge(upto, state) => {
                self.entries.retain(|entry| entry.index > *upto);
                self.purged = Some((*upto, state.clone()));
            }
            Step::Remove => *self = Group::default(),
        }
    }
}

/// What the log should hold: groups that hold nothing are absent.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Model(pub(crate) BTreeMap<u32, Group>);

impl Model {
    pub(crate) fn step(&mut self, group: u32, step: &Step) {
        self.0.entry(group).or_default().step(step);
        self.0.retain(|_, group| *group != Group::default());
    }

    pub(crate) fn next(&self, group: u32) -> u64 {
        self.0.get(&group).map_or(0, Group::next)
    }

    /// Reads everything back from a log.
    pub(crate) fn of(wal: &Wal, recovered: &Recovered) -> Model {
        Model(recovered.keys().map(|group| (group.0, Model::group_of(wal, *group))).collect())
    }

    fn group_of(wal: &Wal, group: GroupId) -> Group {
        let log = wal.group(group).unwrap_or_default();
        let entries = wal.read(group, 0..u64::MAX, u64::MAX).unwrap();
        assert_eq!(entries.len() as u64, log.next - log.first);
        assert!((log.first..).zip(&entries).all(|(index, entry)| entry.index == index));
        Group { vote: log.vote, purged: log.purged, entries }
    }
}

pub(crate) fn entry(index: u64, bytes: usize, fill: u8) -> WalEntry {
    let meta = Bytes::from(vec![fill; bytes % 7]);
    let command = LogCommand { meta, payload: Bytes::from(vec![fill; bytes]) };
    WalEntry { index, header: Bytes::from(index.to_be_bytes().to_vec()), command }
}

/// A random operation; indexes are made to fit when it is carried out.
#[derive(Clone, Debug)]
enum Wish {
    Append { group: u32, count: u64, bytes: usize },
    Vote { group: u32, bytes: usize },
    Truncate { group: u32, back: u64 },
    Purge { group: u32, back: u64 },
    PurgeBeyond { group: u32, ahead: u64 },
    Remove { group: u32 },
    Wait,
    Compare,
}

fn wish() -> impl Strategy<Value = Wish> {
    let group = || 0..4u32;
    prop_oneof![
        12 => (group(), 1..5u64, 0..2500usize).prop_map(|(group, count, bytes)| Wish::Append { group, count, bytes }),
        2 => (group(), 0..80usize).prop_map(|(group, bytes)| Wish::Vote { group, bytes }),
        2 => (group(), 0..6u64).prop_map(|(group, back)| Wish::Truncate { group, back }),
        5 => (group(), 0..4u64).prop_map(|(group, back)| Wish::Purge { group, back }),
        1 => (group(), 0..20u64).prop_map(|(group, ahead)| Wish::PurgeBeyond { group, ahead }),
        1 => group().prop_map(|group| Wish::Remove { group }),
        3 => Just(Wish::Wait),
        2 => Just(Wish::Compare),
    ]
}

/// One life of a log: what was queued, record by record, and what was acknowledged of it.
struct Life {
    disk: SimDisk,
    wal: Wal,
    open: bool,
    start: Model,
    model: Model,
    steps: Vec<(u32, Step)>,
    /// Number of steps covered by an acknowledgement, with its receiver.
    waiting: Vec<(usize, Receiver<io::Result<()>>)>,
    acked: usize,
    dead: bool,
}

impl Life {
    fn begin(disk: SimDisk, wal: Wal, model: Model) -> Life {
        let (start, steps, waiting) = (model.clone(), Vec::new(), Vec::new());
        Life { disk, wal, open: true, start, model, steps, waiting, acked: 0, dead: false }
    }

    fn note(&mut self, group: u32, step: Step) {
        self.model.step(group, &step);
        self.steps.push((group, step));
    }

    fn done(&mut self) -> WalDone {
        let (done, receiver) = WalDone::oneshot();
        self.waiting.push((self.steps.len(), receiver));
        done
    }

    fn wish(&mut self, wish: &Wish) {
        match *wish {
            Wish::Append { group, count, bytes } => {
                let next = self.model.next(group);
                let fill = self.steps.len() as u8;
                let entries: Vec<_> = (next..next + count).map(|index| entry(index, bytes, fill)).collect();
                entries.iter().for_each(|entry| self.note(group, Step::Append(entry.clone())));
                let done = self.done();
                self.wal.append(GroupId(group), entries, done);
            }
            Wish::Vote { group, bytes } => {
                let vote = Bytes::from(vec![self.steps.len() as u8; bytes]);
                self.note(group, Step::Vote(vote.clone()));
                let done = self.done();
                self.wal.save_vote(GroupId(group), vote, done);
            }
            Wish::Truncate { group, back } => {
                let Some(held) = self.model.0.get(&group).filter(|held| !held.entries.is_empty()) else {
                    return;
                };
                let after =
                    held.next().checked_sub(back + 1).filter(|after| *after + 1 >= held.entries[0].index);
                self.note(group, Step::Truncate(after));
                let done = self.done();
                self.wal.truncate_after(GroupId(group), after, done);
            }
            Wish::Purge { group, back } => self.purge(group, self.model.next(group).checked_sub(back + 1)),
            Wish::PurgeBeyond { group, ahead } => self.purge(group, Some(self.model.next(group) + ahead)),
            Wish::Remove { group } => {
                self.note(group, Step::Remove);
                let done = self.done();
                self.wal.remove_group(GroupId(group), done);
            }
            Wish::Wait => self.settle(),
            Wish::Compare => self.compare(),
        }
    }

    fn purge(&mut self, group: u32, upto: Option<u64>) {
        if let Some(upto) = upto {
            let state = Bytes::from(format!("purged to {upto} in step {}", self.steps.len()));
            self.note(group, Step::Purge(upto, state.clone()));
            self.wal.purge(GroupId(group), upto, state);
        }
    }

    /// Waits for every acknowledgement under way; they come in order. Without power some never come while the log is open.
    fn settle(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting).into_iter();
        while let Some((steps, mut receiver)) = waiting.next() {
            loop {
                match receiver.try_recv() {
                    Ok(Ok(())) => {
                        assert!(!self.dead, "acknowledged after a failure");
                        self.acked = steps;
                        break;
                    }
                    Ok(Err(_)) => {
                        self.dead = true;
                        break;
                    }
                    Err(TryRecvError::Closed) => panic!("a record was never answered"),
                    Err(TryRecvError::Empty) if self.disk.is_off() && self.open => {
                        self.waiting = std::iter::once((steps, receiver)).chain(waiting).collect();
                        return;
                    }
                    Err(TryRecvError::Empty) => std::thread::yield_now(),
                }
            }
        }
    }

    fn close(&mut self) {
        self.wal.close();
        self.open = false;
        self.settle();
    }

    /// Queued records are readable at once.
    fn compare(&self) {
        if !self.wal.poisoned() {
            for group in 0..4 {
                let held = self.model.0.get(&group).cloned().unwrap_or_default();
                match self.wal.read(GroupId(group), 0..u64::MAX, u64::MAX) {
                    Ok(entries) => assert_eq!(entries, held.entries, "group {group}"),
                    Err(error) => panic!("group {group}: {error}"),
                }
            }
        }
    }

    /// The state after some prefix that covers what was acknowledged.
    fn check(&self, recovered: &Model) {
        let mut model = self.start.clone();
        let mut matches = self.acked == 0 && model == *recovered;
        for (at, (group, step)) in self.steps.iter().enumerate() {
            model.step(*group, step);
            matches |= at + 1 >= self.acked && model == *recovered;
        }
        assert!(matches, "no prefix past {} of {} fits {recovered:?}", self.acked, self.steps.len());
    }
}

/// Runs one life on the image and returns what the disk holds at its end.
fn live(image: Image, model: &mut Model, wishes: &[Wish], cut: Option<(u64, u64)>) -> Image {
    let disk = SimDisk::new(image);
    let (wal, recovered) = open(&disk, config()).expect("a crash is no corruption");
    assert_eq!(Model::of(&wal, &recovered), *model);
    if let Some((after, mask)) = cut {
        disk.cut_power(after, mask);
    }
    let mut life = Life::begin(disk.clone(), wal, model.clone());
    wishes.iter().for_each(|wish| life.wish(wish));
    if cut.is_some() {
        life.settle();
    }
    life.close();
    let image = disk.image();
    let (wal, recovered) = open(&SimDisk::new(image.clone()), config()).expect("a crash is no corruption");
    let recovered = Model::of(&wal, &recovered);
    if !life.dead && cut.is_none() {
        assert_eq!(recovered, life.model, "a clean end keeps everything");
    }
    life.check(&recovered);
    *model = recovered;
    image
}

proptest! {
    // Two threads race the test, so a seed does not replay a failure: none is kept.
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn recovery_equals_the_model_after_crashes(
        lives in prop::collection::vec(
            (prop::collection::vec(wish(), 1..120), prop::option::of((0..60u64, any::<u64>()))), 1..4),
    ) {
        let (mut image, mut model) = (Image::new(), Model::default());
        for (wishes, cut) in &lives {
            image = live(image, &mut model, wishes, *cut);
        }
    }
}

#[test]
fn a_long_life_recycles_its_segments() {
    let disk = SimDisk::new(Image::new());
    let (wal, _) = open(&disk, config()).unwrap();
    let group = GroupId(1);
    wal.save_vote(GroupId(9), Bytes::from_static(b"an idle group's vote"), WalDone::Nobody);
    for index in 0..600 {
        let (done, receiver) = WalDone::oneshot();
        wal.append(group, vec![entry(index, 900, 1)], done);
        receiver.blocking_recv().unwrap().unwrap();
        wal.purge(group, index, Bytes::from_static(b"p"));
    }
    wal.close();
    assert!(disk.image().len() <= 5, "{} files for a log of one entry", disk.image().len());
    let (_, recovered) = open(&SimDisk::new(disk.image()), config()).unwrap();
    assert_eq!(recovered[&GroupId(9)].vote.as_deref(), Some(b"an idle group's vote".as_slice()));
    assert_eq!(recovered[&group].next, 600);
}

#[test]
fn a_void_purge_does_not_stand_for_the_latest() {
    let disk = SimDisk::new(Image::new());
    let (wal, _) = open(&disk, config()).unwrap();
    let latest = Bytes::from_static(b"latest");
    wal.purge(GroupId(1), 30, latest.clone());
    // Into a later segment.
    for index in 0..16 {
        let (done, receiver) = WalDone::oneshot();
        wal.append(GroupId(2), vec![entry(index, 1000, 1)], done);
        receiver.blocking_recv().unwrap().unwrap();
    }
    wal.purge(GroupId(1), 1, Bytes::from_static(b"void"));
    // The first segment is needed no more but for the latest purge of group 1, which is written again.
    wal.purge(GroupId(2), 15, Bytes::new());
    wal.close();
    let (_, recovered) = open(&SimDisk::new(disk.image()), config()).unwrap();
    assert_eq!(recovered[&GroupId(1)].purged, Some((30, latest)));
}
