//! `POST /api/v1/sign-csr`: a certificate for a token; `POST /api/v1/renew`: another one for a device that
//! shows the one it has.

use serde_json::{Map, Value};

use super::{Api, Asked, Caller, Plan};
use crate::ca::issuer::fingerprint;
use crate::clock::{self, Now};
use crate::http::{Json, Reply};
use crate::problem::{Code, Problem};
use crate::provisioner::{Done, Redemption};

pub(super) fn plan(api: &Api, asked: &Asked<'_>, now: Now) -> Result<Plan, Problem> {
    let Asked { request, body, .. } = asked;
    let token = request.bearer().or_else(|| text(body, "provisioning_token"));
    let token = token.ok_or(Code::TokenMissing)?;
    let token = api.provisioner.check_token(token, now)?;
    let csr = text(body, "csr").ok_or(Code::CsrRequired)?;
    let device = match body.get("device_id") {
        None | Some(Value::Null) => None,
        // What is no text is no device's name, but the CSR is judged first.
        Some(device) => Some(device.as_str().unwrap_or_default()),
    };
    let user_id = text(body, "user_id").map(for_the_log);
    let asked = Redemption { csr, device, user_id, client: request.client, again: false };
    let job = api.provisioner.plan_redeem(token, asked, now)?;
    Ok(Plan::Job(job, render))
}

pub(super) fn renew(api: &Api, asked: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    let Caller::Certified(old) = &asked.caller else { return Err(Code::InternalError.into()) };
    let csr = text(&asked.body, "csr").ok_or(Code::CsrRequired)?;
    let job = api.provisioner.plan_renew(old.clone(), csr, asked.request.client)?;
    Ok(Plan::Job(job, render))
}

fn render(api: &Api, done: Done, now: Now) -> Result<Reply, Problem> {
    let Done::Signed(leaf) = done else { return Err(Code::InternalError.into()) };
    let serial = leaf.serial.to_string();
    let json = Json::success()
        .text("device_id", leaf.device.as_str())
        .text("certificate", &leaf.pem)
        .text("ca_certificate", api.issuer()?.chain_pem())
        .text("expires_at", &clock::rfc3339(leaf.not_after * 1000))
        .text("serial_number", &serial)
        .text("fingerprint", &fingerprint(&leaf.der))
        .text("certificateId", &serial)
        .text("downloadUrl", &format!("/api/v1/certificates/{serial}/download"));
    Ok(Reply::json(json.timestamp(now)))
}

/// A text field of the body that is not blank.
fn text<'a>(body: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    body.get(name).and_then(Value::as_str).filter(|text| !text.trim().is_empty())
}

/// At most 64 printable ASCII characters; others are left out.
fn for_the_log(user_id: &str) -> String {
    user_id.chars().filter(|c| matches!(c, ' '..='~')).take(64).collect()
}
