//! The program under its operator: commands, signals, exit codes, and the lines on its console.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::enrolment::{admin, log_lines, put};
use crate::support::csr::{self, Csr};
use crate::support::http::{Client, Connection};
use crate::support::port::Port;
use crate::support::redis::Redis;
use crate::support::service::{ADMIN_KEY, Service, Setup, send_signal};
use crate::support::{token, wait};

#[test]
fn help_version_and_nonsense() {
    let run = |args: &[&str]| Setup::new().args(args).run();
    let help = run(&["--help"]);
    assert_eq!(help.code, Some(0), "{}", help.log);
    for word in ["check-config", "server-certificate", "healthcheck", "--version"] {
        assert!(help.log.contains(word), "{word} in {}", help.log);
    }
    let version = run(&["--version"]);
    assert_eq!(version.code, Some(0));
    assert!(version.log.contains(env!("CARGO_PKG_VERSION")), "{}", version.log);
    for nonsense in
        [&["--nonsense"][..], &["nonsense"], &["check-config", "more"], &["server-certificate"]]
    {
        let exit = run(nonsense);
        assert_eq!(exit.code, Some(2), "{nonsense:?}: {}", exit.log);
    }
}

#[test]
fn a_signal_stops_it_with_exit_code_0() {
    for signal in ["TERM", "INT"] {
        let mut service = Service::start(&[]);
        // An idle client must not keep it from stopping.
        let idle = Connection::open(&service.http).unwrap();
        service.signal(signal);
        let exit = service.wait_exit();
        assert_eq!(exit.code, Some(0), "SIG{signal}: {}", exit.log);
        drop(idle);
        assert!(TcpStream::connect(("127.0.0.1", service.port())).is_err());
    }
}

/// Where it waits for its first setting, no more than its signals is set up.
#[test]
fn a_sighup_at_the_very_start_does_no_harm() {
    let setup = Setup::new();
    let (fifo, pid) = (setup.dir().join("environment"), setup.dir().join("pid"));
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let says_who = format!("echo $$ >{}; exec \"$@\"", pid.display());
    let setup = setup.wrapper(&["sh", "-c", &says_who, "sh"]);
    let setup = setup.args(&["--env-file", fifo.to_str().unwrap()]);
    thread::scope(|scope| {
        let started = scope.spawn(|| setup.start());
        let mut writer = File::create(&fifo).unwrap();
        let pid = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
        send_signal(pid, "HUP");
        // It is read again, at SIGHUP for example.
        fs::write(fifo.with_extension("file"), "").unwrap();
        fs::rename(fifo.with_extension("file"), &fifo).unwrap();
        writer.write_all(b"REENROLL=deny\n").unwrap();
        drop(writer);
        let service = started.join().unwrap();
        service.wait_for_log("SIGHUP: TLS certificate and key and the API keys were read again");
    });
}

#[test]
fn a_taken_port_is_exit_code_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let exit = Setup::new().env("PORT", &port.to_string()).run();
    assert_eq!(exit.code, Some(1), "{}", exit.log);
    assert!(exit.log.contains(&port.to_string()), "{}", exit.log);
}

#[test]
fn healthcheck_asks_the_local_server() {
    let service = Service::start(&[]);
    let ask =
        |port: u16| Setup::new().args(&["healthcheck"]).env("PORT", &port.to_string()).run().code;
    assert_eq!(ask(service.port()), Some(0));
    assert_eq!(ask(Port::any().number()), Some(1));
}

