//! CPU time that processes have used, read from /proc.

use anyhow::Context;

/// User plus system time of `pids` so far, in seconds; a process that ended counts as zero.
///
/// # Errors
/// A /proc entry that does not parse (proc(5), /proc/pid/stat, fields 14 and 15).
pub fn seconds(pids: &[u32]) -> anyhow::Result<f64> {
    let ticks_per_second = rustix::param::clock_ticks_per_second() as f64;
    let mut ticks = 0u64;
    for pid in pids {
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        ticks += of_stat(&stat).with_context(|| format!("unexpected /proc/{pid}/stat: value={stat:?}"))?;
    }
    Ok(ticks as f64 / ticks_per_second)
}

/// Time that the living threads of `pids` have run so far, in seconds: exact, where [`seconds`] counts ticks, of which a process
/// that rests may never fill one.
///
/// # Errors
/// A process that has ended, or a /proc entry that does not parse (Documentation/scheduler/sched-stats.rst, first field).
pub fn exact_seconds(pids: &[u32]) -> anyhow::Result<f64> {
    let mut nanoseconds = 0u64;
    for pid in pids {
        for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let path = thread?.path().join("schedstat");
            // A thread may end in between.
            let Ok(text) = std::fs::read_to_string(&path) else { continue };
            let ran = text.split(' ').next().and_then(|field| field.parse::<u64>().ok());
            nanoseconds += ran.with_context(|| format!("unexpected {}: value={text:?}", path.display()))?;
        }
    }
    Ok(nanoseconds as f64 / 1e9)
}

fn of_stat(stat: &str) -> Option<u64> {
    // The command name is in parentheses and may hold spaces and parentheses: count fields after the last one.
    let mut fields = stat.get(stat.rfind(')')? + 2..)?.split(' ').skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_has_run_is_counted() {
        let own = [std::process::id()];
        let before = super::exact_seconds(&own).expect("/proc");
        let started = super::seconds(&own).expect("/proc");
        while super::seconds(&own).expect("/proc") < started + 0.03 {}
        let ran = super::exact_seconds(&own).expect("/proc") - before;
        assert!(ran > 0.01, "{ran}");
        assert!(super::exact_seconds(&[0]).is_err(), "nobody has this id");
    }

    #[test]
    fn stat_with_an_ugly_name_is_read() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 11 22 0 0 20 0 1 0 5 6 7";
        assert_eq!(super::of_stat(stat), Some(33));
        assert_eq!(super::of_stat("7 a"), None);
    }
}
