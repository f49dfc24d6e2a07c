//! One front-end: its connection, its device, and the reply that waits for workers.
//!
//! Owned by `control`. Must not know: the listener, other front-ends.

use super::crew::Crew;
use crate::export::Export;
use crate::vhost::connection::{Closed, Connection, Received};
use crate::vhost::device::{Device, Refusal, Shape};
use crate::vhost::message::{MessageError, Reply, Request, config_changed};
use crate::vhost::order::Order;
use rustix::event::epoll::EventFlags;
use rustix::net::SendFlags;
use std::os::fd::{BorrowedFd, OwnedFd};
use thiserror::Error;

/// Why a connection ends.
#[derive(Debug, Error)]
pub enum Ended {
    /// The socket says so.
    #[error(transparent)]
    Closed(#[from] Closed),
    /// A message that nobody can understand, and no reply was asked for.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A message that the device refused, and no reply was asked for.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// What [`Front::step`] did.
#[derive(Debug)]
pub enum Step {
    /// Nothing: there is no message, or something must be waited for first.
    Idle,
    /// It took a message.
    Message,
    /// It took a message and replied that it is refused, for this reason.
    Refused(String),
}

/// The front-end.
#[derive(Debug)]
pub struct Front {
    connection: Connection,
    /// Its device.
    pub device: Device,
    /// Sent when the workers have obeyed.
    reply: Option<Reply>,
    /// The reply waits until nothing is left of what was abandoned, too.
    after_abandon: bool,
    watched: EventFlags,
}

impl Front {
    /// Over a non-blocking socket that is watched for input. `held`: see [`Device::new`].
    pub fn new(socket: OwnedFd, export: &Export, shape: Shape, held: bool) -> Self {
        Self {
            connection: Connection::new(socket),
            device: Device::new(export, shape, held),
            reply: None,
            after_abandon: false,
            watched: EventFlags::IN,
        }
    }

    /// The socket, to be watched.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.connection.socket()
    }

    /// Whether its next message may be taken: replies come in the order of messages, and what a message asked for is done
    /// before the next.
    pub fn reads(&self, crew: &Crew) -> bool {
        crew.has_obeyed() && self.reply.is_none()
    }

    /// What epoll must watch, if that has changed since the last call. Its end is always told.
    pub fn watch(&mut self, reads: bool) -> Option<EventFlags> {
        let mut wanted = EventFlags::RDHUP;
        if reads {
            wanted |= EventFlags::IN;
        }
        if self.connection.is_behind() {
            wanted |= EventFlags::OUT;
        }
        (std::mem::replace(&mut self.watched, wanted) != wanted).then_some(wanted)
    }

    /// Keeps a reply until the workers have obeyed.
    pub fn hold(&mut self, reply: Option<Reply>) {
        if reply.is_some() {
            self.reply = reply;
        }
    }

    /// Sends what may be sent, then takes the next message if there is one and `ending` does not forbid it.
    ///
    /// # Errors
    /// The connection is to be closed.
    pub fn step(&mut self, crew: &mut Crew, ending: bool) -> Result<Step, Ended> {
        self.send(crew)?;
        if ending || !self.reads(crew) {
            return Ok(Step::Idle);
        }
        match self.connection.receive()? {
            Some(received) => self.take(received, crew),
            None => Ok(Step::Idle),
        }
    }

    /// Sends what may be sent.
    ///
    /// # Errors
    /// The connection is to be closed.
    pub fn send(&mut self, crew: &Crew) -> Result<(), Ended> {
        let obeyed = crew.has_obeyed() && (!self.after_abandon || crew.has_abandoned());
        if obeyed && let Some(reply) = self.reply.take() {
            self.after_abandon = false;
            self.connection.reply(reply);
        }
        Ok(self.connection.flush()?)
    }

    fn take(&mut self, received: Received, crew: &mut Crew) -> Result<Step, Ended> {
        let Received { header, payload, fds } = received;
        let request = match Request::decode(&header, &payload, fds) {
            Ok(request) => request,
            Err(error) => {
                let Some(reply) = self.device.refuse(&header) else { return Err(error.into()) };
                self.hold(Some(reply));
                return Ok(Step::Refused(error.to_string()));
            }
        };
        tracing::trace!(?request, "message");
        let turn = self.device.message(&header, request)?;
        self.after_abandon = turn.orders.iter().any(|order| matches!(order, Order::Abandon));
        self.hold(turn.reply);
        crew.order(turn.orders);
        self.catch_up();
        Ok(turn.refused.map_or(Step::Message, |refusal| Step::Refused(refusal.to_string())))
    }

    /// Tells it of the config space if it may not know it.
    pub fn catch_up(&mut self) {
        if self.device.is_behind() {
            self.announce();
        }
    }

    /// Tells it that the config space has changed, if it wants to know. Answers whether it was told.
    pub fn announce(&mut self) -> bool {
        let Some(channel) = self.device.channel() else { return false };
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let bytes = config_changed();
        match rustix::net::send(channel, &bytes, flags) {
            Ok(sent) if sent == bytes.len() => {
                self.device.told();
                true
            }
            // It does not listen, or half of a message is on its way: what follows could not be understood.
            result => {
                let error = result.err().map(std::io::Error::from);
                tracing::warn!(
                    ?error,
                    "front-end can not be told of the volume's size, its guest sees it when the front-end starts again"
                );
                self.device.close_channel();
                false
            }
        }
    }
}
