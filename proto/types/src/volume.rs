//! What is said of a volume when it is named, opened or configured.

use crate::limits::VOLUME_NAME_BYTES_MAX;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A checked volume name: 1 to 255 bytes of letters, digits, `.`, `_`, `-`, `:` and `/`; starts with a letter or
/// digit; no empty, `.` or `..` path parts, so that it is safe in logs, URIs and file names.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct VolumeName(String);

impl VolumeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VolumeName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':' | '/');
        let fits = !text.is_empty()
            && text.len() <= VOLUME_NAME_BYTES_MAX
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.chars().all(allowed)
            && text.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if fits {
            return Ok(Self(text.to_owned()));
        }
        let shown: String = text.chars().take(64).collect();
        Err(format!(
            "not a volume name: value={shown:?}; use 1 to {VOLUME_NAME_BYTES_MAX} letters, digits, '.', '_', '-', ':' \
             and '/', starting with a letter or digit"
        ))
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a request does while the cluster can not serve it: a disk that is slow, or one that is broken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnUnavailable {
    /// Wait for as long as it takes.
    #[default]
    Wait,
    /// Fail with an IO error after this long.
    FailAfter(Duration),
}

impl FromStr for OnUnavailable {
    type Err = String;

    /// `wait`, or `fail-after:SECONDS` with whole seconds from 1 to 86400.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "wait" {
            return Ok(Self::Wait);
        }
        let seconds = text.strip_prefix("fail-after:").map(|s| s.strip_suffix('s').unwrap_or(s));
        match seconds.and_then(|s| s.parse().ok()) {
            Some(seconds @ 1..=86_400) => Ok(Self::FailAfter(Duration::from_secs(seconds))),
            _ => Err(format!("not a policy: value={text:?}; write wait or fail-after:SECONDS (1 to 86400)")),
        }
    }
}

impl fmt::Display for OnUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wait => f.write_str("wait"),
            Self::FailAfter(limit) => write!(f, "fail-after:{}", limit.as_secs()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["disk0", "vm/web-1/root", "a", "A.b_c:d"] {
            assert!(good.parse::<VolumeName>().is_ok(), "{good}");
        }
        let long = "x".repeat(256);
        for bad in [
            "",
            "../etc",
            "a/../b",
            "a//b",
            "/a",
            "a/",
            "-rf",
            "a b",
            "a\n",
            "ä",
            "a\0",
            "a/./b",
            long.as_str(),
        ] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn policies_round_trip() {
        for text in ["wait", "fail-after:30"] {
            assert_eq!(text.parse::<OnUnavailable>().expect("parses").to_string(), text);
        }
        for bad in ["fail-after", "fail-after:0", "fail-after:-1", "never", "fail-after:86401"] {
            assert!(bad.parse::<OnUnavailable>().is_err(), "{bad}");
        }
    }
}
