//! `spline dev`: the first thing that anyone runs. One file per side of it.

mod life;
mod pasted_lines;
