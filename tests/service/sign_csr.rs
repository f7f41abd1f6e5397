//! `POST /api/v1/sign-csr` and what can be asked about the certificate afterwards.

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::clock::parse_utc;
use crate::support::csr::{self, Csr};
use crate::support::http::Response;
use crate::support::redis::Redis;
use crate::support::service::{Service, Setup};
use crate::support::{
    CERTIFICATE_FIELDS, check_error, check_timestamp, fields, on_both_stores, token, wait,
};

#[test]
fn from_token_to_certificate() {
    on_both_stores(&[], |service| {
        let compact = service.token("device-001");
        let body = json!({"csr": Csr::new("device-001").make(), "device_id": "device-001", "user_id": "u 1"});
        let answer = service.sign_with(&compact, &body);
        assert_eq!(answer.status, 200, "{}\n{}", answer.text(), service.log());
        assert_eq!(answer.header("Content-Type"), Some("application/json; charset=utf-8"));
        assert_eq!(fields(&answer.text()), CERTIFICATE_FIELDS);
        check_timestamp(&answer);
        assert_eq!(answer.json()["success"], true);
        assert_eq!(answer.field("device_id"), "device-001");
        let (leaf, ca) = (answer.field("certificate"), answer.field("ca_certificate"));
        csr::verify_with_openssl(&ca, &leaf).unwrap();
        assert_eq!(service.http.get("/api/v1/ca").text().trim(), ca.trim());
        assert_eq!(service.read("ca/root-ca.crt").trim(), ca.trim());

        let serial = answer.field("serial_number");
        assert!(
            serial.len() == 32
                && serial.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        );
        assert!((0x40..=0x7f).contains(&u8::from_str_radix(&serial[..2], 16).unwrap()), "{serial}");
        assert_eq!(csr::x509_field(&leaf, &["-serial"]).to_lowercase(), serial);
        assert_eq!(answer.field("certificateId"), serial);
        assert_eq!(answer.field("downloadUrl"), format!("/api/v1/certificates/{serial}/download"));
        assert_eq!(answer.field("fingerprint"), token::sha256_hex(&token::pem_to_der(&leaf)));
        let end = csr::x509_field(&leaf, &["-enddate", "-dateopt", "iso_8601"]);
        assert_eq!(parse_utc(&answer.field("expires_at")), parse_utc(&end));

        let again = service.sign_with(&compact, &body);
        check_error(&again, 401, "TOKEN_ALREADY_USED", "the same token again");
        let log = service.log();
        assert!(log.contains("device-001") && log.to_lowercase().contains(&serial), "{log}");
        assert!(!log.contains(&compact), "the token is in the log");
    });
}

#[test]
fn where_the_token_may_stand() {
    let service = Service::start(&[]);
    let sign = |headers: &[(&str, &str)], mut body: Value, device: &str| {
        body["csr"] = json!(Csr::new(device).make());
        service.http.post_with("/api/v1/sign-csr", headers, &body)
    };
    let bearer = |scheme: &str, token: &str| format!("{scheme} {token}");
    let header = bearer("Bearer", &service.token("a"));
    assert_eq!(sign(&[("Authorization", &header)], json!({}), "a").status, 200);
    let header = bearer("bearer", &service.token("b"));
    assert_eq!(sign(&[("authorization", &header)], json!({}), "b").status, 200, "RFC 9110, 11.1");
    let body = json!({"provisioning_token": service.token("c")});
    assert_eq!(sign(&[], body, "c").status, 200);
    // The header comes first, whatever the body says.
    let header = bearer("Bearer", &service.token("d"));
    let body = json!({"provisioning_token": "nonsense"});
    assert_eq!(sign(&[("Authorization", &header)], body, "d").status, 200);
    for missing in
        [json!({}), json!({"provisioning_token": ""}), json!({"provisioning_token": null})]
    {
        let answer = sign(&[], missing.clone(), "e");
        check_error(&answer, 401, "TOKEN_MISSING", &missing.to_string());
        assert_eq!(
            answer.field("error"),
            "provisioning_token is required in Authorization header (Bearer token) or request body"
        );
        assert_eq!(answer.header("WWW-Authenticate"), Some("Bearer"));
    }
}

