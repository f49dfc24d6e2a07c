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

fn of_stat(stat: &str) -> Option<u64> {
    // The command name is in parentheses and may hold spaces and parentheses: count fields after the last one.
    let mut fields = stat.get(stat.rfind(')')? + 2..)?.split(' ').skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    #[test]
    fn stat_with_an_ugly_name_is_read() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 11 22 0 0 20 0 1 0 5 6 7";
        assert_eq!(super::of_stat(stat), Some(33));
        assert_eq!(super::of_stat("7 a"), None);
    }
}
