//! The crate's own encodings: what the log, the checkpoints and the peers see. Pure; openraft's serde is not used.
//!
//! Called by `log_store`, `network`, `snapshot`. Every encoding starts with a version byte; an unknown one is refused
//! by name. All numbers are little-endian. Layouts:
//!
//! - leader: term u64 | node u64; position: leader | index u64; optional x: 0, or 1 followed by x.
//! - vote record: version | leader | committed u8.
//! - entry header: version | kind u8 | leader | (kind membership: sets); the index is the log's own. A bundle's commands
//!   lie in its payload (`bundle`).
//! - sets: configs u32 { count u32 | node u64 … } … | nodes u32 | node u64 …
//! - membership record: version | optional position | sets.

pub(crate) mod message;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use openraft::EntryPayload;
use openraft::impls::EmptyNode;
use std::collections::{BTreeMap, BTreeSet};

use crate::command::LogCommand;
use crate::places::Placed;
use crate::types::{Entry, LeaderId, LogId, Membership, StoredMembership, Vote};

/// Versions of the records on disk, newest first.
/// - 1: the first.
pub(crate) const RECORD_VERSION: u8 = 1;

/// Versions of an entry's header, newest first. An entry is written with the oldest that knows its kind.
/// - 2: bundles.
/// - 1: the first.
const ENTRY_VERSION: u8 = 2;

/// Most members a group may list: a foreign length is checked against it before anything is allocated (`bounded`).
const MEMBERS_MAX: u32 = 1024;

const KIND_BLANK: u8 = 0;
const KIND_COMMAND: u8 = 1;
const KIND_MEMBERSHIP: u8 = 2;
const KIND_BUNDLE: u8 = 3;

/// Why bytes could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    /// The bytes end too early.
    #[error("raft record is cut short, what={0}")]
    Short(&'static str),
    /// Written by a version this program does not know.
    #[error("raft {what} has an unknown version, upgrade this program, version={version}")]
    Version { what: &'static str, version: u8 },
    /// A number outside its set.
    #[error("raft {what} is not valid, value={value}")]
    Value { what: &'static str, value: u64 },
}

impl From<DecodeError> for std::io::Error {
    fn from(e: DecodeError) -> Self {
        std::io::Error::new(std::io::ErrorKind::InvalidData, e)
    }
}

/// A cursor over foreign bytes.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl Reader<'_> {
    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, DecodeError> {
        self.0.try_get_u8().map_err(|_| DecodeError::Short(what))
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        self.0.try_get_u32_le().map_err(|_| DecodeError::Short(what))
    }

    pub(crate) fn u64(&mut self, what: &'static str) -> Result<u64, DecodeError> {
        self.0.try_get_u64_le().map_err(|_| DecodeError::Short(what))
    }

    pub(crate) fn flag(&mut self, what: &'static str) -> Result<bool, DecodeError> {
        match self.u8(what)? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(DecodeError::Value { what, value: value.into() }),
        }
    }

    pub(crate) fn version(&mut self, what: &'static str, known: u8) -> Result<(), DecodeError> {
        match self.u8(what)? {
            version if version == known => Ok(()),
            version => Err(DecodeError::Version { what, version }),
        }
    }

    pub(crate) fn optional_leader(&mut self) -> Result<Option<LeaderId>, DecodeError> {
        if self.flag("leader")? { self.leader().map(Some) } else { Ok(None) }
    }

    fn leader(&mut self) -> Result<LeaderId, DecodeError> {
        Ok(LeaderId { term: self.u64("term")?, node_id: self.u64("node")? })
    }

    pub(crate) fn log_id(&mut self) -> Result<LogId, DecodeError> {
        Ok(LogId::new(self.leader()?, self.u64("index")?))
    }

    pub(crate) fn optional_log_id(&mut self) -> Result<Option<LogId>, DecodeError> {
        if self.flag("position")? { self.log_id().map(Some) } else { Ok(None) }
    }

    pub(crate) fn vote(&mut self) -> Result<Vote, DecodeError> {
        Ok(Vote { leader_id: self.leader()?, committed: self.flag("vote")? })
    }

    fn count(&mut self, what: &'static str) -> Result<u32, DecodeError> {
        match self.u32(what)? {
            count if count <= MEMBERS_MAX => Ok(count),
            count => Err(DecodeError::Value { what, value: count.into() }),
        }
    }

    fn sets(&mut self) -> Result<Membership, DecodeError> {
        let mut configs = Vec::new();
        for _ in 0..self.count("configs")? {
            let count = self.count("voters")?;
            configs.push((0..count).map(|_| self.u64("voter")).collect::<Result<BTreeSet<_>, _>>()?);
        }
        let count = self.count("nodes")?;
        let nodes = (0..count)
            .map(|_| Ok((self.u64("node")?, EmptyNode::new())))
            .collect::<Result<BTreeMap<_, _>, DecodeError>>()?;
        // A checkpoint of an uninitialised group lists nobody; openraft's constructor would refuse that.
        if configs.is_empty() && nodes.is_empty() {
            return Ok(Membership::default());
        }
        Membership::new(configs, nodes)
            .map_err(|_| DecodeError::Value { what: "membership", value: count.into() })
    }
}

fn put_leader(out: &mut BytesMut, leader: LeaderId) {
    out.put_u64_le(leader.term);
    out.put_u64_le(leader.node_id);
}

pub(crate) fn put_optional_leader(out: &mut BytesMut, leader: Option<LeaderId>) {
    out.put_u8(leader.is_some().into());
    if let Some(leader) = leader {
        put_leader(out, leader);
    }
}

