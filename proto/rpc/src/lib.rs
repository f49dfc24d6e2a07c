//! The control plane: gRPC between `spline`, gateways, chunkservers and the metadata server.
//!
//! Called by the processes' `service` modules and by the cluster client. Knows: the `.proto` files and how a
//! [`spline_types::Fault`] becomes a gRPC status. Must never know: the data plane, raft, who serves a call.
//!
//! Generated types stop at `*/service.rs`, the client's transport and the command line.

pub mod fault;

/// `spline.mds.v1`: volumes, sessions, cluster.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod mds {
    tonic::include_proto!("spline.mds.v1");
}

/// `spline.gateway.v1`: status and control of a gateway.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod gateway {
    tonic::include_proto!("spline.gateway.v1");
}
