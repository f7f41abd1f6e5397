//! `POST /api/v1/renew`: another certificate for a device that shows the one it has.

use super::{Api, Plan, Request, sign_csr};
use crate::clock::Now;
use crate::problem::{Code, Problem};

pub(super) fn plan(api: &Api, request: &Request, _: &str, now: Now) -> Result<Plan, Problem> {
    let der = request.client_certificate.as_deref();
    let old = api.provisioner.check_certificate(der, now)?;
    let body = request.json(&["csr"])?;
    let csr = sign_csr::text(&body, "csr").ok_or(Code::CsrRequired)?;
    let job = api.provisioner.plan_renew(old, csr, request.client, now)?;
    Ok(Plan::Job(job, sign_csr::render))
}
