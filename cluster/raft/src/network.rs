//! The peers as openraft sees them: one client per group and peer, all over one connection per peer.
//!
//! Called by openraft's replication, heartbeat, vote and snapshot tasks. [`peers`] holds the connections, [`stream`]
//! the pipelined appends, [`beats`] the heartbeats, `crate::snapshot` the transfer of states, [`receive`] the other side.
//! `bounded`: a stream has at most [`stream::WINDOW_MESSAGES`] unanswered messages, [`intake`] limits what is taken from
//! peers; a silent connection is cut.

pub(crate) mod acks;
pub(crate) mod beats;
pub(crate) mod intake;
pub(crate) mod peers;
pub(crate) mod receive;
pub(crate) mod stream;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use openraft::OptionalSend;
use openraft::error::{NetworkError, ReplicationClosed, StreamingError, Unreachable};
use openraft::impls::EmptyNode;
use openraft::network::{
    Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption,
    RaftNetworkFactory,
};
use openraft::raft::{SnapshotResponse, StreamAppendResult, TransferLeaderResponse};

use crate::codec::message::{Reply, Request};
use crate::command::{GroupId, NodeId};
use crate::promise::Promise;
use crate::snapshot;
use crate::state_machine::adapter::SnapshotData;
use crate::types::{AppendRequest, RpcError, TransferRequest, TypeConfig, Vote, VoteRequest, VoteResponse};
use acks::Acks;
use peers::{Peer, Peers};

/// Pause of a replication stream to a peer that can not be reached.
const BACKOFF: Duration = Duration::from_millis(100);

/// Makes the clients of one group.
pub(crate) struct Factory {
    pub(crate) group: GroupId,
    pub(crate) acks: Arc<Acks>,
    pub(crate) promise: Arc<Promise>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) throttle: Arc<snapshot::Throttle>,
}

/// One group's client of one peer.
pub(crate) struct Client {
    group: GroupId,
    acks: Arc<Acks>,
    promise: Arc<Promise>,
    peer: Arc<Peer>,
    peers: Arc<Peers>,
    throttle: Arc<snapshot::Throttle>,
}

impl RaftNetworkFactory<TypeConfig> for Factory {
    type Network = Client;

    async fn new_client(&mut self, target: u64, _node: &EmptyNode) -> Client {
        Client {
            group: self.group,
            acks: self.acks.clone(),
            promise: self.promise.clone(),
            peer: self.peers.peer(NodeId(target)),
            peers: self.peers.clone(),
            throttle: self.throttle.clone(),
        }
    }
}

pub(crate) fn unreachable(reason: impl ToString) -> RpcError {
    RpcError::Unreachable(Unreachable::from_string(reason))
}

pub(crate) fn broken(reason: impl ToString) -> RpcError {
    RpcError::Network(NetworkError::from_string(reason))
}

fn unexpected(reply: Reply) -> RpcError {
    match reply {
        Reply::Refused(reason) => unreachable(reason),
        other => broken(format!("unexpected reply {other:?}")),
    }
}

impl Client {
    async fn call(&self, request: Request, limit: Duration) -> Result<Reply, RpcError> {
        let link = self.peer.link().await.map_err(unreachable)?;
        link.call(self.group, request, limit).await.map_err(broken)
    }

    async fn ask_vote(&self, request: Request, limit: Duration) -> Result<VoteResponse, RpcError> {
        match self.call(request, limit).await? {
            Reply::Voted(response) => Ok(response),
            other => Err(unexpected(other)),
        }
    }
}

impl NetBackoff<TypeConfig> for Client {
    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(BACKOFF)))
    }
}

impl NetStreamAppend<TypeConfig> for Client {
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<TypeConfig>, RpcError>>, RpcError>>
    where
        S: Stream<Item = AppendRequest> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            let link = match self.peer.link().await {
                Ok(link) => link,
                Err(reason) => {
                    // openraft pauses where its requests are pulled, and none is pulled here: without a pause it would
                    // ask again at once, for as long as the peer is away.
                    tokio::time::sleep(BACKOFF).await;
                    return Err(unreachable(reason));
                }
            };
            let metrics = self.peers.metrics.clone();
            let answers = stream::run(self.group, self.peer.node(), self.acks.clone(), link, metrics, input);
            let answers: BoxStream<'s, _> = Box::pin(answers);
            Ok(answers)
        })
    }
}

impl NetVote<TypeConfig> for Client {
    async fn vote(&mut self, rpc: VoteRequest, option: RPCOption) -> Result<VoteResponse, RpcError> {
        // openraft says that a leader asked for it, not which.
        let handed_over = self.promise.released().filter(|_| rpc.leadership_transfer);
        self.ask_vote(Request::Vote { request: rpc, handed_over }, option.hard_ttl()).await
    }

    async fn pre_vote(&mut self, rpc: VoteRequest, option: RPCOption) -> Result<VoteResponse, RpcError> {
        self.ask_vote(Request::PreVote(rpc), option.hard_ttl()).await
    }
}

