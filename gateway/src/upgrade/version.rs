//! Versions of what two processes of a gateway tell each other when one takes over from the other: the messages and the state
//! in them.

/// Every version, newest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u16)]
pub(crate) enum StateVersion {
    /// Sessions with name, epoch, identity and what their engine passes on; links with a ring keep it and their socket, others
    /// come back over the listening socket.
    V1 = 1,
}

/// What one side reads and writes, oldest to newest, both included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct VersionRange {
    pub(crate) min: u16,
    pub(crate) max: u16,
}

impl VersionRange {
    /// What this build reads and writes.
    pub(crate) const OURS: Self = Self { min: StateVersion::V1 as u16, max: StateVersion::V1 as u16 };
}

/// No version that both sides know.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "state version is unknown, upgrade by way of a version between the two, or restart: theirs_min={} theirs_max={} ours_min={} \
     ours_max={}",
    .theirs.min, .theirs.max, VersionRange::OURS.min, VersionRange::OURS.max
)]
pub(crate) struct UnknownVersion {
    pub(crate) theirs: VersionRange,
}

impl StateVersion {
    /// The version with number `raw`.
    ///
    /// # Errors
    /// If this build does not know it.
    pub(crate) fn from_raw(raw: u16) -> Result<Self, UnknownVersion> {
        match raw {
            1 => Ok(Self::V1),
            _ => Err(UnknownVersion { theirs: VersionRange { min: raw, max: raw } }),
        }
    }

    /// The newest version that both this build and the other side know.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn choose(theirs: VersionRange) -> Result<Self, UnknownVersion> {
        let newest = theirs.max.min(VersionRange::OURS.max);
        if theirs.min > theirs.max || newest < theirs.min.max(VersionRange::OURS.min) {
            return Err(UnknownVersion { theirs });
        }
        Self::from_raw(newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_chosen() {
        assert_eq!(StateVersion::choose(VersionRange { min: 1, max: 9 }), Ok(StateVersion::V1));
        assert_eq!(StateVersion::choose(VersionRange { min: 0, max: 1 }), Ok(StateVersion::V1));
        for (min, max) in [(2, 9), (0, 0), (9, 1)] {
            let refused = StateVersion::choose(VersionRange { min, max }).expect_err("no common version");
            assert!(refused.to_string().contains(&format!("theirs_max={max}")), "{refused}");
        }
        assert!(StateVersion::from_raw(7).is_err());
    }
}
