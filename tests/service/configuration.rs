//! The environment: every variable, bad values, `<NAME>_FILE`, `check-config`; nothing secret is shown.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Duration;

use crate::support::csr::Csr;
use crate::support::port::Port;
use crate::support::redis::Redis;
use crate::support::service::{Exit, Service, Setup, as_any_user};
use crate::support::{temp::TempDir, token};

/// A name and a value.
type Variable = (&'static str, &'static str);

/// Variable, a bad value for it, and what else must be set for it to count.
const BAD: &[(&str, &str, &[Variable])] = &[
    ("HTTP_HOST", "not an address", &[]),
    ("PORT", "70000", &[]),
    ("PORT", "http", &[]),
    ("PORT", "-1", &[]),
    ("LOG_LEVEL", "loud", &[]),
    ("LOG_FORMAT", "xml", &[]),
    ("PROVISIONING_TOKEN_TTL", "0", &[]),
    ("PROVISIONING_TOKEN_TTL", "86401", &[]),
    ("PROVISIONING_TOKEN_TTL", "-1", &[]),
    ("PROVISIONING_TOKEN_TTL", "1.5", &[]),
    ("PROVISIONING_TOKEN_TTL", "5m", &[]),
    ("JWT_SECRET", DEFAULT_SECRET, &[]),
    ("PROVISIONING_JWT_SECRET", DEFAULT_SECRET, &[]),
    ("ROOT_CA_VALIDITY_YEARS", "0", &[]),
    ("ROOT_CA_VALIDITY_YEARS", "ten", &[]),
    ("ROOT_CA_VALIDITY_YEARS", "100000", &[]),
    ("DEVICE_CERT_VALIDITY_DAYS", "0", &[]),
    ("DEVICE_CERT_VALIDITY_DAYS", "ninety", &[]),
    ("DEVICE_CERT_VALIDITY_DAYS", "99999999999", &[]),
    ("ONBOARDING_API_KEY", "fifteen-letters", &[]),
    ("ADMIN_API_KEY", "fifteen-letters", &[]),
    ("REENROLL", "maybe", &[]),
    ("REDIS_ENABLED", "perhaps", &[]),
    ("REDIS_URL", "http://127.0.0.1:6379", &[]),
    ("REDIS_URL", "redis://", &[]),
    ("REDIS_URI", "nonsense", &[]),
    ("REDIS_PORT", "0", &[("REDIS_HOST", "127.0.0.1")]),
    ("REDIS_PORT", "70000", &[("REDIS_HOST", "127.0.0.1")]),
    ("REDIS_DB", "-1", &[("REDIS_HOST", "127.0.0.1")]),
    ("REDIS_DB", "first", &[("REDIS_HOST", "127.0.0.1")]),
    ("REDIS_TLS", "perhaps", &[("REDIS_HOST", "127.0.0.1")]),
    ("REDIS_TLS_CA", "no/such/file.pem", &[("REDIS_URL", "rediss://127.0.0.1:6379")]),
    ("REDIS_TLS_CERT", "no/such/file.pem", &[("REDIS_TLS_KEY", "no/such/file.pem")]),
    ("REDIS_SENTINELS", "10.0.0.1:x", &[]),
    ("REDIS_SENTINEL_MASTER", "my master", &[]),
    ("REDIS_CLUSTER", "perhaps", &[]),
    ("REDIS_CLUSTER", "true", &[]),
    ("REDIS_TIMEOUT_MS", "0", &[]),
    ("REDIS_TIMEOUT_MS", "fast", &[]),
    ("REDIS_CONNECT_TIMEOUT_MS", "0", &[]),
    ("REDIS_CONNECT_TIMEOUT_MS", "2s", &[]),
    ("REDIS_POOL_SIZE", "0", &[]),
    ("REDIS_POOL_SIZE", "many", &[]),
    ("OUTAGE_REDEEM", "all", &[]),
    ("MEMORY_MAX_TOKENS", "0", &[]),
    ("MEMORY_MAX_TOKENS", "-5", &[]),
    ("WORKERS", "0", &[]),
    ("WORKERS", "few", &[]),
    ("MAX_CONNECTIONS", "0", &[]),
    ("MAX_CONNECTIONS", "all", &[]),
    ("MAX_CONNECTIONS_PER_IP", "0", &[]),
    ("MAX_CONNECTIONS_PER_IP", "x", &[]),
    ("MAX_BUFFER_BYTES", "0", &[]),
    ("MAX_BUFFER_BYTES", "8M", &[]),
    ("KEEP_ALIVE_SECONDS", "0", &[]),
    ("KEEP_ALIVE_SECONDS", "75s", &[]),
    ("TLS_HANDSHAKE_SECONDS", "0", &[]),
    ("TLS_HANDSHAKE_SECONDS", "301", &[]),
    ("TRUSTED_PROXIES", "10.0.0.0/33", &[]),
    ("TRUSTED_PROXIES", "the proxy", &[]),
    ("RENEW_REVOKES", "perhaps", &[]),
    ("RENEW_AFTER_EXPIRY_DAYS", "366", &[]),
    ("RENEW_AFTER_EXPIRY_DAYS", "-1", &[]),
    ("RECORD_KEEP_DAYS", "36501", &[]),
    ("RECORD_KEEP_DAYS", "30", &[("RENEW_AFTER_EXPIRY_DAYS", "30")]),
    ("ONBOARDING_RATE_LIMIT", "-1", &[]),
    ("ONBOARDING_RATE_LIMIT", "few", &[]),
    ("TLS_CERT", "no/such/file.pem", &[("TLS_KEY", "no/such/file.pem")]),
    ("JWT_SECRET_FILE", "no/such/file", &[]),
    ("ADMIN_API_KEY_FILE", "no/such/file", &[]),
    ("REDIS_PASSWORD_FILE", "no/such/file", &[("REDIS_HOST", "127.0.0.1")]),
];

