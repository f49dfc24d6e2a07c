//! The handshake: fixed newstyle option haggling as a state machine over bytes (proto.md, "Fixed newstyle negotiation").
//!
//! Called by `connection` with whatever bytes have come. Must not know: sockets, time (the connection has a deadline),
//! requests. `bounded`: options longer than [`OPTION_DATA_MAX`] are drained and refused, longer than [`DRAIN_MAX`] cut
//! the connection. `guest_cannot_crash_us`: names must be UTF-8 without NUL, lengths are checked before use.

use crate::export::Export;
use crate::nbd::protocol::*;
use crate::nbd::transmission::Agreed;
use crate::send_queue::SendQueue;
use spline_types::limits::REQUEST_BYTES_MAX;
use std::fmt;

/// Longest option data that is looked at, bytes: a longest name and the lists that may follow it.
pub const OPTION_DATA_MAX: usize = STRING_BYTES_MAX + 1024;
/// Longest option data that is read and thrown away, bytes, so that the client learns why.
pub const DRAIN_MAX: u32 = 64 << 10;
/// Options of one handshake: no client needs more, and each costs us a reply.
pub const OPTIONS_MAX: u32 = 256;

/// What the bytes so far lead to.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// More bytes are needed.
    NeedMore,
    /// The handshake is over; requests follow.
    Enter(Agreed),
    /// The client ended it, after our last reply.
    Abort,
    /// The client broke the protocol; the connection is cut.
    Violation(Violation),
}

/// Why a connection is cut during the handshake.
#[derive(Debug, PartialEq, Eq)]
pub enum Violation {
    /// Client flags that we do not know.
    ClientFlags(u32),
    /// Not an option where one must be.
    OptionMagic(u64),
    /// An option other than EXPORT_NAME from a client that does not know fixed newstyle.
    NotFixed(u32),
    /// An option too long to drain.
    TooLong(u32),
    /// More than [`OPTIONS_MAX`] options.
    TooMany,
    /// EXPORT_NAME for an export that is not ours; that option has no error reply.
    UnknownExport,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ClientFlags(flags) => write!(f, "unknown client flags: flags={flags:#x}"),
            Self::OptionMagic(magic) => write!(f, "not an option: magic={magic:#x}"),
            Self::NotFixed(option) => write!(f, "option without fixed newstyle: option={option}"),
            Self::TooLong(bytes) => write!(f, "option too long: bytes={bytes} limit={DRAIN_MAX}"),
            Self::TooMany => write!(f, "too many options: limit={OPTIONS_MAX}"),
            Self::UnknownExport => write!(f, "export name is not served here"),
        }
    }
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Option,
    Drain { option: u32, left: u32 },
}

/// The state machine of one connection's handshake.
#[derive(Debug)]
pub struct Handshake {
    state: State,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    /// Export name for which base:allocation was selected last.
    allocation_for: Option<String>,
    options: u32,
}

