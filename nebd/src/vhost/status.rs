//! Faults as virtio-blk statuses: the one place where that is decided (virtio 1.2, 5.2.6; design of faults).

use spline_types::Fault;

/// The status byte of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum BlkStatus {
    /// VIRTIO_BLK_S_OK.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR.
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported = 2,
}

/// What a guest is told of a fault.
pub const fn blk_status(fault: Fault) -> BlkStatus {
    match fault {
        Fault::Unsupported => BlkStatus::Unsupported,
        Fault::Invalid(_)
        | Fault::ReadOnly
        | Fault::NoSpace
        | Fault::Fenced
        | Fault::Corrupt
        | Fault::Unavailable(_)
        | Fault::Internal => BlkStatus::IoError,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use spline_types::{Invalid, Unavailable};

    #[test]
    fn only_unsupported_is_told_as_such() {
        let errors = [
            Fault::Invalid(Invalid::PastEnd),
            Fault::ReadOnly,
            Fault::NoSpace,
            Fault::Fenced,
            Fault::Corrupt,
            Fault::Unavailable(Unavailable::Overloaded),
            Fault::Internal,
        ];
        assert!(errors.iter().all(|fault| blk_status(*fault) == BlkStatus::IoError));
        assert_eq!(blk_status(Fault::Unsupported), BlkStatus::Unsupported);
        assert_eq!([BlkStatus::Ok as u8, BlkStatus::IoError as u8, BlkStatus::Unsupported as u8], [0, 1, 2]);
    }
}
