//! Versions of the data plane. Called by `connection`. Must never know what travels in a frame.
//!
//! A connection starts with an 8-byte preface each way: magic `SPLW`, lowest and highest version that the side
//! speaks, u16 little-endian each. Both use the highest version that both speak.

use crate::error::WireError;

/// First bytes of a preface.
pub const PREFACE_MAGIC: [u8; 4] = *b"SPLW";
/// Bytes of a preface.
pub const PREFACE_BYTES: usize = 8;

/// Version of the data plane, newest first. A change of the header or of a meta encoding is a new version.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u16)]
pub enum Version {
    /// First version: 32-byte header, CRC-32C of header with meta and of payload, 64-byte chunk requests.
    V1 = 1,
}

/// Newest version that this build speaks.
pub const NEWEST: u16 = Version::V1 as u16;
/// Oldest version that this build speaks.
pub const OLDEST: u16 = Version::V1 as u16;

/// The preface that this build sends.
pub fn preface() -> [u8; PREFACE_BYTES] {
    preface_of(OLDEST, NEWEST)
}

fn preface_of(oldest: u16, newest: u16) -> [u8; PREFACE_BYTES] {
    let [a, b, c, d] = PREFACE_MAGIC;
    let ([e, f], [g, h]) = (oldest.to_le_bytes(), newest.to_le_bytes());
    [a, b, c, d, e, f, g, h]
}

/// The version to use with a peer that sent `theirs`.
///
/// # Errors
/// `NotSpline` if the bytes are no preface, `Versions` if no version is common.
pub fn choose(theirs: [u8; PREFACE_BYTES]) -> Result<u16, WireError> {
    let [a, b, c, d, e, f, g, h] = theirs;
    if [a, b, c, d] != PREFACE_MAGIC {
        return Err(WireError::NotSpline { bytes: theirs });
    }
    let (oldest, newest) = (u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
    let version = newest.min(NEWEST);
    if version < oldest.max(OLDEST) {
        return Err(WireError::Versions { theirs: (oldest, newest), ours: (OLDEST, NEWEST) });
    }
    Ok(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_preface() {
        assert_eq!(preface(), *b"SPLW\x01\x00\x01\x00");
    }

    #[test]
    fn the_highest_common_version_wins_and_none_is_refused() {
        assert_eq!(choose(preface()).expect("own"), NEWEST);
        assert_eq!(choose(preface_of(1, 900)).expect("newer peer"), NEWEST);
        let text = choose(preface_of(7, 9)).expect_err("too new").to_string();
        assert!(text.contains("7 to 9"), "{text}");
        assert!(choose(preface_of(0, 0)).is_err());
        assert!(choose(preface_of(2, 1)).is_err());
        assert!(matches!(choose(*b"GET / HT"), Err(WireError::NotSpline { .. })));
    }
}
