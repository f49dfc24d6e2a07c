//! The gateway's answer to a hello: the volume as it is served, or why it is not.
//!
//! Layout (64 bytes): magic u32 | version u16 | status u16 | features u64 | epoch u64 | size u64 | block_size u32 |
//! flags u32 | fail_after_ms u32 (0 waits) | request_bytes_max u32 | requests_max u32 | text_len u16 | reserved u16 |
//! bytes_max u64. Behind it lies the text of a refusal, or the identity u128 of an accepted volume. A refusal has the same
//! layout in every version, because it may be about the version.

use crate::error::LinkError;
use crate::fields::{put, u16_at, u32_at, u64_at, u128_at, within, zero};
use crate::hello::Identity;
use crate::version::{LinkVersion, VersionRange};
use spline_types::limits::{REQUEST_BYTES_MAX, VOLUME_BYTES_MAX};
use spline_types::{BlockSize, Epoch, Geometry, OnUnavailable};
use std::time::Duration;

/// "SPLW" as it lies on the socket.
pub const WELCOME_MAGIC: u32 = u32::from_le_bytes(*b"SPLW");
/// Bytes before a refusal's text or an accepted volume's identity.
pub const WELCOME_FIXED_BYTES: usize = 64;
/// Bytes of a welcome that accepts.
pub const WELCOME_ACCEPTED_BYTES: usize = WELCOME_FIXED_BYTES + 16;
/// Longest text, bytes: one line for a human.
pub const TEXT_BYTES_MAX: usize = 1024;
/// Bytes of the longest welcome.
pub const WELCOME_BYTES_MAX: usize = WELCOME_FIXED_BYTES + TEXT_BYTES_MAX;

const FLAG_READ_ONLY: u32 = 1;
const FLAG_VOLATILE_CACHE: u32 = 2;
const FLAG_FAST_ZERO: u32 = 4;
const FLAG_ROTATIONAL: u32 = 8;
const FLAGS_KNOWN: u32 = FLAG_READ_ONLY | FLAG_VOLATILE_CACHE | FLAG_FAST_ZERO | FLAG_ROTATIONAL;

/// What an accepted hello is answered with, or why it was refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Welcome {
    /// Frames may follow.
    Accepted(Accepted),
    /// The gateway closes the socket after this.
    Refused(Refused),
}

/// How the volume is served on this link.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Accepted {
    /// Version of every frame that follows.
    pub version: LinkVersion,
    /// Subset of the hello's features to use.
    pub features: u64,
    /// Epoch of the session.
    pub epoch: Epoch,
    /// Which volume it is.
    pub identity: Identity,
    /// Size and block size.
    pub geometry: Geometry,
    /// What the engine behind it can do.
    pub traits: VolumeTraits,
    /// The volume's policy; nebd applies it while the link is down, the gateway while it is up. Whole milliseconds.
    pub on_unavailable: OnUnavailable,
    /// Most data of one request, bytes.
    pub request_bytes_max: u32,
    /// Most requests that nebd may have unanswered on this link, at least 1.
    pub requests_max: u32,
    /// Most request and reply data that nebd may have unanswered on this link, bytes.
    pub bytes_max: u64,
}

/// What guests may be told of the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VolumeTraits {
    /// Writes are refused.
    pub read_only: bool,
    /// An answered write may still be in a volatile cache: flush and FUA have work to do.
    pub volatile_cache: bool,
    /// Zeroing is quicker than writing zeros; without it `fast` requests fail with `Unsupported`.
    pub fast_zero: bool,
    /// Seeks are dear.
    pub rotational: bool,
}

/// Why a hello was refused; decides what nebd does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// No common version; nebd gives up.
    Version,
    /// No such volume, or its name is not allowed here; nebd gives up at the first open.
    NotFound,
    /// Someone else has the volume's session or export; nebd gives up at the first open, and fails its requests if
    /// it had the volume before.
    Held,
    /// It may be had later (starting, leaving, metadata server away): nebd tries again.
    Unavailable,
    /// The gateway failed; nebd tries again if it had the volume before, else gives up.
    Internal,
    /// The name is another volume's than the one that nebd has served; it fails its requests. Not before version 3.
    Replaced,
}

/// A refusal with its reason for humans.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    /// What nebd acts upon.
    pub refusal: Refusal,
    /// One line for the log: lower case, values at the end, what to do next. Cut at [`TEXT_BYTES_MAX`].
    pub text: String,
}

impl Refusal {
    const fn code(self) -> u16 {
        match self {
            Self::Version => 1,
            Self::NotFound => 2,
            Self::Held => 3,
            Self::Unavailable => 4,
            Self::Internal => 5,
            Self::Replaced => 6,
        }
    }

    const fn from_code(code: u16) -> Option<Self> {
        Some(match code {
            1 => Self::Version,
            2 => Self::NotFound,
            3 => Self::Held,
            4 => Self::Unavailable,
            5 => Self::Internal,
            6 => Self::Replaced,
            _ => return None,
        })
    }
}

