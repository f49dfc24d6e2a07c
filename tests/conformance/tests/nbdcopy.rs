//! nbdcopy: an image with holes goes in and comes out identical, with its holes.

use anyhow::ensure;
use spline_conformance::{MIB, allocated, same_content, sparse_image};
use spline_harness::{Rig, Tool};

/// Bytes of the image, nearly all of them holes.
const IMAGE: u64 = 1024 * MIB;

#[test]
fn an_image_survives_the_round_trip() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let (image, back) = (rig.dir().join("image"), rig.dir().join("back"));
        // At the start, across a chunk's end, an odd length, and at the very end.
        let parts = [
            (0, MIB as usize),
            (16 * MIB - 300_000, 600_000),
            (470 * MIB + 4096, 8 << 20),
            (800 * MIB, 12_345),
            (IMAGE - 65_536, 65_536),
        ];
        let data = sparse_image(&image, IMAGE, &parts)?;
        let export = rig.serve("disk", IMAGE)?;
        let uri = export.uri();
        Tool::new("nbdcopy")
            .args(["--destination-is-zero", "--flush", &image.to_string_lossy(), &uri])
            .run()?;
        Tool::new("nbdcopy").args([&uri, &*back.to_string_lossy()]).run()?;
        same_content(&image, &back)?;
        let holes = Tool::new("nbdinfo").args(["--map", "--totals", "--json", &uri]).json()?;
        let hole = holes.as_array().and_then(|all| all.iter().find(|total| total["type"] == 3));
        let bytes = hole.and_then(|total| total["size"].as_u64()).unwrap_or(0);
        ensure!(bytes > IMAGE - 8 * 16 * MIB, "holes are holes on the disk: {holes}");
        let taken = allocated(&back)?;
        ensure!(taken <= data + 4 * MIB, "holes are holes in the copy: data={data} taken={taken}");
        Ok(())
    })
}

#[test]
fn holes_overwrite_old_data() -> anyhow::Result<()> {
    Rig::both(|rig| {
        let bytes = 48 * MIB;
        let (image, back) = (rig.dir().join("image"), rig.dir().join("back"));
        sparse_image(&image, bytes, &[(20 * MIB, 1 << 20)])?;
        let export = rig.serve("disk", bytes)?;
        Tool::new("qemu-io").args(["-f", "raw", "-c", "write -P 0xee 0 48M", &export.uri()]).run()?;
        Tool::new("nbdcopy").args([&*image.to_string_lossy(), &export.uri()]).run()?;
        Tool::new("nbdcopy").args([&export.uri(), &*back.to_string_lossy()]).run()?;
        same_content(&image, &back)
    })
}
