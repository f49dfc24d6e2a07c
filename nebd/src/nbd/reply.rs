//! Replies: simple ones, structured chunks, sparse reads (proto.md, "Simple reply message", "Structured reply types").
//!
//! Called by `connection`; writes to its send queue. Must not know: sockets, the link. After a successful handshake
//! for structured replies every read and every error is structured; other successes stay simple, as the
//! specification allows.

use crate::area::Buffer;
use crate::nbd::errno::NbdError;
use crate::nbd::handshake::ALLOCATION_CONTEXT;
use crate::nbd::protocol::*;
use crate::nbd::transmission::{STATUS_BYTES_MAX, Ticket};
use crate::send_queue::SendQueue;
use spline_types::Extent;
use std::ops::Range;
use std::rc::Rc;

/// Zeros are looked for in blocks of this many bytes of the volume; shorter runs are sent as data.
const ZERO_BLOCK: u64 = 4096;
/// Most extents of one status reply: enough for any client, small for a slow reader.
const EXTENTS_MAX: usize = 4096;

/// Chunk header, context, extents of 8 bytes.
const _: () = assert!(20 + 4 + 8 * EXTENTS_MAX as u64 <= STATUS_BYTES_MAX);

/// A success without data.
pub fn done(out: &mut SendQueue, cookie: u64) {
    simple(out, cookie, 0);
}

/// A failure. `read_at` is the offset of a failed read.
pub fn failed(
    out: &mut SendQueue,
    structured: bool,
    (cookie, error): (u64, NbdError),
    text: &str,
    read_at: Option<u64>,
) {
    if !structured {
        return simple(out, cookie, error as u32);
    }
    let mut payload = (error as u32).to_be_bytes().to_vec();
    // Texts are our own and short.
    payload.extend_from_slice(&(text.len() as u16).to_be_bytes());
    payload.extend_from_slice(text.as_bytes());
    let kind = match read_at {
        Some(offset) => {
            payload.extend_from_slice(&offset.to_be_bytes());
            REPLY_TYPE_ERROR_OFFSET
        }
        None => REPLY_TYPE_ERROR,
    };
    chunk(out, cookie, kind, true, payload.len());
    out.push(&payload);
}

/// A successful read of nothing.
pub fn nothing(out: &mut SendQueue, structured: bool, cookie: u64) {
    match structured {
        true => chunk(out, cookie, REPLY_TYPE_NONE, true, 0),
        false => simple(out, cookie, 0),
    }
}

/// A successful read of `data`, which is as long as the ticket's range, and not empty. The gateway may still change it: what
/// is found out about it decides how it is sent, and nothing else.
pub fn data(out: &mut SendQueue, structured: bool, ticket: &Ticket, data: &Rc<Buffer>) {
    if !structured {
        simple(out, ticket.cookie, 0);
        return out.push_buffer(data, 0..data.length());
    }
    let offset = ticket.range.offset();
    if ticket.one_chunk {
        return data_chunk(out, (ticket.cookie, offset, true), data, 0..data.length());
    }
    let mut at = 0;
    while at < data.length() {
        let (zero, end) = run(data, at, offset);
        let (place, last) = (offset + at as u64, end == data.length());
        if zero {
            chunk(out, ticket.cookie, REPLY_TYPE_OFFSET_HOLE, last, 12);
            out.push(&place.to_be_bytes());
            // A read is at most 32 MiB long.
            out.push(&((end - at) as u32).to_be_bytes());
        } else {
            data_chunk(out, (ticket.cookie, place, last), data, at..end);
        }
        at = end;
    }
}

/// A successful block status of `extents`, which start at the ticket's offset and lie inside its range.
pub fn status(out: &mut SendQueue, ticket: &Ticket, extents: &[Extent]) {
    let limit = if ticket.one_extent { 1 } else { EXTENTS_MAX };
    let kept = &extents[..extents.len().min(limit)];
    chunk(out, ticket.cookie, REPLY_TYPE_BLOCK_STATUS, true, 4 + 8 * kept.len());
    out.push(&ALLOCATION_CONTEXT.to_be_bytes());
    for extent in kept {
        let hole = if extent.hole { STATE_HOLE } else { 0 };
        let zero = if extent.zero { STATE_ZERO } else { 0 };
        // A request of NBD is shorter than 4 GiB, and so is each of its extents.
        out.push(&(extent.length as u32).to_be_bytes());
        out.push(&(hole | zero).to_be_bytes());
    }
}

fn simple(out: &mut SendQueue, cookie: u64, error: u32) {
    let mut head = [0; 16];
    head[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    head[4..8].copy_from_slice(&error.to_be_bytes());
    head[8..].copy_from_slice(&cookie.to_be_bytes());
    out.push(&head);
}

fn chunk(out: &mut SendQueue, cookie: u64, kind: u16, last: bool, length: usize) {
    let flags = if last { REPLY_FLAG_DONE } else { 0 };
    let mut head = [0; 20];
    head[..4].copy_from_slice(&STRUCTURED_REPLY_MAGIC.to_be_bytes());
    head[4..6].copy_from_slice(&flags.to_be_bytes());
    head[6..8].copy_from_slice(&kind.to_be_bytes());
    head[8..16].copy_from_slice(&cookie.to_be_bytes());
    // Our longest chunk is a read of 32 MiB.
    head[16..].copy_from_slice(&(length as u32).to_be_bytes());
    out.push(&head);
}

fn data_chunk(
    out: &mut SendQueue,
    (cookie, offset, last): (u64, u64, bool),
    data: &Rc<Buffer>,
    part: Range<usize>,
) {
    chunk(out, cookie, REPLY_TYPE_OFFSET_DATA, last, 8 + part.len());
    out.push(&offset.to_be_bytes());
    out.push_buffer(data, part);
}

/// The longest run of whole zero blocks, or of anything else, that starts at `at` of data read from `offset`.
/// Answers whether it is zero, and its end.
fn run(data: &Buffer, at: usize, offset: u64) -> (bool, usize) {
    let next = |at: usize| {
        let to_boundary = ZERO_BLOCK - (offset + at as u64) % ZERO_BLOCK;
        data.length().min(at + to_boundary as usize)
    };
    let zero_block = |from: usize, to: usize| to - from == ZERO_BLOCK as usize && is_zero(data, from);
    let mut end = next(at);
    let zero = zero_block(at, end);
    while end < data.length() {
        let following = next(end);
        if zero_block(end, following) != zero {
            break;
        }
        end = following;
    }
    (zero, end)
}

/// Whether the block at `at` is zero. Looks at its first bytes first, so it costs next to nothing on data that is not zero.
fn is_zero(data: &Buffer, at: usize) -> bool {
    let mut first = [0; 16];
    data.read(at, &mut first);
    if first != [0; 16] {
        return false;
    }
    let mut block = [0; ZERO_BLOCK as usize];
    data.read(at, &mut block);
    block.chunks(256).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests;
