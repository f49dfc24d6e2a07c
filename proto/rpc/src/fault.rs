//! The one mapping between [`Fault`] and gRPC status codes, both ways.

use spline_types::{Fault, Invalid, Unavailable};
use tonic::Code;

/// The status code that a fault becomes.
pub const fn code_of(fault: Fault) -> Code {
    match fault {
        Fault::Invalid(_) => Code::InvalidArgument,
        Fault::Unsupported => Code::Unimplemented,
        Fault::ReadOnly => Code::PermissionDenied,
        Fault::NoSpace => Code::ResourceExhausted,
        Fault::Fenced => Code::FailedPrecondition,
        Fault::Corrupt => Code::DataLoss,
        Fault::Unavailable(_) => Code::Unavailable,
        Fault::Internal => Code::Internal,
    }
}

/// The fault that a status code means to a caller. Codes that Spline never sends are judged by whether a retry may
/// help.
pub const fn fault_of(code: Code) -> Fault {
    match code {
        Code::InvalidArgument | Code::NotFound | Code::AlreadyExists | Code::OutOfRange => {
            Fault::Invalid(Invalid::Flags)
        }
        Code::Unimplemented => Fault::Unsupported,
        Code::PermissionDenied | Code::Unauthenticated => Fault::ReadOnly,
        Code::ResourceExhausted => Fault::NoSpace,
        Code::FailedPrecondition => Fault::Fenced,
        Code::DataLoss => Fault::Corrupt,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Aborted => {
            Fault::Unavailable(Unavailable::Unreachable)
        }
        Code::Ok | Code::Unknown | Code::Internal => Fault::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_survive_the_round_trip() {
        for fault in [
            Fault::Invalid(Invalid::Flags),
            Fault::Unsupported,
            Fault::ReadOnly,
            Fault::NoSpace,
            Fault::Fenced,
            Fault::Corrupt,
            Fault::Unavailable(Unavailable::Unreachable),
            Fault::Internal,
        ] {
            assert_eq!(fault_of(code_of(fault)), fault);
        }
    }
}
