//! What waits to be written, in order, and the choice of what the next batch takes.
//!
//! Called by the log's state and the committer. Pure: knows no file and no lock.
//!
//! Order: the log holds records in the order in which they were queued. Only while the disk is full may a record pass
//! those of other groups that do not fit, and a purge also its own group's entries that it does not concern, because purges
//! are what makes room.
//!
//! `bounded`: while the disk is full, each record is looked at once and then set aside until there is room, and one pick
//! looks at [`LOOK_MAX`] at most: the log's lock is held meanwhile.

use std::collections::{HashMap, VecDeque};

use super::config::WalDone;
use super::format::{BATCH_HEADER, Record, SECTOR};
use crate::command::GroupId;

/// Records that one pick looks at while the disk is full.
const LOOK_MAX: usize = 1024;

/// A queued record.
pub(super) struct Op {
    pub(super) group: GroupId,
    pub(super) record: Record,
    /// The stamp of the entry's slot; 0 for other records.
    pub(super) stamp: u64,
    pub(super) done: WalDone,
    /// Bytes of the encoded record.
    pub(super) length: u64,
}

impl Op {
    pub(super) fn new(group: GroupId, record: Record, stamp: u64, done: WalDone) -> Op {
        let length = record.encoded_length() as u64;
        Op { group, record, stamp, done, length }
    }

    fn is_entry(&self) -> bool {
        matches!(self.record, Record::Entry(_))
    }
}

/// What the current segment can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// Bytes to the end of the segment.
    pub(super) bytes: u64,
    /// Of these, bytes kept for records other than entries: the purges that make room must always find some.
    pub(super) reserve: u64,
    /// Bytes after which a batch is closed.
    pub(super) batch: u64,
    /// Whether a next segment is ready.
    pub(super) can_roll: bool,
    /// No next segment can be made now: what fits may pass other groups' records that do not.
    pub(super) scarce: bool,
}

impl Room {
    fn fits(&self, op: &Op, used: u64) -> bool {
        let limit = if op.is_entry() { self.bytes.saturating_sub(self.reserve) } else { self.bytes };
        (used + op.length).next_multiple_of(SECTOR as u64) <= limit
    }
}

/// What to do next.
pub(super) enum Pick {
    /// Write these.
    Batch(Vec<Op>),
    /// Go to the next segment, then ask again.
    Roll,
    /// Ask again at once; others may use the lock before.
    Again,
    /// Wait: the queue is empty, or nothing in it fits.
    Nothing,
}

/// The queue.
#[derive(Default)]
pub(super) struct Queue {
    ops: VecDeque<Op>,
    bytes: u64,
    aside: Aside,
}

/// What was looked at while the disk is full and did not fit: in order, older than everything in the queue's `ops`.
#[derive(Default)]
struct Aside {
    ops: VecDeque<Op>,
    groups: HashMap<GroupId, HeldBack>,
    /// The room in which it did not fit.
    room: Option<Room>,
}

impl Aside {
    /// Whether what did not fit before does not fit into `room` either.
    fn stays(&self, room: Room) -> bool {
        let is_no_more = |before: &Room| room.bytes <= before.bytes && room.reserve >= before.reserve;
        room.scarce && !room.can_roll && self.room.as_ref().is_none_or(is_no_more)
    }

    fn add(&mut self, op: Op) {
        self.groups.entry(op.group).or_default().add(&op.record);
        self.ops.push_back(op);
    }
}

impl Queue {
    pub(super) fn push(&mut self, op: Op) {
        self.bytes += op.length;
        self.ops.push_back(op);
    }

    /// Records waiting.
    pub(super) fn records(&self) -> usize {
        self.aside.ops.len() + self.ops.len()
    }

    /// Bytes waiting.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Empties the queue (the log failed or closes).
    pub(super) fn drain(&mut self) -> Vec<Op> {
        self.bytes = 0;
        self.take_back();
        self.ops.drain(..).collect()
    }

    /// Takes the next batch.
    pub(super) fn pick(&mut self, room: Room) -> Pick {
        if !self.aside.stays(room) {
            self.take_back();
        }
        if !self.aside.ops.is_empty() {
            return self.pick_what_fits(room);
        }
        let mut used = BATCH_HEADER as u64;
        let mut taken = Vec::new();
        while let Some(op) = self.ops.front() {
            if !taken.is_empty() && used + op.length > room.batch {
                break;
            }
            if !room.fits(op, used) {
                match taken.is_empty() {
                    true if room.can_roll => return Pick::Roll,
                    true if room.scarce => return self.pick_what_fits(room),
                    _ => break,
                }
            }
            used += op.length;
            taken.extend(self.ops.pop_front());
        }
        self.finish(taken, used)
    }

    fn finish(&mut self, taken: Vec<Op>, used: u64) -> Pick {
        self.bytes -= used - BATCH_HEADER as u64;
        if taken.is_empty() { Pick::Nothing } else { Pick::Batch(taken) }
    }

