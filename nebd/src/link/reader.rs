//! What comes over the link after the welcome, as a state machine over bytes.
//!
//! Called by `link`. Must not know: sockets, the volume. `guest_cannot_crash_us` holds for the gateway too: its bytes
//! are checked before they are used, and a payload is at most 32 MiB.

use spline_link::{HEADER_BYTES, Header, LinkError, Message};

/// Payloads up to this size, bytes, are handed on where they lie; larger ones get a buffer of their own.
const SLICE_MAX: usize = 16 << 10;

/// A frame's payload.
#[derive(PartialEq, Eq, Debug)]
pub enum Body<'a> {
    /// In the caller's buffer.
    Slice(&'a [u8]),
    /// In its own.
    Whole(Vec<u8>),
}

impl Body<'_> {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Slice(bytes) => bytes,
            Self::Whole(bytes) => bytes,
        }
    }
}

#[derive(Debug)]
struct Pending {
    message: Message,
    body: Vec<u8>,
    length: usize,
}

/// The state machine.
#[derive(Debug, Default)]
pub struct Reader {
    pending: Option<Pending>,
}

impl Reader {
    /// Takes the next frame from the front of `input`; `None` means that more bytes are needed, and what is left in
    /// `input` must come again in front of them.
    ///
    /// # Errors
    /// The gateway broke the contract; the link is to be cut.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<(Message, Body<'a>)>, LinkError> {
        if self.pending.is_none() {
            let Some((head, rest)) = input.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
            let Header { message, payload } = Header::decode(head)?;
            let length = payload as usize;
            *input = rest;
            if length <= SLICE_MAX
                && let Some((body, rest)) = rest.split_at_checked(length)
            {
                *input = rest;
                return Ok(Some((message, Body::Slice(body))));
            }
            self.pending = Some(Pending { message, body: Vec::with_capacity(length), length });
        }
        if let Some(pending) = &mut self.pending {
            let missing = pending.length - pending.body.len();
            let (front, rest) = input.split_at(missing.min(input.len()));
            pending.body.extend_from_slice(front);
            *input = rest;
        }
        Ok(self
            .pending
            .take_if(|pending| pending.body.len() == pending.length)
            .map(|done| (done.message, Body::Whole(done.body))))
    }

    /// The buffer of a payload that is still coming, to be read into directly, and how many bytes it misses.
    pub fn payload(&mut self) -> Option<(&mut Vec<u8>, usize)> {
        self.pending.as_mut().map(|pending| {
            let missing = pending.length - pending.body.len();
            (&mut pending.body, missing)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use spline_types::{Completion, RequestId};

    #[test]
    fn a_broken_frame_is_an_error() {
        let mut bytes = Header::bare(Message::Leaving).encode();
        bytes[4] = 77;
        assert!(Reader::default().next(&mut &bytes[..]).is_err());
    }

    proptest! {
        #[test]
        fn frames_come_out_whole_however_they_are_cut(
            lengths in proptest::collection::vec(0usize..40_000, 1..6),
            cuts in proptest::collection::vec(1usize..30_000, 1..50),
        ) {
            let mut stream = Vec::new();
            for (id, length) in lengths.iter().enumerate() {
                let done = Header::reply(RequestId::new(id as u64), Completion::Done(()), *length as u32);
                stream.extend_from_slice(&done.encode());
                stream.extend(std::iter::repeat_n(id as u8, *length));
            }
            let (mut reader, mut partial, mut got, mut at) = (Reader::default(), Vec::new(), Vec::new(), 0);
            for cut in cuts.iter().cycle() {
                let end = stream.len().min(at + cut);
                partial.extend_from_slice(&stream[at..end]);
                at = end;
                let mut input = &partial[..];
                while let Some((message, body)) = reader.next(&mut input).expect("valid frames") {
                    let Message::Reply { id, .. } = message else { panic!("not a reply") };
                    prop_assert!(body.bytes().iter().all(|byte| u64::from(*byte) == id.get()));
                    got.push(body.bytes().len());
                }
                partial = input.to_vec();
                prop_assert!(partial.len() < HEADER_BYTES);
                if at == stream.len() {
                    break;
                }
            }
            prop_assert_eq!(got, lengths);
        }
    }
}
