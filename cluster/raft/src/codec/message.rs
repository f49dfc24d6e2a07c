//! What raft peers say to each other, as frames. Pure.
//!
//! Called by `network`. A message is the meta of a `RaftRequest` or `RaftReply` frame; bulk bytes are its payload.
//! Request: version u8 | message u8 | group u32 | body. Reply: version u8 | reply u8 | body. Beats' body: leader u64; its
//! payload: beats; the answer's payload: groups u32 …; its group is 0 and means nothing. Vote's body: vote | optional last
//! position | optional leader; pre-vote's the first two of these. Append's body: vote |
//! optional previous position | optional commit | headers' bytes u32 | entries u32 { header u32 | meta u32 | payload
//! u32 } …; its payload: all entry headers, then all command metas, then the command payloads, each in order.

use bytes::{BufMut, Bytes, BytesMut};
use spline_wire::{Frame, Kind};

use super::{
    DecodeError, Reader, decode_entry, encode_entry, put_optional_leader, put_optional_log_id, put_stored,
    put_vote, stored,
};
use crate::command::{GroupId, LogCommand, NodeId};
use crate::types::{
    AppendRequest, Entry, LeaderId, SnapshotMeta, TransferRequest, Vote, VoteRequest, VoteResponse,
};

/// Versions of the peer messages, newest first.
/// - 2: a request for a vote names the leader that handed its leadership over, if one did.
/// - 1: the first.
pub(crate) const MESSAGE_VERSION: u8 = 2;

/// Most entries of one append message: the table of its meta stays far below the frame's 64 KiB (`bounded`).
pub(crate) const ENTRIES_MAX: u64 = 1024;
/// Most groups of one [`Request::Beats`]: eighty kilobytes (`bounded`).
pub(crate) const BEATS_MAX: usize = 4096;
/// Bytes of a [`Beat`]: group u32 | term u64 | committed u64.
const BEAT_BYTES: usize = 20;
/// Most items a snapshot may list.
const ITEMS_MAX: usize = 1 << 20;
/// Longest reason in a refusal, bytes.
const REASON_MAX: usize = 512;

/// A leader's heartbeat for one of its groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Beat {
    pub(crate) group: GroupId,
    pub(crate) term: u64,
    /// Index of the last committed entry and one; 0 is none.
    pub(crate) committed: u64,
}

/// A request to one group of a peer, or heartbeats for many.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    Append(AppendRequest),
    /// `handed_over` is the leader that asked for it by handing its leadership over; openraft's own mark is not sent.
    Vote {
        request: VoteRequest,
        handed_over: Option<LeaderId>,
    },
    PreVote(VoteRequest),
    Transfer(TransferRequest),
    SnapshotBegin {
        vote: Vote,
        session: u64,
        meta: SnapshotMeta,
        manifest: Bytes,
    },
    SnapshotItem {
        session: u64,
        item: u32,
        data: Bytes,
    },
    SnapshotFinish {
        session: u64,
    },
    Beats {
        leader: NodeId,
        beats: Vec<Beat>,
    },
}

/// A peer's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// Append: everything up to the last entry is durable.
    Appended,
    /// Append: the previous position is not in the log.
    Conflict,
    /// Append or snapshot: a newer leader or candidate is known.
    HigherVote(Vote),
    /// Vote or pre-vote.
    Voted(VoteResponse),
    /// Transfer: the request was taken.
    TransferTaken,
    /// Snapshot begin: the items still needed.
    Needs(Vec<u32>),
    /// Snapshot item: written.
    ItemWritten,
    /// Snapshot finish: installed; the receiver's vote.
    Installed(Vote),
    /// Not carried out, with a reason for the log.
    Refused(String),
    /// Beats: accepted but for these groups.
    Heard { refused: Vec<GroupId> },
}

