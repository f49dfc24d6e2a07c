//! ABORT anywhere in the handshake: ACK, then the end; what is pipelined behind it is not looked at (NBD proto.md,
//! "NBD_OPT_ABORT").

use spline_conformance::raw::{BASE_ALLOCATION, Raw, context_data, info_data, opt, option, option_of, rep};
use spline_conformance::stage::play;

#[test]
fn ends_the_session_wherever_it_stands() -> anyhow::Result<()> {
    play(|stage| {
        let contexts = context_data(stage.name(), &[BASE_ALLOCATION]);
        let steps: [(u32, &[u8], &[u32]); 4] = [
            (opt::LIST, &[], &[rep::SERVER, rep::ACK]),
            (opt::STRUCTURED_REPLY, &[], &[rep::ACK]),
            (opt::SET_META_CONTEXT, &contexts, &[rep::META_CONTEXT, rep::ACK]),
            (opt::STARTTLS, &[], &[rep::ERR_UNSUP]),
        ];
        for before in 0..=steps.len() {
            for data in [&b""[..], b"bye", &[0xff; 4000]] {
                let mut raw = Raw::haggling(stage.socket())?;
                for (name, data, kinds) in &steps[..before] {
                    raw.expect(*name, data, kinds)?;
                }
                raw.expect(opt::ABORT, data, &[rep::ACK])?;
                raw.closed()?;
            }
        }
        Ok(())
    })
}

#[test]
fn nothing_behind_it_is_carried_out() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::haggling(stage.socket())?;
        let go = option(opt::GO, &info_data(stage.name(), &[]));
        raw.send(&[option(opt::LIST, &[]), option(opt::ABORT, &[]), go, vec![0x55; 3000]].concat())?;
        raw.expect_replies(opt::LIST, &[rep::SERVER, rep::ACK])?;
        raw.expect_replies(opt::ABORT, &[rep::ACK])?;
        raw.closed()?;
        // A client that does not wait for the answer.
        let mut rude = Raw::haggling(stage.socket())?;
        rude.send(&option(opt::ABORT, &[]))?;
        drop(rude);
        // And one that goes in the middle of saying it.
        let mut cut = Raw::haggling(stage.socket())?;
        cut.send(&option_of(opt::ABORT, 100, b"abc"))
    })
}
