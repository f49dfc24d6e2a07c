//! How ids, names and durations are written in JSON. The vocabulary crate makes no promise about serialisation, so
//! the promise is made here, where commands, tables and the configuration are written.
//!
//! Called by serde's derives (`#[serde(with = "…")]`). Must never know: what is written.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// An id and the number it is written as.
pub(crate) trait Id: Copy {
    /// The number.
    type Raw: Serialize + for<'a> Deserialize<'a>;
    /// To the number.
    fn raw(self) -> Self::Raw;
    /// From the number.
    fn wrap(raw: Self::Raw) -> Self;
}

macro_rules! ids {
    ($($name:ident: $raw:ty),*) => {$(
        impl Id for spline_types::$name {
            type Raw = $raw;
            fn raw(self) -> $raw {
                self.get()
            }
            fn wrap(raw: $raw) -> Self {
                Self::new(raw)
            }
        }
    )*};
}

ids!(VolumeId: u64, CopysetId: u32, ChunkserverId: u32, SegmentIndex: u32, Epoch: u64);

/// One id, as a number.
pub(crate) mod id {
    use super::*;

    pub(crate) fn serialize<T: Id, S: Serializer>(id: &T, to: S) -> Result<S::Ok, S::Error> {
        id.raw().serialize(to)
    }

    pub(crate) fn deserialize<'a, T: Id, D: Deserializer<'a>>(from: D) -> Result<T, D::Error> {
        T::Raw::deserialize(from).map(T::wrap)
    }
}

/// Several ids, as an array of numbers.
pub(crate) mod ids {
    use super::*;

    pub(crate) fn serialize<'i, T, C, S>(list: &'i C, to: S) -> Result<S::Ok, S::Error>
    where
        T: Id + 'i,
        &'i C: IntoIterator<Item = &'i T>,
        S: Serializer,
    {
        to.collect_seq(list.into_iter().map(|id| id.raw()))
    }

    pub(crate) fn deserialize<'a, T, C, D>(from: D) -> Result<C, D::Error>
    where
        T: Id,
        C: FromIterator<T>,
        D: Deserializer<'a>,
    {
        Ok(Vec::<T::Raw>::deserialize(from)?.into_iter().map(T::wrap).collect())
    }
}

/// What is written as it is displayed and parsed: names and policies.
pub(crate) mod text {
    use super::*;
    use std::fmt::Display;
    use std::str::FromStr;

    pub(crate) fn serialize<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub(crate) fn deserialize<'a, T, D>(from: D) -> Result<T, D::Error>
    where
        T: FromStr<Err = String>,
        D: Deserializer<'a>,
    {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

/// A block size, in bytes.
pub(crate) mod block_size {
    use super::*;
    use spline_types::BlockSize;

    pub(crate) fn serialize<S: Serializer>(size: &BlockSize, to: S) -> Result<S::Ok, S::Error> {
        size.bytes().serialize(to)
    }

    pub(crate) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<BlockSize, D::Error> {
        let bytes = u32::deserialize(from)?;
        BlockSize::from_bytes(bytes)
            .ok_or_else(|| D::Error::custom(format!("not a block size: value={bytes}; use 512 or 4096")))
    }
}

/// A duration as people write it: `500ms`, `10s`, `10min`.
pub(crate) mod duration {
    use super::*;
    use std::time::Duration;

    const UNITS: [(&str, u64); 4] = [("min", 60_000), ("ms", 1), ("s", 1000), ("h", 3_600_000)];

    pub(crate) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        let ms = value.as_millis() as u64;
        let (unit, one) = match ms {
            ms if ms > 0 && ms.is_multiple_of(60_000) => ("min", 60_000),
            ms if ms.is_multiple_of(1000) => ("s", 1000),
            _ => ("ms", 1),
        };
        to.collect_str(&format_args!("{}{unit}", ms / one))
    }

    pub(crate) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        parse(&text).ok_or_else(|| {
            D::Error::custom(format!("not a duration: value={text:?}; write a number with ms, s, min or h"))
        })
    }

    fn parse(text: &str) -> Option<Duration> {
        let (unit, one) = UNITS.iter().find(|(unit, _)| text.ends_with(unit))?;
        let number: u64 = text.strip_suffix(unit)?.trim_end().parse().ok()?;
        number.checked_mul(*one).map(Duration::from_millis)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn durations_as_people_write_them() {
            for (text, ms) in
                [("500ms", 500), ("10s", 10_000), ("10 min", 600_000), ("1h", 3_600_000), ("0s", 0)]
            {
                assert_eq!(parse(text), Some(Duration::from_millis(ms)), "{text}");
            }
            for text in
                ["", "s", "-1s", "1.5s", "10", "10d", "99999999999999999999s", "18446744073709551615h"]
            {
                assert_eq!(parse(text), None, "{text}");
            }
        }
    }
}

/// Opaque bytes, as hexadecimal text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hex(pub(crate) Vec<u8>);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.0.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    }
}

impl<'a> Deserialize<'a> for Hex {
    fn deserialize<D: Deserializer<'a>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let refuse = || D::Error::custom("not hexadecimal text");
        if !text.len().is_multiple_of(2) {
            return Err(refuse());
        }
        let digit = |d: u8| (d as char).to_digit(16).map(|d| d as u8);
        text.as_bytes()
            .chunks_exact(2)
            .map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?))
            .collect::<Option<Vec<u8>>>()
            .map(Hex)
            .ok_or_else(refuse)
    }
}
