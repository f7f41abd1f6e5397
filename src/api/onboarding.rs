//! `POST /api/v1/onboarding`: a provisioning token for a device.

use serde_json::Value;

use super::request::optional;
use super::{Api, Asked, Caller, Plan};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::devices::enrol::Shown;
use crate::http::{Json, Reply};
use crate::problem::{Code, Problem};
use crate::provisioner::{Done, Onboarding, not_issued};

pub(super) fn plan(api: &Api, asked: &Asked<'_>, now: Now) -> Result<Plan, Problem> {
    let body = &asked.body;
    let device = body.get("device_id").and_then(Value::as_str).map(str::trim);
    let device = device.filter(|id| !id.is_empty()).ok_or(Code::DeviceIdRequired)?;
    let device = DeviceId::parse(device).ok_or(Code::DeviceIdInvalid)?;
    let replace = optional(body, "replace", "true or false", Value::as_bool)?.unwrap_or(false);
    let Caller::Onboarding(rule, shown) = asked.caller else {
        return Err(Code::InternalError.into());
    };
    if replace && shown != Shown::Key {
        return Err(not_issued(Code::ReplaceForbidden, &device));
    }
    let client = asked.request.client;
    let onboarding = Onboarding { device, replace, rule, shown, client, csr: None };
    let job = api.provisioner.plan_issue(onboarding, now)?;
    Ok(Plan::Job(job, render))
}

fn render(api: &Api, done: Done, now: Now) -> Result<Reply, Problem> {
    let Done::Issued(token) = done else { return Err(Code::InternalError.into()) };
    let json = Json::success()
        .text("provisioning_token", &token.compact)
        .field("expires_in", api.provisioner.rules.token_ttl_s);
    Ok(Reply::json(json.timestamp(now)))
}