impl Request {
    /// As a frame; payload bytes are carried, not copied.
    pub(crate) fn into_frame(self, group: GroupId, request: u64) -> Frame {
        let mut meta = BytesMut::with_capacity(128);
        meta.put_u8(MESSAGE_VERSION);
        meta.put_u8(self.number());
        meta.put_u32_le(group.0);
        let mut payload = Vec::new();
        match self {
            Request::Append(append) => put_append(&mut meta, &mut payload, append),
            Request::Vote { request, handed_over } => {
                put_candidacy(&mut meta, &request);
                put_optional_leader(&mut meta, handed_over);
            }
            Request::PreVote(request) => put_candidacy(&mut meta, &request),
            Request::Transfer(transfer) => {
                put_vote(&mut meta, transfer.from_leader());
                meta.put_u64_le(*transfer.to_node_id());
                put_optional_log_id(&mut meta, transfer.last_log_id());
            }
            Request::SnapshotBegin { vote, session, meta: snapshot, manifest } => {
                put_vote(&mut meta, &vote);
                meta.put_u64_le(session);
                put_optional_log_id(&mut meta, snapshot.last_log_id.as_ref());
                put_stored(&mut meta, &snapshot.last_membership);
                payload.push(manifest);
            }
            Request::SnapshotItem { session, item, data } => {
                meta.put_u64_le(session);
                meta.put_u32_le(item);
                payload.push(data);
            }
            Request::SnapshotFinish { session } => meta.put_u64_le(session),
            Request::Beats { leader, beats } => {
                meta.put_u64_le(leader.0);
                let mut bytes = BytesMut::with_capacity(beats.len() * BEAT_BYTES);
                for beat in beats {
                    bytes.put_u32_le(beat.group.0);
                    bytes.put_u64_le(beat.term);
                    bytes.put_u64_le(beat.committed);
                }
                payload.push(bytes.freeze());
            }
        }
        Frame { kind: Kind::RaftRequest, request, meta: meta.freeze(), payload }
    }

    fn number(&self) -> u8 {
        match self {
            Request::Append(_) => 1,
            Request::Vote { .. } => 2,
            Request::PreVote(_) => 3,
            Request::Transfer(_) => 4,
            Request::SnapshotBegin { .. } => 5,
            Request::SnapshotItem { .. } => 6,
            Request::SnapshotFinish { .. } => 7,
            Request::Beats { .. } => 8,
        }
    }

    /// Reads a `RaftRequest` frame.
    pub(crate) fn from_frame(frame: Frame) -> Result<(GroupId, Request), DecodeError> {
        let meta = frame.meta.clone();
        let mut reader = Reader(&meta);
        reader.version("request", MESSAGE_VERSION)?;
        let number = reader.u8("message")?;
        let group = GroupId(reader.u32("group")?);
        let payload = frame.into_payload();
        let request = match number {
            1 => Request::Append(append(&mut reader, payload)?),
            2 => {
                let request = candidacy(&mut reader)?;
                Request::Vote { request, handed_over: reader.optional_leader()? }
            }
            3 => Request::PreVote(candidacy(&mut reader)?),
            4 => {
                let (vote, to) = (reader.vote()?, reader.u64("target")?);
                Request::Transfer(TransferRequest::new(vote, to, reader.optional_log_id()?))
            }
            5 => {
                let (vote, session) = (reader.vote()?, reader.u64("session")?);
                let last_log_id = reader.optional_log_id()?;
                let meta = SnapshotMeta { last_log_id, last_membership: stored(&mut reader)? };
                Request::SnapshotBegin { vote, session, meta, manifest: payload }
            }
            6 => {
                let (session, item) = (reader.u64("session")?, reader.u32("item")?);
                Request::SnapshotItem { session, item, data: payload }
            }
            7 => Request::SnapshotFinish { session: reader.u64("session")? },
            8 => Request::Beats { leader: NodeId(reader.u64("leader")?), beats: beats(&payload)? },
            value => return Err(DecodeError::Value { what: "message", value: value.into() }),
        };
        Ok((group, request))
    }
}