#[test]
fn forms_of_a_csr() {
    let service = Service::start(&[]);
    let check = |form: &str, change: fn(String) -> String| {
        let request = Csr::new(form).make();
        let answer = service.sign(&service.token(form), &change(request));
        assert_eq!(answer.status, 200, "{form}: {}", answer.text());
    };
    check("pem", |pem| pem);
    check("crlf", |pem| pem.replace('\n', "\r\n"));
    check("without-last-newline", |pem| pem.trim_end().to_owned());
    check("literal-newlines", |pem| pem.replace('\n', "\\n"));
    check("base64-of-pem", |pem| token::base64_of(pem.as_bytes()));
    check("base64-of-der", |pem| token::base64_of(&token::pem_to_der(&pem)));
    check("new-label", |pem| pem.replace("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"));
}

#[test]
fn what_is_missing_or_wrong_leaves_the_token_usable() {
    on_both_stores(&[], |service| {
        let compact = service.token("d");
        let request = Csr::new("d").make();
        let check = |body: Value, status: u16, code: &str| {
            check_error(&service.sign_with(&compact, &body), status, code, &body.to_string());
        };
        for missing in [json!({}), json!({"csr": ""}), json!({"csr": null}), json!({"csr": 7})] {
            check(missing, 400, "CSR_REQUIRED");
        }
        check(json!({"csr": "garbage"}), 400, "INVALID_CSR");
        for other in [json!("e"), json!(7)] {
            check(json!({"csr": request, "device_id": other}), 401, "TOKEN_DEVICE_MISMATCH");
            check(json!({"csr": "garbage", "device_id": other}), 400, "INVALID_CSR");
        }
        check(json!({"csr": Csr::new("e").make(), "device_id": "d"}), 400, "CSR_DEVICE_MISMATCH");
        let text = service.sign(&compact, "").field("error");
        assert_eq!(text, "csr is required and must be a Base64-encoded PEM string");
        let text =
            service.sign_with(&compact, &json!({"csr": request, "device_id": "e"})).field("error");
        assert_eq!(text, "Device ID mismatch");
        // No body at all: neither a certificate nor a 500.
        let bearer = format!("Bearer {compact}");
        let headers = [("Authorization", &*bearer), ("Content-Type", "application/json")];
        let answer = service.http.request("POST", "/api/v1/sign-csr", &headers, b"");
        check_error(&answer, 400, "CSR_REQUIRED|INVALID_JSON", "an empty body");
        assert_eq!(service.sign(&compact, &request).status, 200, "the token is still good");
    });
}

