//! The command line's grammar.
//!
//! Called by `main`. Must not know what the commands do.

use clap::{Args, Parser, Subcommand, ValueEnum};
use spline_types::{ByteSize, OnUnavailable, VolumeName};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Where a gateway listens for links unless told otherwise.
const GATEWAY_SOCKET: &str = "/run/spline/gateway.sock";
/// Where a gateway's administration listens unless told otherwise.
const GATEWAY_ADMIN: &str = "127.0.0.1:6710";
/// Where processes leave their status files unless told otherwise.
const RUNTIME_DIR: &str = "/run/spline";

/// Replicated volumes as block devices
#[derive(Parser, Debug)]
#[command(
    name = "spline",
    version,
    after_help = "Example:\n  spline dev                          a whole cluster in one process, to try\n  spline volume create disk0 10G\n  spline nbd export disk0 --socket /tmp/disk0.sock\n\nExit status: 0 done, 1 failed, 2 wrong usage."
)]
pub struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Args, Clone, Debug)]
pub struct Global {
    /// Addresses of the metadata servers, separated by commas
    #[arg(
        long,
        global = true,
        env = "SPLINE_MDS",
        value_delimiter = ',',
        default_value = "127.0.0.1:6700",
        value_name = "HOST:PORT"
    )]
    pub mds: Vec<String>,
    /// Print JSON for programs instead of text for people
    #[arg(long, global = true)]
    pub json: bool,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Create, list, resize, rename and delete volumes
    #[command(subcommand, after_help = "Example:\n  spline volume create disk0 10G")]
    Volume(Volume),
    /// Serve volumes to NBD clients
    #[command(subcommand, after_help = "Example:\n  spline nbd export disk0 --socket /tmp/disk0.sock")]
    Nbd(Nbd),
    /// Serve volumes to virtual machines, as vhost-user-blk disks
    #[command(subcommand, after_help = "Example:\n  spline vhost export disk0 --queues 4")]
    Vhost(Vhost),
    /// Look at the cluster
    #[command(subcommand, after_help = "Example:\n  spline cluster status")]
    Cluster(Cluster),
    /// Look at this host's gateway, replace it by another version
    #[command(subcommand, after_help = "Example:\n  spline gateway status")]
    Gateway(Gateway),
    /// Run a whole cluster in one process, with one volume exported over NBD, until Ctrl-C
    #[command(
        after_help = "Examples:\n  spline dev                 data stays in ./.dev\n  spline dev --check         write, read back, verify through NBD, then stop"
    )]
    Dev(Dev),
    /// Print a shell's completion script
    #[command(after_help = "Example:\n  spline completions bash > /etc/bash_completion.d/spline")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Commands on volumes.
#[derive(Subcommand, Debug)]
pub enum Volume {
    /// Create a volume; it takes space only as it is written
    #[command(
        after_help = "Example:\n  spline volume create disk0 10G --block-size 512 --on-unavailable fail-after:60"
    )]
    Create {
        /// Its name
        name: VolumeName,
        /// Its size, such as 10G or 512MiB (powers of two)
        size: ByteSize,
        /// Block size that guests are told to align to
        #[arg(long, value_enum, default_value = "4096")]
        block_size: BlockSizeArg,
        /// What requests do while the cluster can not serve them: wait, or fail-after:SECONDS
        #[arg(long, default_value = "wait", value_name = "POLICY")]
        on_unavailable: OnUnavailable,
    },
    /// List all volumes
    #[command(after_help = "Example:\n  spline volume ls --json")]
    Ls,
    /// Show one volume
    #[command(after_help = "Example:\n  spline volume info disk0")]
    Info {
        /// Its name
        name: VolumeName,
    },
    /// Grow a volume; guests see the new size at once or when they reconnect
    #[command(after_help = "Example:\n  spline volume resize disk0 20G")]
    Resize {
        /// Its name
        name: VolumeName,
        /// Its new size; never less than the old one
        size: ByteSize,
    },
    /// Give a volume another name; not while it is exported
    #[command(after_help = "Example:\n  spline volume rename disk0 web-1")]
    Rename {
        /// Its name
        name: VolumeName,
        /// Its new name
        new_name: VolumeName,
    },
    /// Delete a volume and all its data
    #[command(after_help = "Example:\n  spline volume rm disk0 --yes")]
    Rm {
        /// Its name
        name: VolumeName,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

/// Block sizes to choose from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum BlockSizeArg {
    /// 512 bytes
    #[value(name = "512")]
    B512,
    /// 4096 bytes
    #[value(name = "4096")]
    B4096,
}