fn beats(payload: &[u8]) -> Result<Vec<Beat>, DecodeError> {
    if !payload.len().is_multiple_of(BEAT_BYTES) || payload.len() / BEAT_BYTES > BEATS_MAX {
        return Err(DecodeError::Value { what: "beats", value: payload.len() as u64 });
    }
    let beat = |bytes| {
        let mut reader = Reader(bytes);
        let group = GroupId(reader.u32("group")?);
        Ok(Beat { group, term: reader.u64("term")?, committed: reader.u64("committed")? })
    };
    payload.chunks_exact(BEAT_BYTES).map(beat).collect()
}

fn put_numbers(payload: &mut Vec<Bytes>, numbers: impl ExactSizeIterator<Item = u32>) {
    let mut bytes = BytesMut::with_capacity(numbers.len() * 4);
    numbers.for_each(|number| bytes.put_u32_le(number));
    payload.push(bytes.freeze());
}

fn numbers(payload: &[u8], what: &'static str, most: usize) -> Result<Vec<u32>, DecodeError> {
    if !payload.len().is_multiple_of(4) || payload.len() / 4 > most {
        return Err(DecodeError::Value { what, value: payload.len() as u64 });
    }
    let number = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    Ok(payload.chunks_exact(4).map(number).collect())
}

fn put_candidacy(meta: &mut BytesMut, request: &VoteRequest) {
    put_vote(meta, &request.vote);
    put_optional_log_id(meta, request.last_log_id.as_ref());
}

fn candidacy(reader: &mut Reader<'_>) -> Result<VoteRequest, DecodeError> {
    Ok(VoteRequest::new(reader.vote()?, reader.optional_log_id()?))
}

fn put_append(meta: &mut BytesMut, payload: &mut Vec<Bytes>, append: AppendRequest) {
    put_vote(meta, &append.vote);
    put_optional_log_id(meta, append.prev_log_id.as_ref());
    put_optional_log_id(meta, append.leader_commit.as_ref());
    let first = append.entries.first().map_or(0, |entry| entry.log_id.index);
    meta.put_u64_le(first);
    meta.put_u32_le(append.entries.len() as u32);
    if append.entries.is_empty() {
        return;
    }
    let mut small = BytesMut::new();
    let mut commands = Vec::with_capacity(append.entries.len());
    for entry in append.entries {
        let (_, header, command) = encode_entry(entry);
        meta.put_u32_le(header.len() as u32);
        meta.put_u32_le(command.meta.len() as u32);
        meta.put_u32_le(command.payload.len() as u32);
        small.put_slice(&header);
        commands.push(command);
    }
    commands.iter().for_each(|command| small.put_slice(&command.meta));
    payload.push(small.freeze());
    payload.extend(commands.into_iter().map(|command| command.payload).filter(|bytes| !bytes.is_empty()));
}

fn append(reader: &mut Reader<'_>, payload: Bytes) -> Result<AppendRequest, DecodeError> {
    let vote = reader.vote()?;
    let prev_log_id = reader.optional_log_id()?;
    let leader_commit = reader.optional_log_id()?;
    let first = reader.u64("first index")?;
    let count = reader.u32("entries")?;
    if u64::from(count) > ENTRIES_MAX {
        return Err(DecodeError::Value { what: "entries", value: count.into() });
    }
    let mut sizes = Vec::with_capacity(count as usize);
    for _ in 0..count {
        sizes.push([reader.u32("header")?, reader.u32("meta")?, reader.u32("payload")?].map(|n| n as usize));
    }
    let mut rest = payload;
    let headers = sizes.iter().map(|size| take(&mut rest, size[0])).collect::<Result<Vec<_>, _>>()?;
    let metas = sizes.iter().map(|size| take(&mut rest, size[1])).collect::<Result<Vec<_>, _>>()?;
    let mut entries: Vec<Entry> = Vec::with_capacity(sizes.len());
    for ((index, size), (header, meta)) in (first..).zip(&sizes).zip(headers.iter().zip(metas)) {
        let command = LogCommand { meta, payload: take(&mut rest, size[2])? };
        entries.push(decode_entry(index, header, command)?);
    }
    // openraft requires an unbroken run after the previous entry; a foreign sender's gap must not reach it.
    let expected = prev_log_id.as_ref().map_or(0, |id| id.index.saturating_add(1));
    if !entries.is_empty() && first != expected {
        return Err(DecodeError::Value { what: "first index", value: first });
    }
    Ok(AppendRequest { vote, prev_log_id, leader_commit, entries })
}

