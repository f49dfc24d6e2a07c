//! What the old and the new process of a gateway say to each other, as bytes. Pure.
//!
//! Each message is one packet: a header of 12 bytes (magic, kind, version, length of the rest), then its fields, little-endian;
//! texts and lists have their length in front. Descriptors travel beside it. What the other side wrote is foreign: lengths are
//! checked before they are believed, and a packet that is not exactly what it says is refused. `Hello` and `Refused` never
//! change, so that any two versions can say that they do not fit.

mod fields;
mod link;
#[cfg(test)]
mod tests;

use super::version::{StateVersion, UnknownVersion, VersionRange};
use fields::{Reader, Writer};
pub(crate) use link::{LinkState, RegionState};
use spline_link::Identity;
use spline_types::{ChunkserverId, CopysetId, Epoch, VolumeName};

/// Longest packet, bytes: far below what a socket takes at once.
pub(crate) const PACKET_BYTES_MAX: usize = 64 << 10;
/// Most hints about leaders in one packet.
pub(crate) const LEADERS_MAX: usize = 4096;
/// Most regions in one packet: each has a descriptor.
pub(crate) const REGIONS_MAX: usize = 128;
/// Longest reason, bytes: one line for a human.
pub(crate) const REASON_BYTES_MAX: usize = 2048;

const MAGIC: [u8; 4] = *b"SPLU";
const HEADER_BYTES: usize = 12;
/// Version in the header of what never changes.
const ANY_VERSION: u16 = 0;

/// One message. The comment says who sends it, old or new, and what travels beside it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Message {
    /// New, first: what it is and which versions it knows.
    Hello { versions: VersionRange, product: String },
    /// Both, until the commit: it does not do it, and why.
    Refused { reason: String },
    /// Old: the version that is spoken, and what the new one must be like.
    Offer(Offer),
    /// New: its config fits, and it has reached what it needs.
    Proven,
    /// Old: what it listens on. Beside it: link socket, its lock, the log; then those of the other two that are there.
    Sockets(Sockets),
    /// Old: who leads which copyset, as far as it knows.
    Leaders(Vec<(CopysetId, ChunkserverId)>),
    /// Old: a session that it serves. Beside it the file, if its engine has one.
    Session(SessionState),
    /// Old: those were all sessions; they may be opened now.
    Prepare { sessions: u32 },
    /// New: it could serve so many of them at once.
    Prepared { sessions: u32 },
    /// Old: there is no way back. From now on the new one accepts links.
    Commit,
    /// Old: nothing of this session runs here any more; its last request was taken at `stopped_ns` of the monotonic clock.
    Yours { session: u32, stopped_ns: u64 },
    /// Old: something of this session may still run, so that it can not be gone on with; it is opened anew.
    Kept { session: u32 },
    /// Old: those were all.
    Finish,
    /// New: it serves so many sessions of the old one, and has gone on with so many links, the last one after so long.
    Taken { sessions: u32, links: u32, pause_ns: u64 },
    /// Old, last: the new one is the service's main process from now on.
    Main,
    /// Old, before its session's `Yours`: a link that goes on as it is. Beside it what [`LinkState`] says.
    Link(LinkState),
    /// Old, behind the link's message: its memory, in parts. Beside it a file for each region.
    Regions { link: u32, regions: Vec<RegionState> },
}

/// What a new process must be like.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Offer {
    pub(crate) version: u16,
    pub(crate) product: String,
    /// The name under which sessions are open.
    pub(crate) id: String,
    pub(crate) link_socket: String,
    /// As configured; empty: none.
    pub(crate) admin_listen: String,
    pub(crate) metrics_listen: String,
}

/// Which sockets there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Sockets {
    /// systemd made the link socket: its file is not removed.
    pub(crate) is_systemds: bool,
    pub(crate) admin: bool,
    pub(crate) metrics: bool,
}

/// A session of the old process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct SessionState {
    /// How later messages name it; from 0 on.
    pub(crate) number: u32,
    pub(crate) name: VolumeName,
    pub(crate) epoch: Epoch,
    pub(crate) identity: Identity,
    pub(crate) read_only: bool,
    /// Its file travels beside the message.
    pub(crate) file: bool,
}

