//! Sizes as people write them: `10G`, `512MiB`, `4096`. Powers of two throughout; `G`, `GB` and `GiB` are the same,
//! as in qemu-img and lvcreate.

use std::fmt;
use std::str::FromStr;

/// A number of bytes that a human typed or will read.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u32); 6] = [("K", 10), ("M", 20), ("G", 30), ("T", 40), ("P", 50), ("E", 60)];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse =
            || format!("not a size: value={text:?}; write a number with K, M, G or T, such as 10G or 512MiB");
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let number: u64 = trimmed[..digits].parse().map_err(|_| refuse())?;
        let suffix = trimmed[digits..].trim().to_ascii_uppercase();
        let letter = suffix.strip_suffix("IB").or_else(|| suffix.strip_suffix('B')).unwrap_or(&suffix);
        if letter.is_empty() {
            // "10iB" has no unit in front of it.
            return if suffix == "IB" { Err(refuse()) } else { Ok(Self(number)) };
        }
        let (_, shift) = UNITS.iter().find(|(unit, _)| *unit == letter).ok_or_else(refuse)?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(refuse)
    }
}

impl fmt::Display for ByteSize {
    /// The largest unit with at most one decimal: `10 GiB`, `1.5 MiB`, `512 B`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in UNITS.iter().rev() {
            let one = 1u64 << shift;
            if self.0 >= one {
                let tenths = (u128::from(self.0) * 10 / u128::from(one)) as u64;
                return match tenths % 10 {
                    0 => write!(f, "{} {unit}iB", tenths / 10),
                    tenth => write!(f, "{}.{tenth} {unit}iB", tenths / 10),
                };
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_people_write_them() {
        for (text, bytes) in [
            ("10G", 10 << 30),
            ("512MiB", 512 << 20),
            ("4096", 4096),
            ("1 tb", 1 << 40),
            ("7kib", 7 << 10),
            ("3B", 3),
        ] {
            assert_eq!(text.parse::<ByteSize>().map(|s| s.0), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1G", "1.5G", "10X", "99999999999999999999", "16E", "10iB", "1 G B"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_as_people_read_them() {
        assert_eq!(ByteSize(10 << 30).to_string(), "10 GiB");
        assert_eq!(ByteSize(3 << 19).to_string(), "1.5 MiB");
        assert_eq!(ByteSize(512).to_string(), "512 B");
    }
}
