//! The page for who looks after the gateway, in a real Chromium.

use std::process::Command;

use serde_json::json;

use crate::support::browser::Browser;
use crate::support::check_error;
use crate::support::csr::{self, Csr};
use crate::support::https;
use crate::support::service::{Service, Setup};
use crate::support::temp::TempDir;

const KEY: &str = "the-admin-key-of-the-page";

fn served(setup: Setup) -> Service {
    setup.env("ADMIN_API_KEY", KEY).start()
}

fn html(service: &Service) -> crate::support::http::Response {
    service.http.request("GET", "/", &[("Accept", "text/html,*/*;q=0.8")], b"")
}

#[test]
fn it_is_one_small_file_that_asks_for_nothing() {
    let service = served(Setup::new());
    let page = html(&service);
    assert_eq!((page.status, page.header("Cache-Control")), (200, Some("no-store")));
    assert_eq!(page.header("Content-Type"), Some("text/html; charset=utf-8"));
    assert!(page.text().len() <= 24 * 1024, "{} bytes", page.text().len());
    let policy = page.header("Content-Security-Policy").unwrap().to_owned();
    for part in
        ["default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"]
    {
        assert!(policy.contains(part), "{policy}");
    }
    assert!(!policy.contains("unsafe"), "{policy}");
    for foreign in ["http:", "https:", "style=", "onclick=", "{{"] {
        let known = "http://www.w3.org/2000/svg";
        assert!(!page.text().replace(known, "").contains(foreign), "{foreign}");
    }
    check_error(&service.http.get("/"), 404, "NOT_FOUND", "not for a browser");
    let no_html = service.http.request("GET", "/", &[("Accept", "text/html;q=0, */*")], b"");
    check_error(&no_html, 404, "NOT_FOUND", "it says that it takes none");
    let off = served(Setup::new().env("PAGE", "off"));
    check_error(&html(&off), 404, "NOT_FOUND", "PAGE=off");
}

/// Only what the page brings along runs in it.
#[test]
fn the_policy_holds() {
    let service = served(Setup::new());
    let url = format!("http://127.0.0.1:{}/", service.port());
    let mut browser = Browser::start();
    browser.open(&url, 800, false);
    browser.evaluate(
        "(() => { const add = (name, set) => { const e = document.createElement(name); \
         Object.assign(e, set); document.body.append(e); }; \
         add('script', { textContent: 'window.ran = 1' }); \
         add('img', { src: '/health', onerror: () => { window.blocked = 1; } }); \
         add('iframe', { src: '/health' }); })()",
    );
    browser.wait_for("window.blocked === 1");
    assert_eq!(browser.evaluate("String(window.ran)"), "undefined");
    let refused = browser.complaints().join("\n");
    for what in ["inline script", "image", "frame"] {
        assert!(refused.contains(what), "{what}: {refused}");
    }
}

/// A key over plain HTTP could be read on the way.
#[test]
fn the_key_is_taken_on_loopback_and_over_https() {
    let service = served(Setup::new());
    let mut browser = Browser::start();
    for (host, closed) in [("127.0.0.1", false), ("localhost", false), ("gateway.test", true)] {
        browser.open(&format!("http://{host}:{}/", service.port()), 800, false);
        browser.wait_for("document.querySelector('#state').textContent.includes('eady')");
        assert_eq!(browser.evaluate("document.querySelector('#key').disabled"), closed, "{host}");
    }
    let secure = https::start(Setup::new().env("ADMIN_API_KEY", KEY));
    browser.open(&format!("https://gateway.test:{}/", secure.port()), 800, false);
    assert_eq!(browser.evaluate("document.querySelector('#key').disabled"), false);
}

#[test]
fn a_device_from_its_registration_to_its_end() {
    let service = served(Setup::new());
    whole_way(&format!("http://127.0.0.1:{}/", service.port()), "http://GATEWAY:");
}

