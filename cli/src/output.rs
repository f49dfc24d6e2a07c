//! What commands print: tables for people, JSON for programs, errors on stderr.
//!
//! Called by every command. Must not know what the commands do.

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;

/// How a command prints its result.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// JSON instead of text.
    pub json: bool,
}

impl Output {
    /// Prints `value` as JSON, or what `human` makes of it.
    pub fn print<T: Serialize>(self, value: &T, human: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        use std::io::Write;
        let mut text = if self.json { serde_json::to_string_pretty(value)? } else { human(value) };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        match std::io::stdout().lock().write_all(text.as_bytes()) {
            // The reader of a pipe (head, less) has seen enough.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            result => Ok(result?),
        }
    }

    /// Prints why a command failed, with its causes.
    pub fn fail(self, error: &anyhow::Error) {
        match self.json {
            true => eprintln!("{}", serde_json::json!({ "error": format!("{error:#}") })),
            false => eprintln!("spline: {error:#}"),
        }
    }
}

/// A plain table: a header in capitals, columns in `right` aligned to the right.
pub fn table(header: &[&str], right: &[usize], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(header.iter().map(|title| title.to_uppercase()).collect::<Vec<_>>());
    table.add_rows(rows);
    let last = header.len().saturating_sub(1);
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, if at == last { 0 } else { 2 }));
        if right.contains(&at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.trim_fmt() + "\n"
}

/// Name and value, one pair per line.
pub fn pairs(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 2;
    rows.iter().map(|(name, value)| format!("{name:<width$}{value}\n")).collect()
}

/// How long ago something was, in its largest unit.
pub fn ago(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0 => format!("{ms} ms ago"),
        1..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// Milliseconds since 1970 of this moment.
pub fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_plain_and_aligned() {
        let text = table(
            &["name", "size"],
            &[1],
            [vec!["a".into(), "10 GiB".into()], vec!["bcdef".into(), "1 B".into()]],
        );
        assert_eq!(text, "NAME     SIZE\na      10 GiB\nbcdef     1 B\n");
        assert_eq!(pairs(&[("id", "1".into()), ("name", "x".into())]), "id    1\nname  x\n");
    }

    #[test]
    fn ages_in_their_largest_unit() {
        assert_eq!(ago(900), "900 ms ago");
        assert_eq!(ago(61_000), "61 s ago");
        assert_eq!(ago(3_600_000), "60 min ago");
        assert_eq!(ago(864_000_000), "10 days ago");
    }
}