impl NetTransferLeader<TypeConfig> for Client {
    async fn transfer_leader(
        &mut self,
        request: TransferRequest,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RpcError> {
        // Once more, where the term is known for certain: the core may have lost and regained leadership since it was asked.
        self.acks.hand_over(request.from_leader().leader_id.term);
        match self.call(Request::Transfer(request), option.hard_ttl()).await? {
            Reply::TransferTaken => Ok(Ok(())),
            other => Err(unexpected(other)),
        }
    }
}

impl NetSnapshot<TypeConfig> for Client {
    type SnapshotData = SnapshotData;

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: openraft::alias::SnapshotOf<TypeConfig, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let link = self.peer.link().await.map_err(unreachable)?;
        let send = snapshot::send(self.group, &link, vote, snapshot, &self.throttle, &self.peers.metrics);
        tokio::select! {
            sent = send => Ok(SnapshotResponse::new(sent?)),
            closed = cancel => Err(closed.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use crate::types::LeaderId;
    use prometheus_client::registry::Registry;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_is_away_is_not_asked_again_at_once() {
        let peers = Arc::new(Peers::new(Arc::new(Metrics::register(&mut Registry::default()))));
        let throttle = Arc::new(snapshot::Throttle::new(0));
        let promise = Arc::new(Promise::new(BACKOFF, None));
        let mut factory = Factory { group: GroupId(1), acks: Arc::default(), promise, peers, throttle };
        let mut client = factory.new_client(2, &EmptyNode::new()).await;
        let begun = Instant::now();
        for _ in 0..10 {
            let nothing = futures_util::stream::pending::<AppendRequest>();
            let outcome = client.stream_append(nothing, RPCOption::new(BACKOFF)).await;
            assert!(matches!(outcome.err(), Some(RpcError::Unreachable(_))));
        }
        assert!(begun.elapsed() >= 10 * BACKOFF, "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn who_asks_a_peer_to_take_over_reads_under_that_lease_no_more() {
        let peers = Arc::new(Peers::new(Arc::new(Metrics::register(&mut Registry::default()))));
        let (promise, throttle) =
            (Arc::new(Promise::new(BACKOFF, None)), Arc::new(snapshot::Throttle::new(0)));
        let acks = Arc::<Acks>::default();
        let mut factory = Factory { group: GroupId(1), acks: acks.clone(), promise, peers, throttle };
        let mut client = factory.new_client(2, &EmptyNode::new()).await;
        acks.hand_over(5);
        let leader = Vote { leader_id: LeaderId { term: 7, node_id: 1 }, committed: true };
        let request = TransferRequest::new(leader, 2, None);
        // The peer has no address; that it could not be asked does not matter.
        drop(client.transfer_leader(request, RPCOption::new(BACKOFF)).await);
        assert!(acks.is_handing_over(7) && !acks.is_handing_over(5));
    }

    #[tokio::test]
    async fn a_request_for_a_vote_names_the_leader_that_handed_over() {
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let peers = Arc::new(Peers::new(Arc::new(Metrics::register(&mut Registry::default()))));
        peers.set_addresses([(NodeId(2), listener.local_addr().expect("bound"))].into());
        let (promise, throttle) =
            (Arc::new(Promise::new(BACKOFF, None)), Arc::new(snapshot::Throttle::new(0)));
        let leader = LeaderId { term: 5, node_id: 3 };
        promise.handed_over(leader);
        let mut factory = Factory { group: GroupId(1), acks: Arc::default(), promise, peers, throttle };
        let mut client = factory.new_client(2, &EmptyNode::new()).await;
        let limit = Duration::from_secs(20);
        let vote = Vote { leader_id: LeaderId { term: 6, node_id: 1 }, committed: false };
        let peer = async {
            let (stream, _) = listener.accept().await.expect("the client connects");
            let (sender, mut receiver) = spline_wire::accept(stream, limit).await.expect("greets");
            let mut named = Vec::new();
            while named.len() < 2 {
                let frame = receiver.next().await.expect("sound").expect("open");
                let number = frame.request;
                match Request::from_frame(frame) {
                    Ok((_, Request::Vote { handed_over, .. })) => named.push(handed_over),
                    other => panic!("not a request for a vote: {other:?}"),
                }
                let granted = VoteResponse { vote, vote_granted: true, last_log_id: None };
                assert!(sender.send(Reply::Voted(granted).into_frame(number)).await.is_ok());
            }
            named
        };
        let ask = async {
            for leadership_transfer in [true, false] {
                let mut request = VoteRequest::new(vote, None);
                request.leadership_transfer = leadership_transfer;
                client.vote(request, RPCOption::new(limit)).await.expect("is answered");
            }
        };
        let (named, ()) = tokio::join!(peer, ask);
        assert_eq!(named, [Some(leader), None]);
    }
}
