//! A bundle: several small commands in one log entry.
//!
//! Called by `rounds` (tying) and by the state machine's adapter (untying). What a log entry costs on its way, a record, a
//! place in two replication streams, a wake-up at each stop, a bundle pays once for all that is in it. Its commands are
//! applied in order and answered one by one. Pure.
//!
//! Layout, little-endian, in the entry's payload (its meta is empty): count u32 | per command: meta length u32, payload
//! length u32 | per command: meta, payload.

use bytes::{BufMut, Bytes, BytesMut};

use crate::codec::{DecodeError, Reader};
use crate::command::LogCommand;

/// The longest command that is bundled, bytes: copying a longer one costs more than its own entry would.
pub(crate) const COMMAND_BYTES_MAX: usize = 16 << 10;
/// A bundle is full at this many bytes …
pub(crate) const BYTES: usize = 64 << 10;
/// … or at this many commands. Part of the format: a reader refuses more, so raising it takes a new version of entries.
pub(crate) const COMMANDS_MAX: usize = 64;

/// Bytes of one command's lengths.
const LENGTHS_BYTES: usize = 8;

/// Ties commands, in their order.
pub(crate) fn tie(commands: &[LogCommand]) -> LogCommand {
    let bytes: usize = commands.iter().map(LogCommand::bytes).sum();
    let mut out = BytesMut::with_capacity(4 + LENGTHS_BYTES * commands.len() + bytes);
    out.put_u32_le(commands.len() as u32);
    for command in commands {
        out.put_u32_le(command.meta.len() as u32);
        out.put_u32_le(command.payload.len() as u32);
    }
    for command in commands {
        out.put_slice(&command.meta);
        out.put_slice(&command.payload);
    }
    LogCommand { meta: Bytes::new(), payload: out.freeze() }
}

/// Unties a bundle: its commands share its memory.
///
/// # Errors
/// If the bytes are not a bundle, whole and nothing else.
pub(crate) fn untie(bundle: &LogCommand) -> Result<Vec<LogCommand>, DecodeError> {
    let bytes = &bundle.payload;
    let mut reader = Reader(bytes);
    let count = reader.u32("bundle count")?;
    if count as usize > COMMANDS_MAX {
        return Err(DecodeError::Value { what: "bundle count", value: count.into() });
    }
    let mut at = 4 + LENGTHS_BYTES * count as usize;
    let mut take = |length: u32| {
        let end = at + length as usize;
        let part = (end <= bytes.len()).then(|| bytes.slice(at..end));
        at = end;
        part.ok_or(DecodeError::Short("bundled command"))
    };
    let mut commands = Vec::with_capacity(count as usize);
    for _ in 0..count {
        let (meta, payload) = (reader.u32("meta length")?, reader.u32("payload length")?);
        commands.push(LogCommand { meta: take(meta)?, payload: take(payload)? });
    }
    match bytes.len() - at {
        0 => Ok(commands),
        more => Err(DecodeError::Value { what: "bytes behind a bundle", value: more as u64 }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn command(meta: &'static [u8], payload: &'static [u8]) -> LogCommand {
        LogCommand { meta: Bytes::from_static(meta), payload: Bytes::from_static(payload) }
    }

    #[test]
    fn golden_bundle() {
        let commands = [command(b"me", b"pay"), command(b"", b"x")];
        let bundle = tie(&commands);
        assert!(bundle.meta.is_empty());
        assert_eq!(&bundle.payload[..], b"\x02\0\0\0\x02\0\0\0\x03\0\0\0\0\0\0\0\x01\0\0\0mepayx");
        assert_eq!(untie(&bundle).as_deref(), Ok(&commands[..]));
    }

    #[test]
    fn what_is_not_a_whole_bundle_is_refused() {
        let whole = tie(&[command(b"me", b"pay"), command(b"", b"x")]).payload;
        for end in 0..whole.len() {
            let cut = LogCommand { meta: Bytes::new(), payload: whole.slice(..end) };
            assert!(matches!(untie(&cut), Err(DecodeError::Short(_))), "{end}");
        }
        let more = LogCommand { meta: Bytes::new(), payload: [&whole[..], b"y"].concat().into() };
        assert!(matches!(untie(&more), Err(DecodeError::Value { value: 1, .. })));
        let many = LogCommand { meta: Bytes::new(), payload: Bytes::from_static(&[0xff; 64]) };
        assert!(matches!(untie(&many), Err(DecodeError::Value { what: "bundle count", .. })));
    }

    proptest! {
        #[test]
        fn untied_is_what_was_tied(parts in prop::collection::vec((0..200usize, 0..5000usize), 0..=COMMANDS_MAX)) {
            let commands: Vec<LogCommand> = parts
                .iter()
                .enumerate()
                .map(|(number, (meta, payload))| LogCommand {
                    meta: vec![number as u8; *meta].into(),
                    payload: vec![!(number as u8); *payload].into(),
                })
                .collect();
            prop_assert_eq!(untie(&tie(&commands)), Ok(commands));
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = untie(&LogCommand { meta: Bytes::new(), payload: bytes.into() });
        }
    }
}
