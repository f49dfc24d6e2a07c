//! What commands about chunkservers and copysets do to the state.

use super::MetaState;
use super::record::{Chunkserver, Copyset, Replacing};
use super::rows::Key;
use crate::command::{Answer, LeaderReport, Members, Outcome};
use crate::refusal::Refusal;
use spline_types::{ChunkserverId, CopysetId};

impl MetaState {
    pub(super) fn register_chunkserver(
        &mut self,
        store_uuid: &str,
        address: &str,
        zone: &str,
        now_ms: u64,
    ) -> Outcome {
        let known = self.chunkservers.values().find(|server| server.store_uuid == store_uuid).map(|s| s.id);
        let id = match known {
            Some(id) => id,
            None => {
                self.counters.last_chunkserver += 1;
                self.changed.insert(Key::Counters);
                ChunkserverId::new(self.counters.last_chunkserver)
            }
        };
        self.leave_address(address, id, known.is_none());
        let server = self.chunkservers.entry(id).or_insert_with(|| Chunkserver {
            id,
            store_uuid: store_uuid.to_owned(),
            address: None,
            zone: String::new(),
            gone: false,
            registered_ms: now_ms,
        });
        server.address = Some(address.to_owned());
        server.zone = zone.to_owned();
        // A store that was given up for lost is back with its data: its promises still hold.
        server.gone = false;
        self.changed.insert(Key::Chunkserver(id));
        Ok(Answer::Chunkserver(id))
    }

    /// A lease read is right only if no follower of the leader gives it up sooner than the lease lasts: all
    /// chunkservers must agree on that time. The first one decides.
    pub(super) fn one_election_time(&mut self, address: &str, election_max_ms: u64) -> Result<(), Refusal> {
        let cluster = &mut self.counters.election_max_ms;
        if *cluster == 0 && election_max_ms != 0 {
            *cluster = election_max_ms;
            self.changed.insert(Key::Counters);
        } else if election_max_ms != 0 && election_max_ms != *cluster {
            return Err(Refusal::precondition(format!(
                "chunkserver has another election_max_ms than the cluster, set it to the cluster's: address={address} \
                 election_max_ms={election_max_ms} cluster={cluster}"
            )));
        }
        Ok(())
    }

    pub(super) fn move_chunkserver(&mut self, id: ChunkserverId, address: &str) -> Outcome {
        match self.chunkservers.get(&id) {
            None => return Err(Refusal::not_found(format!("no such chunkserver: id={id}"))),
            Some(server) if server.gone => {
                return Err(Refusal::precondition(format!("chunkserver is gone, register again: id={id}")));
            }
            Some(_) => {}
        }
        self.leave_address(address, id, false);
        if let Some(server) = self.chunkservers.get_mut(&id) {
            server.address = Some(address.to_owned());
            self.changed.insert(Key::Chunkserver(id));
        }
        Ok(Answer::Done)
    }

    /// Takes an address from everyone but `id`. An old id must not be reached at the address of a newcomer, who knows
    /// nothing of what the old one promised (`acked_is_durable`). If the newcomer is a new store, the old one's
    /// directory was emptied or replaced: it is gone.
    fn leave_address(&mut self, address: &str, id: ChunkserverId, gone: bool) {
        for server in self.chunkservers.values_mut() {
            if server.id != id && server.address.as_deref() == Some(address) {
                server.address = None;
                server.gone |= gone;
                self.changed.insert(Key::Chunkserver(server.id));
            }
        }
    }

    pub(super) fn create_copysets(&mut self, copysets: &[Members]) -> Outcome {
        if !self.copysets.is_empty() {
            return Err(Refusal::conflict(format!("copysets exist already: count={}", self.copysets.len())));
        }
        for member in copysets.iter().flat_map(|members| &members.0) {
            if !self.chunkservers.contains_key(member) {
                return Err(Refusal::internal(format!("no such chunkserver: id={member}")));
            }
        }
        for (number, Members(members)) in (1..).zip(copysets) {
            let id = CopysetId::new(number);
            let row = Copyset {
                members: members.clone(),
                led: false,
                term: 0,
                index: 0,
                replacing: None,
                chunks: 0,
            };
            self.copysets.insert(id, row);
            self.changed.insert(Key::Copyset(id));
        }
        Ok(Answer::Done)
    }

    pub(super) fn copysets_reported(&mut self, reports: &[LeaderReport]) -> Outcome {
        for report in reports {
            if let Some(copyset) = self.copysets.get_mut(&report.copyset)
                && copyset.take(report)
            {
                self.changed.insert(Key::Copyset(report.copyset));
            }
        }
        Ok(Answer::Done)
    }

    pub(super) fn start_replace(
        &mut self,
        id: CopysetId,
        add: ChunkserverId,
        remove: ChunkserverId,
    ) -> Outcome {
        let newcomer_usable = self.chunkservers.get(&add).is_some_and(|server| !server.gone);
        let Some(copyset) = self.copysets.get_mut(&id) else {
            return Err(Refusal::not_found(format!("no such copyset: copyset={id}")));
        };
        let fits = copyset.led
            && copyset.replacing.is_none()
            && copyset.members.contains(&remove)
            && !copyset.members.contains(&add)
            && newcomer_usable;
        if !fits {
            return Err(Refusal::conflict(format!(
                "the replacement does not fit the copyset any more: copyset={id} add={add} remove={remove}"
            )));
        }
        copyset.replacing = Some(Replacing { add, remove });
        self.changed.insert(Key::Copyset(id));
        Ok(Answer::Done)
    }

    pub(super) fn abort_replace(&mut self, id: CopysetId, add: ChunkserverId) -> Outcome {
        if let Some(copyset) = self.copysets.get_mut(&id)
            && copyset.replacing.is_some_and(|replacing| replacing.add == add)
            && !copyset.members.contains(&add)
        {
            copyset.replacing = None;
            self.changed.insert(Key::Copyset(id));
        }
        Ok(Answer::Done)
    }
}

impl Copyset {
    /// Whether a leader's report tells something that this row does not know.
    pub fn news_in(&self, report: &LeaderReport) -> bool {
        self.clone().take(report)
    }

    /// Every chunkserver that should hold a replica now: the members, and a newcomer on its way in. (One on its way
    /// out stays among the members until a leader reports it out.)
    pub fn holders(&self) -> impl Iterator<Item = ChunkserverId> {
        let newcomer = self.replacing.map(|replacing| replacing.add);
        self.members.iter().copied().chain(newcomer.filter(|add| !self.members.contains(add)))
    }

    /// Learns from a report unless it is older than what is known. Returns whether anything changed.
    fn take(&mut self, report: &LeaderReport) -> bool {
        if (report.term, report.index) < (self.term, self.index) || report.members.is_empty() {
            return false;
        }
        let mut changed = !self.led;
        self.led = true;
        let sorted = |members: &[ChunkserverId]| {
            let mut members = members.to_vec();
            members.sort_unstable();
            members
        };
        if sorted(&self.members) != sorted(&report.members) {
            self.members.clone_from(&report.members);
            changed = true;
        }
        let done = |replacing: Replacing| {
            self.members.contains(&replacing.add) && !self.members.contains(&replacing.remove)
        };
        if self.replacing.is_some_and(done) {
            self.replacing = None;
            changed = true;
        }
        if changed {
            (self.term, self.index) = (report.term, report.index);
        }
        changed
    }
}