impl Handshake {
    /// Starts a handshake by queueing the server's greeting.
    pub fn start(out: &mut SendQueue) -> Self {
        out.push(&INIT_MAGIC.to_be_bytes());
        out.push(&OPTION_MAGIC.to_be_bytes());
        out.push(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
        Self {
            state: State::ClientFlags,
            fixed: false,
            no_zeroes: false,
            structured: false,
            allocation_for: None,
            options: 0,
        }
    }

    /// Takes what it can from `input` and queues replies. Answers how many bytes it took, and where that leads.
    pub fn advance(&mut self, input: &[u8], export: &Export, out: &mut SendQueue) -> (usize, Step) {
        let mut used = 0;
        loop {
            let (taken, step) = match self.state {
                State::ClientFlags => self.client_flags(&input[used..]),
                State::Option => self.option(&input[used..], export, out),
                State::Drain { option, left } => self.drain(&input[used..], option, left, out),
            };
            used += taken;
            match step {
                Some(step) => return (used, step),
                None if taken == 0 => return (used, Step::NeedMore),
                None => {}
            }
        }
    }

    fn client_flags(&mut self, input: &[u8]) -> (usize, Option<Step>) {
        let Some(flags) = input.first_chunk().map(|bytes| u32::from_be_bytes(*bytes)) else {
            return (0, None);
        };
        if flags & !(FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES) != 0 {
            return (4, Some(Step::Violation(Violation::ClientFlags(flags))));
        }
        self.fixed = flags & FLAG_C_FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & FLAG_C_NO_ZEROES != 0;
        self.state = State::Option;
        (4, None)
    }

    fn drain(&mut self, input: &[u8], option: u32, left: u32, out: &mut SendQueue) -> (usize, Option<Step>) {
        let taken = input.len().min(left as usize);
        let left = left - taken as u32;
        if left > 0 {
            self.state = State::Drain { option, left };
            return (taken, if taken == 0 { None } else { Some(Step::NeedMore) });
        }
        refuse(out, option, REP_ERR_TOO_BIG, "option is too long");
        self.state = State::Option;
        (taken, None)
    }

    fn option(&mut self, input: &[u8], export: &Export, out: &mut SendQueue) -> (usize, Option<Step>) {
        let Some(head) = input.first_chunk::<OPTION_BYTES>() else { return (0, None) };
        let violation = |violation| (OPTION_BYTES, Some(Step::Violation(violation)));
        let mut fields = Fields(head);
        let (Some(magic), Some(option), Some(length)) = (fields.u64(), fields.u32(), fields.u32()) else {
            return (0, None);
        };
        if magic != OPTION_MAGIC {
            return violation(Violation::OptionMagic(magic));
        }
        if !self.fixed && option != OPT_EXPORT_NAME {
            return violation(Violation::NotFixed(option));
        }
        if length as usize > OPTION_DATA_MAX {
            if option == OPT_EXPORT_NAME {
                return violation(Violation::UnknownExport);
            }
            if length > DRAIN_MAX {
                return violation(Violation::TooLong(length));
            }
        }
        if length as usize <= OPTION_DATA_MAX && input.len() < OPTION_BYTES + length as usize {
            return (0, None);
        }
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return violation(Violation::TooMany);
        }
        if option == OPT_SET_META_CONTEXT {
            // It replaces the selection before it even when it fails.
            self.allocation_for = None;
        }
        if length as usize > OPTION_DATA_MAX {
            self.state = State::Drain { option, left: length };
            return (OPTION_BYTES, None);
        }
        let end = OPTION_BYTES + length as usize;
        (end, self.answer(option, &input[OPTION_BYTES..end], export, out))
    }

