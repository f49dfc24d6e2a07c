//! Segments with right checksums and a content that no writer makes: refused, never followed, never a panic.

use crate::sim::{Image, SimDisk, config, open};
use bytes::Bytes;
use spline_raft::wal::aligned::AlignedBuffer;
use spline_raft::wal::format::{
    BatchHeader, NUMBER_MAX, Record, SEGMENT_HEADER, SegmentHeader, finish_batch, start_batch,
};
use spline_raft::wal::{WalEntry, WalError};
use spline_raft::{GroupId, LogCommand};

const LOG: u64 = 7;

/// A segment file of `generation` that holds one batch per header, each with one record.
fn segment(generation: u64, batches: &[(BatchHeader, Record)]) -> Vec<u8> {
    segment_of(LOG, generation, batches)
}

fn segment_of(log: u64, generation: u64, batches: &[(BatchHeader, Record)]) -> Vec<u8> {
    let bytes = config().segment_bytes;
    let mut file = SegmentHeader { log, generation, bytes }.encode().as_ref().to_vec();
    assert_eq!(file.len(), SEGMENT_HEADER);
    for (header, record) in batches {
        let mut buffer = AlignedBuffer::default();
        start_batch(&mut buffer);
        record.encode(GroupId(1), &mut buffer);
        finish_batch(&mut buffer, *header);
        file.extend_from_slice(buffer.as_ref());
    }
    file.resize(bytes as usize, 0);
    file
}

fn header(generation: u64, sequence: u64, oldest: u64) -> BatchHeader {
    BatchHeader { length: 0, records: 1, log: LOG, generation, sequence, oldest }
}

fn entry(index: u64) -> Record {
    let command = LogCommand { meta: Bytes::new(), payload: Bytes::from_static(b"payload") };
    Record::Entry(WalEntry { index, header: Bytes::new(), command })
}

fn image(segments: Vec<Vec<u8>>) -> Image {
    let named = |(at, bytes)| (format!("segment-{at:08}.wal"), bytes);
    segments.into_iter().enumerate().map(named).collect()
}

/// Recovery finds damage inside, and changes nothing.
fn is_refused(segments: Vec<Vec<u8>>) {
    let image = image(segments);
    let disk = SimDisk::new(image.clone());
    let outcome = open(&disk, config()).map(|(_, recovered)| recovered);
    assert!(matches!(outcome, Err(WalError::Corrupt { .. })), "{outcome:?}");
    assert!(disk.image() == image, "a refusal changed the files");
}

#[test]
fn a_batch_that_makes_its_own_segment_superfluous() {
    is_refused(vec![segment(1, &[(header(1, 1, 3), entry(1)), (header(1, 2, 3), entry(2))])]);
}

#[test]
fn a_floor_that_goes_back() {
    let second = [(header(2, 2, 1), entry(2)), (header(2, 3, 0), entry(3)), (header(2, 4, 0), entry(4))];
    is_refused(vec![segment(1, &[(header(1, 1, 1), entry(1))]), segment(2, &second)]);
}

#[test]
fn a_generation_of_two_segments() {
    let first = segment(0, &[(header(0, 1, 0), entry(1))]);
    let second = segment(0, &[(header(0, 2, 0), entry(2))]);
    is_refused(vec![first, second]);
}

/// The same file with a header that nobody can read.
fn without_header(mut file: Vec<u8>) -> Vec<u8> {
    file[0] ^= 1;
    file
}

/// Batches in a file without a header, and a header that names another log but has no batch to prove it: were that file
/// given up and deleted first, the next recovery would refuse what this one took.
#[test]
fn batches_that_only_an_empty_segment_says_are_of_another_log() {
    let foreign = without_header(segment(2, &[(header(2, 1, 0), entry(1))]));
    let empty = segment_of(LOG + 1, 1, &[]);
    is_refused(vec![empty, foreign.clone()]);
    // Of another size than configured: this one would be deleted at once.
    let small = SegmentHeader { log: LOG + 1, generation: 1, bytes: SEGMENT_HEADER as u64 }.encode();
    is_refused(vec![small.as_ref().to_vec(), foreign]);
}

/// A segment's recycling was torn. What lies in it are older batches of this log, and a guest's forgeries of any other.
#[test]
fn batches_that_are_proven_old_or_of_another_log_are_given_up() {
    let live = segment(9, &[(header(9, 5, 9), entry(1))]);
    let old = without_header(segment(2, &[(header(2, 1, 0), entry(1))]));
    let forged = BatchHeader { log: LOG + 1, ..header(12, 9, 9) };
    let foreign = without_header(segment(2, &[(forged, entry(1))]));
    let disk = SimDisk::new(image(vec![old, foreign, live]));
    for open_number in 0..3 {
        let (wal, recovered) = open(&disk, config()).expect("nothing is missing");
        assert_eq!(recovered[&GroupId(1)].next, 2, "open {open_number}");
        wal.close();
    }
}

#[test]
fn an_index_that_no_log_reaches() {
    for record in [entry(NUMBER_MAX + 1), entry(u64::MAX), Record::Purge(u64::MAX, Bytes::new())] {
        is_refused(vec![segment(1, &[(header(1, 1, 0), record), (header(1, 2, 0), entry(1))])]);
    }
}

#[test]
fn a_generation_or_sequence_that_no_log_reaches() {
    // Such a header is no header: nothing of this log is there, and the file is used anew.
    for generation in [NUMBER_MAX + 1, u64::MAX] {
        let strays = image(vec![segment(generation, &[(header(generation, 1, 0), entry(1))])]);
        let (_, recovered) = open(&SimDisk::new(strays), config()).expect("a file that is not ours");
        assert!(recovered.is_empty(), "{recovered:?}");
    }
    let far = segment(1, &[(header(1, u64::MAX, 0), entry(1))]);
    let (_, recovered) = open(&SimDisk::new(image(vec![far])), config()).expect("a log without batches");
    assert!(recovered.is_empty(), "{recovered:?}");
}
