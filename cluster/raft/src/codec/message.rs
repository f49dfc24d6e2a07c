//! What raft peers say to each other, as frames. Pure.
//!
//! Called by `network`. A message is the meta of a `RaftRequest` or `RaftReply` frame; bulk bytes are its payload.
//! Request: version u8 | message u8 | group u32 | body. Reply: version u8 | reply u8 | body. Append's body: vote |
//! optional previous position | optional commit | headers' bytes u32 | entries u32 { header u32 | meta u32 | payload
//! u32 } …; its payload: all entry headers, then all command metas, then the command payloads, each in order.

use bytes::{BufMut, Bytes, BytesMut};
use spline_wire::{Frame, Kind};

use super::{
    DecodeError, Reader, decode_entry, encode_entry, put_optional_log_id, put_stored, put_vote, stored,
};
use crate::command::{GroupId, LogCommand};
use crate::types::{AppendRequest, Entry, SnapshotMeta, TransferRequest, Vote, VoteRequest, VoteResponse};

/// Versions of the peer messages, newest first.
/// - 1: the first.
pub(crate) const MESSAGE_VERSION: u8 = 1;

/// Most entries of one append message: the table of its meta stays far below the frame's 64 KiB (`bounded`).
pub(crate) const ENTRIES_MAX: u64 = 1024;
/// Most items a snapshot may list.
const ITEMS_MAX: usize = 1 << 20;
/// Longest reason in a refusal, bytes.
const REASON_MAX: usize = 512;

/// A request to one group of a peer.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    Append(AppendRequest),
    Vote(VoteRequest),
    PreVote(VoteRequest),
    Transfer(TransferRequest),
    SnapshotBegin { vote: Vote, session: u64, meta: SnapshotMeta, manifest: Bytes },
    SnapshotItem { session: u64, item: u32, data: Bytes },
    SnapshotFinish { session: u64 },
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
            Request::Vote(vote) | Request::PreVote(vote) => {
                put_vote(&mut meta, &vote.vote);
                put_optional_log_id(&mut meta, vote.last_log_id.as_ref());
                meta.put_u8(vote.leadership_transfer.into());
            }
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
        }
        Frame { kind: Kind::RaftRequest, request, meta: meta.freeze(), payload }
    }

    fn number(&self) -> u8 {
        match self {
            Request::Append(_) => 1,
            Request::Vote(_) => 2,
            Request::PreVote(_) => 3,
            Request::Transfer(_) => 4,
            Request::SnapshotBegin { .. } => 5,
            Request::SnapshotItem { .. } => 6,
            Request::SnapshotFinish { .. } => 7,
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
            2 => Request::Vote(vote_request(&mut reader)?),
            3 => Request::PreVote(vote_request(&mut reader)?),
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
            value => return Err(DecodeError::Value { what: "message", value: value.into() }),
        };
        Ok((group, request))
    }
}

fn vote_request(reader: &mut Reader<'_>) -> Result<VoteRequest, DecodeError> {
    let mut request = VoteRequest::new(reader.vote()?, reader.optional_log_id()?);
    request.leadership_transfer = reader.flag("transfer")?;
    Ok(request)
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
            Reply::Needs(items) => {
                let mut bytes = BytesMut::with_capacity(items.len() * 4);
                items.iter().for_each(|item| bytes.put_u32_le(*item));
                payload.push(bytes.freeze());
            }
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
            6 => {
                let payload = frame.into_payload();
                if !payload.len().is_multiple_of(4) || payload.len() / 4 > ITEMS_MAX {
                    return Err(DecodeError::Value { what: "items", value: payload.len() as u64 });
                }
                let item = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                Reply::Needs(payload.chunks_exact(4).map(item).collect())
            }
            7 => Reply::ItemWritten,
            8 => Reply::Installed(reader.vote()?),
            9 => Reply::Refused(String::from_utf8_lossy(reader.0).into_owned()),
            value => return Err(DecodeError::Value { what: "reply", value: value.into() }),
        })
    }
}
