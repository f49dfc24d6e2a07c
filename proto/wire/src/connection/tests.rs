//! Tests of connections over in-memory pipes: frames in all cuts, hostile bytes, pings, the end.

use super::*;
use crate::version::preface;
use proptest::prelude::*;
use tokio::io::{DuplexStream, duplex};

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(work)
}

async fn pair(pipe: usize) -> ((FrameSender, FrameReceiver), (FrameSender, FrameReceiver)) {
    let (near, far) = duplex(pipe);
    let ((near_read, near_write), (far_read, far_write)) = (tokio::io::split(near), tokio::io::split(far));
    let (near, far) = tokio::join!(split(near_read, near_write), split(far_read, far_write));
    (near.expect("near"), far.expect("far"))
}

/// A receiver that has agreed on a version with whoever holds the other end.
async fn receiver_of_raw(pipe: usize) -> (FrameReceiver, DuplexStream) {
    let (near, mut far) = duplex(pipe);
    let (read, write) = tokio::io::split(near);
    far.write_all(&preface()).await.expect("room");
    let (sender, receiver) = split(read, write).await.expect("agrees");
    drop(sender);
    (receiver, far)
}

fn frame(request: u64, meta: usize, payload: usize) -> Frame {
    let fill = |length: usize| -> Bytes {
        (0..length).map(|at| (at as u64 * 31 + request) as u8).collect::<Vec<_>>().into()
    };
    let payload = if payload == 0 { Vec::new() } else { vec![fill(payload)] };
    Frame { kind: Kind::ChunkRequest, request, meta: fill(meta), payload }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn frames_arrive_whole_and_in_order(
        sizes in prop::collection::vec((0usize..300, prop_oneof![0usize..600, 4096..4097usize, 15_000..90_000usize]), 1..20),
        pipe in 500usize..200_000,
    ) {
        block_on(async {
            let ((sender, _kept), (_other, mut receiver)) = pair(pipe).await;
            let frames: Vec<Frame> =
                sizes.iter().enumerate().map(|(at, &(meta, payload))| frame(at as u64, meta, payload)).collect();
            let send = async {
                for frame in frames.clone() {
                    sender.send(frame).await.expect("open");
                }
                drop(sender);
            };
            let receive = async {
                let mut got = Vec::new();
                while let Some(frame) = receiver.next().await.expect("fine") {
                    got.push(frame);
                }
                got
            };
            let ((), got) = tokio::join!(send, receive);
            assert!(got == frames);
        });
    }

    /// Bytes that are not frames end in an error or the stream's end; nothing panics or waits for ever.
    #[test]
    fn arbitrary_bytes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300), honest in 0usize..3, cut in 0usize..200,
    ) {
        block_on(async {
            let (mut receiver, mut far) = receiver_of_raw(1 << 16).await;
            let mut stream = Vec::new();
            for request in 0..honest {
                let frame = frame(request as u64, 10, 50);
                stream.extend(frame.header(1).expect("fits"));
                stream.extend(&frame.meta);
                stream.extend(frame.into_payload());
            }
            stream.truncate(stream.len().saturating_sub(cut));
            stream.extend(&bytes);
            far.write_all(&stream).await.expect("room");
            drop(far);
            while let Ok(Some(_)) | Err(WireError::Payload { .. }) = receiver.next().await {}
        });
    }
}

#[tokio::test]
async fn a_huge_length_is_refused_before_anything_is_allocated_for_it() {
    let (mut receiver, mut far) = receiver_of_raw(1 << 16).await;
    let mut header = frame(1, 0, 0).header(1).expect("fits");
    header[20..24].copy_from_slice(&u32::MAX.to_le_bytes());
    far.write_all(&header).await.expect("room");
    let error = receiver.next().await.expect_err("refused").to_string();
    assert!(error.contains("payload is longer than the limit"), "{error}");
}

#[tokio::test]
async fn a_damaged_payload_is_told_and_the_stream_goes_on() {
    let (mut receiver, mut far) = receiver_of_raw(1 << 20).await;
    let (bad, good) = (frame(1, 64, 40_000), frame(2, 64, 4096));
    far.write_all(&bad.header(1).expect("fits")).await.expect("room");
    far.write_all(&bad.meta).await.expect("room");
    far.write_all(&vec![0; 40_000]).await.expect("room");
    far.write_all(&good.header(1).expect("fits")).await.expect("room");
    far.write_all(&good.meta).await.expect("room");
    far.write_all(&good.clone().into_payload()).await.expect("room");
    assert!(matches!(receiver.next().await, Err(WireError::Payload { request: 1, .. })));
    assert_eq!(receiver.next().await.expect("in step"), Some(good));
}

#[tokio::test]
async fn an_end_inside_a_frame_is_an_error() {
    let whole = frame(1, 64, 40_000);
    for keep in [1, HEADER_BYTES, HEADER_BYTES + 64, HEADER_BYTES + 100] {
        let (mut receiver, mut far) = receiver_of_raw(1 << 20).await;
        let mut bytes = whole.header(1).expect("fits").to_vec();
        bytes.extend(&whole.meta);
        bytes.extend(whole.clone().into_payload());
        far.write_all(&bytes[..keep]).await.expect("room");
        drop(far);
        assert!(matches!(receiver.next().await, Err(WireError::Truncated)), "keep={keep}");
    }
}

#[tokio::test]
async fn reading_can_be_cancelled_anywhere() {
    let (mut receiver, mut far) = receiver_of_raw(1 << 20).await;
    let whole = frame(1, 64, 40_000);
    let mut bytes = whole.header(1).expect("fits").to_vec();
    bytes.extend(&whole.meta);
    bytes.extend(whole.clone().into_payload());
    let (first, rest) = bytes.split_at(20_000);
    for part in first.chunks(7_001) {
        far.write_all(part).await.expect("room");
        // Polled once, then dropped.
        tokio::select! {
            biased;
            _ = receiver.next() => panic!("not whole yet"),
            () = std::future::ready(()) => {}
        }
    }
    far.write_all(rest).await.expect("room");
    assert_eq!(receiver.next().await.expect("whole"), Some(whole));
}

#[tokio::test]
async fn pings_are_answered_out_of_sight() {
    let ((near, mut near_receiver), (_far, mut far_receiver)) = pair(1 << 16).await;
    near.send(Frame { kind: Kind::Ping, ..frame(9, 0, 0) }).await.expect("open");
    near.send(frame(10, 0, 0)).await.expect("open");
    assert_eq!(far_receiver.next().await.expect("fine").map(|f| f.request), Some(10));
    let pong = near_receiver.next().await.expect("fine").expect("a frame");
    assert_eq!((pong.kind, pong.request), (Kind::Pong, 9));
}

#[tokio::test]
async fn a_peer_of_another_protocol_is_named() {
    let (near, mut far) = duplex(1 << 10);
    let (read, write) = tokio::io::split(near);
    far.write_all(b"GET / HTTP/1.1\r\n").await.expect("room");
    let error = split(read, write).await.expect_err("refused").to_string();
    assert!(error.contains("does not speak"), "{error}");
}

#[tokio::test]
async fn a_peer_that_says_nothing_is_given_up() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let addr = listener.local_addr().expect("bound");
    let limit = Duration::from_millis(20);
    assert!(matches!(connect(addr, limit).await, Err(WireError::Timeout { .. })));
    let stream = TcpStream::connect(addr).await.expect("connects");
    let (_silent, _) = listener.accept().await.expect("first");
    assert!(matches!(accept(stream, limit).await, Err(WireError::Timeout { .. })));
}