    /// No room and no next segment: takes whatever fits without reordering a group, and sets the rest aside.
    fn pick_what_fits(&mut self, room: Room) -> Pick {
        self.aside.room = Some(room);
        let mut used = BATCH_HEADER as u64;
        let mut taken = Vec::new();
        for _ in 0..LOOK_MAX {
            let Some(op) = self.ops.pop_front() else { return self.finish(taken, used) };
            let may_pass = self.aside.groups.get(&op.group).is_none_or(|held| held.lets_pass(&op.record));
            if !may_pass || !room.fits(&op, used) {
                self.aside.add(op);
            } else if taken.is_empty() || used + op.length <= room.batch {
                used += op.length;
                taken.push(op);
            } else {
                // It fits, but the batch is closed.
                self.ops.push_front(op);
                return self.finish(taken, used);
            }
        }
        if taken.is_empty() { Pick::Again } else { self.finish(taken, used) }
    }

    /// There is room again: what was set aside is the front of the queue.
    fn take_back(&mut self) {
        let Aside { mut ops, .. } = std::mem::take(&mut self.aside);
        ops.append(&mut self.ops);
        self.ops = ops;
    }
}

/// Records of one group that stay in the queue while later ones are considered.
struct HeldBack {
    lowest_entry: u64,
    only_entries_and_votes: bool,
}

impl Default for HeldBack {
    fn default() -> Self {
        HeldBack { lowest_entry: u64::MAX, only_entries_and_votes: true }
    }
}

impl HeldBack {
    fn add(&mut self, record: &Record) {
        match record {
            Record::Entry(entry) => self.lowest_entry = self.lowest_entry.min(entry.index),
            Record::Vote(_) => {}
            Record::Truncate(_) | Record::Purge(..) | Record::Remove => self.only_entries_and_votes = false,
        }
    }

