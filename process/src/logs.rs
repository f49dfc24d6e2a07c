//! Logging: tracing events to stderr, filtered by `SPLINE_LOG` (or `RUST_LOG`), as text or as JSON lines.
//!
//! Called once per process. ERROR means that someone must look.

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Sets up logging of this process. The filter comes from `SPLINE_LOG`, else `RUST_LOG`, else is `info`.
///
/// # Errors
/// If the filter does not parse, or logging is already set up.
pub fn init(process: &str, json: bool) -> anyhow::Result<()> {
    init_with_default(process, json, "info")
}

/// As [`init`], with another filter for when the environment names none.
///
/// # Errors
/// As [`init`].
pub fn init_with_default(process: &str, json: bool, default: &str) -> anyhow::Result<()> {
    let written = std::env::var("SPLINE_LOG").or_else(|_| std::env::var("RUST_LOG"));
    let filter = EnvFilter::try_new(written.as_deref().unwrap_or(default))
        .map_err(|e| anyhow::anyhow!("log filter is refused, see SPLINE_LOG: {e}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let result = match json {
        true => builder.json().flatten_event(true).try_init(),
        false => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
    };
    result.map_err(|e| anyhow::anyhow!("logging is already set up: {e}"))?;
    std::panic::set_hook(Box::new(|panic| tracing::error!("panic, this is a defect: {panic}")));
    tracing::info!(process, version = crate::VERSION, pid = std::process::id(), "started");
    Ok(())
}
