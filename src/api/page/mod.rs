//! The page for who looks after the gateway: one file out of the program, with its style and its script
//! inside. It asks for nothing from elsewhere, and its Content-Security-Policy names both by their
//! hashes, so that nothing else runs in it, whatever a device calls itself.
//!
//! `build.rs` puts the file together from the three beside this one.

use std::sync::LazyLock;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest as _, Sha256};

use super::{Api, Asked, Plan};
use crate::clock::Now;
use crate::http::Reply;
use crate::problem::{Code, Problem};

const PAGE: &str = include_str!(concat!(env!("OUT_DIR"), "/page.html"));

/// W3C Content Security Policy Level 3, 2.3.1: a hash is of what stands between the tags.
static POLICY: LazyLock<String> = LazyLock::new(|| {
    format!(
        "default-src 'none'; style-src '{}'; script-src '{}'; img-src data:; connect-src 'self'; \
         frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        hash_of("style"),
        hash_of("script")
    )
});

/// `GET /`, for a browser.
pub(super) fn page(api: &Api, asked: &Asked<'_>, _: Now) -> Result<Plan, Problem> {
    if !api.settings().config.page || !asked.request.accepts("text/html") {
        return Err(Code::NotFound.into());
    }
    let reply = Reply::of_type("text/html; charset=utf-8", PAGE)
        .field("Content-Security-Policy", POLICY.as_str())
        .field("Cache-Control", "no-store")
        .field("X-Content-Type-Options", "nosniff")
        .field("Referrer-Policy", "no-referrer");
    Ok(Plan::Reply(reply))
}

fn hash_of(tag: &str) -> String {
    let (begin, end) = (format!("<{tag}>"), format!("</{tag}>"));
    let inside = PAGE.split(&begin).nth(1).and_then(|rest| rest.split(&end).next());
    format!("sha256-{}", STANDARD.encode(Sha256::digest(inside.unwrap_or_default())))
}
