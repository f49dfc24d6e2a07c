//! Durations in config files: `"300ms"`, `"10s"`, `"10m"`, `"2h"`. Use with `#[serde(with = "…::config::duration")]`.

use serde::{Deserialize, Deserializer, Serializer};
use std::time::Duration;

const UNITS: [(&str, u64); 5] =
    [("us", 1), ("ms", 1000), ("s", 1_000_000), ("m", 60_000_000), ("h", 3_600_000_000)];

/// Reads a duration as people write it.
///
/// # Errors
/// If it is not a whole number directly followed by `us`, `ms`, `s`, `m` or `h`, or too large.
pub fn parse(text: &str) -> Result<Duration, String> {
    let refuse = || {
        format!("not a duration: value={text:?}; write a whole number and us, ms, s, m or h, such as 300ms")
    };
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| refuse())?;
    let (_, micros) = UNITS.iter().find(|(unit, _)| *unit == &text[digits..]).ok_or_else(refuse)?;
    number.checked_mul(*micros).map(Duration::from_micros).ok_or_else(refuse)
}

/// Writes a duration so that [`parse`] reads it back, to the microsecond.
pub fn format(duration: Duration) -> String {
    let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    let (unit, size) = match micros {
        0 => ("s", 1),
        // Minutes and hours are read but not written: "600s" compares more easily with its neighbours.
        _ => *UNITS[..3].iter().rev().find(|(_, size)| micros.is_multiple_of(*size)).unwrap_or(&UNITS[0]),
    };
    format!("{}{unit}", micros / size)
}

/// For serde.
///
/// # Errors
/// Those of the serializer.
pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format(*duration))
}

/// For serde.
///
/// # Errors
/// Those of [`parse`].
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_as_people_write_them() {
        assert_eq!(parse("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(parse("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(format(Duration::from_secs(600)), "600s");
        for bad in ["", "10", "s", "1.5s", "-1s", "10 s", "5000000000000h"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(micros in 0u64..1 << 60) {
            prop_assert_eq!(parse(&format(Duration::from_micros(micros))), Ok(Duration::from_micros(micros)));
        }
    }
}