impl Welcome {
    /// The bytes to send.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; WELCOME_FIXED_BYTES];
        put(&mut bytes, 0, &WELCOME_MAGIC.to_le_bytes());
        match self {
            Self::Accepted(accepted) => accepted.encode(&mut bytes),
            Self::Refused(refused) => refused.encode(&mut bytes),
        }
        bytes
    }

    /// Reads a welcome at the start of `bytes`; `None` means that more bytes are needed. The second value is how many
    /// bytes it took.
    ///
    /// # Errors
    /// Any `LinkError`.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, LinkError> {
        if bytes.len() >= 4 && u32_at(bytes, 0) != WELCOME_MAGIC {
            return Err(LinkError::Magic(u32_at(bytes, 0)));
        }
        if bytes.len() < WELCOME_FIXED_BYTES {
            return Ok(None);
        }
        let (status, text_len) = (u16_at(bytes, 6), u16_at(bytes, 52));
        if status == 0 {
            zero("text_len", text_len.into())?;
            // A welcome of another version may be shorter: that is told before more bytes are waited for.
            let version = LinkVersion::from_raw(u16_at(bytes, 4))?;
            let Some(whole) = bytes.get(..WELCOME_ACCEPTED_BYTES) else { return Ok(None) };
            return Ok(Some((Self::Accepted(Accepted::decode(whole, version)?), whole.len())));
        }
        within("text_len", text_len.into(), TEXT_BYTES_MAX as u64)?;
        let end = WELCOME_FIXED_BYTES + usize::from(text_len);
        let Some(text) = bytes.get(WELCOME_FIXED_BYTES..end) else { return Ok(None) };
        let refusal =
            Refusal::from_code(status).ok_or(LinkError::Unknown { field: "status", value: status.into() })?;
        let refused = Refused { refusal, text: String::from_utf8_lossy(text).into_owned() };
        Ok(Some((Self::Refused(refused), end)))
    }
}

impl Accepted {
    fn encode(&self, bytes: &mut Vec<u8>) {
        let traits = [
            (self.traits.read_only, FLAG_READ_ONLY),
            (self.traits.volatile_cache, FLAG_VOLATILE_CACHE),
            (self.traits.fast_zero, FLAG_FAST_ZERO),
            (self.traits.rotational, FLAG_ROTATIONAL),
        ];
        let flags = traits.iter().filter(|(set, _)| *set).fold(0, |flags, (_, bit)| flags | bit);
        let fail_after_ms = match self.on_unavailable {
            OnUnavailable::Wait => 0,
            // 0 would mean "wait"; what does not fit 32 bits (49 days) is as good as 49 days.
            OnUnavailable::FailAfter(limit) => u32::try_from(limit.as_millis()).unwrap_or(u32::MAX).max(1),
        };
        put(bytes, 4, &(self.version as u16).to_le_bytes());
        put(bytes, 8, &self.features.to_le_bytes());
        put(bytes, 16, &self.epoch.get().to_le_bytes());
        put(bytes, 24, &self.geometry.size.to_le_bytes());
        put(bytes, 32, &self.geometry.block_size.bytes().to_le_bytes());
        put(bytes, 36, &flags.to_le_bytes());
        put(bytes, 40, &fail_after_ms.to_le_bytes());
        put(bytes, 44, &self.request_bytes_max.to_le_bytes());
        put(bytes, 48, &self.requests_max.to_le_bytes());
        put(bytes, 56, &self.bytes_max.to_le_bytes());
        bytes.extend_from_slice(&self.identity.0.get().to_le_bytes());
    }

    /// `bytes` are [`WELCOME_ACCEPTED_BYTES`].
    fn decode(bytes: &[u8], version: LinkVersion) -> Result<Self, LinkError> {
        zero("reserved", u16_at(bytes, 54).into())?;
        let size = u64_at(bytes, 24);
        within("size", size, VOLUME_BYTES_MAX)?;
        let raw_block = u32_at(bytes, 32);
        let block_size = BlockSize::from_bytes(raw_block)
            .ok_or(LinkError::Unknown { field: "block_size", value: raw_block.into() })?;
        let flags = u32_at(bytes, 36);
        zero("flags", u64::from(flags & !FLAGS_KNOWN))?;
        let request_bytes_max = u32_at(bytes, 44);
        within("request_bytes_max", request_bytes_max.into(), REQUEST_BYTES_MAX.into())?;
        let (requests_max, bytes_max) = (u32_at(bytes, 48), u64_at(bytes, 56));
        if requests_max == 0 || request_bytes_max < block_size.bytes() {
            return Err(LinkError::Mismatch { field: "limits", value: request_bytes_max.into() });
        }
        if bytes_max < request_bytes_max.into() {
            return Err(LinkError::Mismatch { field: "bytes_max", value: bytes_max });
        }
        Ok(Self {
            version,
            features: u64_at(bytes, 8),
            epoch: Epoch::new(u64_at(bytes, 16)),
            identity: Identity::from_raw(u128_at(bytes, WELCOME_FIXED_BYTES))
                .ok_or(LinkError::Mismatch { field: "identity", value: 0 })?,
            geometry: Geometry { size, block_size },
            traits: VolumeTraits {
                read_only: flags & FLAG_READ_ONLY != 0,
                volatile_cache: flags & FLAG_VOLATILE_CACHE != 0,
                fast_zero: flags & FLAG_FAST_ZERO != 0,
                rotational: flags & FLAG_ROTATIONAL != 0,
            },
            on_unavailable: match u32_at(bytes, 40) {
                0 => OnUnavailable::Wait,
                ms => OnUnavailable::FailAfter(Duration::from_millis(ms.into())),
            },
            request_bytes_max,
            requests_max,
            bytes_max,
        })
    }
}

impl Refused {
    fn encode(&self, bytes: &mut Vec<u8>) {
        let mut end = self.text.len().min(TEXT_BYTES_MAX);
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        put(bytes, 4, &VersionRange::OURS.max.to_le_bytes());
        put(bytes, 6, &self.refusal.code().to_le_bytes());
        // At most TEXT_BYTES_MAX.
        put(bytes, 52, &(end as u16).to_le_bytes());
        bytes.extend_from_slice(&self.text.as_bytes()[..end]);
    }
}
