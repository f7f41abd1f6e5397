//! Under which name this process sets its marks. An older mark of its own name, of which no certificate
//! came, is dead; so no two processes may have one name (`docs/model`, rows 35 to 35d).
//!
//! A process leases its id: `instance:<id>` names the process for 30 s, and is renewed. Whoever finds
//! another process there sets its marks under the process' own id, and takes none of the instance's
//! over, until the lease has ended, for that process is gone; or has been renewed: then two run on one
//! folder's copies, and this one keeps the other id.

use std::sync::Mutex;

use super::command::Commands;
use super::layout::{Key, Layout};
use super::reply::{Replies, is_denied};
use crate::clock::Now;
use crate::devices::Instance;
use crate::devices::identity::Identity;
use crate::store::{DownKind, StoreError, locked};

/// How long a lease lasts that is not renewed.
const LEASE_MS: u64 = 30_000;
/// One that is there so long after another was found was renewed.
const RENEWED_MS: u64 = LEASE_MS + 1000;

/// The name of this process.
#[derive(Debug)]
pub(super) struct Name {
    identity: Identity,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    id: Instance,
    claim: Claim,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claim {
    /// Redis was not asked yet.
    Unasked,
    Ours,
    /// Another process has the lease, found at this time first, by [`Now::mono_ms`].
    Another(u64),
}

/// Whose a mark is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    Ours,
    /// That is not known yet.
    Unknown,
    Others,
}

impl Name {
    pub fn new(identity: Identity) -> Self {
        let state = Mutex::new(State { id: identity.id, claim: Claim::Unasked });
        Name { identity, state }
    }

    /// The name of new marks.
    pub fn own(&self) -> Instance {
        let state = locked(&self.state);
        if state.claim == Claim::Ours { state.id } else { self.identity.process }
    }

    pub fn whose(&self, name: &str) -> Whose {
        let state = locked(&self.state);
        match Instance::from_hex(name) {
            Some(name) if name == self.identity.process => Whose::Ours,
            Some(name) if name == state.id && state.claim == Claim::Ours => Whose::Ours,
            Some(name) if name == state.id => Whose::Unknown,
            _ => Whose::Others,
        }
    }

    /// Takes the lease if it is free or that of the process before, renews it if it is ours, and looks
    /// whose it is. Without the right to ask, the name is taken to be ours.
    pub fn ask(
        &self,
        layout: &Layout,
        out: &mut Commands,
    ) -> impl FnOnce(&Name, &mut Replies, Now) -> Result<(), StoreError> + use<> {
        let State { id, claim } = *locked(&self.state);
        let own = self.identity.process.to_string();
        let before = self.identity.before.filter(|_| claim != Claim::Ours);
        let from = before.map_or_else(|| own.clone(), |before| before.to_string());
        let key = format!("instance:{id}");
        let key = Key::Named(&key);
        let asked = [
            layout.compare_and_set(key, &from, &own, LEASE_MS),
            layout.on("SET", key).arg(&own).arg("NX").arg("PX").number(LEASE_MS),
            layout.on("GET", key),
        ];
        let asked = asked.map(|command| out.try_ask(command));
        move |name, replies, now| {
            let [taken, set, lease] = asked.map(|ask| replies.take(ask));
            match taken.0.and(set.0).and_then(|_| lease.text()) {
                Ok(lease) => name.judge(lease.as_deref(), now),
                Err(error) if is_denied(&error) => {
                    if locked(&name.state).claim == Claim::Unasked {
                        log::warn!(
                            "whether another instance has this one's id is not known: {error}"
                        );
                    }
                    name.judge(Some(&name.identity.process.to_string()), now);
                }
                // It is known when the node that has it is back.
                Err(StoreError::Down(down)) if down.kind == DownKind::Part => {}
                Err(error) => return Err(error),
            }
            Ok(())
        }
    }

    fn judge(&self, lease: Option<&str>, now: Now) {
        let mut state = locked(&self.state);
        if lease.and_then(Instance::from_hex) == Some(self.identity.process) {
            state.claim = Claim::Ours;
            return;
        }
        match state.claim {
            Claim::Another(since_ms) if now.mono_ms > since_ms + RENEWED_MS => {
                self.draw_another(&mut state);
            }
            Claim::Another(_) => {}
            _ => {
                log::info!("the id of this instance, {}, is or was just now in use", state.id);
                state.claim = Claim::Another(now.mono_ms);
            }
        }
    }

    /// Its folder is a copy, or another one a copy of it.
    fn draw_another(&self, state: &mut State) {
        let id = self.identity.process;
        log::warn!("another instance runs under the id {}: this one is {id} from now on", state.id);
        if let Err(error) = self.identity.keep(id) {
            log::warn!("{error}");
        }
        *state = State { id, claim: Claim::Ours };
    }
}
