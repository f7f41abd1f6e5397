//! `POST /api/v1/onboarding`: a provisioning token for a device.

use serde_json::Value;

use super::message::Json;
use super::{Api, Plan, Reply, Request};
use crate::clock::Now;
use crate::device::DeviceId;
use crate::problem::{Code, Problem};
use crate::provisioner::Done;

pub(super) fn plan(api: &Api, request: &Request, _: &str, now: Now) -> Result<Plan, Problem> {
    let settings = api.settings();
    let authenticated = settings.onboarding_key.as_ref().is_some_and(|key| request.bears(key));
    let admitted = api.onboarding_limits.admit(request.client, authenticated, now);
    admitted
        .map_err(|seconds| Problem { retry_after_s: Some(seconds), ..Code::RateLimited.into() })?;
    if settings.onboarding_key.is_some() && !authenticated {
        return Err(Code::ApiKeyRequired.into());
    }
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