#[test]
fn a_server_certificate_for_the_broker() {
    let service = Service::start(&[]);
    let out = crate::support::temp::TempDir::new();
    let folder = out.path().display().to_string();
    let data = service.data("").display().to_string();
    let names = ["server-certificate", "broker.example", "localhost", "127.0.0.1", "::1"];
    let args = [&names[..], &["--days", "30", "--out", &folder]].concat();
    let exit = Setup::new().env("DATA_DIR", &data).args(&args).run();
    assert_eq!(exit.code, Some(0), "while the server runs, without a lock: {}", exit.log);
    let files: Vec<_> = fs::read_dir(out.path()).unwrap().map(|f| f.unwrap().path()).collect();
    let find = |text: &str| {
        let with = files.iter().find(|f| fs::read_to_string(f).unwrap().contains(text));
        with.unwrap_or_else(|| panic!("no file with {text} in {files:?}"))
    };
    let key = find("PRIVATE KEY-----");
    assert_eq!(fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
    let leaf = fs::read_to_string(find("BEGIN CERTIFICATE")).unwrap();
    let text = csr::x509_text(&leaf);
    for part in [
        "DNS:broker.example",
        "DNS:localhost",
        "IP Address:127.0.0.1",
        "TLS Web Server Authentication",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(text.contains("IP Address:0:0:0:0:0:0:0:1"), "{text}");
    let ca = service.data("ca/root-ca.crt").display().to_string();
    let file = out.file("leaf.pem", &leaf).display().to_string();
    csr::openssl(&["verify", "-purpose", "sslserver", "-CAfile", &ca, &file], "");
    let public = csr::openssl(&["pkey", "-in", key.to_str().unwrap(), "-pubout"], "");
    assert_eq!(
        csr::openssl(&["x509", "-noout", "-pubkey"], &leaf),
        public,
        "key and certificate match"
    );
}

#[test]
fn a_server_certificate_needs_a_ca() {
    let setup = Setup::new().args(&["server-certificate", "broker.example"]);
    let folder = setup.data("ca").display().to_string();
    let exit = setup.run();
    assert!(matches!(exit.code, Some(1 | 2)), "{exit:?}");
    assert!(exit.log.contains(&folder), "it says where it looked: {}", exit.log);
}

#[test]
fn lines_that_operators_know_with_redis() {
    let redis = Redis::start(&[]);
    let service =
        Setup::new().env("REDIS_URL", &redis.url()).env("JWT_SECRET", token::SECRET).start();
    let provisioning = format!(
        "🔐 Provisioning API: http://127.0.0.1:{}/api/v1/onboarding (Redis)",
        service.port()
    );
    for line in [
        "💾 Initializing Redis (Token Persistence)...",
        "✅ Redis connected successfully",
        &provisioning,
    ] {
        service.wait_for_log(line);
    }
    assert!(!service.log().contains("will not be persistent"));
}

#[test]
fn lines_that_operators_know_without_redis() {
    let service = Service::start(&[]);
    let provisioning = format!(
        "🔐 Provisioning API: http://127.0.0.1:{}/api/v1/onboarding (In-Memory)",
        service.port()
    );
    service.wait_for_log(&provisioning);
    service.wait_for_log("⚠️  Provisioning tokens will not be persistent");
    let der = token::pem_to_der(&service.read("ca/root-ca.crt"));
    let fingerprint = token::sha256_hex(&der);
    let log = service.log().to_lowercase().replace(':', "");
    assert!(log.contains(&fingerprint), "the CA's fingerprint: {}", service.log());
}

#[test]
fn keys_without_tls_are_warned_of_except_on_loopback() {
    let warns = |host: &str, key: &str| {
        let service =
            Setup::new().env("HTTP_HOST", host).env(key, "a-key-of-16-characters").start();
        let log = service.log();
        assert!(!log.contains("a-key-of-16-characters"));
        log.lines().any(|l| l.contains("WARN") && l.contains(key) && l.contains("TLS"))
    };
    for key in ["ONBOARDING_API_KEY", "ADMIN_API_KEY"] {
        assert!(warns("0.0.0.0", key), "{key}");
        assert!(!warns("127.0.0.1", key), "{key}");
    }
}

#[test]
fn no_secret_in_the_log_at_any_level() {
    let redis = Redis::with_password("redis-password-77");
    let secrets = [
        ("JWT_SECRET", "a-jwt-secret-that-nobody-may-see"),
        ("ONBOARDING_API_KEY", "onboarding-key-0001"),
        ("ADMIN_API_KEY", "an-admin-key-0001"),
    ];
    let setup =
        Setup::new().envs(&secrets).env("LOG_LEVEL", "trace").env("REDIS_URL", &redis.url());
    let service = setup.start();
    service.wait_for_storage("redis");
    let headers = [("Authorization", "Bearer onboarding-key-0001")];
    let body = serde_json::json!({"device_id": "d"});
    let answer = service.http.post_with("/api/v1/onboarding", &headers, &body);
    let compact = answer.field("provisioning_token");
    let request = Csr::new("d").make();
    assert_eq!(service.sign(&compact, &request).status, 200);
    assert_eq!(service.sign(&compact, &request).status, 401);
    let hash = token::sha256_hex(compact.as_bytes());
    let log = service.wait_for_log(&hash[..8]);
    let csr_line = request.lines().nth(1).unwrap();
    let shown = secrets.iter().map(|s| s.1);
    for secret in shown.chain(["redis-password-77", &compact, &hash[..9], csr_line, "PRIVATE KEY"])
    {
        assert!(!log.contains(secret), "{secret:.20} is in the log:\n{log}");
    }
    let health = service.http.get("/health").text();
    assert!(!health.contains("redis-password-77"));
    let arguments = fs::read_to_string(format!("/proc/{}/cmdline", service.pid())).unwrap();
    assert!(!arguments.contains("redis-password-77"));
}

#[test]
fn one_line_for_what_was_issued_consumed_refused_and_signed() {
    let service = Service::start(&[]);
    let lines_with = |mark: usize, word: &str| {
        let log = service.log();
        log[mark..].lines().filter(|l| l.contains(word)).count()
    };
    let (request, start) = (Csr::new("dev-4711").make(), service.log().len());
    let compact = service.token("dev-4711");
    wait::for_true("issued", || lines_with(start, "dev-4711") == 1);
    let log = service.log();
    let line = log[start..].lines().find(|l| l.contains("dev-4711")).unwrap();
    assert!(line.contains("127.0.0.1"), "the client's address: {line}");
    let middle = service.log().len();
    let signed = service.sign(&compact, &request);
    let serial = signed.field("serial_number");
    wait::for_true("signed", || service.log()[middle..].to_lowercase().contains(&serial));
    assert!((1..=2).contains(&lines_with(middle, "dev-4711")), "{}", service.log());
    let end = service.log().len();
    assert_eq!(service.sign(&compact, &request).status, 401);
    wait::for_true("refused", || {
        lines_with(end, "TOKEN_ALREADY_USED") == 1 || lines_with(end, "dev-4711") == 1
    });
}

/// Nobody reads the pipe, and the service goes on; what it could not say it counts, and says when
/// somebody reads.
#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let service = Setup::new().log_to(writer).start();
    let mut device = Connection::open(&service.http).unwrap();
    let mut onboard = |n: u32| {
        let answer =
            device.post("/api/v1/onboarding", &serde_json::json!({"device_id": n.to_string()}));
        assert_eq!(answer.unwrap().status, 200);
    };
    let mut longest = Duration::ZERO;
    for n in 0..2000 {
        onboard(n);
        let begin = Instant::now();
        assert_eq!(service.http.get("/health").status, 200);
        longest = longest.max(begin.elapsed());
    }
    assert!(longest < Duration::from_millis(500), "{longest:?}");
    let page = service.http.get("/metrics").text();
    let name = "mqtt_lite_log_lines_lost_total ";
    let lost = page.lines().find_map(|line| line.strip_prefix(name)).unwrap().to_owned();

    let mut got = vec![0; 1 << 20];
    let n = reader.read(&mut got).unwrap();
    got.truncate(n);
    onboard(2000);
    let mut more = vec![0; 1 << 16];
    let n = reader.read(&mut more).unwrap();
    got.extend_from_slice(&more[..n]);
    let text = String::from_utf8(got).unwrap();
    let issued = text.lines().filter(|line| line.contains(" issued for ")).count();
    assert_eq!(issued as u64 + lost.parse::<u64>().unwrap(), 2001);
    let said = format!("WARN  lines of the log were lost, which nobody took in time: {lost}");
    let last: Vec<&str> = text.lines().rev().take(2).collect();
    assert!(last[1].ends_with(&said) && last[0].contains(" issued for 2000,"), "{last:?}");
    for line in text.lines() {
        let at = line.split(' ').next().unwrap();
        assert!(at.len() == 24 && at.ends_with('Z') && line.len() > 40, "half a line: {line}");
    }
}

/// More refusals of one kind than anyone reads are counted.
#[test]
fn refusals_of_one_kind_are_summed_up() {
    let mut service = Service::start(&[]);
    let mut client = Connection::open(&service.http).unwrap();
    let bad = serde_json::json!({"provisioning_token": "no token", "csr": "x"});
    for _ in 0..3000 {
        assert_eq!(client.post("/api/v1/sign-csr", &bad).unwrap().status, 401);
    }
    assert_eq!(service.sign("", "x").status, 401);
    let exit = service.terminate();
    let lines = |text: &str| exit.log.lines().filter(|line| line.contains(text)).count();
    let shown = lines("refused: TOKEN_INVALID_FORMAT");
    assert!((100..400).contains(&shown), "{shown} lines");
    assert_eq!(lines("refused: TOKEN_MISSING"), 1, "another kind has its line");
    let sum = |line: &str| {
        let rest = line.split_once("INFO  more requests were refused within ")?.1;
        rest.split_once(" s, TOKEN_INVALID_FORMAT: ")?.1.parse::<usize>().ok()
    };
    let summed: usize = exit.log.lines().filter_map(sum).sum();
    assert_eq!(shown + summed, 3000, "{}", exit.log);
}

/// Whatever a line names stands in a field of its own, too.
#[test]
fn json_lines_have_fields() {
    let env = [("LOG_FORMAT", "json"), ("LOG_LEVEL", "debug"), ("ADMIN_API_KEY", ADMIN_KEY)];
    let service = Service::start(&env);
    let signed = service.enroll("meter-7", &Csr::new("meter-7").make());
    let serial = signed.field("serial_number");
    assert_eq!(service.onboard("meter-7").status, 409);
    let other = "4a".repeat(16);
    assert_eq!(service.http.get(&format!("/api/v1/certificates/{other}/download")).status, 404);
    put(&service, "meter-7", json!({"blocked": true, "register": true}));
    let csv = "device_id\nmeter-8\nmeter-9\n";
    let bearer = format!("Bearer {ADMIN_KEY}");
    let fields = [("Content-Type", "text/csv"), ("Authorization", &*bearer)];
    assert_eq!(
        service.http.request("POST", "/api/v1/devices", &fields, csv.as_bytes()).status,
        200
    );
    let one = format!("/api/v1/devices/meter-7/certificates/{serial}");
    assert_eq!(admin(&service, "DELETE", &one, &Value::Null).status, 200);
    service.token("meter-10");
    assert_eq!(service.revoke("meter-10").status, 200);

    let mut events = BTreeSet::new();
    for line in log_lines(&service) {
        let message = line["message"].as_str().unwrap();
        let field = |name: &str| line.get(name).map_or("", |value| value.as_str().unwrap());
        events.insert(field("event").to_owned());
        let devices: Vec<&str> = field("device").split(',').collect();
        for device in ["meter-7", "meter-8", "meter-9", "meter-10"] {
            assert_eq!(message.contains(device), devices.contains(&device), "{line}");
        }
        for serial in [&serial, &other] {
            assert_eq!(message.contains(serial), field("serial") == serial, "{line}");
        }
        let has_client = message.contains("127.0.0.1") && !message.contains("://");
        assert_eq!(if has_client { "127.0.0.1" } else { "" }, field("client"), "{line}");
        assert_eq!(
            if message.contains("by admin,") { "admin" } else { "" },
            field("key"),
            "{line}"
        );
        assert!(!has_client || !field("event").is_empty(), "{line}");
    }
    let expected = [
        "",
        "certificate_revoked",
        "certificate_signed",
        "device_changed",
        "refused",
        "token_issued",
        "token_killed",
    ];
    assert_eq!(events, expected.map(ToOwned::to_owned).into());
}

#[test]
fn log_levels() {
    let log = |env: &[(&str, &str)]| {
        let service = Service::start(env);
        service.token("quiet-device");
        let _ = Client::new(service.port()).get("/health");
        service.log()
    };
    assert!(!log(&[("LOG_LEVEL", "error")]).contains("quiet-device"));
    assert!(
        !log(&[("LOG_LEVEL", "info"), ("RUST_LOG", "error")]).contains("quiet-device"),
        "RUST_LOG wins"
    );
    assert!(log(&[]).contains("quiet-device"));
}
