//! The longest that a client waited, by kind of fault: reported, not judged, for a machine under test may be slow.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

/// What was seen of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Seen {
    rounds: u32,
    longest: Duration,
    total: Duration,
}

/// Longest waits by kind of fault.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Stalls(BTreeMap<&'static str, Seen>);

impl Stalls {
    /// A round of this kind made a client wait this long.
    pub fn add(&mut self, kind: &'static str, longest: Duration) {
        let seen = self.0.entry(kind).or_default();
        seen.rounds += 1;
        seen.longest = seen.longest.max(longest);
        seen.total += longest;
    }
}

impl fmt::Display for Stalls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<34} {:>6} {:>13} {:>10}", "fault", "rounds", "longest stall", "mean")?;
        for (kind, seen) in &self.0 {
            let mean = seen.total / seen.rounds.max(1);
            writeln!(
                f,
                "{kind:<34} {:>6} {:>11.3} s {:>8.3} s",
                seen.rounds,
                seen.longest.as_secs_f64(),
                mean.as_secs_f64()
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_of_each_kind_is_told() {
        let mut stalls = Stalls::default();
        stalls.add("gateway", Duration::from_millis(1500));
        stalls.add("gateway", Duration::from_millis(500));
        let text = stalls.to_string();
        let line = text.lines().nth(1).expect("a line");
        assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["gateway", "2", "1.500", "s", "1.000", "s"]);
    }
}
