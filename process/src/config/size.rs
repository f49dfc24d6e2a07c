//! Sizes in config files: `"10G"`, `"64MiB"`, or a plain number of bytes. Use with
//! `#[serde(with = "…::config::size")]` on a [`ByteSize`] field.

use serde::{Deserialize, Deserializer, Serializer};
use spline_types::ByteSize;

const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

/// For serde: exact, in the largest unit that divides it.
///
/// # Errors
/// Those of the serializer.
pub fn serialize<S: Serializer>(size: &ByteSize, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&exact(*size))
}

/// For serde.
///
/// # Errors
/// If it is neither a number nor a size as [`ByteSize`] reads it.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ByteSize, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Bytes(u64),
        Text(String),
    }
    match Written::deserialize(deserializer)? {
        Written::Bytes(bytes) => Ok(ByteSize(bytes)),
        Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

fn exact(size: ByteSize) -> String {
    match UNITS.iter().find(|(_, shift)| size.0 > 0 && size.0.is_multiple_of(1 << shift)) {
        Some((unit, shift)) => format!("{}{unit}", size.0 >> shift),
        None => size.0.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_exactly() {
        for (bytes, text) in [(0, "0"), (4096, "4KiB"), (10 << 30, "10GiB"), ((10 << 30) + 1, "10737418241")]
        {
            assert_eq!(exact(ByteSize(bytes)), text);
            assert_eq!(text.parse(), Ok(ByteSize(bytes)));
        }
    }
}
