//! The start of a link: nebd's hello is read, the volume's session found or opened, the welcome sent.
//!
//! Called by the link. What it reads is foreign.

use super::{Links, unexpected_end};
use crate::engine::{OpenError, Wanted};
use crate::session::{Caller, Membership};
use spline_link::hello::{HELLO_BYTES_MAX, HELLO_FIXED_BYTES, HELLO_VERSIONS_BYTES};
use spline_link::ring::shared::RING_FDS;
use spline_link::ring::{GatewayRing, Position, RingFds};
use spline_link::{
    Accepted, FEATURE_RING, Hello, InstanceId, LinkError, LinkVersion, Mode, Refusal, Refused, VolumeTraits,
    Welcome, passing,
};
use spline_types::limits::REQUEST_BYTES_MAX;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tracing::warn;

/// Time for a hello to arrive and for a welcome to be taken: both sides are on one host.
const HELLO_LIMIT: Duration = Duration::from_secs(5);

/// What requests travel over.
pub(super) enum Carrier {
    /// A ring, and the bell that tells of requests in it.
    Ring(Box<GatewayRing>, OwnedFd),
    /// The socket.
    Socket,
}

/// What a hello said that matters later.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Facts {
    pub(crate) version: LinkVersion,
    pub(crate) instance: InstanceId,
    /// nebd will not modify the volume.
    pub(crate) read_only: bool,
}

/// An accepted hello.
pub(super) struct Greeted {
    pub(super) membership: Membership,
    pub(super) facts: Facts,
    pub(super) carrier: Carrier,
}

/// Reads the hello, opens or joins the session, sends the welcome; `None` if there is no link to serve.
pub(super) async fn greet(stream: &mut UnixStream, socket: &Arc<OwnedFd>, links: &Links) -> Option<Greeted> {
    let (hello, fds) = match tokio::time::timeout(HELLO_LIMIT, read_hello(stream)).await {
        Ok(Ok(hello)) => hello,
        Ok(Err(HelloError::Closed)) => return None,
        Ok(Err(HelloError::Contract(error @ LinkError::Version { .. }))) => {
            links.metrics.opens_refused.inc();
            warn!(%error, "hello is refused");
            let refused = Refused { refusal: Refusal::Version, text: error.to_string() };
            // Whether it is taken changes nothing: the link is cut.
            send(stream, &Welcome::Refused(refused)).await;
            return None;
        }
        Ok(Err(error)) => {
            warn!(%error, "hello is refused");
            return None;
        }
        Err(_) => {
            warn!("no hello in time, the link is cut");
            return None;
        }
    };
    let opened = match LinkVersion::choose(hello.versions) {
        Ok(version) => {
            let carrier = carrier(&hello, version, fds);
            let ring = matches!(carrier, Carrier::Ring(..));
            let caller = Caller { instance: hello.instance, socket, ring };
            let joined = join(&hello, caller, links).await;
            joined.map(|membership| (membership, version, carrier))
        }
        Err(error) => Err(Refused { refusal: Refusal::Version, text: error.to_string() }),
    };
    let (membership, version, carrier) = match opened {
        Ok(opened) => opened,
        Err(refused) => {
            links.metrics.opens_refused.inc();
            warn!(volume = %hello.volume, reason = %refused.text, "hello is refused");
            send(stream, &Welcome::Refused(refused)).await;
            return None;
        }
    };
    let accepted = accepted(&membership, version, hello.read_only);
    if !send(stream, &Welcome::Accepted(accepted)).await {
        warn!(volume = %hello.volume, "welcome did not reach nebd");
        let session = Arc::clone(&membership.session);
        drop(membership);
        links.registry.link_left(session, false);
        return None;
    }
    let facts = Facts { version, instance: hello.instance, read_only: hello.read_only };
    Some(Greeted { membership, facts, carrier })
}

/// Whether the welcome was taken.
async fn send(stream: &mut UnixStream, welcome: &Welcome) -> bool {
    let bytes = welcome.encode();
    matches!(tokio::time::timeout(HELLO_LIMIT, stream.write_all(&bytes)).await, Ok(Ok(())))
}

