//! qemu-io: unaligned reads and writes, discards and zeroes, with patterns that tell a shifted byte.

use spline_conformance::MIB;
use spline_harness::{Rig, Tool};

/// Runs a script of qemu-io commands; a pattern that does not match fails it.
fn script(uri: &str, commands: &[&str]) -> anyhow::Result<()> {
    let arguments = commands.iter().flat_map(|command| ["-c", command]);
    let said = Tool::new("qemu-io").args(["-f", "raw"]).args(arguments).args([uri]).run()?;
    anyhow::ensure!(!said.contains("failed"), "{said}");
    Ok(())
}

#[test]
fn unaligned_ranges() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let export = rig.serve("disk", 64 * MIB)?;
        script(
            &export.uri(),
            &[
                "write -P 0x11 0 64k",
                "write -P 0x22 1 1",
                "write -P 0x33 511 2",
                "write -P 0x44 4095 4098",
                "read -P 0x11 0 1",
                "read -P 0x22 1 1",
                "read -P 0x11 2 509",
                "read -P 0x33 511 2",
                "read -P 0x11 513 3582",
                "read -P 0x44 4095 4098",
                "read -P 0x11 8193 57343",
            ],
        )
    })
}

#[test]
fn across_chunks() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let export = rig.serve("disk", 64 * MIB)?;
        script(
            &export.uri(),
            &[
                "write -P 0xa1 16777215 2",
                "read -P 0xa1 16777215 2",
                "read -P 0 16777213 2",
                "read -P 0 16777217 2",
                "write -P 0xa2 15M 34M",
                "read -P 0xa2 15M 34M",
                "read -P 0 14M 1M",
                "read -P 0 49M 1M",
                "writev -P 0xa3 33554000 100 1000 3000",
                "readv -P 0xa3 33554000 3000 1000 100",
                "flush",
            ],
        )
    })
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let export = rig.serve("disk", 64 * MIB)?;
        script(
            &export.uri(),
            &[
                "write -P 0xb1 0 32M",
                "write -z 1000 5000",
                "read -P 0xb1 0 1000",
                "read -P 0 1000 5000",
                "read -P 0xb1 6000 2192",
                "write -z -u 8M 16M",
                "read -P 0 8M 16M",
                "read -P 0xb1 24M 8M",
                "discard 1M 1M",
                "read -P 0 1M 1M",
                "read -P 0xb1 2M 6M",
                "write -f -P 0xb2 1M 4k",
                "read -P 0xb2 1M 4k",
                "read -P 0 1052672 4k",
            ],
        )
    })
}

#[test]
fn data_is_there_after_the_client_has_gone() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let export = rig.serve("disk", 64 * MIB)?;
        script(&export.uri(), &["write -P 0xc1 30M 5M", "write -P 0xc2 63M 1M"])?;
        script(&export.uri(), &["read -P 0xc1 30M 5M", "read -P 0xc2 63M 1M", "read -P 0 35M 1M"])
    })
}
