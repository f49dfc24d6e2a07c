//! The command line of Spline.

fn main() {}
