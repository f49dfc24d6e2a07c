//! The `spline` command; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    spline::main()
}
