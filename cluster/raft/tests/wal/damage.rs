//! Damage to the bytes of a log: a torn tail is cut, anything else is reported and never cut.

use bytes::Bytes;
use spline_raft::wal::format::{BatchHeader, SEGMENT_HEADER};
use spline_raft::wal::{WalDone, WalError};
use spline_raft::{GroupId, LogCommand};

use crate::model::{Model, Step, entry};
use crate::sim::{Image, SimDisk, config, open};

/// A log of a few batches, each acknowledged, with the model after every one of them.
struct Sample {
    /// As it lies on the disk after the last acknowledgement.
    crashed: Image,
    /// The same after a clean close.
    closed: Image,
    models: Vec<Model>,
}

fn sample() -> Sample {
    let disk = SimDisk::new(Image::new());
    let (wal, _) = open(&disk, config()).unwrap();
    let mut models = vec![Model::default()];
    for round in 0..4u64 {
        let mut model = models.last().unwrap().clone();
        let entry = entry(round, 300 + 100 * round as usize, round as u8);
        model.step(1, &Step::Append(entry.clone()));
        let (done, receiver) = WalDone::oneshot();
        wal.append(GroupId(1), vec![entry], done);
        receiver.blocking_recv().unwrap().unwrap();
        models.push(model);
    }
    let crashed = disk.image();
    wal.close();
    Sample { crashed, closed: disk.image(), models }
}

/// The file with batches in it, and the offset and length of each.
fn batches(image: &Image) -> (String, Vec<(usize, usize)>) {
    let found = image.iter().map(|(name, bytes)| {
        let (mut at, mut found) = (SEGMENT_HEADER, Vec::new());
        while let Some(batch) = BatchHeader::decode(&bytes[at..]) {
            found.push((at, batch.length as usize));
            at += batch.length as usize;
        }
        (name.clone(), found)
    });
    found.max_by_key(|(_, found)| found.len()).unwrap()
}

fn recover(image: Image) -> Result<Model, WalError> {
    let (wal, recovered) = open(&SimDisk::new(image), config())?;
    Ok(Model::of(&wal, &recovered))
}

#[test]
fn a_tail_cut_at_any_byte_loses_only_the_last_batch() {
    let Sample { crashed, models, .. } = sample();
    let (name, batches) = batches(&crashed);
    assert_eq!(batches.len(), 4);
    let (start, length) = batches[3];
    for cut in start..start + length {
        let mut image = crashed.clone();
        let file = image.get_mut(&name).unwrap();
        let whole = file[cut..].iter().all(|byte| *byte == 0);
        file[cut..].fill(0);
        assert_eq!(recover(image).unwrap(), models[if whole { 4 } else { 3 }], "cut at {cut}");
    }
}

#[test]
fn a_cut_log_goes_on_and_forgets_what_was_cut() {
    let Sample { crashed, models, .. } = sample();
    let (name, batches) = batches(&crashed);
    let mut image = crashed;
    image.get_mut(&name).unwrap()[batches[3].0 + 100] ^= 1;
    let disk = SimDisk::new(image);
    let (wal, _) = open(&disk, config()).unwrap();
    let (done, receiver) = WalDone::oneshot();
    wal.append(GroupId(1), vec![entry(3, 10, 9)], done);
    receiver.blocking_recv().unwrap().unwrap();
    let mut model = models[3].clone();
    model.step(1, &Step::Append(entry(3, 10, 9)));
    assert_eq!(recover(disk.image()).unwrap(), model);
}