/// Why a packet is not a message.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum MessageError {
    /// Not ours at all.
    #[error("packet does not begin as one of a gateway: bytes={bytes}")]
    Magic { bytes: usize },
    #[error(transparent)]
    Version(#[from] UnknownVersion),
    #[error("message of an unknown kind: kind={kind}")]
    Kind { kind: u16 },
    #[error("message is too short or too long: kind={kind} bytes={bytes}")]
    Length { kind: u16, bytes: usize },
    #[error("field is not what it can be: kind={kind} field={field}")]
    Field { kind: u16, field: &'static str },
}

impl Message {
    const fn kind(&self) -> u16 {
        match self {
            Self::Hello { .. } => 1,
            Self::Refused { .. } => 2,
            Self::Offer(_) => 3,
            Self::Proven => 4,
            Self::Sockets(_) => 5,
            Self::Leaders(_) => 6,
            Self::Session(_) => 7,
            Self::Prepare { .. } => 8,
            Self::Prepared { .. } => 9,
            Self::Commit => 10,
            Self::Yours { .. } => 11,
            Self::Kept { .. } => 12,
            Self::Finish => 13,
            Self::Taken { .. } => 14,
            Self::Main => 15,
            Self::Link(_) => 16,
            Self::Regions { .. } => 17,
        }
    }

    /// Its name in logs and refusals.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "hello",
            Self::Refused { .. } => "refused",
            Self::Offer(_) => "offer",
            Self::Proven => "proven",
            Self::Sockets(_) => "sockets",
            Self::Leaders(_) => "leaders",
            Self::Session(_) => "session",
            Self::Prepare { .. } => "prepare",
            Self::Prepared { .. } => "prepared",
            Self::Commit => "commit",
            Self::Yours { .. } => "yours",
            Self::Kept { .. } => "kept",
            Self::Finish => "finish",
            Self::Taken { .. } => "taken",
            Self::Main => "main",
            Self::Link(_) => "link",
            Self::Regions { .. } => "regions",
        }
    }

    /// The packet. Texts that are too long are cut; lists must not be.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Writer::new(HEADER_BYTES);
        match self {
            Self::Hello { versions, product } => {
                out.u16(versions.min);
                out.u16(versions.max);
                out.text(product);
            }
            Self::Refused { reason } => out.text(cut(reason)),
            Self::Offer(offer) => {
                out.u16(offer.version);
                let Offer { product, id, link_socket, admin_listen, metrics_listen, .. } = offer;
                for text in [product, id, link_socket, admin_listen, metrics_listen] {
                    out.text(text);
                }
            }
            Self::Sockets(sockets) => out.flags(&[sockets.is_systemds, sockets.admin, sockets.metrics]),
            Self::Leaders(leaders) => {
                out.u32(leaders.len() as u32);
                for (copyset, leader) in leaders {
                    out.u32(copyset.get());
                    out.u32(leader.get());
                }
            }
            Self::Session(state) => {
                out.u32(state.number);
                out.flags(&[state.read_only, state.file]);
                out.u64(state.epoch.get());
                let (high, low) = state.identity.parts();
                out.u64(high);
                out.u64(low);
                out.text(state.name.as_str());
            }
            Self::Prepare { sessions } | Self::Prepared { sessions } => out.u32(*sessions),
            Self::Taken { sessions, links, pause_ns } => {
                out.u32(*sessions);
                out.u32(*links);
                out.u64(*pause_ns);
            }
            Self::Link(state) => link::write_link(state, &mut out),
            Self::Regions { link, regions } => {
                out.u32(*link);
                link::write_regions(regions, &mut out);
            }
            Self::Yours { session, stopped_ns } => {
                out.u32(*session);
                out.u64(*stopped_ns);
            }
            Self::Kept { session } => out.u32(*session),
            Self::Proven | Self::Commit | Self::Finish | Self::Main => {}
        }
        let version = match self {
            Self::Hello { .. } | Self::Refused { .. } => ANY_VERSION,
            _ => StateVersion::V1 as u16,
        };
        let length = (out.len() - HEADER_BYTES) as u32;
        out.put(0, &MAGIC);
        out.put(4, &self.kind().to_le_bytes());
        out.put(6, &version.to_le_bytes());
        out.put(8, &length.to_le_bytes());
        out.finish()
    }

    /// Understands a packet.
    ///
    /// # Errors
    /// What it is not.
    pub(crate) fn decode(packet: &[u8]) -> Result<Self, MessageError> {
        let bytes = packet.len();
        let (header, rest) = packet.split_at_checked(HEADER_BYTES).ok_or(MessageError::Magic { bytes })?;
        let mut fields = Reader::new(0, header);
        if fields.array::<4>("magic")? != MAGIC {
            return Err(MessageError::Magic { bytes });
        }
        let (kind, version, length) = (fields.u16()?, fields.u16()?, fields.u32()?);
        if length as usize != rest.len() {
            return Err(MessageError::Length { kind, bytes });
        }
        // Before the kind: a later version may have other kinds.
        if version != ANY_VERSION {
            StateVersion::from_raw(version)?;
        }
        let mut fields = Reader::new(kind, rest);
        let message = Self::read(kind, &mut fields)?;
        fields.end()?;
        Ok(message)
    }

    fn read(kind: u16, fields: &mut Reader<'_>) -> Result<Self, MessageError> {
        Ok(match kind {
            1 => {
                let versions = VersionRange { min: fields.u16()?, max: fields.u16()? };
                Self::Hello { versions, product: fields.text()? }
            }
            2 => Self::Refused { reason: cut(&fields.text()?).to_owned() },
            3 => Self::Offer(Offer {
                version: fields.u16()?,
                product: fields.text()?,
                id: fields.text()?,
                link_socket: fields.text()?,
                admin_listen: fields.text()?,
                metrics_listen: fields.text()?,
            }),
            4 => Self::Proven,
            5 => {
                let [is_systemds, admin, metrics] = fields.flags()?;
                Self::Sockets(Sockets { is_systemds, admin, metrics })
            }
            6 => Self::Leaders(read_leaders(kind, fields)?),
            7 => Self::Session(read_session(kind, fields)?),
            8 => Self::Prepare { sessions: fields.u32()? },
            9 => Self::Prepared { sessions: fields.u32()? },
            10 => Self::Commit,
            11 => Self::Yours { session: fields.u32()?, stopped_ns: fields.u64()? },
            12 => Self::Kept { session: fields.u32()? },
            13 => Self::Finish,
            14 => Self::Taken { sessions: fields.u32()?, links: fields.u32()?, pause_ns: fields.u64()? },
            15 => Self::Main,
            16 => Self::Link(link::read_link(fields)?),
            17 => Self::Regions { link: fields.u32()?, regions: link::read_regions(kind, fields)? },
            _ => return Err(MessageError::Kind { kind }),
        })
    }
}

fn read_leaders(kind: u16, fields: &mut Reader<'_>) -> Result<Vec<(CopysetId, ChunkserverId)>, MessageError> {
    let count = fields.u32()? as usize;
    if count > LEADERS_MAX {
        return Err(MessageError::Field { kind, field: "leaders" });
    }
    (0..count).map(|_| Ok((CopysetId::new(fields.u32()?), ChunkserverId::new(fields.u32()?)))).collect()
}

fn read_session(kind: u16, fields: &mut Reader<'_>) -> Result<SessionState, MessageError> {
    let number = fields.u32()?;
    let [read_only, file] = fields.flags()?;
    let epoch = Epoch::new(fields.u64()?);
    let identity = Identity::new(fields.u64()?, fields.u64()?);
    let identity = identity.ok_or(MessageError::Field { kind, field: "identity" })?;
    let name = fields.text()?.parse().map_err(|_| MessageError::Field { kind, field: "name" })?;
    Ok(SessionState { number, name, epoch, identity, read_only, file })
}

/// At most so much of a reason, whole characters.
fn cut(reason: &str) -> &str {
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}
