//! Tokens and another implementation of JWT: PyJWT reads ours, and we read PyJWT's.
//!
//! `scripts/test.sh` installs PyJWT into `venv` in the build folder.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::csr::Csr;
use crate::support::redis::Redis;
use crate::support::service::{Service, Setup};
use crate::support::{check_error, clock::now_s, token};

#[test]
fn pyjwt_reads_ours() {
    let service = Service::start(&[("JWT_SECRET", token::SECRET)]);
    let compact = service.token("device-001");
    let read = "print(json.dumps([jwt.decode(a[0], a[1], algorithms=['HS256'], \
                options={'require': ['exp', 'iat']}), jwt.get_unverified_header(a[0])]))";
    let said: Value = serde_json::from_str(&python(read, &[&compact, token::SECRET])).unwrap();
    assert_eq!(said[0], token::claims_of(&compact));
    assert_eq!(said[0]["device_id"], "device-001");
    assert_eq!(said[1], serde_json::json!({"alg": "HS256", "typ": "JWT"}));
    let refuse = "\ntry:\n  jwt.decode(a[0], a[1], algorithms=['HS256'])\n\
                  except jwt.InvalidSignatureError:\n  print('refused')";
    assert_eq!(python(refuse, &[&compact, "another-secret-of-32-bytes-and-so"]), "refused");
}

#[test]
fn we_read_what_pyjwt_made() {
    let redis = Redis::start(&[]);
    let env = [("JWT_SECRET", token::SECRET), ("REDIS_URL", &redis.url())];
    let service = Setup::new().envs(&env).start();
    service.wait_for_storage("redis");
    let made = |device: &str, claims: &str, secret: &str, alg: &str| {
        let make = "print(jwt.encode(json.loads(a[0]), a[1], algorithm=a[2]))";
        let compact = python(make, &[claims, secret, alg]);
        token::plant_token(&redis, device, &compact, now_s() + 300);
        service.sign(&compact, &Csr::new(device).make())
    };
    let claims = |device: &str| token::claims(device, 300).to_string();
    let answer = made("d", &claims("d"), token::SECRET, "HS256");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let with_jti = claims("e").replace('}', r#","jti":"AAAAAAAAAAAAAAAAAAAAAA"}"#);
    assert_eq!(made("e", &with_jti, token::SECRET, "HS256").status, 200);
    for alg in ["HS384", "HS512"] {
        check_error(
            &made("f", &claims("f"), token::SECRET, alg),
            401,
            "TOKEN_INVALID_SIGNATURE",
            alg,
        );
    }
    let other = "another-secret-of-32-bytes-and-so-on";
    check_error(&made("g", &claims("g"), other, "HS256"), 401, "TOKEN_INVALID_SIGNATURE", "secret");
    let past = format!(
        r#"{{"device_id":"h","type":"provisioning","iat":{},"exp":{}}}"#,
        now_s() - 300,
        now_s() - 1
    );
    check_error(&made("h", &past, token::SECRET, "HS256"), 401, "TOKEN_EXPIRED", "past");
}

/// Runs a line of Python, with `json`, `jwt` and the arguments `a`.
#[track_caller]
fn python(code: &str, args: &[&str]) -> String {
    let build = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let python = build.join("venv/bin/python");
    let program = format!("import json, jwt, sys\na = sys.argv[1:]\n{code}");
    let output =
        Command::new(&python).args(["-c", &program]).args(args).output().unwrap_or_else(|e| {
            panic!("PyJWT is missing ({}: {e}): scripts/test.sh installs it", python.display());
        });
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    said
}
