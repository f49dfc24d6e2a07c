//! Fault and completion as a frame's status field. Code 0 is done, `WITHDRAWN` is withdrawn, the rest are faults.

use crate::error::LinkError;
use spline_types::{Completion, Fault, Invalid, Unavailable};

/// Status of a request that was not carried out because the gateway leaves.
const WITHDRAWN: u16 = u16::MAX;

/// The code of a fault; never 0 and never the withdrawn code.
pub const fn fault_code(fault: Fault) -> u16 {
    match fault {
        Fault::Invalid(Invalid::PastEnd) => 1,
        Fault::Invalid(Invalid::TooLarge) => 2,
        Fault::Invalid(Invalid::Alignment) => 3,
        Fault::Invalid(Invalid::Flags) => 4,
        Fault::Unsupported => 16,
        Fault::ReadOnly => 32,
        Fault::NoSpace => 48,
        Fault::Fenced => 64,
        Fault::Corrupt => 80,
        Fault::Unavailable(Unavailable::NotLeader) => 96,
        Fault::Unavailable(Unavailable::Overloaded) => 97,
        Fault::Unavailable(Unavailable::Unreachable) => 98,
        Fault::Internal => 112,
    }
}

/// The fault of a code.
///
/// # Errors
/// `Unknown` outside the list.
pub const fn fault_from_code(code: u16) -> Result<Fault, LinkError> {
    Ok(match code {
        1 => Fault::Invalid(Invalid::PastEnd),
        2 => Fault::Invalid(Invalid::TooLarge),
        3 => Fault::Invalid(Invalid::Alignment),
        4 => Fault::Invalid(Invalid::Flags),
        16 => Fault::Unsupported,
        32 => Fault::ReadOnly,
        48 => Fault::NoSpace,
        64 => Fault::Fenced,
        80 => Fault::Corrupt,
        96 => Fault::Unavailable(Unavailable::NotLeader),
        97 => Fault::Unavailable(Unavailable::Overloaded),
        98 => Fault::Unavailable(Unavailable::Unreachable),
        112 => Fault::Internal,
        _ => return Err(LinkError::Unknown { field: "status", value: code as u64 }),
    })
}

pub(crate) fn completion_code(completion: &Completion) -> u16 {
    match completion {
        Completion::Done(()) => 0,
        Completion::Failed(fault) => fault_code(*fault),
        Completion::Withdrawn => WITHDRAWN,
    }
}

pub(crate) fn completion_from_code(code: u16) -> Result<Completion, LinkError> {
    match code {
        0 => Ok(Completion::Done(())),
        WITHDRAWN => Ok(Completion::Withdrawn),
        fault => fault_from_code(fault).map(Completion::Failed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_maps_back_to_itself() {
        let mut known = 0;
        for code in 0..=u16::MAX {
            if let Ok(completion) = completion_from_code(code) {
                assert_eq!(completion_code(&completion), code);
                known += 1;
            }
        }
        assert_eq!(known, 15, "13 faults, done and withdrawn");
    }
}