fn take(rest: &mut Bytes, bytes: usize) -> Result<Bytes, DecodeError> {
    if bytes > rest.len() {
        return Err(DecodeError::Short("append payload"));
    }
    Ok(rest.split_to(bytes))
}

impl Reply {
    /// As a frame that answers `request`.
    pub(crate) fn into_frame(self, request: u64) -> Frame {
        let mut meta = BytesMut::with_capacity(64);
        meta.put_u8(MESSAGE_VERSION);
        meta.put_u8(self.number());
        let mut payload = Vec::new();
        match self {
            Reply::Appended | Reply::Conflict | Reply::TransferTaken | Reply::ItemWritten => {}
            Reply::HigherVote(vote) | Reply::Installed(vote) => put_vote(&mut meta, &vote),
            Reply::Voted(response) => {
                put_vote(&mut meta, &response.vote);
                meta.put_u8(response.vote_granted.into());
                put_optional_log_id(&mut meta, response.last_log_id.as_ref());
            }
            Reply::Needs(items) => put_numbers(&mut payload, items.into_iter()),
            Reply::Heard { refused } => put_numbers(&mut payload, refused.into_iter().map(|group| group.0)),
            Reply::Refused(reason) => {
                let end = reason.floor_char_boundary(REASON_MAX);
                meta.put_slice(&reason.as_bytes()[..end]);
            }
        }
        Frame { kind: Kind::RaftReply, request, meta: meta.freeze(), payload }
    }

    fn number(&self) -> u8 {
        match self {
            Reply::Appended => 1,
            Reply::Conflict => 2,
            Reply::HigherVote(_) => 3,
            Reply::Voted(_) => 4,
            Reply::TransferTaken => 5,
            Reply::Needs(_) => 6,
            Reply::ItemWritten => 7,
            Reply::Installed(_) => 8,
            Reply::Refused(_) => 9,
            Reply::Heard { .. } => 10,
        }
    }

    /// Reads a `RaftReply` frame.
    pub(crate) fn from_frame(frame: Frame) -> Result<Reply, DecodeError> {
        let meta = frame.meta.clone();
        let mut reader = Reader(&meta);
        reader.version("reply", MESSAGE_VERSION)?;
        Ok(match reader.u8("reply")? {
            1 => Reply::Appended,
            2 => Reply::Conflict,
            3 => Reply::HigherVote(reader.vote()?),
            4 => {
                let (vote, granted) = (reader.vote()?, reader.flag("granted")?);
                Reply::Voted(VoteResponse {
                    vote,
                    vote_granted: granted,
                    last_log_id: reader.optional_log_id()?,
                })
            }
            5 => Reply::TransferTaken,
            6 => Reply::Needs(numbers(&frame.into_payload(), "items", ITEMS_MAX)?),
            7 => Reply::ItemWritten,
            8 => Reply::Installed(reader.vote()?),
            9 => Reply::Refused(String::from_utf8_lossy(reader.0).into_owned()),
            10 => {
                let refused = numbers(&frame.into_payload(), "groups", BEATS_MAX)?;
                Reply::Heard { refused: refused.into_iter().map(GroupId).collect() }
            }
            value => return Err(DecodeError::Value { what: "reply", value: value.into() }),
        })
    }
}
