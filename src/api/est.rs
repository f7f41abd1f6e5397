//! Enrolment over secure transport (RFC 7030, RFC 8951), for devices that bring a client: other words for
//! what onboarding, redemption and renewal do.
//!
//! What is read is what real clients send: base64 whatever they say of it, with line breaks or without,
//! or PEM. What is written is what the strictest of them take: lines of 64, and the field that RFC 8951
//! made superfluous.

use super::routes::Pass;
use super::{Api, Asked, Caller, Plan, Request};
use crate::ca::csr::Csr;
use crate::ca::pkcs7;
use crate::clock::Now;
use crate::config::Enrolment;
use crate::device::DeviceId;
use crate::devices::enrol::Shown;
use crate::http::Reply;
use crate::pem;
use crate::problem::{Code, Problem};
use crate::provisioner::{Done, Onboarding, Redemption};

/// All of it is here, and everything here is in its manner.
pub(super) const PREFIX: &str = "/.well-known/est/";
const PKCS7: &str = "application/pkcs7-mime";
const CERTS_ONLY: &str = "application/pkcs7-mime; smime-type=certs-only";
const PKCS10: &str = "application/pkcs10";

/// `GET /.well-known/est/cacerts`
pub(super) fn cacerts(api: &Api, _: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    Ok(Plan::Reply(certificates(PKCS7, api.issuer()?.chain())))
}

/// `GET /.well-known/est/csrattrs`
pub(super) fn csrattrs(_: &Api, _: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    Ok(Plan::Reply(Reply::empty(204)))
}

/// `POST /.well-known/est/simpleenroll` and `/simplereenroll`
pub(super) fn enrol(api: &Api, asked: &Asked<'_>, now: Now) -> Result<Plan, Problem> {
    let (provisioner, client) = (&api.provisioner, asked.request.client);
    let csr = &csr(asked.request)?;
    let job = match &asked.caller {
        Caller::Certified(old) => provisioner.plan_renew(old.clone(), csr, client)?,
        Caller::Login(name, Pass::Token(token)) => {
            let device = Some(&**name).filter(|name| !name.is_empty());
            let asked = Redemption { csr, device, user_id: None, client, again: true };
            provisioner.plan_redeem(token.clone(), asked, now)?
        }
        Caller::Login(name, Pass::Secret(secret)) => {
            let csr = Csr::parse(csr)?;
            let device = match name.is_empty() {
                true => csr.device()?,
                false => DeviceId::parse(name).ok_or(Code::DeviceIdInvalid)?,
            };
            csr.belongs_to(&device)?;
            // Here nobody comes without a credential, so that one must be worth something, `open` or not.
            let (rule, shown) = (Enrolment::Registered, Shown::Secret(*secret));
            let csr = Some(csr);
            let asked = Onboarding { device, replace: false, rule, shown, client, csr };
            provisioner.plan_issue(asked, now)?
        }
        Caller::Anyone | Caller::Onboarding(..) | Caller::Admin(_) => {
            return Err(Code::InternalError.into());
        }
    };
    Ok(Plan::Job(job, render))
}

/// Nothing was shown: some clients only then show what they have. One of them, Bouncy Castle, does not read
/// a body here, and takes one that it has not read for a broken connection: there is none.
pub(super) fn challenge() -> Problem {
    Problem::from(Code::SecretInvalid).text("")
}

/// Neither a secret nor a token was shown.
pub(super) fn no_login() -> Problem {
    Problem::from(Code::SecretInvalid).text(
        "The secret of the device's registration or a provisioning token is required: as the password \
         of HTTP Basic, or as Bearer",
    )
}

/// A secret was shown where it opens nothing.
pub(super) fn no_token() -> Problem {
    Problem::from(Code::ApiKeyRequired)
        .text("A provisioning token is required here, which is issued for the API key")
}

fn csr(request: &Request) -> Result<String, Problem> {
    match request.media_type() == PKCS10 {
        true => Ok(String::from_utf8_lossy(&request.body).into_owned()),
        false => Err(Problem::from(Code::UnsupportedMediaType)
            .text("Content-Type must be application/pkcs10")),
    }
}

fn render(_: &Api, done: Done, _: Now) -> Result<Reply, Problem> {
    let Done::Signed(leaf) = done else { return Err(Code::InternalError.into()) };
    Ok(certificates(CERTS_ONLY, &[leaf.der]))
}

fn certificates(media_type: &str, certificates: &[Vec<u8>]) -> Reply {
    let body = pem::lines(&pkcs7::certs_only(certificates));
    Reply::of_type(media_type, body).field("Content-Transfer-Encoding", "base64")
}
