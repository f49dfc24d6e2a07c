//! An available ring that names a descriptor that the table does not have.

use spline_conformance::guest::Setup;
use spline_conformance::guest::stage::play;

#[test]
fn breaks_the_queue() -> anyhow::Result<()> {
    play(|stage| {
        for head in [128, 1024, 65_535] {
            stage.breaks(Setup::default(), |guest| guest.offer(0, head))?;
        }
        Ok(())
    })
}
