//! `spline-bench-direct`: serves a file to a guest or to NBD clients without a link, as the baseline of what the link costs.

use clap::Parser;
use std::path::PathBuf;

/// Serves a file as a vhost-user-blk device, or over NBD, in one process.
#[derive(Parser, Debug)]
struct Args {
    /// The file
    #[arg(long)]
    file: PathBuf,
    /// Where the front-end connects
    #[arg(long)]
    socket: PathBuf,
    /// Serve NBD clients, not a front-end
    #[arg(long)]
    nbd: bool,
    /// Directory for status files
    #[arg(long)]
    runtime_dir: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if args.nbd {
        return spline_bench::direct::nbd::serve(&args.file, &args.socket);
    }
    spline_bench::direct::serve(&args.file, &args.socket, args.runtime_dir)
}