#[test]
fn the_same_over_https() {
    let service = https::start(Setup::new().env("ADMIN_API_KEY", KEY));
    whole_way(&format!("https://gateway.test:{}/", service.port()), "https://gateway.test:");
}

/// The whole way, as a person goes it, by keyboard alone.
fn whole_way(url: &str, shown: &str) {
    let mut browser = Browser::start();
    browser.open(url, 800, false);
    browser.wait_for("document.querySelector('#state').textContent.startsWith('✓') || document.querySelector('#state').textContent.startsWith('⚠')");
    assert!(browser.text("#health").contains("CA\n36"), "{}", browser.text("#health"));

    // By keyboard alone: a wrong key, then the right one.
    browser.tab_to("#key");
    browser.type_in("not-the-admin-key-of-it");
    browser.press("Enter");
    browser.wait_for("document.querySelector('#error').textContent !== ''");
    browser.events.clear(); // a 403 is an error of the console's
    browser.evaluate("document.querySelector('#key').focus()");
    browser.type_in(KEY);
    browser.press("Enter");
    browser.wait_for("!document.querySelector('#list').hidden");
    assert_eq!(browser.text("#empty"), "No device fits.");
    check_access(&mut browser);
    keep(&mut browser, "page-none.png");

    browser.tab_to("#add");
    browser.press("Enter");
    browser.wait_for("document.querySelector('#register').open");
    browser.evaluate("document.querySelector('#id').focus()");
    browser.type_in("pump:7");
    browser.tab_to("#note");
    browser.type_in("<img src=x onerror=alert(1)>");
    browser.press("Enter");
    browser.wait_for("!document.querySelector('#secret').hidden");
    let secret = browser.text("#text");
    let dir = TempDir::new();
    let picture = dir.path().join("qr.png");
    browser.picture(Some("#qr"), &picture);
    let read = Command::new("zbarimg").args(["-q", "--raw"]).arg(&picture).output().unwrap();
    assert_eq!(String::from_utf8(read.stdout).unwrap().trim(), secret, "the QR code");
    check_access(&mut browser);
    keep(&mut browser, "page-secret.png");

    // What it shows is what a device runs.
    let line = browser.text("#line");
    dir.file("secret", &secret);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/enroll.sh");
    assert!(line.contains(&format!("--url {shown}")), "{line}");
    let line = line.replace("enroll.sh", script).replace("/etc/mqtt", "device");
    let line = line.replace("GATEWAY", "127.0.0.1").replace("gateway.test", "localhost");
    let ran = Command::new("sh").args(["-c", &line]).current_dir(dir.path()).output().unwrap();
    assert!(ran.status.success(), "{line}: {}", String::from_utf8_lossy(&ran.stderr));
    browser.tab_to("#secret button");
    browser.press("Enter");
    browser.wait_for("!document.querySelector('#register').open");
    browser.wait_for("document.querySelector('#text').textContent === ''"); // shown once

    browser.tab_to("#q");
    browser.press("Enter");
    browser.wait_for("document.querySelector('#rows').innerText.includes('active')");
    browser.tab_to("#rows button");
    browser.press("Enter");
    browser.wait_for("document.querySelector('#device').open");
    assert!(browser.text("#facts").contains("<img src=x onerror=alert(1)>"), "it stays text");
    assert!(browser.text("#facts").contains("by admin"), "{}", browser.text("#facts"));
    check_access(&mut browser);
    keep(&mut browser, "page-device.png");

    let act = |browser: &mut Browser, button: u32, asks: bool, state: &str| {
        browser.tab_to(&format!("#acts button:nth-of-type({button})"));
        browser.press("Enter");
        if asks {
            browser.wait_for("document.querySelector('#sure').open");
            browser.tab_to("#sure [value=yes]");
            browser.press("Enter");
        }
        browser.wait_for(&format!(
            "document.querySelector('#facts').innerText.includes({state:?}) && \
             document.querySelector('#done').innerText === 'Done.'"
        ));
    };
    let file = browser.download("#certificates button");
    assert!(file.starts_with("-----BEGIN CERTIFICATE-----\n"), "{file}");
    assert!(csr::x509_field(&file, &["-subject"]).ends_with("pump:7"), "{file}");
    act(&mut browser, 4, true, "blocked");
    act(&mut browser, 4, false, "active");
    act(&mut browser, 2, true, "revoked");
    assert_eq!(browser.complaints(), Vec::<String>::new());
    for asked in browser.requests() {
        assert!(asked.starts_with(url), "{asked}");
    }
    // What the page has done counts.
    act(&mut browser, 4, true, "blocked");
    let asks = "fetch('api/v1/onboarding', {method: 'POST', headers: {'Content-Type': \
                'application/json'}, body: '{\"device_id\":\"pump:7\"}'}).then(r => r.json())";
    assert_eq!(browser.evaluate(asks)["code"], "DEVICE_BLOCKED");
    let status = browser.evaluate("fetch('api/v1/certificates/pump:7/status').then(r => r.json())");
    assert_eq!(status["status"], "revoked");
}

