//! Every line that `spline dev` prints for pasting, run as printed: by a shell, with nothing added but what makes QEMU
//! end by itself.

use anyhow::{Context, ensure};
use spline_harness::nbd::{Connection, Kind};
use spline_harness::{Dev, Tool, binaries};
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// What stands before the lines.
const HEADING: &str = "Paste into another terminal:";
/// The last line that `spline dev` says once it serves.
const LAST: &str = "the next start finds the data.";
/// Bytes of the images that are copied in.
const IMAGE: u64 = 64 << 20;

/// The smallest guest: a boot sector that writes itself to the next sector of its disk through the machine's firmware,
/// and so through virtio, then ends QEMU by its debug-exit device with [`WROTE`] or another status.
const BOOT_SECTOR: [u8; 28] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xc0, // mov es, ax
    0xbb, 0x00, 0x7c, // mov bx, 0x7c00: where the firmware has put this sector
    0xb8, 0x01, 0x03, // mov ax, 0x0301: write one sector
    0xb9, 0x02, 0x00, // mov cx, 2: cylinder 0, the second sector
    0xb6, 0x00, // mov dh, 0: head 0 of the disk that was booted
    0xcd, 0x13, // int 0x13
    0xb0, 0x10, // mov al, 0x10
    0x73, 0x02, // jnc: written
    0xb0, 0x11, // mov al, 0x11
    0xe6, 0xf4, // out 0xf4, al
    0xf4, // hlt
    0xeb, 0xfd, // back to hlt
];
/// Exit status of QEMU for 0x10 at its debug-exit device: twice that and one.
const WROTE: i32 = 0x21;
/// What the device needs on QEMU's command line.
const DEBUG_EXIT: &str = "-display none -no-reboot -device isa-debug-exit,iobase=0xf4,iosize=4";

/// The place where the lines are pasted: a directory with the image that they name, and `spline` among the programs.
struct Terminal {
    dir: TempDir,
    path: OsString,
    /// The line that sets the environment.
    exports: String,
}

impl Terminal {
    fn new(exports: &str) -> anyhow::Result<Self> {
        let binary = binaries::find("spline")?;
        let own = binary.parent().map(Path::to_owned).context("a binary lies in a directory")?;
        let programs = std::env::var_os("PATH").unwrap_or_default();
        let all: Vec<PathBuf> = std::iter::once(own).chain(std::env::split_paths(&programs)).collect();
        Ok(Self { dir: TempDir::new()?, path: std::env::join_paths(all)?, exports: exports.to_owned() })
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("IMAGE")
    }

    /// Pastes a line; it must end with `status`.
    fn paste(&self, line: &str, status: i32) -> anyhow::Result<String> {
        let script = format!("{}\n{line}\n", self.exports);
        // Nothing that is pasted takes long; a guest that does not come up never ends.
        let mut command = std::process::Command::new("timeout");
        let output = command
            .args(["120", "sh", "-ec", &script])
            .env("PATH", &self.path)
            .current_dir(self.dir.path())
            .output()?;
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        ensure!(output.status.code() == Some(status), "{line}\n{} wanted={status}\n{said}", output.status);
        Ok(said)
    }
}

fn boot_image(path: &Path) -> anyhow::Result<()> {
    let image = File::create(path)?;
    image.set_len(IMAGE)?;
    image.write_all_at(&BOOT_SECTOR, 0)?;
    image.write_all_at(&[0x55, 0xaa], 510)?;
    Ok(image.write_all_at(b"the end", IMAGE - 7)?)
}

/// The lines between the heading and the blank line before "Metrics".
fn lines_of(text: &str) -> anyhow::Result<Vec<String>> {
    let (_, after) = text.split_once(HEADING).with_context(|| text.to_owned())?;
    let (block, _) = after.split_once("Metrics:").with_context(|| text.to_owned())?;
    Ok(block.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect())
}

#[test]
fn all_work_as_printed() -> anyhow::Result<()> {
    let dir = TempDir::new()?;
    let dev = Dev::start_until(dir.path(), &[], LAST)?;
    let text = &dev.said;
    let mut lines = lines_of(text)?;
    let mut take = |start: &str| {
        let at = lines.iter().position(|line| line.starts_with(start));
        at.map(|at| lines.remove(at)).with_context(|| format!("no line starts with {start:?}:\n{text}"))
    };
    let terminal = Terminal::new(&take("export ")?)?;
    let image = terminal.image();

    let said = terminal.paste(&take("nbdinfo ")?, 0)?;
    ensure!(said.contains("export-size: 10737418240"), "{said}");
    terminal.paste(&take("fio ")?, 0)?;

    boot_image(&image)?;
    let copy = take("nbdcopy ")?;
    terminal.paste(&copy, 0)?;
    let uri = copy.split('\'').nth(1).context("a quoted uri")?.to_owned();
    let compare = |qcow2: bool| -> anyhow::Result<()> {
        // The disk is longer than the image; behind it is what fio wrote.
        let back = terminal.dir.path().join("back");
        let count = format!("count={}", IMAGE >> 20);
        let (from, to) = (format!("if={uri}"), format!("of={}", back.display()));
        Tool::new("qemu-img").args(["dd", "-f", "raw", "-O", "raw", "bs=1M", &count, &from, &to]).run()?;
        let format = if qcow2 { "qcow2" } else { "raw" };
        let files = [&*image.to_string_lossy(), &*back.to_string_lossy()];
        Tool::new("qemu-img").args(["compare", "-f", format, "-F", "raw"]).args(files).run().map(drop)
    };
    compare(false)?;

    let raw = terminal.dir.path().join("raw");
    std::fs::rename(&image, &raw)?;
    let files = [&*raw.to_string_lossy(), &*image.to_string_lossy()];
    Tool::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).args(files).run()?;
    terminal.paste(&take("qemu-img ")?, 0)?;
    compare(true)?;

    terminal.paste(&format!("{} {DEBUG_EXIT}", take("qemu-system-x86_64 ")?), WROTE)?;
    guest_wrote(&uri)?;

    let said = terminal.paste(&take("spline volume ls; ")?, 0)?;
    ensure!(said.contains("disk0") && said.contains("serving"), "{said}");
    let said = terminal.paste(&take("spline volume create ")?, 0)?;
    ensure!(said.contains("disk1"), "{said}");
    end_exports(&terminal, "disk1")?;
    ensure!(lines.is_empty(), "lines that nobody ran: {lines:?}");
    Ok(())
}

/// The guest's boot sector stands in the sector behind it, too.
fn guest_wrote(uri: &str) -> anyhow::Result<()> {
    let (_, socket) = uri.split_once("socket=").context("a unix socket")?;
    let mut connection = Connection::open(Path::new(socket), "", Duration::from_secs(20))?;
    let sectors = connection.succeed(Kind::Read, 0, 1024, &[])?;
    let (first, second) = sectors.split_at(512);
    ensure!(first.starts_with(&BOOT_SECTOR) && first == second, "{second:?}");
    connection.close()
}

/// `spline nbd export` leaves a process that serves until it is told to stop.
fn end_exports(terminal: &Terminal, volume: &str) -> anyhow::Result<()> {
    let listed = |wanted: bool| {
        let said = terminal.paste("spline nbd ls", 0)?;
        ensure!(said.contains(volume) == wanted, "{said}");
        Ok(())
    };
    listed(true)?;
    terminal.paste(&format!("spline nbd rm {volume}"), 0)?;
    listed(false)?;
    terminal.paste(&format!("spline nbd rm {volume}"), 1).map(drop)
}
