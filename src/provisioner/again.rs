//! A device whose answer was lost asks again, with what it has shown before and for the same key: it is
//! given the certificate that was signed for it, if that still counts. Another key is another certificate,
//! and refused.

use std::net::IpAddr;

use super::{Done, Provisioner, not_issued};
use crate::ca::csr::Csr;
use crate::ca::record::{Origin, Redeemed};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::devices::enrol::Shown;
use crate::jwt::TokenHash;
use crate::problem::{Code, Problem};

/// Who may have had its certificate before.
#[derive(Debug)]
pub(super) struct Again {
    pub device: DeviceId,
    pub csr: Csr,
    pub paid: Paid,
    pub client: IpAddr,
}

#[derive(Debug)]
pub(super) enum Paid {
    Token(TokenHash),
    Secret(Shown),
}

impl Provisioner {
    /// Gives those of a batch who ask again and were refused what was signed for them before. Others may
    /// have signed it: they are asked once, for all of the batch. Where nothing can be decided now nobody
    /// can be asked.
    pub(super) fn give_again(
        &self,
        done: &mut [Result<Done, Problem>],
        again: &[Option<Box<Again>>],
        now: Now,
    ) {
        const USED: [Code; 3] = [Code::SecretInvalid, Code::TokenAlreadyUsed, Code::TokenExpired];
        let mut unknown = Vec::new();
        for (done, again) in done.iter_mut().zip(again) {
            let (Err(problem), Some(again)) = (&*done, again) else { continue };
            match self.given_again(again, now) {
                Some(given) => *done = given,
                None if USED.contains(&problem.code) => unknown.push((done, again)),
                None => {}
            }
        }
        let mut devices: Vec<DeviceId> =
            unknown.iter().map(|(_, again)| again.device.clone()).collect();
        devices.sort_unstable();
        devices.dedup();
        if devices.is_empty() || !self.sharing.look_up(&devices) {
            return;
        }
        for (done, again) in unknown {
            if let Some(given) = self.given_again(again, now) {
                *done = given;
            }
        }
    }

    /// What is known here to have been signed for it.
    fn given_again(&self, again: &Again, now: Now) -> Option<Result<Done, Problem>> {
        let Again { device, csr, paid, client } = again;
        let row = self.devices.row(device);
        // A registration kills what was before it, so that a token that it has paid for is younger.
        let begun = match paid {
            Paid::Token(_) => None,
            Paid::Secret(shown) => Some(row.spent_by(shown)?),
        };
        let is_right = |token: Redeemed| match paid {
            Paid::Token(hash) => token.hash == *hash,
            Paid::Secret(_) => begun.is_some_and(|begun| token.iat > begun),
        };
        let was_for = |origin: Origin| origin.token().is_some_and(is_right);
        let leaf = self.ca().record().signed_for(device, csr.key(), was_for, now)?;
        // What is to be revoked by a bound may not be so yet.
        if self.ca().record().paid(&leaf.serial) <= row.bound.c {
            return None;
        }
        let allowed = self.check_block(device).map_err(|code| not_issued(code, device));
        let allowed = allowed.and_then(|()| Ok(self.issuer(now)?));
        Some(allowed.map(|_issuer| {
            let serial = leaf.serial;
            log::info!(
                event = "certificate_given_again", device:%, serial:%, client:%;
                "certificate {serial} of {device} given again, by {client}"
            );
            Done::Signed(Box::new(leaf))
        }))
    }
}
