//! Messages that are cut off, too short, too long, of another version, replies where requests belong; and one byte at a time.

use anyhow::ensure;
use spline_conformance::guest::message::{PLAIN, REPLY, Raw, message, request, u32s, u64s};
use spline_conformance::guest::stage::play;

#[test]
fn heads_that_no_message_has() -> anyhow::Result<()> {
    play(|stage| {
        for (kind, flags, size) in [
            (request::GET_FEATURES, 0, 0),
            (request::GET_FEATURES, 2, 0),
            (request::GET_FEATURES, 3, 0),
            (request::GET_FEATURES, REPLY, 0),
            (request::GET_FEATURES, PLAIN, u32::MAX),
            (request::SET_FEATURES, PLAIN, 0x8000_0000),
            (request::SET_MEM_TABLE, PLAIN, 65_536),
            (request::GET_CONFIG, PLAIN, 4097),
            (0, PLAIN, 0),
            (999, PLAIN, 0),
            (u32::MAX, u32::MAX, u32::MAX),
        ] {
            let raw = Raw::connect(stage.socket())?;
            raw.send(&u32s(&[kind, flags, size]), &[])?;
            raw.closed()
                .map_err(|error| error.context(format!("kind={kind} flags={flags:#x} size={size}")))?;
        }
        Ok(())
    })
}

#[test]
fn bodies_of_a_wrong_length() -> anyhow::Result<()> {
    play(|stage| {
        for (kind, length) in [
            (request::SET_FEATURES, 0),
            (request::SET_FEATURES, 7),
            (request::SET_FEATURES, 9),
            (request::SET_VRING_NUM, 4),
            (request::SET_VRING_NUM, 16),
            (request::SET_VRING_ADDR, 39),
            (request::SET_VRING_ADDR, 41),
            (request::SET_VRING_KICK, 4),
            (request::SET_MEM_TABLE, 0),
            (request::SET_MEM_TABLE, 8),
            (request::SET_MEM_TABLE, 39),
            (request::GET_CONFIG, 11),
            (request::SET_INFLIGHT_FD, 16),
            (request::GET_INFLIGHT_FD, 0),
            (request::SET_LOG_BASE, 3),
            (request::GET_VRING_BASE, 0),
            (request::SET_VRING_ENABLE, 5),
        ] {
            let guest = spline_conformance::guest::Guest::greeted(stage.socket(), Default::default())?;
            let mut body = vec![0; length];
            if kind == request::SET_MEM_TABLE && length > 0 {
                body[0] = 1;
            }
            guest.turned_down(kind, &body, &[])?;
        }
        Ok(())
    })
}

#[test]
fn cut_off() -> anyhow::Result<()> {
    play(|stage| {
        let whole = message(request::SET_FEATURES, PLAIN, &u64s(&[1 << 32]));
        for length in 0..whole.len() {
            let raw = Raw::connect(stage.socket())?;
            raw.send(&whole[..length.max(1)], &[])?;
            raw.stream()?.shutdown(std::net::Shutdown::Write)?;
            raw.closed()?;
        }
        Ok(())
    })
}

#[test]
fn one_byte_at_a_time() -> anyhow::Result<()> {
    play(|stage| {
        let raw = Raw::connect(stage.socket())?;
        let ask = message(request::GET_FEATURES, PLAIN, &[]);
        let whole = [message(request::SET_OWNER, PLAIN, &[]), ask.clone(), ask].concat();
        for byte in whole {
            raw.send(&[byte], &[])?;
        }
        let features = raw.reply(request::GET_FEATURES)?;
        ensure!(features.len() == 8 && features == raw.reply(request::GET_FEATURES)?);
        Ok(())
    })
}

#[test]
fn noise() -> anyhow::Result<()> {
    play(|stage| {
        for seed in 0..20 {
            let raw = Raw::connect(stage.socket())?;
            // The device may have closed before all of it is sent.
            let _ = raw.send(&spline_conformance::pattern(seed, 0, 8192), &[]);
            raw.closed()?;
        }
        Ok(())
    })
}
