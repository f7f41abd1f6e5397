//! What is known of certificates: status, download, the CA; and revocation.

use percent_encoding::percent_decode_str;

use super::request::optional;
use super::{Api, Asked, Plan};
use crate::ca::issuer::fingerprint;
use crate::ca::record::{Certificate, Reason, Record, RecordError};
use crate::clock::{self, Now};
use crate::device::DeviceId;
use crate::http::{Json, Reply};
use crate::problem::{Code, Problem};
use crate::provisioner::{Done, Job, no_certificate};
use crate::serial::Serial;

/// A CRL in DER (RFC 2585, 4.2).
const PKIX_CRL: &str = "application/pkix-crl";
/// RFC 8555, 9.1 registers `application/pem-certificate-chain`; deployed clients ask for this one.
const PEM: &str = "application/x-pem-file";

/// `GET /api/v1/certificates/{device_id}/status`
pub(super) fn status(api: &Api, asked: &Asked<'_>, now: Now) -> Result<Plan, Problem> {
    let record = api.provisioner.ca().record();
    let certificate =
        device(asked.name).and_then(|device| record.newest(&device)).ok_or_else(no_certificate)?;
    // What only its own file tells is not known without that.
    let stored = match record.stored(&certificate.serial) {
        Err(RecordError::Absent(_)) => None,
        stored => Some(stored?),
    };
    let created_at = stored.as_ref().map(|s| clock::rfc3339(s.created_at * 1000));
    let revoked_at = certificate.revoked_at.map(|at| clock::rfc3339(at * 1000));
    let json = Json::success()
        .field("device_id", certificate.device.as_str())
        .field("status", certificate.status(now))
        .field("serial_number", certificate.serial.to_string())
        .field("fingerprint", stored.map(|s| fingerprint(&s.der)))
        .field("created_at", created_at)
        .field("expires_at", clock::rfc3339(certificate.expires_at * 1000))
        .some("revoked_at", revoked_at);
    Ok(Plan::Reply(Reply::json(json.timestamp(now))))
}

/// `GET /api/v1/certificates/{id}/download`, by serial or device id
pub(super) fn download(api: &Api, asked: &Asked<'_>, now: Now) -> Result<Plan, Problem> {
    let ca = api.provisioner.ca();
    let certificate = find(ca.record(), asked.name).ok_or(Code::CertificateNotFound)?;
    let stored = ca.record().stored(&certificate.serial)?;
    let issuer = api.issuer()?;
    let ca_pem = issuer.chain_pem();
    if asked.request.says("format", "pem", "json")? || asked.request.accepts(PEM) {
        return Ok(Plan::Reply(Reply::of_type(PEM, stored.pem + ca_pem)));
    }
    let content = Json::new()
        .field("content", stored.pem)
        .field("filename", format!("device-{}.crt", certificate.device))
        .field("expires_at", clock::rfc3339(certificate.expires_at * 1000));
    let ca_certificate = Json::new().field("content", ca_pem).field("filename", "root-ca.crt");
    let json = Json::success()
        .field("device_id", certificate.device.as_str())
        .object("certificate", content)
        .object("ca_certificate", ca_certificate);
    Ok(Plan::Reply(Reply::json(json.timestamp(now))))
}

/// `GET /api/v1/ca`
pub(super) fn ca(api: &Api, _: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    Ok(Plan::Reply(Reply::of_type(PEM, api.issuer()?.chain_pem())))
}

/// `GET /api/v1/crl`
pub(super) fn crl(api: &Api, asked: &Asked<'_>, now: Now) -> Result<Plan, Problem> {
    let ca = api.provisioner.ca();
    let none = match ca.clock_is_plausible(now) && ca.issuer().is_some() {
        true => Code::ServiceUnavailable,
        false => Code::ClockNotSet,
    };
    let list = ca.crl().ok_or(none)?;
    Ok(Plan::Reply(match asked.request.says("format", "der", "pem")? {
        true => Reply::of_type(PKIX_CRL, list.der.clone()),
        false => Reply::of_type(PEM, list.pem.clone()),
    }))
}

/// `DELETE /api/v1/certificates/{device_id}`
pub(super) fn revoke(_: &Api, asked: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    let device = device(asked.name).ok_or_else(no_certificate)?;
    let block = asked.request.flag("block")?;
    let reason = reason(asked)?;
    let job = Job::revoke(device, block, reason, asked.by());
    Ok(Plan::Job(job, render_revoked))
}

fn render_revoked(_: &Api, done: Done, now: Now) -> Result<Reply, Problem> {
    let Done::Revoked { of, serial, shared } = done else {
        return Err(Code::InternalError.into());
    };
    let json = Json::success()
        .field("message", "Certificate revoked successfully")
        .field("device_id", of)
        .some("serial_number", serial.map(|serial| serial.to_string()))
        .field("shared", shared);
    Ok(Reply::json(json.timestamp(now)))
}

/// `DELETE /api/v1/devices/{device_id}/certificates/{serial}`
pub(super) fn revoke_one(_: &Api, asked: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    let serial = Serial::from_hex(asked.serial).ok_or(Code::CertificateNotFound)?;
    let name = percent_decode_str(asked.name).decode_utf8_lossy().into_owned();
    let job = Job::revoke_one(name, serial, reason(asked)?, asked.by());
    Ok(Plan::Job(job, render_revoked))
}

/// Why something is revoked.
fn reason(asked: &Asked<'_>) -> Result<Reason, Problem> {
    let must = "keyCompromise, superseded, cessationOfOperation or unspecified";
    let given = optional(&asked.body, "reason", must, |value| Reason::parse(value.as_str()?))?;
    Ok(given.unwrap_or(Reason::Unspecified))
}

/// A serial wins over a device id.
fn find(record: &Record, name: &str) -> Option<Certificate> {
    let by_serial = Serial::from_hex(name).and_then(|serial| record.by_serial(&serial));
    by_serial.or_else(|| record.newest(&device(name)?))
}

/// The device that a path segment names; its `:` may be percent-encoded.
pub(super) fn device(segment: &str) -> Option<DeviceId> {
    DeviceId::parse(&percent_decode_str(segment).decode_utf8().ok()?)
}
