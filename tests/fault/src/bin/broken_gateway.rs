//! A gateway that breaks in the middle of an upgrade, each time elsewhere: what it does is said by the name it is started by.
//!
//! Started by a gateway under test as the new process. It knows the first bytes of what two gateways say to each other, and no
//! more: `<what>-at-<kind>` starts the real gateway, named in the file `<its own path>.real`, between which and the old one it
//! passes everything on, until one of them says a message of that kind. Then it `dies`, `panics` two seconds later or `hangs`, each
//! without the real one; or it `freezes` the old one (SIGSTOP), or `waits` until there is a file `<its own path>.go`, having written
//! the real one's process id to `<its own path>.reached`, and passes on what comes.

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, send, sendmsg, socketpair,
};
use rustix::process::{Signal, getppid, kill_process, set_parent_process_death_signal};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Longer than any packet.
const PACKET_BYTES: usize = 1 << 17;
/// Far longer than anybody waits.
const FOR_EVER: Duration = Duration::from_hours(1);
/// From the message to the panic.
const PANIC_DELAY: Duration = Duration::from_secs(2);
/// How often is looked whether it may go on.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Name of a process that becomes the program in its first argument, and ends with the one that started it.
const BOUND: &str = "bound";
/// A hello of state version 9 only: magic, kind 1, no version, length; 9 to 9, product "9".
const FUTURE_HELLO: &[u8] = b"SPLU\x01\0\0\0\x07\0\0\0\x09\0\x09\0\x01\09";
/// A hello that announces more than is there.
const TORN_HELLO: &[u8] = b"SPLU\x01\0\0\0\xff\xff\xff\x7f\x01\0\x01\0";

fn main() -> anyhow::Result<()> {
    let path = std::env::args().next().context("no name")?;
    let name = path.rsplit('/').next().unwrap_or_default();
    if name == BOUND {
        // Whoever kills the one that stands between means both.
        set_parent_process_death_signal(Some(Signal::KILL))?;
        let mut arguments = std::env::args_os().skip(1);
        let error = Command::new(arguments.next().context("no program")?).args(arguments).exec();
        return Err(error.into());
    }
    // Not blocking: the socket is shared with nobody, so that it is simply polled.
    let old = std::io::stdin().as_fd().try_clone_to_owned()?;
    match name {
        "exits" => std::process::exit(1),
        "panics" => panic!("a build that panics"),
        "hangs" => std::thread::sleep(FOR_EVER),
        "future" => drop(send(&old, FUTURE_HELLO, SendFlags::empty())?),
        "torn" => drop(send(&old, TORN_HELLO, SendFlags::empty())?),
        "nonsense" => drop(send(&old, b"GET / HTTP/1.1", SendFlags::empty())?),
        "passes-descriptors" => drop(forward(&old, FUTURE_HELLO, &[old.try_clone()?])?),
        _ => return between(&path, name, &old),
    }
    // What the old one does is its own affair: it is not helped by an end.
    std::thread::sleep(FOR_EVER);
    Ok(())
}

/// The real gateway of the one at `path`.
fn real(path: &str) -> anyhow::Result<String> {
    let named = format!("{path}.real");
    Ok(std::fs::read_to_string(&named).context(named)?.trim().to_owned())
}

/// Stands between the old gateway and a real new one; something happens when a message of a kind is said.
fn between(path: &str, name: &str, old: &OwnedFd) -> anyhow::Result<()> {
    let (what, kind) = name.split_once("-at-").context("unknown name")?;
    let kind: u16 = kind.parse()?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let mut command = Command::new(path);
    command.arg0(BOUND).arg(real(path)?).args(std::env::args_os().skip(1));
    let mut new: Child = command.stdin(Stdio::from(theirs)).spawn()?;
    loop {
        let mut ready = [PollFd::new(old, PollFlags::IN), PollFd::new(&ours, PollFlags::IN)];
        poll(&mut ready, None)?;
        let from_old = !ready[0].revents().is_empty();
        let (from, to) = if from_old { (old.as_fd(), ours.as_fd()) } else { (ours.as_fd(), old.as_fd()) };
        let (packet, fds) = receive(from)?;
        if packet.is_empty() {
            break;
        }
        if packet.get(4..6) == Some(&kind.to_le_bytes()) {
            happen(what, path, &mut new)?;
        }
        forward(&to, &packet, &fds)?;
    }
    // One of them has ended; the new one may go on by itself.
    drop(ours);
    let status = new.wait()?;
    std::process::exit(status.code().unwrap_or(1));
}

/// What is to happen when the message is said; if this comes back, all goes on.
fn happen(what: &str, path: &str, new: &mut Child) -> anyhow::Result<()> {
    match what {
        "freezes" => kill_process(getppid().context("no parent")?, Signal::STOP)?,
        "waits" => {
            std::fs::write(format!("{path}.reached"), format!("{}\n", new.id()))?;
            while !Path::new(&format!("{path}.go")).exists() {
                std::thread::sleep(LOOK_EVERY);
            }
        }
        _ => {
            new.kill()?;
            new.wait()?;
            match what {
                "dies" => std::process::exit(3),
                "panics" => {
                    std::thread::sleep(PANIC_DELAY);
                    panic!("a build that panics");
                }
                "hangs" => std::thread::sleep(FOR_EVER),
                _ => bail!("unknown name"),
            }
        }
    }
    Ok(())
}

fn receive(from: BorrowedFd<'_>) -> anyhow::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut packet = vec![0; PACKET_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(from, &mut [IoSliceMut::new(&mut packet)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            fds.extend(came);
        }
    }
    packet.truncate(received.bytes);
    Ok((packet, fds))
}

fn forward(to: &impl AsFd, packet: &[u8], fds: &[OwnedFd]) -> anyhow::Result<usize> {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        bail!("too many descriptors");
    }
    Ok(sendmsg(to, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL)?)
}
