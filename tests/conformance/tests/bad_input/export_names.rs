//! Export names of every length and content: only the export's own name and the empty one are served. INFO and GO tell
//! that others are unknown or malformed, EXPORT_NAME has no error reply and closes (NBD proto.md, "Option types").

use anyhow::ensure;
use spline_conformance::raw::{BASE_ALLOCATION, Raw, context_data, info_data, opt, option, rep};
use spline_conformance::stage::{DISK, Stage, play, play_on};
use spline_harness::{Export, Process, Rig, binaries, wait_until};
use std::ffi::OsString;
use std::time::Duration;

fn served(stage: &Stage, name: &[u8]) -> anyhow::Result<()> {
    let mut raw = Raw::haggling(stage.socket())?;
    raw.expect(opt::INFO, &info_data(name, &[]), &[rep::INFO, rep::ACK])?;
    let (size, _) = raw.go(name, &[])?;
    ensure!(size == DISK, "size={size}");
    raw.read(0, 512)?;
    let mut old = Raw::haggling(stage.socket())?;
    old.send(&option(opt::EXPORT_NAME, name))?;
    ensure!(old.bytes(10)?[..8] == DISK.to_be_bytes());
    old.read(0, 512).map(drop)
}

fn refused(stage: &Stage, name: &[u8], error: u32) -> anyhow::Result<()> {
    let mut raw = Raw::haggling(stage.socket())?;
    raw.expect(opt::STRUCTURED_REPLY, &[], &[rep::ACK])?;
    raw.expect(opt::INFO, &info_data(name, &[3]), &[error])?;
    raw.expect(opt::GO, &info_data(name, &[3]), &[error])?;
    raw.expect(opt::LIST_META_CONTEXT, &context_data(name, &[]), &[error])?;
    raw.expect(opt::SET_META_CONTEXT, &context_data(name, &[BASE_ALLOCATION]), &[error])?;
    raw.go(stage.name(), &[])?;
    Raw::haggling(stage.socket())?.cut_by(&option(opt::EXPORT_NAME, name))
}

#[test]
fn names_that_are_not_served() -> anyhow::Result<()> {
    play(|stage| {
        served(stage, b"")?;
        served(stage, stage.name())?;
        for length in [1, 255, 256, 4095, 4096] {
            refused(stage, &vec![b'a'; length], rep::ERR_UNKNOWN)?;
        }
        // A path is a name like any other, and not ours.
        for name in ["../", "../../etc/passwd", "/", ".", "*", "%s%n", "disk", " ", "\u{1f980}", "\n"] {
            refused(stage, name.as_bytes(), rep::ERR_UNKNOWN)?;
        }
        let parent = [stage.name(), b"/../disk.img"].concat();
        refused(stage, &parent, rep::ERR_UNKNOWN)
    })
}

#[test]
fn names_that_are_no_strings() -> anyhow::Result<()> {
    play(|stage| {
        let with_nul = [stage.name(), b"\0"].concat();
        for name in [&b"\0"[..], b"dis\0k", &with_nul, b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\xaf"] {
            refused(stage, name, rep::ERR_INVALID)?;
        }
        // A byte more than a string may have.
        refused(stage, &[b'a'; 4097], rep::ERR_INVALID)
    })
}

/// An export with the longest name that a config takes.
fn long_named(rig: &Rig) -> anyhow::Result<Export> {
    let (volume, name) = (rig.create("disk", DISK)?, "n".repeat(256));
    let (dir, socket) = (rig.dir(), rig.dir().join("long.sock"));
    let arguments: [(&str, OsString); 5] = [
        ("--volume", volume.into()),
        ("--export", name.as_str().into()),
        ("--gateway-socket", dir.join("gateway.sock").into()),
        ("--listen-unix", socket.clone().into()),
        ("--runtime-dir", dir.into()),
    ];
    let arguments = arguments.into_iter().flat_map(|(flag, value)| [flag.into(), value]).collect();
    let mut nebd = Process::new("nebd-long", binaries::find("spline-nebd")?, arguments, dir);
    nebd.start()?;
    let export = Export { nebd, socket, volume: name };
    wait_until("nebd to serve", Duration::from_secs(60), || Raw::entered(&export).map(Some))?;
    Ok(export)
}

#[test]
fn the_longest_name_is_served_and_its_neighbours_are_not() -> anyhow::Result<()> {
    play_on(&long_named, 8 << 10, |stage| {
        served(stage, stage.name())?;
        let mut raw = Raw::haggling(stage.socket())?;
        let list = raw.expect(opt::LIST, &[], &[rep::SERVER, rep::ACK])?;
        ensure!(list[0].data == [&[0, 0, 1, 0], stage.name()].concat(), "{list:?}");
        refused(stage, &stage.name()[1..], rep::ERR_UNKNOWN)?;
        refused(stage, &[stage.name(), b"n"].concat(), rep::ERR_UNKNOWN)
    })
}
