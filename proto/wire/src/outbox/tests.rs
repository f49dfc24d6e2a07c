//! Tests of the outbox over an in-memory pipe: order, limits, the end.

use super::*;
use proptest::prelude::*;
use tokio::io::AsyncReadExt;

fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime").block_on(work)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Whatever the lengths and however little the pipe takes at once, the bytes arrive in order and whole, and the
    /// pipe ends after the last handle is dropped.
    #[test]
    fn bytes_arrive_in_order(
        messages in prop::collection::vec((0usize..40, 0usize..2000, prop::collection::vec(0usize..5000, 0..4)), 0..30),
        pipe in 1usize..3000,
    ) {
        let (got, wanted) = block_on(async {
            let (near, mut far) = tokio::io::duplex(pipe);
            let outbox = Outbox::start(near);
            let (mut wanted, mut next) = (Vec::new(), 0u8);
            let mut bytes = |length: usize| {
                next = next.wrapping_add(1);
                vec![next; length]
            };
            let mut queued = Vec::new();
            for (head, meta, payload) in messages {
                let (head, meta) = (bytes(head), bytes(meta));
                let payload: Vec<Vec<u8>> = payload.into_iter().map(&mut bytes).collect();
                wanted.extend([head.clone(), meta.clone()].into_iter().chain(payload.clone()).flatten());
                queued.push((head, meta, payload));
            }
            let reader = async { let mut got = Vec::new(); far.read_to_end(&mut got).await.map(|_| got) };
            let writer = async {
                for (head, meta, payload) in queued {
                    let payload = payload.into_iter().map(Bytes::from).collect();
                    outbox.send(&head, meta.into(), payload).await.expect("open");
                }
                drop(outbox);
            };
            let (got, ()) = tokio::join!(reader, writer);
            (got.expect("reads"), wanted)
        });
        prop_assert!(got == wanted, "got {} bytes, wanted {}", got.len(), wanted.len());
    }
}

#[tokio::test]
async fn a_full_queue_refuses_or_waits_and_goes_on_when_it_is_read() {
    let (near, mut far) = tokio::io::duplex(1 << 16);
    let outbox = Outbox::start(near);
    let megabyte = Bytes::from(vec![7; 1 << 20]);
    let mut queued = 0usize;
    while outbox.try_send(b"head", Bytes::new(), vec![megabyte.clone()]).is_ok() {
        queued += 4 + megabyte.len();
        assert!(queued <= QUEUE_BYTES_MAX);
    }
    assert!(queued > QUEUE_BYTES_MAX - 2 * megabyte.len());
    assert_eq!(outbox.try_send(b"head", Bytes::new(), vec![megabyte.clone()]), Err(TrySendError::Full));
    let late = tokio::spawn({
        let outbox = outbox.clone();
        async move { outbox.send(b"last", Bytes::new(), vec![megabyte]).await }
    });
    drop(outbox);
    let mut got = Vec::new();
    far.read_to_end(&mut got).await.expect("reads");
    assert_eq!(late.await.expect("no panic"), Ok(()));
    assert_eq!(got.len(), queued + 4 + (1 << 20));
}

#[tokio::test]
async fn a_broken_pipe_closes_the_outbox_and_frees_those_that_wait() {
    let (near, far) = tokio::io::duplex(16);
    let outbox = Outbox::start(near);
    let large = Bytes::from(vec![1; QUEUE_BYTES_MAX - 1000]);
    outbox.send(b"", Bytes::new(), vec![large.clone()]).await.expect("empty queue takes it");
    let waiting = tokio::spawn({
        let outbox = outbox.clone();
        async move { outbox.send(b"", Bytes::new(), vec![large]).await }
    });
    tokio::task::yield_now().await;
    assert!(!outbox.is_closed());
    drop(far);
    outbox.closed().await;
    assert_eq!(waiting.await.expect("no panic"), Err(Closed));
    assert_eq!(outbox.send(b"x", Bytes::new(), Vec::new()).await, Err(Closed));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_nothing_is_given_up() {
    let (near, far) = tokio::io::duplex(16);
    let outbox = Outbox::start(near);
    outbox.send(&[1; 100], Bytes::new(), Vec::new()).await.expect("open");
    let before = tokio::time::Instant::now();
    outbox.closed().await;
    assert!(before.elapsed() >= STALL_LIMIT);
    drop(far);
}