const DEFAULT_SECRET: &str = "mqtt-publisher-lite-secret-key-change-in-production";

/// Variables whose value must never be printed.
const SECRET: [&str; 4] =
    ["JWT_SECRET", "PROVISIONING_JWT_SECRET", "ONBOARDING_API_KEY", "ADMIN_API_KEY"];

#[test]
fn every_bad_value_stops_the_start_with_one_line_that_names_it() {
    let faults: Vec<String> = BAD
        .iter()
        .flat_map(|(name, value, others)| {
            [&[][..], &["check-config"]].map(|args| {
                let setup = Setup::new().args(args).envs(others).env(name, value);
                let what = format!("{name}={value} {args:?}");
                match setup.run_within(Duration::from_secs(5)) {
                    Some(exit) => bad_exit(name, value, &exit).map(|why| format!("{what}: {why}")),
                    None => Some(format!("{what}: it runs")),
                }
            })
        })
        .flatten()
        .collect();
    assert!(faults.is_empty(), "{} faults: {faults:#?}", faults.len());
}

/// Settings of where Redis is that are good by themselves, and those of which two do not go together, or
/// are both wrong: one line names one of them.
#[test]
fn settings_of_redis_that_do_not_go_together() {
    const CLUSTER: (&str, &str) = ("REDIS_CLUSTER", "true");
    const HOST: (&str, &str) = ("REDIS_HOST", "127.0.0.1");
    const URL: (&str, &str) = ("REDIS_URL", "redis://127.0.0.1");
    const SENTINELS: (&str, &str) = ("REDIS_SENTINELS", "127.0.0.1");
    const SOCKET: (&str, &str) = ("REDIS_HOST", "/run/redis.sock");
    let together: [&[(&str, &str)]; 15] = [
        &[SENTINELS, HOST],
        &[SENTINELS, URL],
        &[SENTINELS, SOCKET],
        &[SENTINELS, CLUSTER],
        &[SENTINELS, CLUSTER, HOST],
        &[CLUSTER, HOST, ("REDIS_DB", "1")],
        &[CLUSTER, ("REDIS_URL", "redis://127.0.0.1/1")],
        &[CLUSTER, SOCKET],
        &[CLUSTER, ("REDIS_URL", "unix:///run/redis.sock")],
        &[CLUSTER, HOST, ("REDIS_KEY_PREFIX", "{a")],
        &[CLUSTER, HOST, ("REDIS_KEY_PREFIX", "}a"), ("REDIS_DB", "1")],
        &[("REDIS_HOST", "127.0.0.1,127.0.0.2")],
        &[SOCKET, ("REDIS_TLS", "true")],
        &[HOST, ("REDIS_TLS_CERT", "one.pem")],
        &[("REDIS_DB", "x"), ("REDIS_PORT", "x"), HOST],
    ];
    let check = |env: &[(&str, &str)]| {
        let exit = Setup::new().args(&["check-config", "--offline"]).envs(env).run();
        let lines: Vec<&str> = exit.log.lines().filter(|line| !line.trim().is_empty()).collect();
        let names = |line: &&&str| env.iter().any(|(name, _)| line.contains(name));
        assert_eq!(exit.code, Some(2), "{env:?}: {}", exit.log);
        assert_eq!(lines.iter().filter(names).count(), 1, "{env:?}: {lines:?}");
        assert_eq!(lines.len(), 1, "{env:?}: {lines:?}");
    };
    together.iter().for_each(|env| check(env));
}