pub(crate) fn put_log_id(out: &mut BytesMut, id: &LogId) {
    put_leader(out, id.leader_id);
    out.put_u64_le(id.index);
}

pub(crate) fn put_optional_log_id(out: &mut BytesMut, id: Option<&LogId>) {
    out.put_u8(id.is_some().into());
    if let Some(id) = id {
        put_log_id(out, id);
    }
}

pub(crate) fn put_vote(out: &mut BytesMut, vote: &Vote) {
    put_leader(out, vote.leader_id);
    out.put_u8(vote.committed.into());
}

fn put_sets(out: &mut BytesMut, membership: &Membership) {
    let configs = membership.get_joint_config();
    out.put_u32_le(configs.len() as u32);
    for voters in configs {
        out.put_u32_le(voters.len() as u32);
        voters.iter().for_each(|voter| out.put_u64_le(*voter));
    }
    let nodes: Vec<u64> = membership.nodes().map(|(node, _)| *node).collect();
    out.put_u32_le(nodes.len() as u32);
    nodes.iter().for_each(|node| out.put_u64_le(*node));
}

/// A vote as the log keeps it.
pub(crate) fn encode_vote(vote: &Vote) -> Bytes {
    let mut out = BytesMut::with_capacity(18);
    out.put_u8(RECORD_VERSION);
    put_vote(&mut out, vote);
    out.freeze()
}

/// Reads [`encode_vote`]'s bytes.
pub(crate) fn decode_vote(bytes: &[u8]) -> Result<Vote, DecodeError> {
    let mut reader = Reader(bytes);
    reader.version("vote", RECORD_VERSION)?;
    reader.vote()
}

/// A position as the log keeps it beside a purge.
pub(crate) fn encode_position(id: &LogId) -> Bytes {
    let mut out = BytesMut::with_capacity(25);
    out.put_u8(RECORD_VERSION);
    put_log_id(&mut out, id);
    out.freeze()
}

/// Reads [`encode_position`]'s bytes.
pub(crate) fn decode_position(bytes: &[u8]) -> Result<LogId, DecodeError> {
    let mut reader = Reader(bytes);
    reader.version("position", RECORD_VERSION)?;
    reader.log_id()
}

/// A membership as a checkpoint keeps it; empty bytes stand for "none yet".
pub(crate) fn encode_membership(membership: &StoredMembership) -> Bytes {
    let mut out = BytesMut::with_capacity(96);
    out.put_u8(RECORD_VERSION);
    put_stored(&mut out, membership);
    out.freeze()
}

/// Reads [`encode_membership`]'s bytes.
pub(crate) fn decode_membership(bytes: &[u8]) -> Result<StoredMembership, DecodeError> {
    if bytes.is_empty() {
        return Ok(StoredMembership::default());
    }
    let mut reader = Reader(bytes);
    reader.version("membership", RECORD_VERSION)?;
    stored(&mut reader)
}

pub(crate) fn put_stored(out: &mut BytesMut, membership: &StoredMembership) {
    put_optional_log_id(out, membership.log_id().as_ref());
    put_sets(out, membership.membership());
}

pub(crate) fn stored(reader: &mut Reader<'_>) -> Result<StoredMembership, DecodeError> {
    let id = reader.optional_log_id()?;
    Ok(StoredMembership::new(id, reader.sets()?))
}

/// The header of an entry in the log, and the command that lies beside it (empty if it has none).
pub(crate) fn encode_entry(entry: Entry) -> (u64, Bytes, LogCommand) {
    let mut out = BytesMut::with_capacity(18);
    let (version, kind) = match &entry.payload {
        EntryPayload::Blank => (1, KIND_BLANK),
        EntryPayload::Normal(placed) if placed.is_bundle => (2, KIND_BUNDLE),
        EntryPayload::Normal(_) => (1, KIND_COMMAND),
        EntryPayload::Membership(_) => (1, KIND_MEMBERSHIP),
    };
    out.put_u8(version);
    out.put_u8(kind);
    put_leader(&mut out, entry.log_id.leader_id);
    let command = match entry.payload {
        EntryPayload::Blank => LogCommand::default(),
        EntryPayload::Normal(placed) => placed.command,
        EntryPayload::Membership(membership) => {
            put_sets(&mut out, &membership);
            LogCommand::default()
        }
    };
    (entry.log_id.index, out.freeze(), command)
}

/// Reads [`encode_entry`]'s bytes.
pub(crate) fn decode_entry(index: u64, header: &[u8], command: LogCommand) -> Result<Entry, DecodeError> {
    let mut reader = Reader(header);
    let version = reader.u8("entry version")?;
    if !(1..=ENTRY_VERSION).contains(&version) {
        return Err(DecodeError::Version { what: "entry", version });
    }
    let kind = reader.u8("entry kind")?;
    let leader = reader.leader()?;
    let payload = match kind {
        KIND_BLANK => EntryPayload::Blank,
        KIND_COMMAND => EntryPayload::Normal(Placed::from(command)),
        KIND_BUNDLE if version >= 2 => EntryPayload::Normal(Placed { command, place: None, is_bundle: true }),
        KIND_MEMBERSHIP => EntryPayload::Membership(reader.sets()?),
        value => return Err(DecodeError::Value { what: "entry kind", value: value.into() }),
    };
    Ok(Entry { log_id: LogId::new(leader, index), payload })
}

#[cfg(test)]
mod tests;