#[test]
fn one_token_many_requests_one_certificate() {
    on_both_stores(&[], |service| {
        let (compact, request) = (service.token("d"), Csr::new("d").make());
        let barrier = Barrier::new(20);
        let ask = || {
            barrier.wait();
            service.sign(&compact, &request)
        };
        let answers: Vec<Response> = thread::scope(|scope| {
            let all: Vec<_> = (0..20).map(|_| scope.spawn(ask)).collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let won = answers.iter().filter(|a| a.status == 200).count();
        for lost in answers.iter().filter(|a| a.status != 200) {
            check_error(lost, 401, "TOKEN_ALREADY_USED", "a loser");
        }
        assert_eq!((won, service.index().len()), (1, 1));
    });
}

#[test]
fn a_used_token_says_so_until_it_ends() {
    on_both_stores(&[("PROVISIONING_TOKEN_TTL", "2")], |service| {
        let (compact, request) = (service.token("d"), Csr::new("d").make());
        assert_eq!(service.sign(&compact, &request).status, 200);
        check_error(&service.sign(&compact, &request), 401, "TOKEN_ALREADY_USED", "at once");
        let last = wait::until(Duration::from_secs(5), || {
            let code = service.sign(&compact, &request).code();
            (code != "TOKEN_ALREADY_USED").then_some(code)
        });
        assert_eq!(last.as_deref(), Some("TOKEN_EXPIRED"));
    });
}

#[test]
fn an_active_certificate_refuses_and_keeps_the_token() {
    let redis = Redis::start(&[]);
    let env = [("JWT_SECRET", token::SECRET), ("REDIS_URL", &redis.url())];
    let service = Setup::new().envs(&env).start();
    let request = Csr::new("d").make();
    assert_eq!(service.sign(&service.token("d"), &request).status, 200);
    let other = token::plant(&redis, "d", 300);
    let answer = service.sign(&other, &request);
    check_error(&answer, 409, "DEVICE_HAS_ACTIVE_CERTIFICATE", "a token from elsewhere");
    assert!(redis.exists(&format!("mqtt-lite:token:{other}")), "the token is kept");
    wait::for_true("the mark, if any, is withdrawn", || {
        !redis.exists(&format!("mqtt-lite:{}", token::mark_of(&other)))
    });
    assert_eq!(service.index().len(), 1);
}

#[test]
fn status_and_download() {
    let service = Service::start(&[("DEVICE_CERT_VALIDITY_DAYS", "30")]);
    let signed = service.sign(&service.token("device-9"), &Csr::new("device-9").make());
    assert_eq!(signed.status, 200, "{}", signed.text());
    let serial = signed.field("serial_number");

    let status = service.http.get("/api/v1/certificates/device-9/status");
    assert_eq!(
        fields(&status.text()),
        [
            "success",
            "device_id",
            "status",
            "serial_number",
            "fingerprint",
            "created_at",
            "expires_at",
            "timestamp"
        ]
    );
    for same in ["serial_number", "fingerprint", "expires_at", "device_id"] {
        assert_eq!(status.field(same), signed.field(same));
    }
    assert_eq!(status.field("status"), "active");
    let (created, expires) =
        (parse_utc(&status.field("created_at")), parse_utc(&status.field("expires_at")));
    assert!(created.abs_diff(crate::support::clock::now_s()) <= 5);
    assert_eq!(expires - created, 30 * 86_400);

    for id in ["device-9", &serial, &serial.to_uppercase()] {
        let answer = service.http.get(&format!("/api/v1/certificates/{id}/download"));
        assert_eq!(
            fields(&answer.text()),
            ["success", "device_id", "certificate", "ca_certificate", "timestamp"]
        );
        let json = answer.json();
        assert_eq!(json["certificate"]["content"].as_str(), Some(&*signed.field("certificate")));
        assert_eq!(json["certificate"]["filename"], "device-device-9.crt");
        assert_eq!(json["certificate"]["expires_at"].as_str(), Some(&*signed.field("expires_at")));
        assert_eq!(
            json["ca_certificate"]["content"].as_str(),
            Some(&*signed.field("ca_certificate"))
        );
        assert_eq!(json["ca_certificate"]["filename"], "root-ca.crt");
    }
    let path = format!("/api/v1/certificates/{serial}/download");
    let by_accept =
        service.http.request("GET", &path, &[("Accept", "application/x-pem-file")], b"");
    let by_query = service.http.get(&format!("{path}?format=pem"));
    for pem in [by_accept.text(), by_query.text()] {
        assert_eq!(pem.matches("-----BEGIN CERTIFICATE-----").count(), 2, "leaf and CA: {pem}");
        assert_eq!(token::pem_to_der(&pem), token::pem_to_der(&signed.field("certificate")));
    }
    assert_eq!(service.http.get(&format!("{path}?format=json")).field("device_id"), "device-9");
    assert!(service.http.get("/api/v1/crl?format=pem").text().contains("BEGIN X509 CRL"));
    for (path, formats) in [(&*path, "pem or json"), ("/api/v1/crl", "der or pem")] {
        let answer = service.http.get(&format!("{path}?format=txt"));
        check_error(&answer, 400, "BAD_REQUEST", path);
        assert_eq!(answer.field("error"), format!("format must be {formats}"));
    }
    for id in ["nobody", "..", "4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a4a"] {
        let answer = service.http.get(&format!("/api/v1/certificates/{id}/download"));
        check_error(&answer, 404, "CERTIFICATE_NOT_FOUND|NOT_FOUND", id);
    }
    let answer = service.http.get("/api/v1/certificates/nobody/download");
    assert_eq!(answer.field("error"), "Certificate not found");
    let answer = service.http.get("/api/v1/certificates/nobody/status");
    check_error(&answer, 404, "CERTIFICATE_NOT_FOUND", "status");
    assert_eq!(answer.field("error"), "No certificate found for this device");
}

#[test]
fn a_device_named_like_a_serial_does_not_hide_it() {
    let service = Service::start(&[]);
    let signed = service.sign(&service.token("d"), &Csr::new("d").make());
    let serial = signed.field("serial_number");
    let other = service.sign(&service.token(&serial), &Csr::new(&serial).make());
    assert_eq!(other.status, 200, "{}", other.text());
    let answer = service.http.get(&format!("/api/v1/certificates/{serial}/download"));
    assert_eq!(answer.field("device_id"), "d", "a serial wins over a device id");
}

#[test]
fn the_record_is_one_that_openssl_reads() {
    let service = Service::start(&[]);
    let signed = service.sign(&service.token("d"), &Csr::new("d").make());
    let serial = signed.field("serial_number").to_uppercase();
    let index = service.index();
    assert_eq!((index.len(), index[0].len()), (1, 6), "{index:?}");
    assert_eq!(
        (&*index[0][0], &*index[0][2], &*index[0][3], &*index[0][5]),
        ("V", "", &*serial, "/CN=d")
    );
    assert_eq!(service.read("ca/index.txt.attr").trim().replace(' ', ""), "unique_subject=no");
    let record = service.read(&format!("ca/certs/{serial}.pem"));
    assert!(!record.starts_with("-----BEGIN"), "the token's hash stands before the PEM");
    assert_eq!(csr::x509_field(&record, &["-serial"]), serial);
    assert_eq!(token::pem_to_der(&record), token::pem_to_der(&signed.field("certificate")));

    let folder = service.data("ca").display().to_string();
    let config = format!(
        "[ca]\ndefault_ca=d\n[d]\ndatabase={folder}/index.txt\nnew_certs_dir={folder}/certs\n\
         certificate={folder}/root-ca.crt\nprivate_key={folder}/root-ca.key\ndefault_md=sha256\n\
         default_crl_days=7\npolicy=p\n[p]\ncommonName=supplied\n"
    );
    let config = crate::support::temp::TempDir::new().keep_file("ca.cnf", &config);
    let config = config.path().display().to_string();
    // -status says what it found on stderr and ends with an error in some versions of OpenSSL.
    let said = match csr::try_openssl(&["ca", "-config", &config, "-status", &serial], "") {
        Ok(text) | Err(text) => text,
    };
    assert!(!said.contains("rror"), "{said}");
    let crl = csr::openssl(&["ca", "-config", &config, "-gencrl"], "");
    assert!(crl.contains("BEGIN X509 CRL"), "{crl}");
}

#[test]
fn a_certificate_outlives_a_restart_and_so_does_its_token() {
    let mut service = Setup::new().start();
    let (compact, request) = (service.token("d"), Csr::new("d").make());
    let signed = service.sign(&compact, &request);
    service.kill9();
    service.restart();
    let status = service.http.get("/api/v1/certificates/d/status");
    assert_eq!(status.field("serial_number"), signed.field("serial_number"));
    check_error(&service.sign(&compact, &request), 401, "TOKEN_ALREADY_USED", "by the record");
    check_error(&service.onboard("d"), 409, "DEVICE_HAS_ACTIVE_CERTIFICATE", "by the record");
}

#[test]
fn a_record_torn_by_a_power_cut_is_repaired() {
    let mut service = Setup::new().start();
    let signed = service.sign(&service.token("d"), &Csr::new("d").make());
    service.kill9();
    let index = service.data("ca/index.txt");
    let whole = std::fs::read_to_string(&index).unwrap();
    std::fs::write(&index, format!("{whole}V\t2701")).unwrap();
    let stray = service.data("ca/certs/4A000000000000000000000000000000.pem");
    std::fs::write(&stray, signed.field("certificate")).unwrap();
    let mark = service.log().len();
    service.restart();
    assert_eq!(std::fs::read_to_string(&index).unwrap(), whole, "the torn line is gone");
    assert!(!stray.exists(), "a certificate without a line was never answered");
    assert!(service.log()[mark..].to_uppercase().contains("WARN"), "{}", service.log());
    assert_eq!(service.http.get("/api/v1/certificates/d/status").field("status"), "active");
}