/// What is wrong about this end, if anything.
fn bad_exit(name: &str, value: &str, exit: &Exit) -> Option<String> {
    let lines: Vec<&str> = exit.log.lines().filter(|l| !l.trim().is_empty()).collect();
    let secret = SECRET.contains(&name);
    if exit.code != Some(2) {
        Some(format!("exit code {:?}: {}", exit.code, exit.log))
    } else if lines.len() != 1 {
        Some(format!("{} lines: {}", lines.len(), exit.log))
    } else if !lines[0].contains(name) {
        Some(format!("the line does not name it: {}", lines[0]))
    } else if secret && lines[0].contains(value) {
        Some(format!("the line shows the secret: {}", lines[0]))
    } else if !secret
        && !name.ends_with("_FILE")
        && !name.starts_with("REDIS_UR")
        && !lines[0].contains(value)
    {
        Some(format!("the line does not show the value: {}", lines[0]))
    } else {
        None
    }
}

#[test]
fn a_certificate_and_its_key_go_together() {
    for name in ["TLS_CERT", "TLS_KEY"] {
        let exit = Setup::new().env(name, "one-of-the-two.pem").run();
        assert_eq!(exit.code, Some(2), "{}", exit.log);
        assert!(exit.log.contains("TLS_CERT") && exit.log.contains("TLS_KEY"), "{}", exit.log);
    }
}

/// Makes the files of the next test in the present folder.
const TLS_FILES: &str = r#"
set -e
req() { openssl req -x509 -nodes -subj /CN=localhost "$@" 2>&1; }
req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -keyout own.key -out own.crt
req -newkey rsa:2048 -keyout other.key -out other.crt
openssl x509 -in own.crt -outform DER -out der.crt
openssl pkey -in own.key -outform DER -out der.key
openssl pkey -in own.key -aes128 -passout pass:x -out encrypted.key
openssl rsa -in other.key -traditional -aes128 -passout pass:x -out traditional.key 2>&1
openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:secp256k1 -out curve.key
openssl req -x509 -x509v1 -key own.key -subj /CN=old -out old.crt 2>/dev/null ||
    openssl req -new -key own.key -subj /CN=old | openssl x509 -req -signkey own.key -out old.crt 2>&1
printf '\357\273\277' | cat - own.crt >marked.crt
printf '\357\273\277' | cat - own.key >marked.key
sed 's/$/\r/' own.crt >crlf.crt
sed 's/$/\r/' own.key >crlf.key
(echo 'subject=CN = caf\351'; sed 's/^-/ -/' own.crt) >text.crt
printf '%s%s\n' "$(cat own.crt)" "$(cat other.crt)" >chain.crt
cat other.crt own.crt >reversed.crt
iconv -t UTF-16 own.crt >utf16.crt
head -n 4 own.crt >half.crt
: >empty.crt
openssl crl2pkcs7 -nocrl -certfile own.crt -out bundle.p7b
"#;

