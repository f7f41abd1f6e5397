//! The domain: issue a token, redeem it for a certificate, renew that, revoke.
//!
//! It knows no HTTP and no Redis. What can be refused without the store is refused when a job is
//! planned ([`plan`]); what is left is done in batches, which share their round trips to the store
//! ([`batch`]) and their `fsync` ([`sign`]). What others know of a device, where that matters, is asked
//! for first, and what changes of its row is put on disk ([`prepare`]). Who has lost an answer may be
//! given it again ([`again`]).

mod again;
mod batch;
mod plan;
mod prepare;
mod sign;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use crate::ca::csr::Csr;
use crate::ca::issuer::{Issuer, Leaf};
use crate::ca::publisher::Publisher;
use crate::ca::record::{Certificate, Reason};
use crate::ca::{Ca, CaError};
use crate::clock::Now;
use crate::config::{Enrolment, Rules};
use crate::device::DeviceId;
use crate::devices::enrol::{Edit, Shown};
use crate::devices::secret::NewSecret;
use crate::devices::table::Devices;
use crate::devices::{Row, Text};
use crate::jwt::{Signer, Token, TokenHash};
use crate::metrics::Metrics;
use crate::problem::{Code, Problem};
use crate::serial::Serial;
use crate::share::Sharing;
use crate::store::ledger::Ledger;
use crate::store::{Op, StoreError, TokenStore};

use again::Again;
pub use prepare::CLOCK_IS_FAR_OFF_MS;

/// Issues tokens and redeems them.
pub struct Provisioner {
    /// Where tokens are.
    pub store: Arc<dyn TokenStore>,
    /// What is known here as used or killed.
    pub ledger: Arc<Ledger>,
    /// The rows of devices.
    pub devices: Arc<Devices>,
    /// The CA, its record and its list.
    pub publisher: Arc<Publisher>,
    /// What other instances know.
    pub sharing: Arc<Sharing>,
    /// Signs tokens.
    pub signer: Signer,
    /// What the configuration says.
    pub rules: Rules,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Devices whose registration is being used for a certificate that is not recorded yet; or that is,
    /// but what it has used up could not be written.
    pub spending: Mutex<BTreeMap<DeviceId, Option<Row>>>,
}

#[derive(Debug)]
pub struct Job {
    /// What is to be done, or why that is refused already.
    work: Result<Work, Problem>,
    /// Who is given a certificate again if it is refused, now or later.
    again: Option<Box<Again>>,
}

impl Job {
    pub const COUNT: Job = Job { work: Ok(Work::Count), again: None };
}

impl From<Work> for Job {
    fn from(work: Work) -> Self {
        Job { work: Ok(work), again: None }
    }
}

#[derive(Debug)]
enum Work {
    Issue(Box<Issue>),
    Sign(Box<Sign>),
    Revoke(Revoke),
    /// Revoke one certificate: a device's, whose others go on to count, or a server's, which no other
    /// way of revoking finds.
    RevokeOne(RevokeOne),
    Rewrite(Rewrite),
    Count,
}

#[derive(Clone, Debug)]
pub struct Onboarding {
    pub device: DeviceId,
    /// In place of the one that the device may have.
    pub replace: bool,
    pub rule: Enrolment,
    pub shown: Shown,
    pub client: IpAddr,
    /// Redeem the token at once, for the key in this.
    pub csr: Option<Csr>,
}

/// How a token is to be redeemed.
#[derive(Clone, Debug)]
pub struct Redemption<'a> {
    pub csr: &'a str,
    /// The device that the request names, if it names one.
    pub device: Option<&'a str>,
    /// For the log.
    pub user_id: Option<String>,
    pub client: IpAddr,
    /// A token that was used for the same key gives the same certificate again.
    pub again: bool,
}

/// A planned onboarding. Its token is dated when what is known of the device's past is known.
#[derive(Debug)]
struct Issue {
    asked: Onboarding,
    /// The device's row, as far as is known.
    row: Row,
    /// What others know of the device may change the answer.
    look: bool,
}

/// A planned certificate.
#[derive(Debug)]
struct Sign {
    grant: Grant,
    csr: Csr,
    serial: Serial,
    client: IpAddr,
}

/// What entitles to a certificate.
#[derive(Debug)]
enum Grant {
    Token(Box<Redeem>),
    Certificate(Certificate),
}

#[derive(Debug)]
struct Redeem {
    token: Token,
    user_id: Option<String>,
    /// The device's row, as far as is known.
    row: Row,
    /// What of it is used up by this.
    spends: Option<Row>,
}

/// A planned revocation, and what else is to change of the device.
#[derive(Debug)]
struct Revoke {
    device: DeviceId,
    reason: Reason,
    edit: Option<Edit>,
    by: By,
}

/// A planned revocation of one certificate, of the device or server of this name.
#[derive(Debug)]
struct RevokeOne {
    of: String,
    serial: Serial,
    reason: Reason,
    by: By,
}

