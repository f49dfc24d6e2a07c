//! A chain of descriptors as a request of a virtio block device (virtio 1.2, 5.2.6).
//!
//! Called by the worker. Must not know: rings, the link. A request is any number of readable bytes (16 of header, then what is
//! to be written) and any number of writable ones (what is read, then one of status), cut into buffers wherever the guest likes.

use super::memory::{GuestMemory, Segment};
use super::queue::{Chain, QueueError};
use super::status::BlkStatus;
use crate::config::SERIAL_BYTES;
use crate::export::Export;
use spline_types::{BlockOp, ByteRange, Fault};

/// Bytes of a request's header.
const HEADER_BYTES: usize = 16;
/// Bytes of a sector, the unit of every address (virtio 1.2, 5.2.6).
pub const SECTOR_BYTES: u64 = 512;
/// Longest range that one discard or zeroing may have, bytes: a segment of the cluster, so 64 chunks at a time.
pub const RANGE_BYTES_MAX: u64 = 1 << 30;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// Bytes of a discard's or zeroing's range (virtio 1.2, 5.2.6, struct virtio_blk_discard_write_zeroes).
const RANGE_BYTES: usize = 16;
/// Its flag: the space may be given back.
const FLAG_UNMAP: u32 = 1;

/// What a guest wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    /// A request for the gateway; the data is what is left in the chain's readable part for a write, in its writable part
    /// for a read.
    Block {
        /// What to do.
        op: BlockOp,
        /// Where.
        range: ByteRange,
        /// Durable before it is answered.
        fua: bool,
    },
    /// The serial number, as much as the chain's writable part takes.
    Serial,
    /// Nothing is left to do.
    Nothing,
    /// It fails at once.
    Refused(Fault),
}

/// Understands a chain. Afterwards it holds the data only: header and status are taken off. Answers where the status byte
/// goes. `writethrough`: the driver does not flush, so that a write must be durable when it is answered.
///
/// # Errors
/// `QueueError::Framing` if there is no room for header or status: then nothing can be answered.
pub fn understand(
    chain: &mut Chain,
    memory: &GuestMemory,
    export: &Export,
    writethrough: bool,
) -> Result<(Wish, Segment), QueueError> {
    let framing = QueueError::Framing {
        head: chain.head,
        readable: chain.readable_bytes,
        writable: chain.writable_bytes,
    };
    let mut header = [0; HEADER_BYTES];
    if !take_front(chain, memory, &mut header) {
        return Err(framing);
    }
    let status = take_last_byte(chain).ok_or(framing)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let wish = wish(kind, u64::from_le_bytes(sector), chain, memory, export, writethrough);
    Ok((wish.unwrap_or_else(Wish::Refused), status))
}

fn wish(
    kind: u32,
    sector: u64,
    chain: &mut Chain,
    memory: &GuestMemory,
    export: &Export,
    writethrough: bool,
) -> Result<Wish, Fault> {
    match kind {
        TYPE_IN => data(BlockOp::Read, sector, chain.writable_bytes, false, export),
        TYPE_OUT => data(BlockOp::Write, sector, chain.readable_bytes, writethrough, export),
        TYPE_FLUSH => Ok(Wish::Block { op: BlockOp::Flush, range: ByteRange::EMPTY, fua: false }),
        TYPE_GET_ID => Ok(Wish::Serial),
        TYPE_DISCARD | TYPE_WRITE_ZEROES => {
            let mut bytes = [0; RANGE_BYTES];
            // Exactly one range: the config space says that there may not be more.
            if chain.readable_bytes != RANGE_BYTES as u64 || !take_front(chain, memory, &mut bytes) {
                return Err(Fault::Invalid(spline_types::Invalid::Flags));
            }
            trim(kind, &bytes, writethrough, export)
        }
        _ => Err(Fault::Unsupported),
    }
}

fn data(op: BlockOp, sector: u64, bytes: u64, fua: bool, export: &Export) -> Result<Wish, Fault> {
    if !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Fault::Invalid(spline_types::Invalid::Alignment));
    }
    block(op, sector, bytes, fua, export)
}

fn trim(kind: u32, bytes: &[u8; RANGE_BYTES], writethrough: bool, export: &Export) -> Result<Wish, Fault> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *bytes;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let length = u64::from(u32::from_le_bytes([n0, n1, n2, n3])) * SECTOR_BYTES;
    let flags = u32::from_le_bytes(flags);
    let op = match (kind, flags) {
        (TYPE_DISCARD, 0) => BlockOp::Discard,
        (TYPE_WRITE_ZEROES, 0) => BlockOp::WriteZeroes { no_hole: true, fast: false },
        (TYPE_WRITE_ZEROES, FLAG_UNMAP) => BlockOp::WriteZeroes { no_hole: false, fast: false },
        // virtio 1.2, 5.2.6.2: unknown flags, and unmap on a discard, are unsupported.
        _ => return Err(Fault::Unsupported),
    };
    if length > RANGE_BYTES_MAX {
        return Err(Fault::Invalid(spline_types::Invalid::TooLarge));
    }
    block(op, sector, length, writethrough && op != BlockOp::Discard, export)
}

fn block(op: BlockOp, sector: u64, length: u64, fua: bool, export: &Export) -> Result<Wish, Fault> {
    let past_end = Fault::Invalid(spline_types::Invalid::PastEnd);
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(past_end)?;
    let range = ByteRange::new(offset, length).ok_or(past_end)?;
    if op.modifies() && export.read_only {
        return Err(Fault::ReadOnly);
    }
    export.geometry.check(op, range)?;
    if range.is_empty() {
        return Ok(Wish::Nothing);
    }
    Ok(Wish::Block { op, range, fua })
}

/// Takes bytes off the front of the readable part; false if there are too few, which then are gone.
fn take_front(chain: &mut Chain, memory: &GuestMemory, into: &mut [u8]) -> bool {
    if chain.readable_bytes < into.len() as u64 {
        return false;
    }
    chain.readable_bytes -= into.len() as u64;
    let (mut have, mut whole) = (0, 0);
    for segment in &mut chain.readable {
        let rest = &mut into[have..];
        let part = rest.len().min(segment.length as usize);
        memory.read(*segment, 0, &mut rest[..part]);
        have += part;
        *segment = segment.skip(part as u32);
        if segment.length > 0 {
            break;
        }
        whole += 1;
    }
    chain.readable.drain(..whole);
    true
}

/// Takes the last byte off the writable part.
fn take_last_byte(chain: &mut Chain) -> Option<Segment> {
    let last = chain.writable.last_mut()?;
    chain.writable_bytes -= 1;
    last.length -= 1;
    let status = Segment { offset: last.offset + u64::from(last.length), length: 1, ..*last };
    if last.length == 0 {
        chain.writable.pop();
    }
    Some(status)
}

/// Writes the status byte.
pub fn answer(memory: &GuestMemory, status_byte: Segment, status: BlkStatus) {
    memory.write(status_byte, 0, &[status as u8]);
}

/// Writes the serial number, filled up with zeros, as far as there is room. Answers how many bytes that were.
pub fn write_serial(memory: &GuestMemory, data: &[Segment], serial: &str) -> u32 {
    let mut bytes = [0; SERIAL_BYTES];
    for (place, byte) in bytes.iter_mut().zip(serial.bytes()) {
        *place = byte;
    }
    let mut rest = &bytes[..];
    for segment in data {
        let (part, behind) = rest.split_at(rest.len().min(segment.length as usize));
        memory.write(*segment, 0, part);
        rest = behind;
    }
    (SERIAL_BYTES - rest.len()) as u32
}

#[cfg(test)]
mod tests;
