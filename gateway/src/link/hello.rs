//! The start of a link: nebd's hello is read, the volume's session found or opened, the welcome sent.
//!
//! Called by the link. What it reads is foreign.

use super::{Links, unexpected_end};
use crate::engine::{OpenError, Wanted};
use crate::session::{Membership, Session};
use spline_link::hello::{HELLO_BYTES_MAX, HELLO_FIXED_BYTES, HELLO_VERSIONS_BYTES};
use spline_link::{Accepted, Hello, LinkError, LinkVersion, Mode, Refusal, Refused, VolumeTraits, Welcome};
use spline_types::limits::REQUEST_BYTES_MAX;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tracing::warn;

/// Time for a hello to arrive and for a welcome to be taken: both sides are on one host.
const HELLO_LIMIT: Duration = Duration::from_secs(5);

/// The place in a session and whether it is for reading only; `None` if there is no link to serve.
pub(super) async fn greet(
    read: &mut OwnedReadHalf,
    write: &mut OwnedWriteHalf,
    socket: &Arc<OwnedFd>,
    links: &Links,
) -> Option<(Membership, bool)> {
    let hello = match tokio::time::timeout(HELLO_LIMIT, read_hello(read)).await {
        Ok(Ok(hello)) => hello,
        Ok(Err(HelloError::Closed)) => return None,
        Ok(Err(HelloError::Contract(error @ LinkError::Version { .. }))) => {
            links.metrics.opens_refused.inc();
            warn!(%error, "hello is refused");
            let refused = Refused { refusal: Refusal::Version, text: error.to_string() };
            // Whether it is taken changes nothing: the link is cut.
            let _ =
                tokio::time::timeout(HELLO_LIMIT, write.write_all(&Welcome::Refused(refused).encode())).await;
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
        Ok(version) => open(&hello, version, socket, links).await,
        Err(error) => Err(Refused { refusal: Refusal::Version, text: error.to_string() }),
    };
    let (membership, welcome) = match opened {
        Ok((membership, accepted)) => (Some(membership), Welcome::Accepted(accepted)),
        Err(refused) => {
            links.metrics.opens_refused.inc();
            warn!(volume = %hello.volume, reason = %refused.text, "hello is refused");
            (None, Welcome::Refused(refused))
        }
    };
    let volume = hello.volume;
    let bytes = welcome.encode();
    match tokio::time::timeout(HELLO_LIMIT, write.write_all(&bytes)).await {
        Ok(Ok(())) => membership.map(|membership| (membership, hello.read_only)),
        _ => {
            warn!(%volume, "welcome did not reach nebd");
            if let Some(membership) = membership {
                let session = Arc::clone(&membership.session);
                drop(membership);
                links.registry.link_left(session, false);
            }
            None
        }
    }
}

async fn open(
    hello: &Hello,
    version: LinkVersion,
    socket: &Arc<OwnedFd>,
    links: &Links,
) -> Result<(Membership, Accepted), Refused> {
    let resumes = match hello.mode {
        Mode::Open => None,
        Mode::Resume { epoch } => Some(epoch),
    };
    let wanted = Wanted { read_only: hello.read_only, force: hello.force, resumes, known: hello.identity };
    let joined = links.registry.join(&hello.volume, wanted, hello.instance, socket).await;
    let membership = joined.map_err(|error| {
        let refusal = match error {
            OpenError::NotFound(_) => Refusal::NotFound,
            OpenError::Held(_) => Refusal::Held,
            OpenError::Replaced(_) => Refusal::Replaced,
            OpenError::Unavailable(_) => Refusal::Unavailable,
            OpenError::Internal(_) => Refusal::Internal,
        };
        Refused { refusal, text: error.to_string() }
    })?;
    let accepted = accepted(&membership.session, version, hello.read_only);
    Ok((membership, accepted))
}

fn accepted(session: &Session, version: LinkVersion, read_only: bool) -> Accepted {
    let traits = session.engine.traits();
    Accepted {
        version,
        features: 0,
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

/// Reads a hello and not a byte more: requests may follow it at once.
async fn read_hello(read: &mut OwnedReadHalf) -> Result<Hello, HelloError> {
    let mut bytes = [0; HELLO_BYTES_MAX];
    let mut have = 0;
    let mut want = HELLO_VERSIONS_BYTES;
    loop {
        while have < want {
            let read = read.read(&mut bytes[have..want]).await?;
            match (read, have) {
                (0, 0) => return Err(HelloError::Closed),
                (0, _) => return Err(unexpected_end().into()),
                _ => have += read,
            }
        }
        if let Some((hello, _)) = Hello::decode(&bytes[..have])? {
            return Ok(hello);
        }
        want = match have {
            ..HELLO_FIXED_BYTES => HELLO_FIXED_BYTES,
            // The fixed part is there: it tells how long the name is, and decode has checked that it fits.
            _ => HELLO_FIXED_BYTES + usize::from(u16::from_le_bytes([bytes[18], bytes[19]])),
        };
    }
}
