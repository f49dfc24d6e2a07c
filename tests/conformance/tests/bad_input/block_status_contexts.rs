//! BLOCK_STATUS without a selected context is EINVAL; however many contexts a client asks for, it gets the one there is,
//! once (NBD proto.md, "Metadata querying").

use anyhow::ensure;
use spline_conformance::raw::{BASE_ALLOCATION, Raw, chunk, cmd, context_data, errno, flag, opt, rep};
use spline_conformance::stage::{Stage, play};

/// Selects `queries` and enters; `found` contexts must have been selected.
fn select(stage: &Stage, queries: &[&str], found: usize) -> anyhow::Result<Raw> {
    let mut raw = Raw::haggling(stage.socket())?;
    raw.expect(opt::STRUCTURED_REPLY, &[], &[rep::ACK])?;
    let kinds = [vec![rep::META_CONTEXT; found], vec![rep::ACK]].concat();
    raw.expect(opt::SET_META_CONTEXT, &context_data(stage.name(), queries), &kinds)?;
    raw.go(stage.name(), &[])?;
    Ok(raw)
}

/// Asks for the status; an errno of 0 is one chunk of extents.
fn status(raw: &mut Raw, flags: u16) -> anyhow::Result<u32> {
    let cookie = raw.ask((cmd::BLOCK_STATUS, flags), (0, 1 << 20), &[])?;
    let reply = raw.chunk()?;
    ensure!(reply.done && reply.cookie == cookie, "{reply:?}");
    if reply.kind == chunk::BLOCK_STATUS {
        let extents = reply.data.len().saturating_sub(4);
        ensure!(extents > 0 && extents.is_multiple_of(8), "{reply:?}");
        ensure!(flags & flag::REQ_ONE == 0 || extents == 8, "one was asked for: {reply:?}");
    }
    Ok(reply.errno())
}

#[test]
fn no_context_at_all() -> anyhow::Result<()> {
    play(|stage| {
        let mut never = Raw::entered(&stage.export)?;
        never.expect_errno((cmd::BLOCK_STATUS, 0), (0, 4096), &[], errno::EINVAL)?;
        never.read(0, 512)?;
        let nothing: [&[&str]; 4] =
            [&[], &["base:"], &["x-mine:dirty", "qemu:allocation-depth"], &["", "base", ":"]];
        for queries in nothing {
            let mut raw = select(stage, queries, 0)?;
            ensure!(status(&mut raw, 0)? == errno::EINVAL, "queries={queries:?}");
            ensure!(status(&mut raw, flag::REQ_ONE)? == errno::EINVAL, "queries={queries:?}");
        }
        Ok(())
    })
}

#[test]
fn many_contexts() -> anyhow::Result<()> {
    play(|stage| {
        let mut many = vec!["x-mine:one"; 100];
        many.extend([BASE_ALLOCATION; 100]);
        many.push("base:none");
        let mut raw = select(stage, &many, 1)?;
        ensure!(status(&mut raw, 0)? == 0);
        ensure!(status(&mut raw, flag::REQ_ONE)? == 0);

        let mut raw = Raw::haggling(stage.socket())?;
        raw.expect(opt::STRUCTURED_REPLY, &[], &[rep::ACK])?;
        let good = context_data(stage.name(), &[BASE_ALLOCATION]);
        raw.expect(opt::SET_META_CONTEXT, &good, &[rep::META_CONTEXT, rep::ACK])?;
        // So many that they are not even looked at.
        let far_too_many = context_data(stage.name(), &vec![BASE_ALLOCATION; 1000]);
        raw.expect(opt::SET_META_CONTEXT, &far_too_many, &[rep::ERR_TOO_BIG])?;
        raw.go(stage.name(), &[])?;
        ensure!(status(&mut raw, 0)? == errno::EINVAL, "an answer to a selection that failed");
        Ok(())
    })
}

#[test]
fn the_last_selection_counts() -> anyhow::Result<()> {
    play(|stage| {
        let good = context_data(stage.name(), &[BASE_ALLOCATION]);
        let empty = context_data(stage.name(), &[]);
        let elsewhere = context_data(b"", &[BASE_ALLOCATION]);
        let selected: &[u32] = &[rep::META_CONTEXT, rep::ACK];
        let cases: [(&[u8], &[u32], u32); 4] = [
            (&empty, &[rep::ACK], errno::EINVAL),
            (b"malformed", &[rep::ERR_INVALID], errno::EINVAL),
            (&elsewhere, selected, errno::EINVAL),
            (&good, selected, 0),
        ];
        for (last, kinds, wanted) in cases {
            let mut raw = Raw::haggling(stage.socket())?;
            raw.expect(opt::STRUCTURED_REPLY, &[], &[rep::ACK])?;
            raw.expect(opt::SET_META_CONTEXT, &good, selected)?;
            raw.expect(opt::SET_META_CONTEXT, last, kinds)?;
            raw.go(stage.name(), &[])?;
            ensure!(status(&mut raw, 0)? == wanted, "last={last:?}");
        }
        // Listing selects nothing.
        let mut raw = Raw::haggling(stage.socket())?;
        raw.expect(opt::STRUCTURED_REPLY, &[], &[rep::ACK])?;
        raw.expect(opt::LIST_META_CONTEXT, &empty, selected)?;
        raw.go(stage.name(), &[])?;
        ensure!(status(&mut raw, 0)? == errno::EINVAL);
        Ok(())
    })
}
