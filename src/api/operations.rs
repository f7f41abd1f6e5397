//! What operators ask: health, readiness, the list of endpoints.

use super::routes::{ROUTES, Route};
use super::{Api, Asked, Plan};
use crate::clock::{self, DAY_S, Now};
use crate::http::{Json, Reply};
use crate::metrics::{MEDIA_TYPE, Page};
use crate::problem::{Code, Problem};
use crate::provisioner::{Done, Job};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// `GET /health`: always 200 while the process can answer
pub(super) fn health(_: &Api, _: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    Ok(Plan::Job(Job::COUNT, render_health))
}

fn render_health(api: &Api, done: Done, now: Now) -> Result<Reply, Problem> {
    let Done::Counted(count) = done else { return Err(Code::InternalError.into()) };
    let status = api.provisioner.store.status();
    let degraded = status.redis_enabled && !status.redis_serves;
    let redis = Json::new()
        .field("enabled", status.redis_enabled)
        .field("connected", status.redis_serves)
        .field("tokenCount", count)
        .field("deviceCount", count);
    let sharing = api.provisioner.sharing.status(now);
    let record = Json::new()
        .field("shared", sharing.shared)
        .field("behind_seconds", sharing.behind_ms / 1000)
        .field("ignored", sharing.ignored);
    let json = Json::new()
        .field("status", if degraded { "degraded" } else { "ok" })
        .field("timestamp", clock::rfc3339(now.unix_ms))
        .field("version", VERSION)
        .field("uptime_seconds", now.mono_ms / 1000)
        .field("storage", if status.redis_serves { "redis" } else { "memory" })
        .object("redis", redis)
        .object("record", record);
    Ok(Reply::json(json))
}

/// What `GET /ready` says: why the service is not ready, and what is well only today.
#[derive(Default)]
pub(super) struct Notes {
    pub reasons: Vec<String>,
    pub warnings: Vec<String>,
}

/// `GET /ready`: whether tokens can be issued and certificates signed
pub(super) fn ready(api: &Api, _: &Asked<'_>, now: Now) -> Result<Plan, Problem> {
    let Notes { reasons, warnings } = notes(api, now);
    if !reasons.is_empty() {
        return Err(Problem::from(Code::ServiceUnavailable)
            .text("Not ready")
            .field("reasons", reasons));
    }
    let json = Json::new()
        .field("status", "ready")
        .some("warnings", Some(warnings).filter(|warnings| !warnings.is_empty()));
    Ok(Plan::Reply(Reply::json(json.timestamp(now))))
}

fn notes(api: &Api, now: Now) -> Notes {
    let mut reasons = api.provisioner.obstacles(now);
    let down = api.metrics.edge.lanes_down.value();
    if down > 0 {
        reasons.push(format!("lanes to workers that cannot be used: {down}"));
    }
    let mut warnings = api.provisioner.warnings(now);
    for more in [certificate_notes(api, now), crl_notes(api, now)] {
        reasons.extend(more.reasons);
        warnings.extend(more.warnings);
    }
    let store = api.provisioner.store.status();
    if store.redis_enabled && !store.redis_serves {
        warnings.push("Redis is away: a token that only it knows is answered 503".to_owned());
    }
    let part = |why| format!("a part of Redis is away: a token that it has is answered 503: {why}");
    warnings.extend(store.missing.map(part));
    warnings.extend(store.warnings.iter().cloned());
    let trouble = api.provisioner.sharing.status(now).trouble.filter(|_| store.redis_serves);
    warnings.extend(trouble.map(|why| format!("the record is not shared: {why}")));
    warnings.extend(api.settings().config.warnings.iter().cloned());
    Notes { reasons, warnings }
}

/// Of the certificate that we show over HTTPS: by one that does not count, no device that checks it
/// can reach us.
pub(super) fn certificate_notes(api: &Api, now: Now) -> Notes {
    let mut notes = Notes::default();
    let shown = api.settings().certificate;
    let Some((begin, end)) = shown.filter(|_| api.provisioner.ca().clock_is_plausible(now)) else {
        return notes;
    };
    let date = |second: u64| clock::rfc3339(second.saturating_mul(1000));
    if now.unix_s() < begin {
        notes.reasons.push(format!("our TLS certificate begins only at {}", date(begin)));
    } else if now.unix_s() > end {
        notes.reasons.push(format!("our TLS certificate expired at {}", date(end)));
    } else if let Some(soon) = now.ends_soon(end) {
        notes.warnings.push(format!("our TLS certificate {soon}"));
    }
    notes
}

