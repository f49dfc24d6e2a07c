//! Upgrades, kills, stops, freezes and cut links in random order, under clients that verify: no error at a client, nothing
//! that was acknowledged is lost, nothing comes back that was replaced.
//!
//! A seed decides what happens; it is told at the start and, with all steps so far, if something is wrong. `SPLINE_SEED` and
//! `SPLINE_SOAK_SECONDS` choose another one and how long it goes on.

use anyhow::{Context, ensure};
use spline_fault::guest::GuestLoad;
use spline_fault::history::History;
use spline_fault::schedule::{Costs, Planned, Schedule, Step};
use spline_fault::workload::{BLOCKS, EXPORT_BYTES, RECOVERY_LIMIT, Workload, verify};
use spline_harness::vhost::{Shown, VhostExport};
use spline_harness::{Cluster, Export, Rig, Stalls, seed, soak_time, wait_until};
use std::io::Write;
use std::time::{Duration, Instant};

/// Volumes that are served over NBD.
const DISKS: [&str; 2] = ["first", "second"];
/// The volume of a guest.
const GUEST: &str = "guest";
/// How long it goes on in `make test`.
const USUAL_TIME: Duration = Duration::from_secs(10);
/// Steps however slow the machine is.
const STEPS_MIN: usize = 6;
/// Answers to each client when all is over.
const PROGRESS: u64 = 200;

/// A cluster, clients at work, and what they have seen.
struct Stage {
    loads: Vec<Workload>,
    guest_load: GuestLoad,
    exports: Vec<Export>,
    guest: VhostExport,
    // Its directory holds the logs of the others, which show them when they are dropped.
    rig: Rig,
    away: Option<usize>,
    costs: Costs,
    /// Links that were cut.
    cut: usize,
    /// Upgrades that were refused, and tried again.
    refused: usize,
}

impl Stage {
    fn new(seed: u64) -> anyhow::Result<Self> {
        let rig = Rig::cluster()?;
        let exports =
            DISKS.iter().map(|name| rig.serve(name, EXPORT_BYTES)).collect::<Result<Vec<_>, _>>()?;
        let guest = rig.export_to_guest(&rig.create(GUEST, EXPORT_BYTES)?, Shown::default())?;
        let start = |(export, number): (&Export, u64)| {
            Workload::start(&export.socket, &export.volume, History::new(BLOCKS), seed.wrapping_add(number))
        };
        let loads = exports.iter().zip(1..).map(start).collect();
        let guest_load = GuestLoad::start(&guest.socket, History::new(BLOCKS), seed);
        let (away, costs) = (None, Costs::default());
        Ok(Self { loads, guest_load, exports, guest, rig, away, costs, cut: 0, refused: 0 })
    }

    fn cluster(&mut self) -> &mut Cluster {
        match &mut self.rig {
            Rig::Cluster(cluster) => cluster,
            Rig::File { .. } => unreachable!("a cluster"),
        }
    }

    fn wait_for_progress(&self, answers: u64) -> anyhow::Result<()> {
        for (load, name) in self.loads.iter().zip(DISKS) {
            load.wait_for_progress(answers).with_context(|| format!("volume={name}"))?;
        }
        self.guest_load.wait_for_progress(answers).with_context(|| format!("volume={GUEST}"))
    }