/// Commands on NBD exports.
#[derive(Subcommand, Debug)]
pub enum Nbd {
    /// Start a nebd process that serves a volume, wait until it does, and print its NBD URI
    #[command(
        after_help = "Examples:\n  spline nbd export disk0 --socket /tmp/disk0.sock\n  spline nbd export disk0 --tcp 127.0.0.1:10809 --read-only"
    )]
    Export(NbdExport),
    /// Stop the nebd process that serves a volume; its clients are disconnected, the volume stays
    #[command(after_help = "Example:\n  spline nbd rm disk0")]
    Rm {
        /// The volume, as `nbd ls` shows it
        volume: String,
        /// Directory of the status files
        #[arg(long, env = "SPLINE_RUNTIME_DIR", default_value = RUNTIME_DIR, value_name = "DIR")]
        runtime_dir: PathBuf,
    },
    /// List the exports of this host
    #[command(after_help = "Example:\n  spline nbd ls")]
    Ls {
        /// Directory of the status files
        #[arg(long, env = "SPLINE_RUNTIME_DIR", default_value = RUNTIME_DIR, value_name = "DIR")]
        runtime_dir: PathBuf,
    },
}

/// What to export to NBD clients, and where.
#[derive(Args, Debug)]
pub struct NbdExport {
    /// What every export has.
    #[command(flatten)]
    pub export: Export,
    /// Listen on this unix socket (default: one in the runtime directory)
    #[arg(long, value_name = "PATH", conflicts_with = "tcp")]
    pub socket: Option<PathBuf>,
    /// Listen on this TCP address; loopback only, NBD has no passwords
    #[arg(long, value_name = "ADDR")]
    pub tcp: Option<SocketAddr>,
}

/// What every export has.
#[derive(Args, Debug)]
pub struct Export {
    /// The volume, or file:/abs/path for a file that the gateway may serve
    pub volume: String,
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,
    /// Take the volume from another gateway that still serves it; that one's writes are refused from then on
    #[arg(long)]
    pub force: bool,
    /// User that the export's process becomes once it has its sockets (default: stay as started)
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,
    /// Link socket of this host's gateway
    #[arg(long, env = "SPLINE_GATEWAY", default_value = GATEWAY_SOCKET, value_name = "PATH")]
    pub gateway: PathBuf,
    /// Directory of the status files
    #[arg(long, env = "SPLINE_RUNTIME_DIR", default_value = RUNTIME_DIR, value_name = "DIR")]
    pub runtime_dir: PathBuf,
}

/// Commands on vhost-user-blk exports.
#[derive(Subcommand, Debug)]
pub enum Vhost {
    /// Start a nebd process that serves a volume to a virtual machine, wait until it does, and print its socket; what QEMU
    /// needs is said on standard error
    #[command(
        after_help = "Examples:\n  spline vhost export disk0\n  spline vhost export disk0 --socket /tmp/disk0.vhost --queues 8 --serial root"
    )]
    Export(VhostExport),
    /// Stop the nebd process that serves a volume; its guest's disk stops answering, the volume stays
    #[command(after_help = "Example:\n  spline vhost rm disk0")]
    Rm {
        /// The volume, as `vhost ls` shows it
        volume: String,
        /// Directory of the status files
        #[arg(long, env = "SPLINE_RUNTIME_DIR", default_value = RUNTIME_DIR, value_name = "DIR")]
        runtime_dir: PathBuf,
    },
    /// List the exports of this host
    #[command(after_help = "Example:\n  spline vhost ls")]
    Ls {
        /// Directory of the status files
        #[arg(long, env = "SPLINE_RUNTIME_DIR", default_value = RUNTIME_DIR, value_name = "DIR")]
        runtime_dir: PathBuf,
    },
    /// Print what libvirt's domain XML needs for an export
    #[command(after_help = "Example:\n  spline vhost xml disk0 --target vdb")]
    Xml {
        /// The volume, as `vhost ls` shows it
        volume: String,
        /// Name of the disk in the domain
        #[arg(long, default_value = "vda", value_name = "NAME")]
        target: String,
        /// Directory of the status files
        #[arg(long, env = "SPLINE_RUNTIME_DIR", default_value = RUNTIME_DIR, value_name = "DIR")]
        runtime_dir: PathBuf,
    },
}

