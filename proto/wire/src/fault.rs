//! The one mapping between [`Fault`] and its number on the wire, both ways. 0 is never a fault.

use spline_types::{Fault, Invalid, Unavailable};

/// The number of a fault. Numbers are never reused.
pub const fn number_of(fault: Fault) -> u16 {
    match fault {
        Fault::Invalid(Invalid::PastEnd) => 1,
        Fault::Invalid(Invalid::TooLarge) => 2,
        Fault::Invalid(Invalid::Alignment) => 3,
        Fault::Invalid(Invalid::Flags) => 4,
        Fault::Unsupported => 16,
        Fault::ReadOnly => 17,
        Fault::NoSpace => 18,
        Fault::Fenced => 19,
        Fault::Corrupt => 20,
        Fault::Unavailable(Unavailable::NotLeader) => 32,
        Fault::Unavailable(Unavailable::Overloaded) => 33,
        Fault::Unavailable(Unavailable::Unreachable) => 34,
        Fault::Internal => 48,
    }
}

/// The fault of a number; `None` if there is none of that number.
pub const fn fault_of(number: u16) -> Option<Fault> {
    Some(match number {
        1 => Fault::Invalid(Invalid::PastEnd),
        2 => Fault::Invalid(Invalid::TooLarge),
        3 => Fault::Invalid(Invalid::Alignment),
        4 => Fault::Invalid(Invalid::Flags),
        16 => Fault::Unsupported,
        17 => Fault::ReadOnly,
        18 => Fault::NoSpace,
        19 => Fault::Fenced,
        20 => Fault::Corrupt,
        32 => Fault::Unavailable(Unavailable::NotLeader),
        33 => Fault::Unavailable(Unavailable::Overloaded),
        34 => Fault::Unavailable(Unavailable::Unreachable),
        48 => Fault::Internal,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_survives_the_round_trip() {
        let known: Vec<u16> = (0..=u16::MAX).filter(|&n| fault_of(n).is_some()).collect();
        assert_eq!(known, [1, 2, 3, 4, 16, 17, 18, 19, 20, 32, 33, 34, 48]);
        for number in known {
            assert_eq!(fault_of(number).map(number_of), Some(number));
        }
    }
}