    fn answer(&mut self, option: u32, data: &[u8], export: &Export, out: &mut SendQueue) -> Option<Step> {
        match option {
            OPT_EXPORT_NAME => return Some(self.export_name(data, export, out)),
            OPT_ABORT => {
                reply(out, option, REP_ACK, &[]);
                return Some(Step::Abort);
            }
            OPT_LIST if data.is_empty() => {
                reply(out, option, REP_SERVER, &[&prefixed(&export.name), export.description.as_bytes()]);
                reply(out, option, REP_ACK, &[]);
            }
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                reply(out, option, REP_ACK, &[]);
            }
            OPT_LIST | OPT_STRUCTURED_REPLY => refuse(out, option, REP_ERR_INVALID, "option takes no data"),
            OPT_INFO | OPT_GO => return self.info(option, data, export, out),
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.meta_context(option, data, export, out),
            _ => refuse(out, option, REP_ERR_UNSUP, "option is not supported"),
        }
        None
    }

    fn export_name(&self, data: &[u8], export: &Export, out: &mut SendQueue) -> Step {
        let Some(name) = name(data).filter(|name| export.answers_to(name)) else {
            return Step::Violation(Violation::UnknownExport);
        };
        out.push(&export.geometry.size.to_be_bytes());
        out.push(&self.flags(export).to_be_bytes());
        if !self.no_zeroes {
            out.push(&[0; 124]);
        }
        Step::Enter(self.agreed(name, false))
    }

    fn agreed(&self, name: &str, block_size: bool) -> Agreed {
        Agreed {
            structured: self.structured,
            allocation: self.structured && self.allocation_for.as_deref() == Some(name),
            block_size,
        }
    }

    /// Transmission flags (proto.md, "Transmission flags").
    fn flags(&self, export: &Export) -> u16 {
        let mut flags =
            FLAG_HAS_FLAGS | FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_CAN_MULTI_CONN | FLAG_SEND_CACHE;
        if export.read_only {
            flags |= FLAG_READ_ONLY;
        } else {
            flags |= FLAG_SEND_TRIM | FLAG_SEND_WRITE_ZEROES | FLAG_SEND_FAST_ZERO;
        }
        if export.traits.rotational {
            flags |= FLAG_ROTATIONAL;
        }
        if self.structured {
            flags |= FLAG_SEND_DF;
        }
        flags
    }

    /// NBD_OPT_INFO and NBD_OPT_GO.
    fn info(&mut self, option: u32, data: &[u8], export: &Export, out: &mut SendQueue) -> Option<Step> {
        let Some((name, wanted)) = info_query(data) else {
            refuse(out, option, REP_ERR_INVALID, "option data is malformed");
            return None;
        };
        if !export.answers_to(name) {
            refuse(out, option, REP_ERR_UNKNOWN, "export name is not served here");
            return None;
        }
        let (size, flags) = (export.geometry.size.to_be_bytes(), self.flags(export).to_be_bytes());
        reply(out, option, REP_INFO, &[&INFO_EXPORT.to_be_bytes(), &size, &flags]);
        if wanted.contains(&INFO_NAME) {
            reply(out, option, REP_INFO, &[&INFO_NAME.to_be_bytes(), export.name.as_bytes()]);
        }
        if wanted.contains(&INFO_DESCRIPTION) && !export.description.is_empty() {
            let text = export.description.as_bytes();
            reply(out, option, REP_INFO, &[&INFO_DESCRIPTION.to_be_bytes(), text]);
        }
        let block_size = wanted.contains(&INFO_BLOCK_SIZE);
        if block_size {
            let preferred = export.geometry.block_size.bytes().max(4096);
            let sizes = [BLOCK_BYTES_MIN, preferred, REQUEST_BYTES_MAX].map(u32::to_be_bytes).concat();
            reply(out, option, REP_INFO, &[&INFO_BLOCK_SIZE.to_be_bytes(), &sizes]);
        }
        reply(out, option, REP_ACK, &[]);
        (option == OPT_GO).then(|| Step::Enter(self.agreed(name, block_size)))
    }

    /// NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
    fn meta_context(&mut self, option: u32, data: &[u8], export: &Export, out: &mut SendQueue) {
        let set = option == OPT_SET_META_CONTEXT;
        if !self.structured {
            return refuse(out, option, REP_ERR_INVALID, "negotiate structured replies first");
        }
        let Some((name, queries)) = context_query(data) else {
            return refuse(out, option, REP_ERR_INVALID, "option data is malformed");
        };
        if !export.answers_to(name) {
            return refuse(out, option, REP_ERR_UNKNOWN, "export name is not served here");
        }
        let chosen = if set {
            queries.contains(&BASE_ALLOCATION)
        } else {
            queries.is_empty() || queries.iter().any(|query| matches!(*query, "base:" | BASE_ALLOCATION))
        };
        if chosen {
            // The id means something only in an answer to SET.
            let id = if set { ALLOCATION_CONTEXT } else { 0 };
            reply(out, option, REP_META_CONTEXT, &[&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()]);
        }
        if chosen && set {
            self.allocation_for = Some(name.to_owned());
        }
        reply(out, option, REP_ACK, &[]);
    }
}

/// The id that we give to `base:allocation`.
pub const ALLOCATION_CONTEXT: u32 = 1;

/// Takes big-endian fields from the front of an option; each is `None` if too few bytes are left.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (front, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(front)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*front)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string behind its length.
    fn string(&mut self) -> Option<&'a str> {
        let length = self.u32()?;
        name(self.bytes(length as usize)?)
    }
}

/// A string of the protocol: UTF-8, no NUL, at most 4096 bytes.
fn name(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    (bytes.len() <= STRING_BYTES_MAX && !bytes.contains(&0)).then_some(text)
}

/// Export name and wanted information of INFO and GO.
fn info_query(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u16()?;
    let wanted = (0..count).map(|_| fields.u16()).collect::<Option<Vec<_>>>()?;
    fields.0.is_empty().then_some((name, wanted))
}

/// Export name and queries of LIST_META_CONTEXT and SET_META_CONTEXT.
fn context_query(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let queries = (0..count).map(|_| fields.string()).collect::<Option<Vec<_>>>()?;
    fields.0.is_empty().then_some((name, queries))
}

fn prefixed(text: &str) -> Vec<u8> {
    // Our own export name: config allows at most 4096 bytes.
    let mut bytes = (text.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

fn reply(out: &mut SendQueue, option: u32, kind: u32, data: &[&[u8]]) {
    let length: usize = data.iter().map(|part| part.len()).sum();
    out.push(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.push(&option.to_be_bytes());
    out.push(&kind.to_be_bytes());
    out.push(&(length as u32).to_be_bytes());
    data.iter().for_each(|part| out.push(part));
}

fn refuse(out: &mut SendQueue, option: u32, error: u32, text: &str) {
    reply(out, option, error, &[text.as_bytes()]);
}

#[cfg(test)]
mod tests;
