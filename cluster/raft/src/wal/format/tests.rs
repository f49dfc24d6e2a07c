//! Golden bytes of version 1, and what a decoder must refuse.

use super::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn batch() -> AlignedBuffer {
    let mut buffer = AlignedBuffer::default();
    start_batch(&mut buffer);
    let entry = WalEntry {
        index: 0x0a0b,
        header: Bytes::from_static(b"head"),
        command: LogCommand { meta: Bytes::from_static(b"me"), payload: Bytes::from_static(b"payload") },
    };
    Record::Entry(entry).encode(GroupId(7), &mut buffer);
    let header = BatchHeader {
        length: 0,
        records: 1,
        log: 0x1122_3344_5566_7788,
        generation: 9,
        sequence: 10,
        oldest: 8,
    };
    finish_batch(&mut buffer, header);
    buffer
}

#[test]
fn golden_segment_header() {
    let area = SegmentHeader { log: 0x1122_3344_5566_7788, generation: 9, bytes: 64 << 20 }.encode();
    assert_eq!(area.as_ref().len(), SEGMENT_HEADER);
    assert_eq!(
        hex(&area.as_ref()[..60]),
        "53504c4e57414c0a0100000000000000887766554433221109000000000000000000000400000000\
         0000000000000000000000000000000000000000"
    );
    assert_eq!(hex(&area.as_ref()[60..64]), GOLDEN_SEGMENT_CRC);
    assert!(area.as_ref()[64..].iter().all(|byte| *byte == 0));
}

#[test]
fn golden_batch_with_one_entry() {
    let batch = batch();
    let bytes = batch.as_ref();
    assert_eq!(bytes.len(), SECTOR);
    assert_eq!(hex(&bytes[..4]), "53505742");
    assert_eq!(hex(&bytes[4..8]), GOLDEN_BATCH_CRC);
    assert_eq!(
        hex(&bytes[8..48]),
        "0002000001000000887766554433221109000000000000000a000000000000000800000000000000"
    );
    assert_eq!(hex(&bytes[48..52]), GOLDEN_RECORD_CRC);
    assert_eq!(
        hex(&bytes[52..93]),
        "0100000007000000040000000b0a0000000000000200000007000000686561646d657061796c6f6164"
    );
    assert!(bytes[93..].iter().all(|byte| *byte == 0));
}

const GOLDEN_SEGMENT_CRC: &str = "8bb919cd";
const GOLDEN_BATCH_CRC: &str = "7451c1f8";
const GOLDEN_RECORD_CRC: &str = "04098a89";

#[test]
fn every_kind_survives_the_round_trip() {
    let state = Bytes::from_static(b"state");
    let entry = WalEntry { index: 3, header: state.clone(), ..WalEntry::default() };
    for (kind, record) in [
        Record::Entry(entry),
        Record::Vote(state.clone()),
        Record::Truncate(4),
        Record::Purge(5, state.clone()),
        Record::Remove,
    ]
    .into_iter()
    .enumerate()
    {
        let mut buffer = AlignedBuffer::default();
        record.encode(GroupId(1), &mut buffer);
        assert_eq!(buffer.as_ref().len(), record.encoded_length());
        assert_eq!(usize::from(buffer.as_ref()[4]), kind + 1);
        let raw = RawRecord::decode(buffer.as_ref()).unwrap();
        assert_eq!((raw.group, raw.to_record()), (GroupId(1), Some(record)));
    }
}

#[test]
fn any_flipped_bit_of_a_batch_or_record_or_header_is_seen() {
    let whole = batch();
    let header = SegmentHeader { log: 1, generation: 2, bytes: 3 }.encode();
    for bit in 0..SECTOR * 8 {
        let mut batch = whole.as_ref().to_vec();
        batch[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(BatchHeader::decode(&batch), None, "bit {bit}");
        if (48 * 8..93 * 8).contains(&bit) {
            assert!(RawRecord::decode(&batch[48..]).is_none(), "bit {bit}");
        }
        if bit < SEGMENT_HEADER_USED * 8 {
            let mut header = header.as_ref().to_vec();
            header[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SegmentHeader::decode(&header), Err(HeaderError::Bad), "bit {bit}");
        }
    }
}

#[test]
fn an_unknown_version_is_named() {
    let mut area = SegmentHeader { log: 1, generation: 2, bytes: 3 }.encode();
    area.as_mut()[8] = 77;
    let crc = crc32c(&area.as_ref()[..60]);
    area.as_mut()[60..64].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(SegmentHeader::decode(area.as_ref()), Err(HeaderError::Version(77)));
}
