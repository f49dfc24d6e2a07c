//! Every decoder of data-plane bytes: must answer a value or an error, and what decodes must encode to the same value.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spline_wire::{chunk, frame};

fuzz_target!(|bytes: &[u8]| {
    if let Some(head) = bytes.first_chunk::<{ frame::HEADER_BYTES }>() {
        for version in [0, 1, 2] {
            let _ = frame::Head::parse(head, version);
        }
        let _ = frame::Head::verify(head, &bytes[frame::HEADER_BYTES..]);
    }
    if let Ok(command) = chunk::decode_request(bytes) {
        assert_eq!(
            chunk::decode_request(&chunk::encode_request(&command)).expect("own bytes decode"),
            command
        );
    }
    if let Ok(reply) = chunk::Reply::decode(bytes) {
        let again = chunk::Reply::decode(&reply.encode()).expect("own bytes decode");
        assert_eq!(format!("{again:?}"), format!("{reply:?}"));
    }
    if let Ok(extents) = chunk::decode_extents(bytes) {
        assert_eq!(
            chunk::decode_extents(&chunk::encode_extents(&extents)).expect("own bytes decode"),
            extents
        );
    }
});
