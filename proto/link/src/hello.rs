//! The first message of a link, from nebd: which volume, and whether this is a first meeting.
//!
//! Layout (56 bytes, then the name): magic u32 | version_min u16 | version_max u16 | features u64 | mode u8 |
//! flags u8 | name_len u16 | reserved u32 | instance u64 | epoch u64 (0 unless resumed) | identity u128 (0 unless known,
//! never 0 if resumed) | name. A hello is read before a version is agreed: magic and versions lie at the same place in
//! every version, and what follows is laid out as in `version_min`, which whoever shares a version with nebd can read.

use crate::error::LinkError;
use crate::fields::{put, u16_at, u32_at, u64_at, u128_at, within, zero};
use crate::version::{VersionRange, mismatch};
use spline_types::limits::VOLUME_NAME_BYTES_MAX;
use spline_types::{Epoch, VolumeName};
use std::fmt;
use std::num::NonZeroU128;

/// "SPLH" as it lies on the socket.
pub const HELLO_MAGIC: u32 = u32::from_le_bytes(*b"SPLH");
/// Bytes that tell whether the rest can be read: magic and versions.
pub const HELLO_VERSIONS_BYTES: usize = 8;
/// Bytes before the name.
pub const HELLO_FIXED_BYTES: usize = 56;
/// Bytes of the longest hello.
pub const HELLO_BYTES_MAX: usize = HELLO_FIXED_BYTES + VOLUME_NAME_BYTES_MAX;

const FLAG_READ_ONLY: u8 = 1;
const FLAG_FORCE: u8 = 2;

/// Names one nebd process: random, new at every start. A resume is recognised by it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct InstanceId(pub u64);

/// Which volume it is, whatever its name: names move from one volume to another. Known to the gateway's engine, opaque to
/// nebd, the same on every gateway that serves the volume.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Identity(pub NonZeroU128);

impl Identity {
    /// Of two numbers of an engine; `None` if both are 0, which names nothing.
    pub const fn new(high: u64, low: u64) -> Option<Self> {
        match NonZeroU128::new((high as u128) << 64 | low as u128) {
            Some(identity) => Some(Self(identity)),
            None => None,
        }
    }

    /// The high and the low number.
    pub const fn parts(self) -> (u64, u64) {
        ((self.0.get() >> 64) as u64, self.0.get() as u64)
    }

    /// As it lies in a message; `None` for 0.
    pub(crate) fn from_raw(raw: u128) -> Option<Self> {
        NonZeroU128::new(raw).map(Self)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.parts() {
            (0, low) => write!(f, "{low}"),
            (high, low) => write!(f, "{high:x}:{low}"),
        }
    }
}

/// Whether this nebd has had a link for the volume before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// First link of this nebd, or the first since the volume was lost: nothing is replayed.
    Open,
    /// The link was lost; unanswered requests will be replayed first. Refused if anybody else had the volume since
    /// the session that nebd was last told of: their writes are newer than what is replayed (`no_late_duplicate`).
    Resume {
        /// That session; 0 for engines without sessions.
        epoch: Epoch,
    },
}

/// What nebd asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Versions that nebd speaks.
    pub versions: VersionRange,
    /// Optional abilities that nebd offers, one bit each: [`FEATURE_RING`](crate::version::FEATURE_RING). Unknown bits are
    /// ignored by the gateway, which answers with the subset to use.
    pub features: u64,
    /// First link or resumed.
    pub mode: Mode,
    /// nebd will not modify the volume.
    pub read_only: bool,
    /// Take the volume from another gateway whose lease is alive. Holds for a first link only: a nebd whose volume was
    /// taken must not take it back.
    pub force: bool,
    /// Which nebd this is.
    pub instance: InstanceId,
    /// The volume that nebd has served; `None` only before its first welcome. Refused as `Replaced` if the name is another
    /// volume's now: neither what is replayed nor what guests know of the volume is that one's.
    pub identity: Option<Identity>,
    /// The volume's name.
    pub volume: VolumeName,
}

