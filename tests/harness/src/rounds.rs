//! How often a test is to be repeated.

/// Rounds of a test: few in `make test`, as many as `SPLINE_ROUNDS` says in `make soak`.
pub fn rounds(usual: usize) -> usize {
    std::env::var("SPLINE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}
