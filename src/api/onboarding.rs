//! `POST /api/v1/onboarding`: a provisioning token for a device.

use serde_json::Value;

use super::message::Json;
use super::{Api, Plan, Reply, Request};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::problem::{Code, Problem};
use crate::provisioner::Done;

pub(super) fn plan(api: &Api, request: &Request, _: &str, now: Now) -> Result<Plan, Problem> {
    // Before the key is looked at, so that keys cannot be tried at leisure.
    let admitted = api.onboarding_limit.admit(request.client, now);
    admitted
        .map_err(|seconds| Problem { retry_after_s: Some(seconds), ..Code::RateLimited.into() })?;
    let authenticated = match &api.settings().onboarding_key {
        Some(key) if !request.bears(key) => return Err(Code::ApiKeyRequired.into()),
        key => key.is_some(),
    };
    let body = request.json(&["device_id", "replace"])?;
    let device = body.get("device_id").and_then(Value::as_str).map(str::trim);
    let device = device.filter(|id| !id.is_empty()).ok_or(Code::DeviceIdRequired)?;
    let device = DeviceId::parse(device).ok_or(Code::DeviceIdInvalid)?;
    let replace = match body.get("replace") {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Bool(true)) if authenticated => true,
        Some(Value::Bool(true)) => return Err(Code::ReplaceForbidden.into()),
        Some(_) => {
            return Err(Problem::from(Code::InvalidJson).text("replace must be true or false"));
        }
    };
    let job = api.provisioner.plan_issue(device, replace, request.client, now)?;
    Ok(Plan::Job(job, render))
}

fn render(api: &Api, done: Done, now: Now) -> Result<Reply, Problem> {
    let Done::Issued(token) = done else { return Err(Code::InternalError.into()) };
    let mut json = Json::new();
    json.field("success", true)
        .text("provisioning_token", &token.compact)
        .field("expires_in", api.provisioner.token_ttl_s());
    Ok(Reply::json(json.timestamp(now)))
}