impl Hello {
    /// The bytes to send.
    pub fn encode(&self) -> Vec<u8> {
        let name = self.volume.as_str().as_bytes();
        let mut bytes = vec![0; HELLO_FIXED_BYTES];
        put(&mut bytes, 0, &HELLO_MAGIC.to_le_bytes());
        put(&mut bytes, 4, &self.versions.min.to_le_bytes());
        put(&mut bytes, 6, &self.versions.max.to_le_bytes());
        put(&mut bytes, 8, &self.features.to_le_bytes());
        let (mode, epoch) = match self.mode {
            Mode::Open => (1, 0),
            Mode::Resume { epoch } => (2, epoch.get()),
        };
        bytes[16] = mode;
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        let force = self.force && self.mode == Mode::Open;
        bytes[17] = flag(self.read_only, FLAG_READ_ONLY) | flag(force, FLAG_FORCE);
        // A VolumeName is at most 255 bytes long.
        put(&mut bytes, 18, &(name.len() as u16).to_le_bytes());
        put(&mut bytes, 24, &self.instance.0.to_le_bytes());
        put(&mut bytes, 32, &epoch.to_le_bytes());
        put(&mut bytes, 40, &self.identity.map_or(0, |identity| identity.0.get()).to_le_bytes());
        bytes.extend_from_slice(name);
        bytes
    }

    /// Reads a hello at the start of `bytes`; `None` means that more bytes are needed. The second value is how many
    /// bytes it took.
    ///
    /// # Errors
    /// Any `LinkError`; `Version`, which is to be answered with a refusal, as soon as the versions are there.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, LinkError> {
        if bytes.len() >= 4 && u32_at(bytes, 0) != HELLO_MAGIC {
            return Err(LinkError::Magic(u32_at(bytes, 0)));
        }
        if bytes.len() < HELLO_VERSIONS_BYTES {
            return Ok(None);
        }
        let versions = VersionRange { min: u16_at(bytes, 4), max: u16_at(bytes, 6) };
        if !(VersionRange::OURS.min..=VersionRange::OURS.max).contains(&versions.min) {
            return Err(mismatch(versions));
        }
        if bytes.len() < HELLO_FIXED_BYTES {
            return Ok(None);
        }
        let epoch = u64_at(bytes, 32);
        let mode = match bytes[16] {
            1 => {
                zero("epoch", epoch)?;
                Mode::Open
            }
            2 => Mode::Resume { epoch: Epoch::new(epoch) },
            other => return Err(LinkError::Unknown { field: "mode", value: other.into() }),
        };
        let identity = Identity::from_raw(u128_at(bytes, 40));
        if identity.is_none() && mode != Mode::Open {
            return Err(LinkError::Mismatch { field: "identity", value: 0 });
        }
        // A flag that this build does not know, or a force that a resume must not use.
        let known = if mode == Mode::Open { FLAG_READ_ONLY | FLAG_FORCE } else { FLAG_READ_ONLY };
        zero("flags", u64::from(bytes[17] & !known))?;
        zero("reserved", u32_at(bytes, 20).into())?;
        let name_len = u16_at(bytes, 18);
        within("name_len", name_len.into(), VOLUME_NAME_BYTES_MAX as u64)?;
        let end = HELLO_FIXED_BYTES + usize::from(name_len);
        let Some(name) = bytes.get(HELLO_FIXED_BYTES..end) else { return Ok(None) };
        let name =
            std::str::from_utf8(name).map_err(|_| LinkError::Text("volume name is not UTF-8".to_owned()))?;
        let hello = Self {
            versions,
            features: u64_at(bytes, 8),
            mode,
            read_only: bytes[17] & FLAG_READ_ONLY != 0,
            force: bytes[17] & FLAG_FORCE != 0,
            instance: InstanceId(u64_at(bytes, 24)),
            identity,
            volume: name.parse().map_err(LinkError::Text)?,
        };
        Ok(Some((hello, end)))
    }
}