/// The ring that came with a hello, if it is one and both sides can; nebd is served over the socket otherwise.
fn carrier(hello: &Hello, version: LinkVersion, fds: Vec<OwnedFd>) -> Carrier {
    if hello.features & FEATURE_RING == 0 || version < LinkVersion::V4 {
        return Carrier::Socket;
    }
    let Ok([memory, to_gateway, to_nebd]) = <[OwnedFd; RING_FDS]>::try_from(fds) else {
        warn!(volume = %hello.volume, "hello offers a ring and brings none, requests travel over its socket");
        return Carrier::Socket;
    };
    match GatewayRing::adopt(RingFds { memory, to_gateway, to_nebd }, Position::default()) {
        Ok((ring, bell)) => Carrier::Ring(Box::new(ring), bell),
        Err(error) => {
            warn!(volume = %hello.volume, %error, "ring is not taken, requests travel over the socket");
            Carrier::Socket
        }
    }
}

async fn join(hello: &Hello, caller: Caller<'_>, links: &Links) -> Result<Membership, Refused> {
    let resumes = match hello.mode {
        Mode::Open => None,
        Mode::Resume { epoch } => Some(epoch),
    };
    let wanted = Wanted { read_only: hello.read_only, force: hello.force, resumes, known: hello.identity };
    links.registry.join(&hello.volume, wanted, caller).await.map_err(|error| {
        let refusal = match error {
            OpenError::NotFound(_) => Refusal::NotFound,
            OpenError::Held(_) => Refusal::Held,
            OpenError::Replaced(_) => Refusal::Replaced,
            OpenError::Unavailable(_) => Refusal::Unavailable,
            OpenError::Internal(_) => Refusal::Internal,
        };
        Refused { refusal, text: error.to_string() }
    })
}

fn accepted(membership: &Membership, version: LinkVersion, read_only: bool) -> Accepted {
    let session = &membership.session;
    let traits = session.engine.traits();
    Accepted {
        version,
        features: if membership.has_ring() { FEATURE_RING } else { 0 },
        epoch: traits.epoch,
        identity: traits.identity,
        geometry: session.engine.geometry(),
        traits: VolumeTraits {
            read_only: read_only || traits.read_only,
            volatile_cache: traits.volatile_cache,
            fast_zero: traits.fast_zero,
            rotational: traits.rotational,
        },
        on_unavailable: traits.on_unavailable,
        request_bytes_max: REQUEST_BYTES_MAX,
        requests_max: u32::try_from(session.admission.requests_max()).unwrap_or(u32::MAX),
        bytes_max: session.admission.bytes_max(),
    }
}

#[derive(Debug, thiserror::Error)]
enum HelloError {
    /// Somebody looked whether there is a listener.
    #[error("closed before a hello")]
    Closed,
    #[error("link socket failed: error={0}")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Contract(#[from] LinkError),
}

/// Reads a hello and not a byte more: requests may follow it at once. With it come the descriptors of a ring, if it offers one.
async fn read_hello(stream: &UnixStream) -> Result<(Hello, Vec<OwnedFd>), HelloError> {
    let mut bytes = [0; HELLO_BYTES_MAX];
    let mut fds = Vec::new();
    let mut have = 0;
    let mut want = HELLO_VERSIONS_BYTES;
    loop {
        while have < want {
            let part = &mut bytes[have..want];
            let receive = || passing::receive(stream.as_fd(), part, &mut fds);
            let read = stream.async_io(Interest::READABLE, receive).await?;
            match (read, have) {
                (0, 0) => return Err(HelloError::Closed),
                (0, _) => return Err(unexpected_end().into()),
                _ => have += read,
            }
            if fds.len() > RING_FDS {
                return Err(LinkError::Mismatch { field: "descriptors", value: fds.len() as u64 }.into());
            }
        }
        if let Some((hello, _)) = Hello::decode(&bytes[..have])? {
            return Ok((hello, fds));
        }
        want = match have {
            ..HELLO_FIXED_BYTES => HELLO_FIXED_BYTES,
            // The fixed part is there: it tells how long the name is, and decode has checked that it fits.
            _ => HELLO_FIXED_BYTES + usize::from(u16::from_le_bytes([bytes[18], bytes[19]])),
        };
    }
}
