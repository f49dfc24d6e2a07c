//! How often a test is to be repeated, for how long, and with which seed.

use anyhow::Context;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Rounds of a test: few in `make test`, as many as `SPLINE_ROUNDS` says in `make soak`.
pub fn rounds(usual: usize) -> usize {
    std::env::var("SPLINE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Time for which a random test goes on: a little in `make test`, `SPLINE_SOAK_SECONDS` in `make soak`.
///
/// # Errors
/// If the variable is no number.
pub fn soak_time(usual: Duration) -> anyhow::Result<Duration> {
    Ok(number("SPLINE_SOAK_SECONDS")?.map_or(usual, Duration::from_secs))
}

/// What decides a random test: `SPLINE_SEED`, or another number each time. Whoever uses it must tell it.
///
/// # Errors
/// If the variable is no number.
pub fn seed() -> anyhow::Result<u64> {
    // The keys of the standard library's hashes are random; 32 bits are quickly typed again.
    Ok(number("SPLINE_SEED")?.unwrap_or_else(|| RandomState::new().hash_one(0) >> 32))
}

/// A variable that is no number must not be taken for one that is not there: another run than the wanted one would succeed.
fn number(variable: &str) -> anyhow::Result<Option<u64>> {
    let Some(text) = std::env::var_os(variable) else { return Ok(None) };
    let text = text.to_string_lossy();
    text.parse().map(Some).with_context(|| format!("not a number: {variable}={text}"))
}
