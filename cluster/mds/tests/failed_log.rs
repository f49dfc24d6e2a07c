//! A metadata server that may not write its log any more ends, and says why.

use rustix::process::{Pid, Resource, Rlimit};
use spline_rpc::mds as pb;
use spline_rpc::mds::volumes_client::VolumesClient;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Long enough for the slowest machine; only a failure waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ends with the test, whatever comes of it.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where it serves, from the line that says so.
fn address(lines: &Receiver<String>) -> String {
    let end = Instant::now() + PATIENCE;
    loop {
        let line = lines.recv_timeout(end.saturating_duration_since(Instant::now())).expect("it gets ready");
        if let Some((_, address)) = line.split_once("ready: metadata on ") {
            return address.trim().to_owned();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_fails_ends_the_process() {
    let dir = tempfile::tempdir().expect("tempdir");
    // Beyond the limit of a file's size a write is refused, and else the signal would end the process.
    let process = std::process::Command::new("env")
        .args([
            "--ignore-signal=XFSZ",
            env!("CARGO_BIN_EXE_spline-mds"),
            "--listen",
            "127.0.0.1:0",
            "--data-dir",
        ])
        .arg(dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut process = Killed(process);
    let stderr = process.0.stderr.take().expect("piped");
    let (tell, lines) = channel();
    std::thread::spawn(move || {
        BufReader::new(stderr).lines().map_while(Result::ok).try_for_each(|line| tell.send(line))
    });
    let address = address(&lines);
    let mut volumes = VolumesClient::connect(format!("http://{address}")).await.expect("connects");
    let create =
        |name: &str| pb::CreateVolumeRequest { name: name.into(), size_bytes: 1 << 20, ..Default::default() };
    volumes.create(create("a")).await.expect("created");
    assert!(process.0.try_wait().expect("asks").is_none());

    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::prlimit(Some(Pid::from_child(&process.0)), Resource::Fsize, none).expect("limits");
    let creating = tokio::spawn(async move { volumes.create(create("b")).await });
    let end = Instant::now() + PATIENCE;
    let status = loop {
        assert!(Instant::now() < end, "it runs on");
        match process.0.try_wait().expect("asks") {
            Some(status) => break status,
            None => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
    assert!(creating.await.expect("no panic").is_err(), "what was not logged must not be acknowledged");
    let logs: Vec<String> = lines.iter().collect();
    let logs = logs.join("\n");
    assert_eq!(status.code(), Some(1), "{logs}");
    assert!(logs.contains("Error: write-ahead log failed") && logs.contains("File too large"), "{logs}");
}
