//! `spline`: the command line, and a whole cluster in one process to try (`spline dev`).
//!
//! Knows: the control plane's calls, nebd's flags and status files, NBD enough to verify an export, the libraries of
//! the other processes (for `dev` only). Must never know: the data plane, raft, formats on disk.
//!
//! Modules in the order in which a command meets them: [`args`] → [`volume`], [`nbd`], [`vhost`], [`cluster`],
//! [`gateway`], [`dev`] → [`mds`], [`export`], [`nebd`], [`nbd_client`] → [`output`].

pub mod args;
pub mod cluster;
pub mod dev;
pub mod export;
pub mod gateway;
pub mod mds;
pub mod nbd;
pub mod nbd_client;
pub mod nebd;
pub mod output;
pub mod vhost;
pub mod volume;

use clap::{CommandFactory, Parser};
use output::Output;
use std::process::ExitCode;

/// Parses the command line, carries the command out and says how it went: 0 done, 1 failed, 2 wrong usage.
pub fn main() -> ExitCode {
    // Wrong usage ends here with status 2.
    let cli = args::Cli::parse();
    let output = Output { json: cli.global.json };
    match run(cli, output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.fail(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: args::Cli, output: Output) -> anyhow::Result<()> {
    match cli.command {
        args::Command::Volume(command) => block_on(volume::run(command, &cli.global.mds, output)),
        args::Command::Cluster(command) => block_on(cluster::run(command, &cli.global.mds, output)),
        args::Command::Gateway(command) => block_on(gateway::run(command, output)),
        args::Command::Nbd(command) => nbd::run(command, output),
        args::Command::Vhost(command) => vhost::run(command, output),
        args::Command::Dev(wanted) => dev::run(&wanted, output),
        args::Command::Completions { shell } => {
            clap_complete::generate(shell, &mut args::Cli::command(), "spline", &mut std::io::stdout());
            Ok(())
        }
    }
}

/// Runs a short command: one thread is enough.
fn block_on(command: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}
