//! Lengths of options that do not fit: none where data must be, more than there is, far too much. What can be skipped is
//! answered with an error and the next option works; what can not closes the connection.

use anyhow::ensure;
use spline_conformance::raw::{BASE_ALLOCATION, Raw, context_data, info_data, opt, option, option_of, rep};
use spline_conformance::stage::play;

const WITH_DATA: [u32; 4] = [opt::INFO, opt::GO, opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT];
const UNKNOWN: [u32; 5] = [0, 4, 11, 12_345, u32::MAX];

#[test]
fn no_data_where_some_must_be() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::haggling(stage.socket())?;
        raw.expect(opt::STRUCTURED_REPLY, &[], &[rep::ACK])?;
        for name in WITH_DATA {
            raw.expect(name, &[], &[rep::ERR_INVALID])?;
        }
        for name in UNKNOWN {
            raw.expect(name, &[], &[rep::ERR_UNSUP])?;
        }
        raw.expect(opt::LIST, &[], &[rep::SERVER, rep::ACK])?;
        raw.go(stage.name(), &[]).map(drop)
    })
}

#[test]
fn data_where_none_may_be() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::haggling(stage.socket())?;
        for name in [opt::LIST, opt::STRUCTURED_REPLY] {
            for data in [&b"x"[..], &[0; 4], &[0xff; 4000]] {
                raw.expect(name, data, &[rep::ERR_INVALID])?;
            }
        }
        for name in UNKNOWN {
            raw.expect(name, &[0xff; 4000], &[rep::ERR_UNSUP])?;
        }
        raw.go(stage.name(), &[])?;
        // The refused options had no effect: replies are simple.
        raw.read(0, 512).map(drop)
    })
}

#[test]
fn lengths_inside_the_data_that_do_not_fit() -> anyhow::Result<()> {
    play(|stage| {
        let name = stage.name();
        let mut raw = Raw::haggling(stage.socket())?;
        raw.expect(opt::STRUCTURED_REPLY, &[], &[rep::ACK])?;
        let (info, contexts) = (info_data(name, &[1, 3]), context_data(name, &[BASE_ALLOCATION]));
        for (options, good) in [(&WITH_DATA[..2], &info), (&WITH_DATA[2..], &contexts)] {
            let patched = |at: usize, count: u32| {
                let mut data = good.clone();
                data[at..at + 4].copy_from_slice(&count.to_be_bytes());
                data
            };
            let mut bad = vec![[good, &b"\0"[..]].concat(), good.repeat(2)];
            // The name's length, and behind it the number of requests or queries.
            for count in [1, name.len() as u32 - 1, name.len() as u32 + 1, 5000, 1 << 31, u32::MAX] {
                bad.push(patched(0, count));
            }
            bad.extend([2, 1 << 16, 1 << 31, u32::MAX].map(|count| patched(4 + name.len(), count)));
            // Cut short anywhere.
            bad.extend((0..good.len()).map(|end| good[..end].to_vec()));
            for (option, data) in
                options.iter().flat_map(|option| bad.iter().map(move |data| (*option, data)))
            {
                let reply = raw.expect(option, data, &[rep::ERR_INVALID]);
                ensure!(reply.is_ok(), "option={option} data={data:?}: {reply:?}");
            }
        }
        raw.expect(opt::SET_META_CONTEXT, &contexts, &[rep::META_CONTEXT, rep::ACK])?;
        raw.go(name, &[]).map(drop)
    })
}

#[test]
fn longer_than_any_option_but_skipped() -> anyhow::Result<()> {
    play(|stage| {
        let mut raw = Raw::haggling(stage.socket())?;
        let known = [opt::LIST, opt::STARTTLS, opt::INFO, opt::GO, opt::SET_META_CONTEXT];
        for name in known.into_iter().chain(UNKNOWN) {
            for length in [6000, 65_536] {
                raw.expect(name, &vec![0x49; length], &[rep::ERR_TOO_BIG])?;
            }
        }
        raw.go(stage.name(), &[]).map(drop)
    })
}

#[test]
fn four_gigabytes_close_the_connection() -> anyhow::Result<()> {
    play(|stage| {
        let known = [opt::EXPORT_NAME, opt::ABORT, opt::LIST, opt::STARTTLS, opt::STRUCTURED_REPLY];
        for name in known.into_iter().chain(WITH_DATA).chain(UNKNOWN) {
            for length in [u32::MAX, 1 << 31, 1 << 20] {
                let mut raw = Raw::haggling(stage.socket())?;
                raw.cut_by(&option_of(name, length, &[0; 64]))?;
            }
        }
        Ok(())
    })
}

#[test]
fn cut_off_in_the_middle() -> anyhow::Result<()> {
    play(|stage| {
        let whole = option(opt::GO, &info_data(stage.name(), &[3]));
        for end in 0..whole.len() {
            let mut gone = Raw::haggling(stage.socket())?;
            gone.send(&whole[..end])?;
            drop(gone);
            let mut half = Raw::haggling(stage.socket())?;
            half.send(&whole[..end])?;
            half.half_close()?;
            half.closed()?;
        }
        let mut flags = Raw::greeted(stage.socket())?;
        flags.send(&[0, 0])?;
        flags.half_close()?;
        flags.closed()
    })
}