/// Of the list that brokers read: it is renewed daily, so one of two days has been forgotten.
fn crl_notes(api: &Api, now: Now) -> Notes {
    let mut notes = Notes::default();
    let Some(crl) = api.provisioner.ca().crl() else { return notes };
    let end = clock::rfc3339(crl.next_update().saturating_mul(1000));
    if now.unix_s() > crl.next_update() {
        notes.reasons.push(format!("the CRL expired at {end}: brokers refuse every device"));
    } else if now.unix_s().saturating_sub(crl.made_at) > 2 * DAY_S {
        notes.warnings.push(format!("the CRL was not renewed and ends at {end}"));
    }
    notes
}

/// `GET /metrics`
pub(super) fn metrics(_: &Api, _: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    Ok(Plan::Job(Job::COUNT, render_metrics))
}

fn render_metrics(api: &Api, done: Done, now: Now) -> Result<Reply, Problem> {
    let Done::Counted(count) = done else { return Err(Code::InternalError.into()) };
    let mut page = api.metrics.page(now);
    store_state(api, count, now, &mut page);
    ends(api, now, &mut page);
    Ok(Reply::of_type(MEDIA_TYPE, page.into_text()))
}

fn store_state(api: &Api, live: u64, now: Now, page: &mut Page) {
    let status = api.provisioner.store.status();
    let name = "mqtt_lite_store_mode";
    page.family(name, "gauge", "1 for the store that serves.");
    page.sample(name, &[("mode", "redis")], u8::from(status.redis_serves));
    page.sample(name, &[("mode", "memory")], u8::from(!status.redis_serves));
    if let Some(since_ms) = status.since_ms {
        let since_ms = now.unix_ms.saturating_sub(now.mono_ms.saturating_sub(since_ms));
        let help = "When the store that serves took over, in seconds since 1970.";
        page.gauge("mqtt_lite_store_since_timestamp_seconds", help, since_ms / 1000);
    }
    let help = "Whether Redis is configured.";
    page.gauge("mqtt_lite_redis_enabled", help, u8::from(status.redis_enabled));
    let help = "How often Redis was lost, or its connection doubted.";
    page.counter("mqtt_lite_redis_losses_total", help, status.losses);
    page.gauge("mqtt_lite_tokens_live", "Live tokens in the store that serves.", live);
    page.gauge("mqtt_lite_store_full", "No room for a token.", u8::from(status.full));
    let sharing = api.provisioner.sharing.status(now);
    let help = "Whether certificates are shared with other instances now.";
    page.gauge("mqtt_lite_record_shared", help, u8::from(sharing.shared));
    let help = "For how long nothing was read of what others share.";
    page.gauge("mqtt_lite_record_behind_seconds", help, sharing.behind_ms / 1000);
    let help = "Values in Redis that no instance of this CA has written.";
    page.counter("mqtt_lite_record_ignored_total", help, sharing.ignored);
}

/// When the CA, its list and our own certificate end.
fn ends(api: &Api, now: Now, page: &mut Page) {
    let ca = api.provisioner.ca();
    if let Some(issuer) = ca.issuer() {
        let help = "When the CA ends, in seconds since 1970.";
        page.gauge("mqtt_lite_ca_expiry_timestamp_seconds", help, issuer.not_after);
    }
    if let Some((_, end)) = api.settings().certificate {
        let help = "When the certificate that we show over HTTPS ends, in seconds since 1970.";
        page.gauge("mqtt_lite_tls_certificate_expiry_timestamp_seconds", help, end);
    }
    if let Some(crl) = ca.crl() {
        let help = "When the certificate revocation list ends, in seconds since 1970.";
        page.gauge("mqtt_lite_crl_expiry_timestamp_seconds", help, crl.next_update());
        let age = now.unix_s().saturating_sub(crl.made_at);
        page.gauge("mqtt_lite_crl_age_seconds", "Age of the certificate revocation list.", age);
    }
}

/// `GET /api`
pub(super) fn list(_: &Api, _: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    let endpoint = |route: &Route| {
        Json::new()
            .field("method", route.method.name())
            .field("path", route.path)
            .field("description", route.what)
    };
    let json = Json::new()
        .field("name", env!("CARGO_PKG_NAME"))
        .field("version", VERSION)
        .array("endpoints", ROUTES.iter().map(endpoint));
    Ok(Plan::Reply(Reply::json(json)))
}
