//! Faults as NBD errors: the one place where that is decided (proto.md, "Error values"; design of faults).

use spline_types::{BlockOp, Fault, Invalid};

/// The error values that proto.md allows in a reply and that we use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum NbdError {
    /// Operation not permitted.
    Perm = 1,
    /// Input or output error.
    Io = 5,
    /// Invalid argument.
    Inval = 22,
    /// No space left on device, or a write past its end.
    NoSpace = 28,
    /// Operation not supported; only for a zeroing that could not be fast.
    NotSupported = 95,
    /// The server is shutting down.
    Shutdown = 108,
}

/// What a client is told when `op` ends with `fault`.
pub const fn nbd_error(op: BlockOp, fault: Fault) -> NbdError {
    match fault {
        Fault::Invalid(Invalid::PastEnd) => match op {
            BlockOp::Write | BlockOp::WriteZeroes { .. } => NbdError::NoSpace,
            BlockOp::Read | BlockOp::Flush | BlockOp::Discard | BlockOp::Cache | BlockOp::Status => {
                NbdError::Inval
            }
        },
        Fault::Invalid(Invalid::TooLarge | Invalid::Alignment | Invalid::Flags) => NbdError::Inval,
        Fault::Unsupported => match op {
            BlockOp::WriteZeroes { fast: true, .. } => NbdError::NotSupported,
            BlockOp::WriteZeroes { fast: false, .. }
            | BlockOp::Read
            | BlockOp::Write
            | BlockOp::Flush
            | BlockOp::Discard
            | BlockOp::Cache
            | BlockOp::Status => NbdError::Inval,
        },
        Fault::ReadOnly => NbdError::Perm,
        Fault::NoSpace => NbdError::NoSpace,
        Fault::Fenced => NbdError::Shutdown,
        Fault::Corrupt | Fault::Unavailable(_) | Fault::Internal => NbdError::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spline_types::Unavailable;

    const OPS: [BlockOp; 8] = [
        BlockOp::Read,
        BlockOp::Write,
        BlockOp::Flush,
        BlockOp::Discard,
        BlockOp::WriteZeroes { no_hole: false, fast: false },
        BlockOp::WriteZeroes { no_hole: false, fast: true },
        BlockOp::Cache,
        BlockOp::Status,
    ];
    const FAULTS: [Fault; 13] = [
        Fault::Invalid(Invalid::PastEnd),
        Fault::Invalid(Invalid::TooLarge),
        Fault::Invalid(Invalid::Alignment),
        Fault::Invalid(Invalid::Flags),
        Fault::Unsupported,
        Fault::ReadOnly,
        Fault::NoSpace,
        Fault::Fenced,
        Fault::Corrupt,
        Fault::Unavailable(Unavailable::NotLeader),
        Fault::Unavailable(Unavailable::Overloaded),
        Fault::Unavailable(Unavailable::Unreachable),
        Fault::Internal,
    ];

    #[test]
    fn each_fault_has_the_number_of_the_specification() {
        let numbers = |op| FAULTS.map(|fault| nbd_error(op, fault) as u32);
        assert_eq!(numbers(BlockOp::Read), [22, 22, 22, 22, 22, 1, 28, 108, 5, 5, 5, 5, 5]);
        assert_eq!(numbers(BlockOp::Write), [28, 22, 22, 22, 22, 1, 28, 108, 5, 5, 5, 5, 5]);
        let fast = BlockOp::WriteZeroes { no_hole: false, fast: true };
        assert_eq!(numbers(fast), [28, 22, 22, 22, 95, 1, 28, 108, 5, 5, 5, 5, 5]);
    }

    #[test]
    fn each_error_comes_only_from_the_faults_that_it_stands_for() {
        for op in OPS {
            for fault in FAULTS {
                let explained = match nbd_error(op, fault) {
                    NbdError::Perm => fault == Fault::ReadOnly,
                    NbdError::Io => {
                        matches!(fault, Fault::Corrupt | Fault::Unavailable(_) | Fault::Internal)
                    }
                    NbdError::Inval => matches!(fault, Fault::Invalid(_) | Fault::Unsupported),
                    NbdError::NoSpace => {
                        matches!(fault, Fault::NoSpace | Fault::Invalid(Invalid::PastEnd))
                    }
                    NbdError::NotSupported => {
                        fault == Fault::Unsupported && matches!(op, BlockOp::WriteZeroes { fast: true, .. })
                    }
                    NbdError::Shutdown => fault == Fault::Fenced,
                };
                assert!(explained, "{op:?} {fault:?}");
            }
        }
    }
}
