//! `POST /api/v1/renew`: another certificate for a device that shows the one it has.

use super::{Api, Asked, Caller, Plan, sign_csr};
use crate::clock::Now;
use crate::problem::{Code, Problem};

pub(super) fn plan(api: &Api, asked: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    let Caller::Certified(old) = &asked.caller else { return Err(Code::InternalError.into()) };
    let csr = sign_csr::text(&asked.body, "csr").ok_or(Code::CsrRequired)?;
    let job = api.provisioner.plan_renew(old.clone(), csr, asked.request.client)?;
    Ok(Plan::Job(job, sign_csr::render))
}