#[test]
fn any_flipped_bit_inside_is_reported_and_in_the_last_batch_cuts_it() {
    let Sample { crashed, models, .. } = sample();
    let (name, batches) = batches(&crashed);
    for (number, (start, length)) in batches.iter().enumerate() {
        // Every bit of the headers, and one bit of every byte of content.
        let bits = (0..length * 8).filter(|bit| *bit < 100 * 8 || bit % 8 == bit / 8 % 8);
        for bit in bits {
            let mut image = crashed.clone();
            image.get_mut(&name).unwrap()[start + bit / 8] ^= 1 << (bit % 8);
            match recover(image) {
                Ok(model) => assert_eq!((number, &model), (3, &models[3]), "bit {bit}"),
                Err(WalError::Corrupt { segment, offset }) => {
                    assert!(number < 3, "bit {bit}");
                    assert_eq!((segment, offset), (name.clone(), *start as u64), "bit {bit}");
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
}

#[test]
fn a_flipped_bit_of_the_segment_header_is_reported() {
    let Sample { crashed, models, .. } = sample();
    let (name, _) = batches(&crashed);
    for bit in 0..SEGMENT_HEADER * 8 {
        if bit >= 64 * 8 && bit % 97 != 0 {
            continue;
        }
        let mut image = crashed.clone();
        image.get_mut(&name).unwrap()[bit / 8] ^= 1 << (bit % 8);
        match recover(image) {
            Ok(model) => assert!(bit >= 64 * 8 && model == models[4], "bit {bit}"),
            Err(WalError::Corrupt { segment, .. }) => assert_eq!(segment, name, "bit {bit}"),
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn after_a_clean_close_damage_to_the_last_records_is_reported_too() {
    let Sample { closed, models, .. } = sample();
    let (name, batches) = batches(&closed);
    assert_eq!(batches.len(), 5);
    assert_eq!(recover(closed.clone()).unwrap(), models[4]);
    let mut image = closed;
    image.get_mut(&name).unwrap()[batches[3].0 + 90] ^= 4;
    assert!(matches!(recover(image), Err(WalError::Corrupt { .. })));
}

#[test]
fn a_missing_segment_inside_is_reported() {
    let disk = SimDisk::new(Image::new());
    let (wal, _) = open(&disk, config()).unwrap();
    for index in 0..40 {
        let (done, receiver) = WalDone::oneshot();
        wal.append(GroupId(1), vec![entry(index, 1500, 1)], done);
        receiver.blocking_recv().unwrap().unwrap();
    }
    wal.close();
    let image = disk.image();
    let last = batches(&image).0;
    let used: Vec<_> = image
        .iter()
        .filter(|(_, bytes)| BatchHeader::decode(&bytes[SEGMENT_HEADER..]).is_some())
        .map(|(name, _)| name.clone())
        .collect();
    assert!(used.len() > 4, "{last}");
    for name in &used[..used.len() - 1] {
        let mut image = image.clone();
        image.remove(name);
        assert!(matches!(recover(image), Err(WalError::Corrupt { .. })), "{name}");
    }
}

#[test]
fn a_record_damaged_while_open_is_refused_by_reads() {
    let disk = SimDisk::new(Image::new());
    let (wal, _) = open(&disk, config()).unwrap();
    for index in 0..40 {
        let (done, receiver) = WalDone::oneshot();
        wal.append(GroupId(1), vec![entry(index, 1000, 1)], done);
        receiver.blocking_recv().unwrap().unwrap();
    }
    assert!(wal.read_cached(GroupId(1), 0..1, 1).is_none(), "evicted");
    assert!(wal.read_cached(GroupId(1), 39..40, 1).is_some(), "the newest stay");
    assert_eq!(wal.read(GroupId(1), 0..1, 1).unwrap(), [entry(0, 1000, 1)]);
    disk.flip("segment-00000000.wal", SEGMENT_HEADER + 200);
    let error = wal.read(GroupId(1), 0..1, 1).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
    assert_eq!(wal.read(GroupId(1), 1..2, 1).unwrap(), [entry(1, 1000, 1)]);
}

#[test]
fn payload_that_looks_like_a_batch_is_only_payload() {
    let Sample { crashed, models, .. } = sample();
    let (name, found) = batches(&crashed);
    // A guest writes a copy of a real batch of another log, sector aligned, in a write that is then torn.
    let disk = SimDisk::new(crashed);
    let (wal, _) = open(&disk, config()).unwrap();
    let foreign = {
        let other = sample().crashed;
        let (name, found) = batches(&other);
        Bytes::from(other[&name][found[0].0..found[0].0 + 512].repeat(6))
    };
    let (done, receiver) = WalDone::oneshot();
    // Header 48 + 32 and 432 bytes in front bring the copy to the next sector.
    let forged = spline_raft::wal::WalEntry {
        index: 4,
        header: Bytes::from(vec![0; 432]),
        command: LogCommand { meta: Bytes::new(), payload: foreign },
    };
    wal.append(GroupId(1), vec![forged], done);
    receiver.blocking_recv().unwrap().unwrap();
    let mut image = disk.image();
    let start = found[3].0 + found[3].1;
    let file = image.get_mut(&name).unwrap();
    assert!(BatchHeader::decode(&file[start + 512..]).is_some(), "the forgery is a whole batch");
    file[start] ^= 1;
    assert_eq!(recover(image).unwrap(), models[4]);
}