/// Its width is that of the window, in light and dark, also with many devices; a search among them.
#[test]
fn many_devices_on_a_small_screen() {
    let service = served(Setup::new());
    let rows = |from: u32| {
        let ids = (from..from + 5_000).map(|n| format!("d{n:05}\n"));
        format!("device_id\n{}", ids.collect::<String>())
    };
    for from in [0, 5_000] {
        let headers = [("Authorization", &*format!("Bearer {KEY}")), ("Content-Type", "text/csv")];
        let answer =
            service.http.request("POST", "/api/v1/devices", &headers, rows(from).as_bytes());
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    let token = service.token("d04711");
    assert_eq!(service.sign(&token, &Csr::new("d04711").make()).status, 200);
    let mut browser = Browser::start();
    for (width, dark) in [(360, false), (800, true), (1440, false)] {
        browser.open(&format!("http://127.0.0.1:{}/", service.port()), width, dark);
        browser.evaluate(&format!("document.querySelector('#key').value = {KEY:?}, document.querySelector('#login').requestSubmit()"));
        browser.wait_for("document.querySelector('#rows').children.length === 50");
        check_access(&mut browser);
        keep(&mut browser, &format!("page-many-{width}.png"));
        assert_eq!(browser.evaluate("document.documentElement.scrollWidth"), json!(width));
        browser.evaluate("document.querySelector('#next').click()");
        browser.wait_for("document.querySelector('#rows').innerText.startsWith('d00050')");
        browser.evaluate("document.querySelector('#q').value = 'd0471', document.querySelector('#search').requestSubmit()");
        browser.wait_for("document.querySelector('#rows').children.length === 10");
        browser.evaluate("document.querySelector('#filter').value = 'active', document.querySelector('#filter').dispatchEvent(new Event('change'))");
        browser.wait_for("document.querySelector('#rows').children.length === 1");
    }
    assert_eq!(browser.complaints(), Vec::<String>::new());
}

/// What axe-core finds serious, if somebody has it (`.ci/check-page.sh`).
fn check_access(browser: &mut Browser) {
    let Some(file) = std::env::var_os("MPL_AXE") else { return };
    let axe = std::fs::read_to_string(file).unwrap();
    browser.evaluate(&format!("{axe}; 0"));
    let found = browser.evaluate(
        "axe.run().then(r => r.violations.filter(v => ['serious', 'critical'].includes(v.impact))\
         .map(v => v.id + ': ' + v.nodes.map(n => n.html).join(' ')))",
    );
    assert_eq!(found, json!([]));
}

/// The pictures of docs/page.md, if somebody wants them anew.
fn keep(browser: &mut Browser, name: &str) {
    if let Some(folder) = std::env::var_os("MPL_PICTURES") {
        browser.picture(None, &std::path::Path::new(&folder).join(name));
    }
}
