//! A client that sends one byte at a time: slow, and served like any other.

use anyhow::ensure;
use spline_conformance::raw::{
    BASE_ALLOCATION, CLIENT_FLAGS, Raw, chunk, cmd, context_data, info_data, opt, option, rep, request,
};
use spline_conformance::stage::play;

fn trickle(raw: &mut Raw, bytes: &[u8]) -> anyhow::Result<()> {
    bytes.iter().try_for_each(|byte| raw.send(&[*byte]))
}

#[test]
fn is_served_like_any_other() -> anyhow::Result<()> {
    play(|stage| {
        let name = stage.name();
        let mut raw = Raw::greeted(stage.socket())?;
        trickle(&mut raw, &CLIENT_FLAGS.to_be_bytes())?;
        trickle(&mut raw, &option(opt::LIST, &[]))?;
        raw.expect_replies(opt::LIST, &[rep::SERVER, rep::ACK])?;
        trickle(&mut raw, &option(99, &[0x49; 6000]))?;
        raw.expect_replies(99, &[rep::ERR_TOO_BIG])?;
        trickle(&mut raw, &option(opt::STRUCTURED_REPLY, &[]))?;
        raw.expect_replies(opt::STRUCTURED_REPLY, &[rep::ACK])?;
        trickle(&mut raw, &option(opt::SET_META_CONTEXT, &context_data(name, &[BASE_ALLOCATION])))?;
        raw.expect_replies(opt::SET_META_CONTEXT, &[rep::META_CONTEXT, rep::ACK])?;
        trickle(&mut raw, &option(opt::GO, &info_data(name, &[])))?;
        raw.expect_replies(opt::GO, &[rep::INFO, rep::ACK])?;
        let data: Vec<u8> = (0..4096u32).map(|at| (at % 251) as u8).collect();
        trickle(&mut raw, &request(cmd::WRITE, 0, 1, (512, 4096)))?;
        trickle(&mut raw, &data)?;
        ensure!(raw.simple()? == (1, 0));
        trickle(&mut raw, &request(cmd::READ, 0, 2, (512, 4096)))?;
        let read = raw.chunk()?;
        ensure!(read.kind == chunk::OFFSET_DATA && read.data[8..] == data, "{read:?}");
        // A refused write's data is skipped byte by byte too.
        trickle(&mut raw, &request(cmd::WRITE, 0x8000, 3, (0, 2000)))?;
        trickle(&mut raw, &[0xbb; 2000])?;
        ensure!(raw.chunk()?.errno() == 22);
        trickle(&mut raw, &request(cmd::DISC, 0, 4, (0, 0)))?;
        raw.closed()
    })
}
