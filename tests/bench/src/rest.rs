//! What a server costs beside its requests: memory, wake-ups while its guest is idle, and the time to a first answer.

use crate::report::median;
use crate::{cpu, guest};
use anyhow::Context;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

/// How long an idle server is watched.
const WATCHED: Duration = Duration::from_secs(5);
/// Connections that are timed.
const CONNECTIONS: usize = 15;

/// A server whose guest rests.
pub struct Resting<'a> {
    /// Its name in the table.
    pub name: &'a str,
    /// Where its guest connects.
    pub socket: &'a Path,
    /// Its processes; the first has the guest.
    pub pids: &'a [u32],
}

/// A table of what the servers cost at rest.
///
/// # Errors
/// Those of the devices, or of /proc.
pub fn table(servers: &[Resting<'_>]) -> anyhow::Result<String> {
    let mut text = String::from(
        "\n### At rest\n\nMemory is the proportional share of the process that has the guest, the guest's own left out. Wake-ups are \
         voluntary context\nswitches of its threads, and of those of all processes, while a guest is connected and asks for nothing; \
         CPU is of all.\nThe first answer is that to a read of 4 KiB, from the driver's connect on.\n\n| server | own memory, KiB | \
         of it anonymous, KiB | wake-ups a second | of all processes | CPU ms a second | first answer, ms |\n\
         |---|---:|---:|---:|---:|---:|---:|\n",
    );
    for server in servers {
        let times = (0..CONNECTIONS).map(|_| guest::first_read_us(server.socket));
        let first = median(&times.collect::<anyhow::Result<Vec<_>>>()?) / 1e3;
        let guest = guest::idle(server.socket)?;
        let own = server.pids.get(..1).context("a server has a process")?;
        let memory = Memory::of(own[0])?;
        // What the connection itself has set going is over.
        std::thread::sleep(Duration::from_secs(1));
        let (before, all_before, seconds) =
            (switches(own)?, switches(server.pids)?, cpu::seconds(server.pids)?);
        std::thread::sleep(WATCHED);
        let a_second = |count: u64| count as f64 / WATCHED.as_secs_f64();
        let woken = a_second(switches(own)?.saturating_sub(before));
        let all_woken = a_second(switches(server.pids)?.saturating_sub(all_before));
        let busy = (cpu::seconds(server.pids)? - seconds) * 1e3 / WATCHED.as_secs_f64();
        drop(guest);
        // Writing to a String can not fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {woken:.1} | {all_woken:.1} | {busy:.1} | {first:.1} |",
            server.name, memory.own_kib, memory.anonymous_kib
        );
    }
    Ok(text)
}

/// Memory of a process, its proportional share of each page, KiB.
pub struct Memory {
    /// Its own, and files: everything but what is shared by descriptors.
    pub own_kib: u64,
    /// Of that, what is no file.
    pub anonymous_kib: u64,
    /// Guest memory and rings.
    pub shared_kib: u64,
}

impl Memory {
    /// That of a process.
    ///
    /// # Errors
    /// Those of /proc.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let kib = |name: &str| of_line(&text, name).with_context(|| format!("no {name} in {path}"));
        let anonymous_kib = kib("Pss_Anon:")?;
        // Guest memory is a memfd: Pss_Shmem.
        let (own_kib, shared_kib) = (anonymous_kib + kib("Pss_File:")?, kib("Pss_Shmem:")?);
        Ok(Self { own_kib, anonymous_kib, shared_kib })
    }
}

/// A line such as "Pss_Anon:   123 kB".
fn of_line(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// Voluntary context switches of all threads of these processes.
///
/// # Errors
/// Those of /proc.
pub fn switches(pids: &[u32]) -> anyhow::Result<u64> {
    let mut sum = 0;
    for pid in pids {
        for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let path = thread?.path().join("status");
            let text = std::fs::read_to_string(&path)?;
            sum += of_line(&text, "voluntary_ctxt_switches:").with_context(|| path.display().to_string())?;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    #[test]
    fn lines_are_read() {
        let text = "Pss:    900 kB\nPss_Anon:            123 kB\nvoluntary_ctxt_switches:\t7\n";
        assert_eq!(super::of_line(text, "Pss_Anon:"), Some(123));
        assert_eq!(super::of_line(text, "voluntary_ctxt_switches:"), Some(7));
        assert_eq!(super::of_line(text, "Pss_File:"), None);
    }
}