/// Certificate, key, which of the two is named, and what is said of it; nothing if they are good.
const TLS_FAULTS: &[(&str, &str, &str, &str)] = &[
    ("own.crt", "own.key", "", ""),
    ("marked.crt", "marked.key", "", ""),
    ("crlf.crt", "crlf.key", "", ""),
    ("text.crt", "own.key", "", ""),
    ("chain.crt", "own.key", "", ""),
    ("own.crt", "other.key", "TLS_KEY", "is not the key of the first certificate beside it"),
    (
        "reversed.crt",
        "own.key",
        "TLS_CERT",
        "own certificate, which is number 2 in it; then its chain",
    ),
    ("old.crt", "own.key", "TLS_CERT", "X.509 version 1, which clients refuse"),
    ("der.crt", "own.key", "TLS_CERT", "openssl x509 -inform DER -in FILE -out NEW"),
    ("own.crt", "der.key", "TLS_KEY", "openssl pkey -inform DER -in FILE -out NEW"),
    ("utf16.crt", "own.key", "TLS_CERT", "save it as UTF-8, not as UTF-16"),
    ("half.crt", "own.key", "TLS_CERT", "a PEM block that is not whole"),
    ("empty.crt", "own.key", "TLS_CERT", "holds no CERTIFICATE in PEM, nor anything else"),
    ("own.key", "own.key", "TLS_CERT", "holds no CERTIFICATE in PEM, only: PRIVATE KEY"),
    ("bundle.p7b", "own.key", "TLS_CERT", "holds no CERTIFICATE in PEM, only: PKCS7"),
    ("own.crt", "own.crt", "TLS_KEY", "holds no PRIVATE KEY in PEM, only: CERTIFICATE"),
    ("own.crt", "encrypted.key", "TLS_KEY", "openssl pkey -in FILE -out NEW makes a copy without"),
    ("other.crt", "traditional.key", "TLS_KEY", "is encrypted"),
    ("own.crt", "curve.key", "TLS_KEY", "make one of ECDSA P-256 or P-384, Ed25519, or RSA"),
    ("none.crt", "own.key", "TLS_CERT", "No such file or directory"),
];

