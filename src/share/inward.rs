//! In: what others have announced is read, judged, and made durable before the place in the stream is
//! passed.

use std::collections::BTreeSet;

use super::Asked;
use super::codec::Value;
use super::exchange::{Exchange, Name, Place};
use super::out::to_put;
use super::thread::{BATCH, Progress, Turn};
use crate::ca::record::Spent;
use crate::ca::record::merge::{Judge, Merged};
use crate::clock;
use crate::device::DeviceId;
use crate::jwt::Claims;
use crate::serial::Serial;
use crate::store::StoreError;

/// So often, at most, values that are not ours are told of in the log.
const HOUR_MS: u64 = 3_600_000;
/// A token that has ended by our clock may be alive by another's, in seconds.
const ENDED_LATELY_S: u64 = 120;

impl<E: Exchange> Turn<'_, E> {
    /// Reads what was announced, until there is nothing more.
    pub(super) fn read(&mut self) -> Result<(), StoreError> {
        loop {
            let begun = clock::now();
            let changes = self.parts.exchange.changes(&self.progress.cursor)?;
            if changes.gap {
                self.progress.distrust();
                self.parts.sharing.wake();
                return Ok(());
            }
            self.take_in(changes.names)?;
            self.progress.cursor = changes.cursor;
            if !changes.more {
                self.parts.sharing.lock().read_ms = Some(begun.mono_ms);
                return Ok(());
            }
        }
    }

    /// Who waits now, taken before anything is told: who asks later may have changed something that
    /// was not told then.
    pub(super) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.parts.sharing.lock().asked)
    }

    /// These wait for what others have of a device.
    pub(super) fn answer(&mut self, asked: Vec<Asked>) -> Result<(), StoreError> {
        let in_reach = asked.into_iter().filter(|asked| self.is_in_reach(asked));
        let asked: Vec<Asked> = in_reach.collect();
        if asked.is_empty() {
            return Ok(());
        }
        if self.shares_record {
            let (mut devices, mut serials) = (Vec::new(), Vec::new());
            for name in asked.iter().flat_map(|asked| asked.names.iter().cloned()) {
                match name {
                    Name::Row(device) => devices.push(device),
                    Name::Certificate(serial) | Name::Revocation(serial) => serials.push(serial),
                }
            }
            serials.extend(self.parts.exchange.holders(&devices)?);
            self.take_in_unknown(&serials)?;
        }
        for Asked { answer, .. } in asked {
            // Who has waited too long does not listen any more.
            let _ = answer.try_send(());
        }
        Ok(())
    }

    /// Who asks for what is out of reach is not kept waiting.
    fn is_in_reach(&self, Asked { names, .. }: &Asked) -> bool {
        match names.is_empty() {
            true => self.progress.aside.is_empty(),
            false => names.iter().all(|name| self.reaches(name)),
        }
    }

    pub(super) fn take_in_unknown(&mut self, serials: &[Serial]) -> Result<(), StoreError> {
        let unknown = self.record().unknown(serials);
        self.take_in(unknown.into_iter().map(Name::Certificate))
    }

    /// Reads the values of these names and enters them. What stands there is put right where none of our
    /// instances has written it, or it says less than is known here: a bound revokes earlier than the
    /// revocation by name that another has told, say.
    fn take_in(&mut self, names: impl IntoIterator<Item = Name>) -> Result<(), StoreError> {
        let counts = |name: &Name| self.shares_record || matches!(name, Name::Row(_));
        // One entry of ours is passed over: a second one of the same name may be another's.
        let names: BTreeSet<Name> = names
            .into_iter()
            .filter(|name| !self.progress.told.remove(name) && counts(name))
            .collect();
        let in_reach = names.into_iter().filter(|name| self.reaches(name));
        let names: Vec<Name> = in_reach.collect();
        for names in names.chunks(self.progress.at_once(BATCH)) {
            let places: Vec<Place> = names.iter().map(|name| self.keys.place(name)).collect();
            let values = self.parts.exchange.values(&places)?;
            let opened = names.iter().zip(&values).map(|(name, value)| self.open(name, value));
            let opened: Vec<Option<Value>> = opened.collect();
            self.enter(opened.iter().flatten().cloned().collect())?;
            for (name, opened) in names.iter().zip(opened) {
                // Forged, or gone before it was read: by a policy that drops keys, say.
                let is_missing = opened.is_none();
                // A certificate never changes.
                let says_less = !matches!(name, Name::Certificate(_))
                    && opened.is_some()
                    && to_put(self.known(name), opened.as_ref()).is_some();
                let Progress { unsent, doubted, .. } = &mut self.progress;
                if says_less || is_missing && doubted.insert(name.clone()) {
                    unsent.insert(name.clone());
                }
            }
        }
        Ok(())
    }

    /// The value, if one of our instances has written it.
    pub(super) fn open(&mut self, name: &Name, value: &[u8]) -> Option<Value> {
        let opened = self.keys.open(name, value);
        if opened.is_none() && !value.is_empty() {
            self.ignore(1);
        }
        opened
    }

    pub(super) fn ignore(&mut self, values: usize) {
        if values == 0 {
            return;
        }
        self.parts.sharing.lock().ignored += values as u64;
        let now_ms = clock::now().mono_ms;
        let lately = |warned: u64| now_ms.saturating_sub(warned) < HOUR_MS;
        if !self.progress.warned_ms.is_some_and(lately) {
            log::warn!(
                "{} holds values of the record that none of our instances has written",
                E::NAME
            );
            self.progress.warned_ms = Some(now_ms);
        }
    }

    /// Makes durable what was read. A bound revokes what is there, and what comes later.
    pub(super) fn enter(&mut self, learnt: Vec<Value>) -> Result<(), StoreError> {
        let (mut certificates, mut revocations, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        for value in learnt {
            match value {
                Value::Certificate(shared) => certificates.push(shared),
                Value::Revocation(revocation) => revocations.push(revocation),
                Value::Row(device, row) => rows.push((device, row)),
            }
        }
        let now = self.now;
        self.parts.devices.enter(rows, false, now).map_err(not_kept)?;
        self.revoke_killed()?;
        let Some(issuer) = self.parts.publisher.ca().issuer() else { return Ok(()) };
        if !certificates.is_empty() || !revocations.is_empty() {
            let bound = |device: &DeviceId| self.parts.devices.bound(device).0.c;
            let ended_before = self.parts.publisher.ended_before(now);
            let judge = Judge { ca: &issuer, bound: &bound, ended_before, now };
            let merged = self.record().merge(certificates, &revocations, &judge);
            self.merged_in(merged.map_err(not_kept)?);
        }
        Ok(())
    }

    /// Revokes what others have killed, by whichever way that was learnt: with a token, too, or when Redis
    /// was back. What cannot be written now stays noted.
    pub(super) fn revoke_killed(&mut self) -> Result<(), StoreError> {
        let killed = self.parts.devices.take_killed();
        if killed.is_empty() {
            return Ok(());
        }
        match self.record().apply_bounds(&killed) {
            Ok(revoked) => self.note_revoked(&revoked),
            Err(error) => {
                self.parts.devices.note_killed(killed.into_iter().map(|(device, _)| device));
                return Err(not_kept(error));
            }
        }
        Ok(())
    }

    fn note_revoked(&mut self, serials: &[Serial]) {
        for serial in serials {
            // What is foretold is not here yet.
            let known = self.record().by_serial(serial);
            let device = known.as_ref().map_or("", |certificate| certificate.device.as_str());
            let of = if device.is_empty() { "" } else { " of " };
            log::info!(
                event = "certificate_revoked", device, serial:%;
                "certificate {serial}{of}{device} revoked, at another instance"
            );
        }
        self.progress.crl_is_due |= !serials.is_empty();
    }

    /// What the record has found when it took certificates in. Their tokens are used, whatever Redis
    /// says of them after a return.
    fn merged_in(&mut self, merged: Merged) {
        let Merged { revoked, ignored, passed, spent, twice, both_active, .. } = merged;
        self.progress.passed.extend(passed);
        self.note_revoked(&revoked);
        self.ignore(ignored.len());
        let now = self.now;
        let lasts = |spent: &Spent| spent.token.exp.saturating_add(ENDED_LATELY_S) > now.unix_s();
        for Spent { token, serial, device } in spent.into_iter().filter(lasts) {
            let claims = Claims { device_id: device, iat: token.iat, exp: token.exp, jti: None };
            self.parts.ledger.load(token.hash, serial, claims, now);
        }
        for (token, [one, other]) in twice {
            let token = token.short();
            log::error!(
                event = "token_redeemed_twice", serial = format!("{one},{other}");
                "token {token} was redeemed twice: for certificates {one} and {other}"
            );
        }
        let both_active = both_active.into_iter().filter(|_| !self.parts.reenroll);
        for (device, serials) in both_active {
            let serial: Vec<String> = serials.iter().map(|(s, _)| s.to_string()).collect();
            let own = self.parts.devices.own();
            let signed = |(serial, here): &(Serial, bool)| match here {
                true => format!("{serial}, signed here ({own})"),
                false => format!("{serial}, signed at another instance"),
            };
            let signed: Vec<String> = serials.iter().map(signed).collect();
            let (serial, signed) = (serial.join(","), signed.join("; "));
            log::warn!(
                device:%, serial;
                "device {device} has several active certificates: {signed}"
            );
        }
    }
}

fn not_kept(error: impl std::fmt::Display) -> StoreError {
    StoreError::Failed(format!("what was read is not kept: {error}"))
}
