//! Tests of calls over loopback TCP: what each failure may claim.

use super::*;
use tokio::net::TcpListener;

fn later() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let addr = listener.local_addr().expect("bound");
    (listener, addr)
}

async fn accepted(listener: &TcpListener) -> (FrameSender, FrameReceiver) {
    let (stream, _) = listener.accept().await.expect("accepts");
    connection::accept(stream, Duration::from_secs(20)).await.expect("agrees")
}

async fn ask(caller: &Caller, text: &'static str) -> Result<Frame, CallError> {
    caller.call(Kind::ChunkRequest, Bytes::from_static(text.as_bytes()), Vec::new(), later()).await
}

fn reply_to(request: Frame) -> Frame {
    Frame { kind: Kind::ChunkReply, ..request }
}

#[tokio::test]
async fn replies_find_their_calls_in_any_order() {
    let (listener, addr) = listener().await;
    let caller = Caller::new(addr);
    let server = async {
        let (sender, mut receiver) = accepted(&listener).await;
        let mut requests = Vec::new();
        for _ in 0..3 {
            requests.push(receiver.next().await.expect("fine").expect("a frame"));
        }
        for request in requests.into_iter().rev() {
            sender.send(reply_to(request)).await.expect("open");
        }
        (sender, receiver)
    };
    let (a, b, c, _kept) = tokio::join!(ask(&caller, "a"), ask(&caller, "b"), ask(&caller, "c"), server);
    for (reply, meta) in [(a, "a"), (b, "b"), (c, "c")] {
        assert_eq!(reply.expect("answered").meta, meta);
    }
}

#[tokio::test]
async fn nobody_there_is_not_sent_and_one_that_comes_is_found() {
    let (gone, addr) = listener().await;
    drop(gone);
    let caller = Caller::new(addr);
    assert!(matches!(ask(&caller, "a").await, Err(CallError::NotSent(_))));
    // Within the pause the answer comes without a connect.
    assert!(matches!(ask(&caller, "a").await, Err(CallError::NotSent(_))));
    let listener = TcpListener::bind(addr).await.expect("binds again");
    let server = tokio::spawn(async move {
        let (sender, mut receiver) = accepted(&listener).await;
        let request = receiver.next().await.expect("fine").expect("a frame");
        sender.send(reply_to(request)).await.expect("open");
        receiver.next().await.expect("clean end")
    });
    let reply = loop {
        match ask(&caller, "b").await {
            Err(CallError::NotSent(_)) => tokio::task::yield_now().await,
            other => break other,
        }
    };
    assert_eq!(reply.expect("answered").meta, "b");
    drop(caller);
    assert_eq!(server.await.expect("no panic"), None, "the connection ends with its last caller");
}

#[tokio::test]
async fn a_connection_that_ends_loses_its_calls_and_the_next_call_connects_again() {
    let (listener, addr) = listener().await;
    let caller = Caller::new(addr);
    let server = async {
        let (sender, mut receiver) = accepted(&listener).await;
        receiver.next().await.expect("fine").expect("a frame");
        drop((sender, receiver));
    };
    let (lost, ()) = tokio::join!(ask(&caller, "a"), server);
    assert!(matches!(lost, Err(CallError::Lost(_))), "{lost:?}");
    let server = async {
        let (sender, mut receiver) = accepted(&listener).await;
        let request = receiver.next().await.expect("fine").expect("a frame");
        sender.send(reply_to(request)).await.expect("open");
        (sender, receiver)
    };
    let (reply, _kept) = tokio::join!(ask(&caller, "b"), server);
    assert_eq!(reply.expect("answered").meta, "b");
}

#[tokio::test]
async fn a_silent_peer_ends_in_the_deadline_and_a_dead_one_in_a_new_connection() {
    let (listener, addr) = listener().await;
    let caller = Caller::new(addr);
    // Accepts, and then never reads: as a stopped process does.
    let server = async { accepted(&listener).await };
    let soon = Instant::now() + Duration::from_millis(50);
    let call = caller.call(Kind::ChunkRequest, Bytes::new(), Vec::new(), soon);
    let (silent, first) = tokio::join!(call, server);
    assert_eq!(silent, Err(CallError::Deadline));
    // The ping is not answered either, so the link ends and a call that waits is lost.
    assert!(matches!(ask(&caller, "x").await, Err(CallError::Lost(_))));
    let (_second, lost) = tokio::join!(accepted(&listener), async {
        caller.call(Kind::Ping, Bytes::new(), Vec::new(), Instant::now() + Duration::from_millis(50)).await
    });
    assert_eq!(lost, Err(CallError::Deadline), "it was sent on the second connection");
    drop(first);
}

#[tokio::test]
async fn a_dropped_call_is_forgotten() {
    let (listener, addr) = listener().await;
    let caller = Caller::new(addr);
    let (sender, mut receiver) = {
        let call = ask(&caller, "a");
        tokio::pin!(call);
        let accept = accepted(&listener);
        tokio::pin!(accept);
        let (sender, mut receiver) =
            tokio::select! { _ = &mut call => panic!("nobody answers"), ends = accept => ends };
        let request = tokio::select! { _ = call => panic!("nobody answers"), next = receiver.next() => next };
        assert!(request.expect("fine").is_some());
        (sender, receiver)
    };
    let link = caller.0.current().expect("connected");
    assert_eq!(link.shared.pending().calls.len(), 0);
    // A late answer to it disturbs nobody.
    sender
        .send(Frame { kind: Kind::ChunkReply, request: 1, meta: Bytes::new(), payload: Vec::new() })
        .await
        .expect("open");
    let server = async {
        let request = receiver.next().await.expect("fine").expect("a frame");
        sender.send(reply_to(request)).await.expect("open");
    };
    let (reply, ()) = tokio::join!(ask(&caller, "b"), server);
    assert_eq!(reply.expect("answered").meta, "b");
}
