//! The TOML file of a process: read, refuse what is unknown, print with every default.
//!
//! Called by each `main.rs` through [`CommonFlags`](crate::CommonFlags). Must not know any process's fields: their
//! types say `deny_unknown_fields` and `default` themselves.

pub mod duration;
pub mod size;

use anyhow::Context;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::Path;

/// Largest config file, bytes: far above any real one, so that a wrong path (a disk image) is refused, not read.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Reads a config file; without a path, the defaults.
///
/// # Errors
/// If the file can not be read, is larger than 1 MiB, does not parse, or holds a key that `T` does not know
/// (`T` must derive `serde(deny_unknown_fields)`); the message names the file, the line and the column.
pub fn load<T: DeserializeOwned + Default>(path: Option<&Path>) -> anyhow::Result<T> {
    let Some(path) = path else { return Ok(T::default()) };
    let shown = path.display();
    let size =
        std::fs::metadata(path).with_context(|| format!("can not read the config file: path={shown}"))?.len();
    anyhow::ensure!(
        size <= CONFIG_BYTES_MAX,
        "config file is too large, is it the right one: path={shown} bytes={size} limit={CONFIG_BYTES_MAX}"
    );
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("can not read the config file: path={shown}"))?;
    toml::from_str(&text).with_context(|| format!("config file is refused: path={shown}"))
}

/// The config as TOML, every default included: what `--print-config` shows, and a valid config file.
///
/// # Errors
/// If the config holds something that TOML can not say; that is a defect of its type.
pub fn print<T: Serialize>(config: &T) -> anyhow::Result<String> {
    toml::to_string_pretty(config).context("config can not be written as toml")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use std::time::Duration;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Example {
        listen: String,
        #[serde(with = "duration")]
        lease: Duration,
    }

    impl Default for Example {
        fn default() -> Self {
            Self { listen: "127.0.0.1:1".into(), lease: Duration::from_secs(10) }
        }
    }

    fn write(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("x.toml");
        std::fs::write(&path, text).expect("writes");
        (dir, path)
    }

    #[test]
    fn what_is_printed_is_read_back() {
        let example = Example { listen: "[::1]:9".into(), lease: Duration::from_millis(1500) };
        let (_dir, path) = write(&print(&example).expect("prints"));
        assert_eq!(load::<Example>(Some(&path)).expect("loads"), example);
        assert_eq!(load::<Example>(None).expect("defaults"), Example::default());
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line() {
        let (_dir, path) = write("listen = \"a\"\nlisten_adress = \"b\"\n");
        let message = format!("{:#}", load::<Example>(Some(&path)).expect_err("refused"));
        assert!(message.contains("line 2"), "{message}");
        assert!(message.contains("listen_adress"), "{message}");
        assert!(message.contains("x.toml"), "{message}");
    }

    #[test]
    fn a_huge_or_missing_file_is_refused() {
        let (dir, path) = write(&"#".repeat(CONFIG_BYTES_MAX as usize + 1));
        assert!(format!("{:#}", load::<Example>(Some(&path)).expect_err("refused")).contains("too large"));
        assert!(load::<Example>(Some(&dir.path().join("none"))).is_err());
    }
}