#[test]
fn what_is_wrong_with_a_certificate_or_key_is_said_plainly() {
    let dir = TempDir::new();
    let made = Command::new("sh").args(["-c", TLS_FILES]).current_dir(dir.path()).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let path = |name: &str| dir.path().join(name).display().to_string();
    for (cert, key, variable, says) in TLS_FAULTS {
        let setup = Setup::new().args(&["check-config"]);
        let exit = setup.env("TLS_CERT", &path(cert)).env("TLS_KEY", &path(key)).run();
        let what = format!("{cert} and {key}: {}", exit.log);
        assert_eq!(exit.code, Some(if says.is_empty() { 0 } else { 2 }), "{what}");
        if !says.is_empty() {
            let named = if *variable == "TLS_CERT" { cert } else { key };
            let begin = format!("mqtt-publisher-lite: {variable}=\"{}\": ", path(named));
            assert!(exit.log.starts_with(&begin) && exit.log.contains(says), "{what}");
            assert_eq!(exit.log.lines().count(), 1, "{what}");
        }
    }
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_secret() {
    let dir = TempDir::new();
    let key = dir.file("key", "\u{feff}onboarding-key-0001\r\n").display().to_string();
    let service = Service::start(&[("ONBOARDING_API_KEY_FILE", &key)]);
    let headers = [("Authorization", "Bearer onboarding-key-0001")];
    let body = serde_json::json!({"device_id": "d"});
    assert_eq!(service.http.post_with("/api/v1/onboarding", &headers, &body).status, 200);
}

#[test]
fn http_port_counts_where_port_is_unset() {
    let exit = Setup::new().without_port().env("HTTP_PORT", "http").run();
    assert_eq!(exit.code, Some(2));
    assert!(exit.log.contains("HTTP_PORT"), "{}", exit.log);
    let port = Port::any();
    let number = port.number().to_string();
    let service = Setup::new().env("PORT", &number).env("HTTP_PORT", "1").on_port(port).start();
    assert_eq!(service.http.get("/health").status, 200, "PORT wins");
    let port = Port::any();
    let number = port.number().to_string();
    let service = Setup::new().without_port().env("HTTP_PORT", &number).on_port(port).start();
    assert_eq!(service.http.get("/health").status, 200);
}

#[test]
fn a_password_in_a_bad_url_is_not_shown() {
    for url in [
        "http://user:hunter2secret@127.0.0.1",
        "redis://user:hunter2secret@127.0.0.1:99999",
        "redis://user:hunter2secret@127.0.0.1/notanumber",
        "user:hunter2secret@127.0.0.1:6379",
    ] {
        let exit = Setup::new().env("REDIS_URL", url).run();
        assert_eq!(exit.code, Some(2), "{url}: {}", exit.log);
        assert!(
            exit.log.contains("REDIS_URL") && !exit.log.contains("hunter2secret"),
            "{}",
            exit.log
        );
    }
}

#[test]
fn nothing_configured() {
    let service = Setup::new().without_data_dir().start();
    assert_eq!(service.onboard("d").status, 200);
    for file in ["data/jwt-secret", "data/ca/root-ca.key"] {
        assert_eq!(mode(&service.dir().join(file)), 0o600, "{file}");
    }
    assert!(service.dir().join("data/ca/root-ca.crt").exists());
    let log = service.log();
    assert!(log.contains("⚠️  Provisioning tokens will not be persistent"), "{log}");
}

#[test]
fn the_secret_is_made_once_and_kept() {
    let mut service = Setup::new().start();
    let first = fs::read(service.data("jwt-secret")).unwrap();
    assert!(first.len() >= 32);
    service.kill9();
    service.restart();
    assert_eq!(fs::read(service.data("jwt-secret")).unwrap(), first);
}

#[test]
fn which_secret_signs() {
    let other = "another-example-secret-of-32-bytes";
    let opens = |env: &[(&str, &str)], secret: &str| {
        let service = Service::start(env);
        token::open(secret, &service.token("d"));
        service.log()
    };
    opens(&[("JWT_SECRET", token::SECRET)], token::SECRET);
    opens(&[("PROVISIONING_JWT_SECRET", token::SECRET)], token::SECRET);
    opens(&[("JWT_SECRET", token::SECRET), ("PROVISIONING_JWT_SECRET", other)], token::SECRET);
    let log = opens(&[("JWT_SECRET", "short-but-allowed")], "short-but-allowed");
    assert!(log.lines().any(|l| l.contains("WARN") && l.contains("JWT_SECRET")), "{log}");
    assert!(!log.contains("short-but-allowed"));
}

#[test]
fn secrets_from_files() {
    let dir = TempDir::new();
    let secret = dir.file("secret", &format!("{}\n", token::SECRET)).display().to_string();
    let key = dir.file("key", "onboarding-key-0001\n").display().to_string();
    let service =
        Service::start(&[("JWT_SECRET_FILE", &secret), ("ONBOARDING_API_KEY_FILE", &key)]);
    assert_eq!(service.onboard("d").status, 401, "the key counts");
    let headers = [("Authorization", "Bearer onboarding-key-0001")];
    let body = serde_json::json!({"device_id": "d"});
    let answer = service.http.post_with("/api/v1/onboarding", &headers, &body);
    token::open(token::SECRET, &answer.field("provisioning_token"));
}

#[test]
fn check_config_shows_what_counts_and_no_secret() {
    let secrets = [
        ("JWT_SECRET", "check-config-secret-of-32-bytes-1"),
        ("ONBOARDING_API_KEY", "check-config-onboarding-key"),
        ("ADMIN_API_KEY", "check-config-admin-key"),
        ("REDIS_PASSWORD", "check-config-redis-password"),
    ];
    let setup = Setup::new().args(&["check-config", "--offline"]).envs(&secrets);
    let setup = setup.env("PROVISIONING_TOKEN_TTL", "77").env("REDIS_HOST", "redis.example");
    let exit = setup.run();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    for shown in [
        "PROVISIONING_TOKEN_TTL",
        "77",
        "redis.example",
        "REENROLL",
        "deny",
        "MAX_CONNECTIONS",
        "1024",
    ] {
        assert!(exit.log.contains(shown), "{shown} in {}", exit.log);
    }
    for (name, value) in secrets {
        assert!(!exit.log.contains(value), "{name} is shown: {}", exit.log);
    }
    let url = "redis://user:hunter2secret@redis.example:6380/2";
    let exit = Setup::new().args(&["check-config", "--offline"]).env("REDIS_URL", url).run();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert!(
        !exit.log.contains("hunter2secret") && exit.log.contains("redis.example"),
        "{}",
        exit.log
    );
}

/// A script that makes the fault in the folder of the data, variables, and what is said.
const START_FAULTS: &[(&str, &[Variable], &str)] = &[
    ("", &[], ""),
    ("chmod 500 .", &[], "DATA_DIR: cannot write "),
    (
        "rm -r ca; chmod 500 .",
        &[("CA_STORAGE_PATH", "data/x/ca")],
        "cannot make folder data/x/ca: Permission denied",
    ),
    ("rm -r ca", &[("CA_STORAGE_PATH", "data/jwt-secret")], "CA_STORAGE_PATH: cannot "),
    ("chmod 500 ca/certs", &[], "CA_STORAGE_PATH: cannot write "),
    ("chmod 000 ca/root-ca.key", &[], "root-ca.key: Permission denied"),
    ("rm ca/root-ca.key", &[], "root-ca.key: missing beside root-ca.crt"),
    ("openssl genpkey -algorithm ED25519 -out ca/root-ca.key", &[], "root-ca.key: not the key of"),
    (
        "openssl x509 -in ca/root-ca.crt -outform DER -out x; mv x ca/root-ca.crt",
        &[],
        "no PEM text: it is DER",
    ),
    ("echo nonsense >>ca/index.txt", &[], "index.txt line 1: "),
    ("echo 0123 >jwt-secret", &[], "jwt-secret should hold 64 lower-case hexadecimal digits"),
    ("", &[("CRL_HOOK", "/no/such/hook")], "CRL_HOOK=\"/no/such/hook\": No such file or directory"),
    (
        "",
        &[("CRL_HOOK", "no-such-hook")],
        "CRL_HOOK=\"no-such-hook\": no such program in /usr/local/sbin:",
    ),
    ("", &[("CRL_HOOK", "true")], ""),
    ("", &[("CRL_HOOK", "data/ca")], "CRL_HOOK=\"data/ca\": is no file"),
    (
        "printf '#!/bin/sh\n' >h",
        &[("CRL_HOOK", "data/h")],
        "this user may not execute it: chmod +x",
    ),
    ("echo true >h; chmod 755 h", &[("CRL_HOOK", "data/h")], "must begin with the line #!/bin/sh"),
    (
        "printf '#!/bin/sh\r\n' >h; chmod 755 h",
        &[("CRL_HOOK", "data/h")],
        r#"interpreter "/bin/sh\r" is not there"#,
    ),
    ("printf '#! /bin/sh\n' >h; chmod 755 h", &[("CRL_HOOK", "data/h")], ""),
    ("", &[("REDIS_URL", "redis://127.0.0.1:1")], "Redis: "),
];

#[test]
fn check_config_tries_what_a_start_would() {
    for (script, vars, says) in START_FAULTS {
        let mut service = Setup::new().start();
        assert_eq!(service.terminate().code, Some(0));
        let data = service.data("");
        let made = Command::new("sh").args(["-ec", script]).current_dir(&data).output().unwrap();
        assert!(made.status.success(), "{made:?}");
        let check = |args: &[&str]| {
            let setup = Setup::new().wrapper(as_any_user()).envs(vars).args(args);
            setup.env("DATA_DIR", data.to_str().unwrap()).running_in(service.dir()).run()
        };
        let exit = check(&["check-config"]);
        let fault = exit.log.lines().find(|line| line.contains(says));
        let what = format!("{script} {vars:?}: {says}: {}", exit.log);
        assert_eq!(exit.code, Some(if says.is_empty() { 0 } else { 2 }), "{what}");
        assert!(fault.is_some() && exit.log.contains("REENROLL=deny"), "{what}");
        let is_redis = says.starts_with("Redis");
        assert_eq!(
            check(&["check-config", "--offline"]).code == Some(0),
            says.is_empty() || is_redis,
            "{what}"
        );
        fs::set_permissions(&data, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn check_config_asks_redis_and_leaves_it_as_it_was() {
    let redis = Redis::with_password("right");
    let check = |password: &str| {
        let setup = Setup::new().args(&["check-config"]).env("REDIS_HOST", "127.0.0.1");
        let setup = setup.env("REDIS_PORT", &redis.port().to_string());
        setup.env("REDIS_PASSWORD", password).run()
    };
    assert_eq!(check("right").code, Some(0));
    assert!(redis.keys().is_empty(), "{:?}", redis.keys());
    let exit = check("wrong");
    assert_eq!(exit.code, Some(2), "{}", exit.log);
    assert!(
        exit.log.contains("Redis: ") && exit.log.contains("wrong user name or password?"),
        "{}",
        exit.log
    );
}

/// It takes no lock and stops nothing.
#[test]
fn check_config_beside_the_service() {
    let service = Setup::new().start();
    let setup =
        Setup::new().args(&["check-config"]).env("DATA_DIR", service.data("").to_str().unwrap());
    let exit = setup.run();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    service.enroll("d", &Csr::new("d").make());
}

/// As systemd reads an environment file; each command, and the environment wins.
#[test]
fn variables_from_a_file() {
    let dir = TempDir::new();
    let port = Port::any();
    let number = port.number();
    let text = format!(
        "# ours\nDATA_DIR='{0}/da ta'\nPORT={1}\nJWT_SECRET=\"{2}\"\nREENROLL=deny\n",
        dir.path().display(),
        number,
        token::SECRET
    );
    let file = dir.file("environment", &text).display().to_string();
    let with = |args: &[&str]| {
        let args = [&["--env-file", &file], args].concat();
        Setup::new().without_port().without_data_dir().args(&args).env("REENROLL", "allow")
    };
    assert_eq!(with(&["healthcheck"]).run().code, Some(1));
    let exit = with(&["check-config"]).run();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    for line in [&*format!("PORT={number}"), "REENROLL=allow", "JWT_SECRET=(set)"] {
        assert!(exit.log.lines().any(|l| l == line), "{line} in {}", exit.log);
    }
    let service = with(&[]).on_port(port).start();
    token::open(token::SECRET, &service.token("d"));
    assert_eq!(with(&["healthcheck"]).run().code, Some(0));
    let out = dir.path().join("out").display().to_string();
    let exit = with(&["server-certificate", "broker.lan", "--out", &out]).run();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert!(dir.path().join("out/server.crt").exists() && dir.path().join("da ta/ca").exists());

    let exit = Setup::new().args(&["check-config", "--env-file", "/no/such"]).run();
    assert_eq!(exit.code, Some(2));
    assert!(exit.log.contains("--env-file=\"/no/such\": No such file"), "{}", exit.log);
}

#[test]
fn a_file_of_variables_is_read_again() {
    let dir = TempDir::new();
    let write = |text: &str| dir.file("environment", text).display().to_string();
    let file = write("ONBOARDING_API_KEY=first-key-01234567\nREENROLL=deny\n");
    let service = Setup::new().args(&["--env-file", &file]).start();
    let ask = |key: &str| {
        let bearer = format!("Bearer {key}");
        let body = serde_json::json!({"device_id": key});
        service.http.post_with("/api/v1/onboarding", &[("Authorization", &bearer)], &body).status
    };
    assert_eq!(ask("first-key-01234567"), 200);
    write(
        "ONBOARDING_API_KEY=later-key-01234567\nREENROLL=allow\nWORKERS=4\nPAGE=off\nENROLMENT=registered\n",
    );
    service.signal("HUP");
    let log =
        service.wait_for_log("WORKERS has changed, which takes effect at the next start only");
    assert!(
        log.contains("REENROLL has changed, which takes effect at the next start only"),
        "{log}"
    );
    assert_eq!(log.matches("takes effect at the next start").count(), 3, "{log}");
    let page = service.http.request("GET", "/", &[("Accept", "text/html")], b"");
    assert_eq!(page.status, 404, "PAGE counts at once, as the keys do");
    assert_eq!((ask("first-key-01234567"), ask("later-key-01234567")), (401, 200));
}

#[test]
fn what_counts_for_nothing_is_warned_of() {
    let dir = TempDir::new();
    let file = dir.file("environment", "PORT\nCERT_VALIDITY_DAYS=365\n").display().to_string();
    let setup = Setup::new().args(&["--env-file", &file]).envs(&[
        ("ONBOARDING_APIKEY", "hunter2-0123456789"),
        ("REDIS_PORT", "tcp://10.0.0.1:6379"),
        ("REDIS_SERVICE_HOST", "10.0.0.1"),
        ("REENROLL", "allow"),
        ("HTTP_HOST", "0.0.0.0"),
    ]);
    let service = setup.start();
    let log = service.log();
    for warning in [
        "ONBOARDING_APIKEY is no variable of this program and is ignored: did you mean ONBOARDING_API_KEY?",
        "CERT_VALIDITY_DAYS was a variable of the older service and is ignored: DEVICE_CERT_VALIDITY_DAYS takes",
        &format!("line 1 of {file} is no NAME=value and is ignored"),
        "ONBOARDING_API_KEY is unset: whoever reaches 0.0.0.0 can onboard any device",
        "REENROLL=allow without ONBOARDING_API_KEY: whoever reaches the port gets a certificate",
    ] {
        assert!(
            log.lines().any(|l| l.contains("WARN") && l.contains(warning)),
            "{warning} in {log}"
        );
    }
    assert!(!log.contains("hunter2") && !log.contains("REDIS_"), "{log}");
    let warnings = service.http.get("/ready").json()["warnings"].to_string();
    assert!(warnings.contains("ONBOARDING_APIKEY"), "{warnings}");
}

#[test]
fn check_config_touches_nothing() {
    let setup = Setup::new().args(&["check-config"]);
    let data = setup.data("");
    let (exit, _kept) = setup.run_and_keep();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert!(!data.exists(), "it made {}", data.display());
    let left = fs::read_dir(data.parent().unwrap()).unwrap().flatten().map(|e| e.file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["service.log"]);
}

/// Also for root, who may do anything but that.
#[test]
fn a_folder_that_cannot_be_made_is_told() {
    let setup = Setup::new().without_data_dir().env("DATA_DIR", "/proc/mqtt/data");
    let exit = setup.args(&["check-config"]).run();
    assert_eq!(exit.code, Some(2), "{}", exit.log);
    assert!(exit.log.contains("DATA_DIR: cannot make folder /proc/mqtt/data: "), "{}", exit.log);
}

#[test]
fn values_with_effect() {
    let service =
        Service::start(&[("PROVISIONING_TOKEN_TTL", "86400"), ("DEVICE_CERT_VALIDITY_DAYS", "1")]);
    assert_eq!(service.onboard("d").json()["expires_in"], 86_400);
    let service =
        Service::start(&[("REDIS_ENABLED", "false"), ("REDIS_URL", "redis://127.0.0.1:1")]);
    let health = service.health();
    assert_eq!(
        (&health["storage"], &health["redis"]["enabled"]),
        (&"memory".into(), &false.into())
    );
    assert_eq!(health["status"], "ok");
}

fn mode(path: &std::path::Path) -> u32 {
    fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).permissions().mode()
        & 0o777
}
