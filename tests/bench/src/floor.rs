//! What the disk itself takes for a durable 4 KiB write: the floor under every figure of a replicated write.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

const WRITES: usize = 200;

/// Median time of a 4 KiB write into written space plus fdatasync, in microseconds.
///
/// # Errors
/// What the file system refuses.
pub fn write_and_sync_us(dir: &Path) -> io::Result<f64> {
    let path = dir.join("floor");
    let file = File::create(&path)?;
    let block = [7u8; 4096];
    for at in 0..WRITES {
        file.write_all_at(&block, (at * block.len()) as u64)?;
    }
    file.sync_all()?;
    let mut times = Vec::with_capacity(WRITES);
    for at in 0..WRITES {
        let start = Instant::now();
        file.write_all_at(&block, (at * block.len()) as u64)?;
        file.sync_data()?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    std::fs::remove_file(path)?;
    Ok(crate::report::median(&times))
}
