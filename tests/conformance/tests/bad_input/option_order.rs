//! LIST, INFO, STARTTLS, STRUCTURED_REPLY and GO in every order, and repeated: each is answered as it is when it comes
//! alone, and GO ends the handshake wherever it stands.

use anyhow::ensure;
use spline_conformance::raw::{BASE_ALLOCATION, Raw, chunk, cmd, context_data, info_data, opt, option, rep};
use spline_conformance::stage::{Stage, play};

const OPTIONS: [u32; 5] = [opt::LIST, opt::INFO, opt::STARTTLS, opt::STRUCTURED_REPLY, opt::GO];

fn orders(options: &[u32]) -> Vec<Vec<u32>> {
    let with_first = |at: usize| {
        let mut rest = options.to_vec();
        let first = rest.remove(at);
        orders(&rest).into_iter().map(move |tail| [vec![first], tail].concat())
    };
    if options.is_empty() { vec![vec![]] } else { (0..options.len()).flat_map(with_first).collect() }
}

fn say(raw: &mut Raw, stage: &Stage, name: u32) -> anyhow::Result<()> {
    let (data, kinds) = match name {
        opt::LIST => (vec![], vec![rep::SERVER, rep::ACK]),
        opt::INFO => (info_data(stage.name(), &[]), vec![rep::INFO, rep::ACK]),
        opt::STARTTLS => (vec![], vec![rep::ERR_UNSUP]),
        _ => (vec![], vec![rep::ACK]),
    };
    raw.expect(name, &data, &kinds).map(drop)
}

/// Says `order` with each option `times` times up to GO, works, and then says the rest, which is no request.
fn try_order(stage: &Stage, order: &[u32], times: usize) -> anyhow::Result<()> {
    let mut raw = Raw::haggling(stage.socket())?;
    let before: Vec<u32> = order.iter().copied().take_while(|name| *name != opt::GO).collect();
    for name in &before {
        (0..times).try_for_each(|_| say(&mut raw, stage, *name))?;
    }
    let (_, flags) = raw.go(stage.name(), &[])?;
    let structured = before.contains(&opt::STRUCTURED_REPLY);
    // NBD_FLAG_SEND_DF goes with structured replies, and only with them.
    ensure!((flags & 1 << 7 != 0) == structured, "flags={flags:#x}");
    if structured {
        let cookie = raw.ask((cmd::READ, 0), (0, 512), &[])?;
        let reply = raw.chunk()?;
        ensure!(reply.done && reply.cookie == cookie && reply.kind == chunk::OFFSET_DATA, "{reply:?}");
    } else {
        raw.read(0, 512)?;
    }
    raw.cut_by(&option(opt::LIST, &[]).repeat(2))
}

#[test]
fn every_order_once_and_repeated() -> anyhow::Result<()> {
    play(|stage| {
        let all = orders(&OPTIONS);
        ensure!(all.len() == 120);
        all.iter().try_for_each(|order| try_order(stage, order, 1))?;
        all.iter().step_by(7).try_for_each(|order| try_order(stage, order, 3))
    })
}

#[test]
fn contexts_before_structured_replies_are_refused() -> anyhow::Result<()> {
    play(|stage| {
        let data = context_data(stage.name(), &[BASE_ALLOCATION]);
        let mut raw = Raw::haggling(stage.socket())?;
        raw.expect(opt::SET_META_CONTEXT, &data, &[rep::ERR_INVALID])?;
        raw.expect(opt::LIST_META_CONTEXT, &data, &[rep::ERR_INVALID])?;
        raw.expect(opt::STRUCTURED_REPLY, &[], &[rep::ACK])?;
        raw.expect(opt::SET_META_CONTEXT, &data, &[rep::META_CONTEXT, rep::ACK])?;
        raw.go(stage.name(), &[]).map(drop)
    })
}

#[test]
fn options_without_end_are_cut() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::haggling(stage.socket())?;
        // A real client needs a dozen.
        for _ in 0..200 {
            say(&mut raw, stage, opt::INFO)?;
        }
        for _ in 0..100_000 {
            if say(&mut raw, stage, opt::LIST).is_err() {
                return stage.works();
            }
        }
        anyhow::bail!("a client may haggle for ever")
    })
}
