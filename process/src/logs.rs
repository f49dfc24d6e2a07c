//! Logging: tracing events to stderr, filtered by `SPLINE_LOG` (or `RUST_LOG`), as text or as JSON lines.
//!
//! Called once per process. ERROR means that someone must look.

use anyhow::Context;
use std::error::Error;
use std::fs::File;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::Mutex;
use tracing_subscriber::EnvFilter;

/// What is logged unless the environment says otherwise. Raft's library tells of every heartbeat at `info`.
const DEFAULT: &str = "info,openraft=warn";

/// Sets up logging of this process. The filter comes from `SPLINE_LOG`, else `RUST_LOG`, else is `info`, and `warn` for
/// raft's library.
///
/// # Errors
/// If the filter does not parse, or logging is already set up.
pub fn init(process: &str, json: bool) -> anyhow::Result<()> {
    let builder = tracing_subscriber::fmt().with_env_filter(filter(DEFAULT)?).with_writer(std::io::stderr);
    let result = match json {
        true => builder.json().flatten_event(true).try_init(),
        false => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
    };
    begin(process, result)
}

/// As [`init`], but as text into a file and with another filter for when the environment names none: for a process
/// whose terminal belongs to its user.
///
/// # Errors
/// As [`init`], and if the file can not be opened.
pub fn init_to_file(process: &str, path: &Path, default: &str) -> anyhow::Result<()> {
    let file = File::options().create(true).append(true).open(path);
    let file = file.with_context(|| format!("can not open the log: path={}", path.display()))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter(default)?).with_ansi(false);
    begin(process, builder.with_writer(Mutex::new(file)).try_init())
}

fn filter(default: &str) -> anyhow::Result<EnvFilter> {
    let written = std::env::var("SPLINE_LOG").or_else(|_| std::env::var("RUST_LOG"));
    EnvFilter::try_new(written.as_deref().unwrap_or(default))
        .map_err(|e| anyhow::anyhow!("log filter is refused, see SPLINE_LOG: {e}"))
}

fn begin(process: &str, result: Result<(), Box<dyn Error + Send + Sync>>) -> anyhow::Result<()> {
    result.map_err(|e| anyhow::anyhow!("logging is already set up: {e}"))?;
    // The panicking thread also says so on stderr, in case nobody reads the log.
    let standard = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!("panic, this is a defect: {panic}");
        standard(panic);
    }));
    tracing::info!(process, version = crate::VERSION, pid = std::process::id(), "started");
    Ok(())
}
