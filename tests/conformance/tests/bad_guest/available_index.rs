//! An available index that jumps ahead of the queue, or back.

use spline_conformance::guest::stage::play;
use spline_conformance::guest::{Guest, Setup};

fn jump(guest: &mut Guest, to: u16) -> anyhow::Result<()> {
    guest.memory.write(guest.rings[0].available + 2, &to.to_le_bytes())?;
    guest.rings[0].kick.ring()
}

#[test]
fn ahead_of_the_queue() -> anyhow::Result<()> {
    play(|stage| {
        for to in [129, 1000, 40_000] {
            stage.breaks(Setup::default(), |guest| jump(guest, to))?;
        }
        Ok(())
    })
}

#[test]
fn back() -> anyhow::Result<()> {
    play(|stage| {
        stage.breaks(Setup::default(), |guest| {
            for sector in 0..10 {
                guest.read(sector, 512)?;
            }
            jump(guest, 5)
        })
    })
}