    /// Carries steps out, which go into `done` first, until the time is over.
    fn follow(&mut self, schedule: Schedule, time: Duration, done: &mut Vec<Planned>) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        for planned in schedule {
            if Instant::now() >= end && done.len() >= STEPS_MIN {
                break;
            }
            done.push(planned);
            self.wait_for_progress(planned.answers).context("before the step")?;
            self.add_waits();
            self.costs.begin(Instant::now(), planned.step);
            self.happen(planned.step).context("the step")?;
        }
        if let Some(number) = self.away.take() {
            self.cluster().chunkservers[number].start()?;
        }
        self.wait_for_progress(PROGRESS).context("in the end")?;
        self.add_waits();
        Ok(())
    }

    fn add_waits(&mut self) {
        for wait in self.loads.iter().flat_map(Workload::take_waits) {
            self.costs.add(wait);
        }
    }

    fn happen(&mut self, step: Step) -> anyhow::Result<()> {
        match step {
            Step::Upgrade => self.upgrade()?,
            Step::KillGateway => self.rig.gateway_mut().restart()?,
            Step::StopGateway => {
                self.wait_until_steered()?;
                let status = self.rig.gateway_mut().terminate(RECOVERY_LIMIT)?;
                ensure!(status.success(), "{status}");
                self.rig.gateway_mut().start()?;
            }
            Step::FreezeGateway(time) => {
                self.freeze(time)?;
                self.rig.gateway().cont()?;
            }
            Step::KillFrozenGateway(time) => {
                self.freeze(time)?;
                self.rig.gateway_mut().restart()?;
            }
            Step::CutLinks => self.cut += self.rig.gateway().cut(&self.rig.gateway_socket())?,
            Step::KillMetadataServer => self.cluster().mds.restart()?,
            Step::KillChunkserver(number) => {
                // The last one has come back: two at once leave no majority.
                self.cluster().wait_until_led()?;
                self.cluster().chunkservers[number].kill9()?;
                self.away = Some(number);
            }
            Step::StartChunkserver(number) => {
                self.cluster().chunkservers[number].start()?;
                self.away = None;
            }
        }
        Ok(())
    }

    /// A metadata server that answers too late is a refusal, and the old gateway goes on: the operator tries again.
    fn upgrade(&mut self) -> anyhow::Result<()> {
        self.wait_until_steered()?;
        wait_until("the upgrade", RECOVERY_LIMIT, || match self.rig.upgrade(None) {
            Err(refused) if format!("{refused:#}").contains("no metadata server answers") => {
                self.refused += 1;
                Err(refused)
            }
            outcome => Ok(Some(outcome.map(drop))),
        })?
    }

    fn freeze(&self, time: Duration) -> anyhow::Result<()> {
        self.rig.gateway().stop()?;
        // Its length is the fault.
        std::thread::sleep(time);
        Ok(())
    }

    /// Waits until an operator could do something: the gateway and the metadata server listen.
    fn wait_until_steered(&mut self) -> anyhow::Result<()> {
        wait_until("the gateway and the metadata server to answer", RECOVERY_LIMIT, || {
            self.rig.gateway_status()?;
            self.cluster().status()?;
            Ok(Some(()))
        })
    }

    /// All clients end without an error, and after a cold start everything is there.
    fn finish(mut self) -> anyhow::Result<Stalls> {
        let mut histories = Vec::new();
        for load in self.loads.drain(..) {
            histories.push(load.finish()?);
        }
        let mut of_guest = self.guest_load.finish().context(GUEST)?;
        for nebd in self.exports.iter_mut().map(|export| &mut export.nebd).chain([&mut self.guest.nebd]) {
            nebd.kill9()?;
        }
        let Rig::Cluster(cluster) = &mut self.rig else { unreachable!("a cluster") };
        cluster.restart_all()?;
        for (export, history) in self.exports.iter_mut().zip(&mut histories) {
            export.nebd.start()?;
            export.wait_until_serving()?;
            verify(&export.socket, &export.volume, history).context("after a cold start")?;
        }
        let export = self.rig.export(GUEST, false)?;
        verify(&export.socket, GUEST, &mut of_guest).context("after a cold start")?;
        Ok(self.costs.stalls())
    }
}

/// Not by a macro: the test harness would keep what a test says that passes.
fn say(text: &str) {
    let _ = write!(std::io::stderr(), "\n{text}\n");
}

#[test]
fn nothing_is_lost_whatever_happens_in_whatever_order() {
    let (seed, time) = (seed().expect("a seed"), soak_time(USUAL_TIME).expect("a time"));
    say(&format!("schedule: seed={seed} time={time:?} (again: SPLINE_SEED={seed})"));
    let mut stage = Stage::new(seed).expect("clients at work");
    let mut done = Vec::new();
    let followed = stage.follow(Schedule::new(seed), time, &mut done);
    let (steps, cut, refused) = (done.len(), stage.cut, stage.refused);
    if let Err(error) = followed {
        panic!("seed={seed} steps={steps}\n{}\n{error:#}", told(&done));
    }
    let stalls = stage.finish().unwrap_or_else(|error| {
        panic!("seed={seed} steps={steps}\n{}\n{error:#}", told(&done));
    });
    say(&format!(
        "schedule: seed={seed} steps={steps} links_cut={cut} upgrades_refused={refused} violations=0\n{stalls}"
    ));
}

fn told(done: &[Planned]) -> String {
    done.iter().map(|planned| format!("{planned}\n")).collect()
}