    fn lets_pass(&self, record: &Record) -> bool {
        matches!(record, Record::Purge(upto, _) if self.only_entries_and_votes && *upto < self.lowest_entry)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::wal::config::WalEntry;

    fn op(group: u32, record: Record) -> Op {
        Op::new(GroupId(group), record, 0, WalDone::Nobody)
    }

    fn entry(group: u32, index: u64, bytes: usize) -> Op {
        let header = Bytes::from(vec![0; bytes]);
        op(group, Record::Entry(WalEntry { index, header, ..WalEntry::default() }))
    }

    fn taken(pick: Pick) -> Vec<(u32, Record)> {
        match pick {
            Pick::Batch(ops) => ops.into_iter().map(|op| (op.group.0, op.record)).collect(),
            Pick::Roll | Pick::Again | Pick::Nothing => Vec::new(),
        }
    }

    #[test]
    fn rolls_when_the_next_record_does_not_fit_and_closes_batches_by_bytes() {
        let mut queue = Queue::default();
        (0..4).for_each(|index| queue.push(entry(1, index, 968)));
        let room = Room { bytes: 1 << 20, reserve: 0, batch: 2500, can_roll: true, scarce: false };
        assert_eq!(taken(queue.pick(room)).len(), 2);
        assert!(matches!(queue.pick(Room { bytes: 512, ..room }), Pick::Roll));
        assert_eq!(taken(queue.pick(room)).len(), 2);
        assert_eq!(queue.bytes(), 0);
        assert!(matches!(queue.pick(room), Pick::Nothing));
    }

    #[test]
    fn without_room_purges_pass_entries_they_do_not_concern_and_nothing_else_does() {
        let mut queue = Queue::default();
        let state = Bytes::from_static(b"s");
        queue.push(entry(1, 10, 4000));
        queue.push(op(1, Record::Vote(state.clone())));
        queue.push(op(1, Record::Purge(10, state.clone())));
        queue.push(op(2, Record::Vote(state.clone())));
        queue.push(entry(3, 7, 4000));
        queue.push(op(3, Record::Purge(6, state.clone())));
        queue.push(entry(4, 7, 4000));
        queue.push(op(4, Record::Truncate(7)));
        queue.push(op(4, Record::Purge(6, state.clone())));
        let room = Room { bytes: 4096, reserve: 2048, batch: 1 << 20, can_roll: false, scarce: true };
        let expected = vec![(2, Record::Vote(state.clone())), (3, Record::Purge(6, state))];
        assert_eq!(taken(queue.pick(room)), expected);
        assert!(matches!(queue.pick(room), Pick::Nothing));
        assert!(matches!(queue.pick(Room { scarce: false, ..room }), Pick::Nothing));
        let kept = taken(queue.pick(Room {
            bytes: 1 << 20,
            reserve: 0,
            batch: 1 << 20,
            can_roll: false,
            scarce: true,
        }));
        assert_eq!(kept.iter().map(|(group, _)| *group).collect::<Vec<_>>(), [1, 1, 1, 3, 4, 4, 4]);
        assert_eq!(queue.bytes(), 0);
    }

    const FULL: Room = Room { bytes: 4096, reserve: 2048, batch: 1 << 20, can_roll: false, scarce: true };

    #[test]
    fn a_full_disk_does_not_make_a_pick_walk_the_whole_queue() {
        let mut queue = Queue::default();
        let (entries, state) = (20 * LOOK_MAX as u64, Bytes::from_static(b"s"));
        (0..entries).for_each(|index| queue.push(entry(1, 10 + index, 4000)));
        queue.push(op(1, Record::Purge(9, state.clone())));
        let mut picks = 0;
        let purge = loop {
            match queue.pick(FULL) {
                Pick::Again => picks += 1,
                Pick::Batch(ops) => break taken(Pick::Batch(ops)),
                Pick::Roll | Pick::Nothing => unreachable!("the purge fits"),
            }
        };
        assert_eq!((purge, picks), (vec![(1, Record::Purge(9, state.clone()))], 20));
        assert!(matches!(queue.pick(FULL), Pick::Nothing));
        // What was looked at once is not looked at again.
        queue.push(op(1, Record::Purge(8, state.clone())));
        assert_eq!(taken(queue.pick(Room { bytes: 3584, ..FULL })), [(1, Record::Purge(8, state))]);
        assert_eq!(queue.records() as u64, entries);
        let again = taken(queue.pick(Room { bytes: 1 << 20, reserve: 0, batch: 1 << 20, ..FULL }));
        let is_in_order = |(index, (_, record)): (u64, &(u32, Record))| matches!(record, Record::Entry(entry) if entry.index == 10 + index);
        assert!(again.len() > 200 && (0..).zip(&again).all(is_in_order));
    }

    /// Records of one group, as raft makes them: entries in order, purges behind them, now and then a vote or a truncation.
    fn records() -> impl Strategy<Value = Vec<(u32, u8, usize)>> {
        proptest::collection::vec((0..3u32, 0..8u8, 0..3000usize), 1..60)
    }

    fn queue_of(records: &[(u32, u8, usize)]) -> VecDeque<Op> {
        let mut next = [10u64; 3];
        let state = Bytes::from_static(b"s");
        let make = |(group, kind, size): &(u32, u8, usize)| {
            let next = &mut next[*group as usize];
            let record = match kind {
                0 => Record::Vote(state.clone()),
                1 => Record::Purge(next.saturating_sub(1 + *size as u64 % 5), state.clone()),
                2 => {
                    *next -= (*size as u64 % 3).min(*next);
                    Record::Truncate(*next)
                }
                _ => {
                    *next += 1;
                    return entry(*group, *next - 1, *size);
                }
            };
            op(*group, record)
        };
        records.iter().map(make).collect()
    }

    /// Takes what fits into a full log, by one walk over the whole queue.
    fn walk(ops: &mut VecDeque<Op>, room: Room) -> (Vec<(u32, Record)>, u64) {
        let (mut used, mut taken) = (BATCH_HEADER as u64, Vec::new());
        let mut held_back: HashMap<GroupId, HeldBack> = HashMap::new();
        for op in std::mem::take(ops) {
            let may_pass = held_back.get(&op.group).is_none_or(|held| held.lets_pass(&op.record));
            if may_pass && room.fits(&op, used) {
                used += op.length;
                taken.push((op.group.0, op.record));
            } else {
                held_back.entry(op.group).or_default().add(&op.record);
                ops.push_back(op);
            }
        }
        (taken, used.next_multiple_of(SECTOR as u64))
    }

    proptest! {
        /// However the picks and the arrivals fall, what fits is taken and the rest keeps its order.
        #[test]
        fn what_fits_is_what_a_walk_over_all_finds(records in records(), cut in 0..60usize, sectors in 4..40u64) {
            let mut room = Room { bytes: sectors * 512, ..FULL };
            let (mut queue, mut all) = (Queue::default(), VecDeque::new());
            // The walk begins with what does not fit.
            queue.push(entry(9, 0, 1 << 20));
            all.push_back(entry(9, 0, 1 << 20));
            let split = || {
                let mut first = queue_of(&records);
                let second = first.split_off(cut.min(first.len()));
                [first, second]
            };
            for (arriving, again) in split().into_iter().zip(split()) {
                arriving.into_iter().for_each(|op| queue.push(op));
                all.extend(again);
                let (expected, used) = walk(&mut all, room);
                prop_assert_eq!(taken(queue.pick(room)), expected);
                room.bytes = room.bytes.saturating_sub(used);
            }
            let left = |op: Op| (op.group.0, op.record);
            let rest: Vec<_> = queue.drain().into_iter().map(left).collect();
            prop_assert_eq!(rest, all.into_iter().map(left).collect::<Vec<_>>());
        }
    }
}
