//! Versions of the link. nebd is rarely upgraded, the gateway often: a gateway keeps speaking what running nebds speak.

use crate::error::LinkError;

/// Every version, newest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u16)]
pub enum LinkVersion {
    /// A hello may offer [`FEATURE_RING`] and bring a ring's descriptors; frames to pass regions of memory on and to take them
    /// back, and one by which a gateway that took a link over tells its session's epoch. Otherwise as V3.
    V4 = 4,
    /// The welcome names the volume's identity, and a nebd that comes back names it in its hello. Hello of 56 bytes,
    /// welcome of 80, 48-byte frames with inline payload over the socket, extents of 12 bytes. Version 2 had a hello of
    /// 40 bytes and a welcome of 64 without the identity, version 1 a hello of 32 without the resumed epoch either: a
    /// replay could land in another volume. They were never released and are not spoken.
    V3 = 3,
}

/// Feature of a hello and a welcome: requests and completions travel in a ring, and the socket carries all other frames.
pub const FEATURE_RING: u64 = 1;

/// What one side speaks, oldest to newest, both included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VersionRange {
    /// Oldest.
    pub min: u16,
    /// Newest.
    pub max: u16,
}

impl VersionRange {
    /// What this build speaks.
    pub const OURS: Self = Self { min: LinkVersion::V3 as u16, max: LinkVersion::V4 as u16 };
}

impl LinkVersion {
    /// The version with number `raw`.
    ///
    /// # Errors
    /// `Version` if this build does not speak it.
    pub fn from_raw(raw: u16) -> Result<Self, LinkError> {
        match raw {
            3 => Ok(Self::V3),
            4 => Ok(Self::V4),
            _ => Err(mismatch(VersionRange { min: raw, max: raw })),
        }
    }

    /// The newest version that both this build and the other side speak.
    ///
    /// # Errors
    /// `Version` if there is none.
    pub fn choose(theirs: VersionRange) -> Result<Self, LinkError> {
        let newest = theirs.max.min(VersionRange::OURS.max);
        if theirs.min > theirs.max || newest < theirs.min.max(VersionRange::OURS.min) {
            return Err(mismatch(theirs));
        }
        Self::from_raw(newest)
    }
}

pub(crate) fn mismatch(theirs: VersionRange) -> LinkError {
    LinkError::Version {
        min: theirs.min,
        max: theirs.max,
        ours_min: VersionRange::OURS.min,
        ours_max: VersionRange::OURS.max,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_chosen() {
        assert_eq!(LinkVersion::choose(VersionRange { min: 2, max: 9 }), Ok(LinkVersion::V4));
        assert_eq!(LinkVersion::choose(VersionRange { min: 0, max: 3 }), Ok(LinkVersion::V3));
        for (min, max) in [(5, 9), (2, 2), (1, 1), (0, 0), (9, 1)] {
            let refused = LinkVersion::choose(VersionRange { min, max }).expect_err("no common version");
            assert!(refused.to_string().contains(&format!("theirs_min={min}")), "{refused}");
        }
    }
}