/// What to export to a virtual machine, and how.
#[derive(Args, Debug)]
pub struct VhostExport {
    /// What every export has.
    #[command(flatten)]
    pub export: Export,
    /// Listen on this unix socket (default: one in the runtime directory)
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Queues that the guest may use; one for each of its processors serves best
    #[arg(long, default_value_t = 4, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=16))]
    pub queues: u16,
    /// Threads that serve the queues (default: as many as cores, at most 4)
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=16))]
    pub threads: Option<u16>,
    /// Serial number that the guest sees, at most 20 characters (default: the volume's name)
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<String>,
}

/// Commands on the cluster.
#[derive(Subcommand, Debug)]
pub enum Cluster {
    /// Show chunkservers and copysets
    #[command(
        after_help = "Examples:\n  spline cluster status --copysets\n  spline cluster status --wait 60"
    )]
    Status {
        /// Wait until every copyset is healthy, at most so many seconds; then fail, saying what is not
        #[arg(long, value_name = "SECONDS")]
        wait: Option<u32>,
        /// List every copyset, not only those that are not healthy
        #[arg(long)]
        copysets: bool,
    },
}

/// Commands on a gateway.
#[derive(Subcommand, Debug)]
pub enum Gateway {
    /// Show the gateway's version, and the volumes that it serves
    #[command(after_help = "Examples:\n  spline gateway status\n  spline gateway status --json")]
    Status {
        /// Where to ask.
        #[command(flatten)]
        at: GatewayAddress,
    },
    /// Replace the running gateway by a new process, which takes its volumes over; guests see a pause of milliseconds. If the
    /// new one can not serve, the old one goes on, and the command fails with the reason
    #[command(
        after_help = "Examples:\n  spline gateway upgrade                 the file at the path by which the gateway was started\n  spline gateway upgrade --binary /usr/lib/spline-0.2/spline-gateway"
    )]
    Upgrade {
        /// The new binary; it must be root's or the gateway's own, and so must its directories (default: the path by which the
        /// running gateway was started)
        #[arg(long, value_name = "PATH")]
        binary: Option<PathBuf>,
        /// Where to ask.
        #[command(flatten)]
        at: GatewayAddress,
    },
}

/// Where a gateway's administration listens.
#[derive(Args, Debug)]
pub struct GatewayAddress {
    /// Address of the gateway's administration service (its admin_listen)
    #[arg(long, env = "SPLINE_GATEWAY_ADMIN", default_value = GATEWAY_ADMIN, value_name = "HOST:PORT")]
    pub admin: String,
}

/// How to run the cluster to try.
#[derive(Args, Debug)]
pub struct Dev {
    /// Directory of all data, sockets and logs
    #[arg(long, default_value = ".dev", value_name = "DIR")]
    pub dir: PathBuf,
    /// Write, read back and verify through NBD, say what was done, and stop
    #[arg(long)]
    pub check: bool,
    /// Delete the data of earlier runs first
    #[arg(long)]
    pub fresh: bool,
    /// Raft groups of a cluster that is made anew; a host of a real one has about a hundred, but three of these hosts
    /// elect all their leaders at once here
    #[arg(long, default_value_t = 12, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub copysets: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    fn has_example(command: &clap::Command) {
        for sub in command.get_subcommands() {
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "no example: command={}", sub.get_name());
            has_example(sub);
        }
    }

    #[test]
    fn every_help_ends_with_an_example() {
        has_example(&Cli::command());
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            "spline",
            "spline volume create disk0",
            "spline volume create ../etc 1G",
            "spline volume create disk0 1X",
            "spline volume create disk0 1G --block-size 1024",
            "spline nbd export disk0 --socket /a --tcp 127.0.0.1:1",
            "spline vhost export disk0 --queues 17",
            "spline vhost export disk0 --queues 0",
        ] {
            let error = Cli::try_parse_from(line.split(' ')).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
