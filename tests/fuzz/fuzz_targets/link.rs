//! Every decoder of link bytes: must answer a value or an error, and what decodes must encode to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spline_link::{extents, frame, hello, welcome};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Some((hello, used))) = hello::Hello::decode(bytes) {
        assert!(used <= bytes.len());
        let again =
            hello::Hello::decode(&hello.encode()).expect("own bytes decode").expect("own bytes are whole");
        assert_eq!(again.0, hello);
    }
    if let Ok(Some((_, used))) = welcome::Welcome::decode(bytes) {
        assert!(used <= bytes.len());
    }
    if let Some(head) = bytes.first_chunk::<{ frame::HEADER_BYTES }>()
        && let Ok(header) = frame::Header::decode(head)
    {
        assert_eq!(frame::Header::decode(&header.encode()).expect("own bytes decode"), header);
    }
    let asked = bytes.len() as u64 * 4096;
    if let Ok(list) = extents::decode(bytes, asked) {
        assert!(list.iter().map(|extent| extent.length).sum::<u64>() <= asked);
    }
});