/// Planned changes of what is kept of devices: all are made, or none.
#[derive(Debug)]
struct Rewrite {
    changes: Vec<Changed>,
    by: By,
}

/// What is to change of a device, and then what has changed.
#[derive(Debug)]
pub struct Changed {
    pub device: DeviceId,
    /// The change; [`Change::Keep`] afterwards where nothing was to change.
    pub change: Change,
    /// The secret of the new registration, to be shown once.
    pub secret: Option<NewSecret>,
    /// What is kept of the device afterwards.
    pub row: Row,
}

/// What is to be done to a device's row.
#[derive(Debug)]
pub enum Change {
    Keep,
    /// Change it so; not if `unless_living` and a registration lives.
    Edit {
        edit: Edit,
        unless_living: bool,
    },
    Forget,
}

impl Changed {
    pub fn new(device: DeviceId, change: Change, secret: Option<NewSecret>) -> Self {
        Changed { device, change, secret, row: Row::default() }
    }
}

/// Who does something: for the log, and for the row.
#[derive(Clone, Debug)]
pub struct By {
    /// The name of the key that was shown.
    pub name: Option<Text>,
    pub client: IpAddr,
}

impl By {
    /// The name of the key for the log; empty if there is none.
    pub fn key(&self) -> &str {
        self.name.as_ref().map_or("", Text::as_str)
    }
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "by {}, from {}", name.as_str(), self.client),
            None => write!(f, "by {}", self.client),
        }
    }
}

/// What became of a [`Job`].
#[derive(Debug)]
pub enum Done {
    Issued(Token),
    /// A certificate was signed and recorded, now or when the device asked for it before.
    Signed(Box<Leaf>),
    /// The device's certificates are revoked and its token is dead; or one certificate is revoked.
    Revoked {
        /// The name of the device, or server.
        of: String,
        /// Which certificate, if it was one.
        serial: Option<Serial>,
        /// All other instances will have heard of it in a moment; else when Redis is back.
        shared: bool,
    },
    /// What is kept of devices is as was asked.
    Rewritten {
        changes: Vec<Changed>,
        shared: bool,
    },
    Counted(u64),
}

#[derive(Debug)]
pub struct Batch {
    /// One for each job, in their order.
    pub done: Vec<Result<Done, Problem>>,
    /// To be run by [`Provisioner::clean_up`] after the answers were sent.
    pub after: Vec<Op>,
}

impl Provisioner {
    /// The CA and its record, for what is only read.
    pub fn ca(&self) -> &Ca {
        self.publisher.ca()
    }

    /// Why tokens cannot be issued or certificates signed now; empty if they can.
    pub fn obstacles(&self, now: Now) -> Vec<String> {
        let mut reasons = Vec::new();
        if let Err(error) = self.issuer(now) {
            reasons.push(error.to_string());
        }
        reasons.extend(self.publisher.troubles(now));
        reasons.extend(self.publisher.failure());
        let status = self.store.status();
        if status.full {
            reasons.push(StoreError::Full.to_string());
        }
        if status.lacks_replicas {
            reasons.push(StoreError::Unsafe.to_string());
        }
        if let Some(away) = status.away.filter(|_| status.redis_required) {
            reasons.push(format!("Redis is away: {}", away.why));
        }
        if status.foreign_ca {
            reasons.push("another CA than ours is entered in Redis".to_owned());
        }
        reasons.extend(self.clock_is_far_off());
        if self.sharing.status(now).contradicts {
            reasons.push("SHARE_RECORD is not what other instances on this Redis have".to_owned());
        }
        reasons
    }

    /// What is well today and will not be for long.
    pub fn warnings(&self, now: Now) -> Vec<String> {
        let status = self.store.status();
        let lasting = status.away.filter(|away| away.lasting && !status.redis_required);
        let lasting = lasting
            .map(|away| format!("Redis is away and will not be back by itself: {}", away.why));
        let clock = self.clock_is_off().filter(|_| self.clock_is_far_off().is_none());
        self.publisher.warnings(now).into_iter().chain(lasting).chain(clock).collect()
    }

    fn issuer(&self, now: Now) -> Result<Arc<Issuer>, CaError> {
        self.ca().check_clock(now)?;
        let issuer = self.ca().issuer().ok_or(CaError::ClockNotSet)?;
        issuer.check_dates(now)?;
        Ok(issuer)
    }
}

/// For the log: which token was refused. The client is told nothing that it did not send.
fn refused(problem: impl Into<Problem>, hash: &TokenHash, device: &DeviceId) -> Problem {
    problem.into().of(device).log_more(format!("token {} of {device}", hash.short()))
}

/// The device has none, as far as is recorded here.
pub fn no_certificate() -> Problem {
    Problem::from(Code::CertificateNotFound).text("No certificate found for this device")
}

/// What was refused to a device that is named to the log.
pub fn not_issued(problem: impl Into<Problem>, device: &DeviceId) -> Problem {
    problem.into().of(device).log_more(format!("device {device}"))
}
