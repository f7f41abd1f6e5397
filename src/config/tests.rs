//! Every variable with good and bad values, and that secrets stay inside.

use std::collections::HashMap;
use std::time::Duration;

use super::variables::Allowed;
use super::*;

const ROOT: &str = "/pem/root.crt";

/// Files that the tests name, by path; a `root.crt` made for the purpose is always there.
fn load(vars: &[(&str, &str)], files: &[(&str, &[u8])]) -> Result<Config, ConfigError> {
    let vars: HashMap<_, _> = vars.iter().copied().collect();
    let (cert, key) = certificate();
    let read = |path: &Path| match path.to_str() {
        Some(ROOT) => Ok(cert.clone().into_bytes()),
        Some("/pem/root.key") => Ok(key.clone().into_bytes()),
        Some(path) => {
            let file = files.iter().find(|(name, _)| *name == path);
            file.map(|(_, bytes)| bytes.to_vec()).ok_or(io::ErrorKind::NotFound.into())
        }
        None => Err(io::ErrorKind::InvalidFilename.into()),
    };
    Config::from_lookup(|name| vars.get(name).map(OsString::from), read)
}

fn certificate() -> (String, String) {
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = rcgen::CertificateParams::default().self_signed(&key).unwrap();
    (cert.pem(), key.serialize_pem())
}

fn good(vars: &[(&str, &str)]) -> Config {
    load(vars, &[]).unwrap_or_else(|e| panic!("{vars:?}: {e}"))
}

/// What is warned of on loopback, where onboarding may be open.
fn warnings(vars: &[(&str, &str)]) -> Vec<String> {
    good(&[vars, &[("HTTP_HOST", "localhost")]].concat()).warnings
}

fn check(vars: &[(&str, &str)], expected: &str) {
    let error = load(vars, &[]).map(|_| ()).map_err(|e| e.to_string());
    assert_eq!(error, Err(expected.to_owned()), "{vars:?}");
}

#[test]
fn an_empty_environment_gives_the_defaults_of_the_table() {
    let lines = good(&[]).shown;
    for variable in var::ALL {
        let effective = match variable.name {
            // Read only in place of another, or only where there is a Redis.
            "HTTP_PORT" | "PROVISIONING_JWT_SECRET" => continue,
            "REDIS_ENABLED" => "false",
            name if name.starts_with("REDIS_") => continue,
            "CA_STORAGE_PATH" => "./data/ca",
            _ if variable.default.is_empty() => "(unset)",
            _ => variable.default,
        };
        let line = format!("{}={effective}", variable.name);
        assert_eq!(lines.iter().filter(|l| **l == line).count(), 1, "{line} in {lines:#?}");
    }
    assert!(good(&[]).redis.is_none());
    let open = "ONBOARDING_API_KEY is unset: whoever reaches 0.0.0.0 can onboard any device that has \
                no certificate; set it, or HTTP_HOST=127.0.0.1";
    assert_eq!(good(&[]).warnings, [open]);
    assert_eq!(good(&[]).run_dir, Path::new("./data/run"));
}

#[test]
fn an_empty_variable_is_unset() {
    let empty: Vec<_> = var::ALL.iter().map(|variable| (variable.name, "")).collect();
    assert_eq!(good(&empty).shown, good(&[]).shown);
}

#[test]
fn redis_has_the_defaults_of_the_table() {
    let lines = good(&[("REDIS_HOST", "redis.lan")]).shown;
    for variable in var::ALL.iter().filter(|v| v.name.starts_with("REDIS_")) {
        let effective = match variable.name {
            "REDIS_URL" | "REDIS_URI" => continue,
            "REDIS_HOST" => "redis.lan",
            _ if variable.default.is_empty() => "(unset)",
            _ => variable.default,
        };
        let line = format!("{}={effective}", variable.name);
        assert_eq!(lines.iter().filter(|l| **l == line).count(), 1, "{line} in {lines:#?}");
    }
}

#[test]
fn what_counts_is_described_in_the_order_of_the_table() {
    let config = good(&[("REDIS_HOST", "h")]);
    let mut table = var::ALL.iter();
    for line in config.shown {
        let (name, _) = line.split_once('=').unwrap();
        assert!(table.any(|variable| variable.name == name), "{line}");
    }
}

#[test]
fn every_number_has_its_range() {
    let numbers = var::ALL.iter().filter_map(|variable| match variable.allowed {
        Allowed::Number(min, max) => Some((variable.name, min, max)),
        _ => None,
    });
    for (name, min, max) in numbers {
        for value in [min, max] {
            good(&[(name, &value.to_string())]);
        }
        let below = min.checked_sub(1).map_or("-1".to_owned(), |n| n.to_string());
        let above = (max + 1).to_string();
        let huge = "9".repeat(30);
        for bad in [&below, &above, "x", " 1", "+1", "1.0", "1e1", "0x1", &huge] {
            let line = format!("{name}={bad:?}: must be a whole number from {min} to {max}");
            check(&[(name, bad)], &line);
        }
    }
}

#[test]
fn every_flag_is_yes_or_no() {
    for variable in var::ALL.iter().filter(|v| matches!(v.allowed, Allowed::Flag)) {
        for word in ["true", "TRUE", "1", "yes", "On", "false", "0", "no", "OFF"] {
            good(&[("REDIS_HOST", "h"), (variable.name, word)]);
        }
        for bad in ["2", "y", "enabled", " true"] {
            check(
                &[(variable.name, bad)],
                &format!("{}={bad:?}: must be true or false", variable.name),
            );
        }
    }
    assert!(good(&[("RENEW_REVOKES", "YES")]).rules.renew_revokes);
    assert!(!good(&[("RENEW_REVOKES", "off")]).rules.renew_revokes);
}

#[test]
fn every_choice_is_one_of_its_words() {
    for variable in var::ALL {
        let Allowed::OneOf(words) = variable.allowed else { continue };
        for word in words {
            let key = ("ONBOARDING_API_KEY", "0123456789abcdef");
            good(&[(variable.name, word), ("REDIS_HOST", "r"), key]);
            good(&[(variable.name, &word.to_uppercase()), key]);
        }
        for bad in ["x", "of", " info"] {
            let line = format!("{}={bad:?}: must be one of {}", variable.name, words.join(", "));
            check(&[(variable.name, bad)], &line);
        }
    }
    assert!(good(&[("REENROLL", "Allow")]).rules.reenroll);
    assert_eq!(good(&[("OUTAGE_REDEEM", "none")]).outage_redeem, OutageRedeem::None);
    assert_eq!(good(&[("LOG_FORMAT", "json")]).log.format, LogFormat::Json);
    assert_eq!(good(&[("LOG_LEVEL", "trace")]).log.level, LevelFilter::Trace);
}

#[test]
fn every_text_is_what_its_row_says() {
    const HOST: &str =
        "a host name or an IP address, without scheme and port, or a Unix socket's path";
    let rows = [
        ("HTTP_HOST", "example.com", "an IP address or localhost"),
        ("HTTP_HOST", "127.0.0.1:80", "an IP address or localhost"),
        ("RUST_LOG", "a=b=c", "a list of [target=]level"),
        ("REDIS_HOST", "redis:6379", HOST),
        ("REDIS_HOST", "redis://redis", HOST),
        ("REDIS_HOST", "0.0.0.0", HOST),
        ("REDIS_SENTINELS", "a:1,", "host[:port] of sentinels, separated by commas"),
        ("REDIS_SENTINELS", "a:0", "host[:port] of sentinels, separated by commas"),
        ("REDIS_SENTINELS", "redis://a", "host[:port] of sentinels, separated by commas"),
        ("REDIS_SENTINELS", "::1:x", "host[:port] of sentinels, separated by commas"),
        ("REDIS_SENTINEL_MASTER", "my master", "a name without white space"),
        ("REDIS_SENTINEL_USERNAME", "app", "a user name that has a REDIS_SENTINEL_PASSWORD"),
        ("REDIS_USERNAME", "app", "a user name that has a REDIS_PASSWORD"),
        ("REDIS_KEY_PREFIX", "a\nb", "at most 128 bytes without control characters"),
        ("TRUSTED_PROXIES", "10.0.0.0/8,proxy", "IP addresses or CIDRs, separated by commas"),
        ("TRUSTED_PROXIES", "10.0.0.0/33", "IP addresses or CIDRs, separated by commas"),
    ];
    for (name, bad, allowed) in rows {
        check(&[(name, bad)], &format!("{name}={bad:?}: must be {allowed}"));
    }
    let long = "é".repeat(120);
    let shown = "é".repeat(100);
    check(
        &[("REDIS_KEY_PREFIX", &long)],
        &format!(
            "REDIS_KEY_PREFIX=\"{shown}\"…: must be at most 128 bytes without control characters"
        ),
    );
}

#[test]
fn what_is_not_utf_8_is_named() {
    use std::os::unix::ffi::OsStringExt as _;
    for name in var::ALL.iter().map(|v| v.name) {
        let lookup = |asked: &str| (asked == name).then(|| OsString::from_vec(b"\xff".to_vec()));
        let error = Config::from_lookup(lookup, |_| Err(io::ErrorKind::NotFound.into()));
        assert_eq!(error.unwrap_err().to_string(), format!("{name}: must be UTF-8"));
    }
}

#[test]
fn the_address_to_listen_on() {
    let address = |vars| (good(vars).http.host.to_string(), good(vars).http.port);
    assert_eq!(address(&[]), ("0.0.0.0".to_owned(), 3002));
    assert_eq!(
        address(&[("HTTP_HOST", "LocalHost"), ("HTTP_PORT", "1")]),
        ("127.0.0.1".to_owned(), 1)
    );
    assert_eq!(
        address(&[("HTTP_HOST", "::"), ("PORT", "2"), ("HTTP_PORT", "1")]),
        ("::".to_owned(), 2)
    );
    assert_eq!(address(&[("HTTP_HOST", "[::1]")]), ("::1".to_owned(), 3002));
    let proxies = good(&[("TRUSTED_PROXIES", "10.0.0.0/8, fd00::/8")]).http.trusted_proxies;
    assert!(proxies.iter().any(|range| range.contains("10.1.2.3".parse().unwrap())));
    assert_eq!(proxies.len(), 2);
}

#[test]
fn tls_needs_a_certificate_and_its_key() {
    let (cert, key) = (("TLS_CERT", ROOT), ("TLS_KEY", "/pem/root.key"));
    assert!(good(&[cert, key]).http.tls.is_some());
    check(&[cert], "TLS_KEY: must be set when TLS_CERT is set");
    check(&[key], "TLS_CERT: must be set when TLS_KEY is set");
    check(
        &[("TLS_CERT", "/pem/root.key"), key],
        "TLS_CERT=\"/pem/root.key\": holds no CERTIFICATE in PEM, only: PRIVATE KEY",
    );
    check(
        &[cert, ("TLS_KEY", ROOT)],
        &format!("TLS_KEY=\"{ROOT}\": holds no PRIVATE KEY in PEM, only: CERTIFICATE"),
    );
    check(
        &[cert, ("TLS_KEY", "/none")],
        "TLS_KEY=\"/none\": must be a readable PEM file with the private key of TLS_CERT, \
         but it gives: entity not found",
    );
}

#[test]
fn folders() {
    let config = good(&[("DATA_DIR", "/var/lib/x")]);
    assert_eq!(
        (config.ca.dir.to_str(), config.run_dir.to_str()),
        (Some("/var/lib/x/ca"), Some("/var/lib/x/run"))
    );
    assert_eq!(good(&[("CA_STORAGE_PATH", "/ca")]).ca.dir, Path::new("/ca"));
    let long = format!("/{}", "d".repeat(89));
    let systemd = ("RUNTIME_DIRECTORY", "/run/x:/run/y");
    assert_eq!(good(&[("DATA_DIR", &long), systemd]).run_dir, Path::new("/run/x"));
    let reason = format!("the path \"{long}/run\" for private sockets must be at most 90 bytes");
    check(&[("DATA_DIR", &long)], &format!("DATA_DIR: {reason}"));
    let longer = format!("{long}x");
    let reason = format!("the path \"{longer}\" for private sockets must be at most 90 bytes");
    check(&[("RUNTIME_DIRECTORY", &longer)], &format!("RUNTIME_DIRECTORY: {reason}"));
}

#[test]
fn what_a_service_manager_says() {
    assert_eq!(good(&[]).supervision, Supervision::default());
    let socket = ("NOTIFY_SOCKET", "@/org/x");
    let watchdog = ("WATCHDOG_USEC", "30000000");
    let read = |more: &[(&str, &str)]| good(&[&[socket, watchdog], more].concat()).supervision;
    let expected = Supervision {
        notify_socket: Some("@/org/x".to_owned()),
        watchdog: Some(Duration::from_secs(30)),
        watchdog_pid: None,
    };
    assert_eq!(read(&[]), expected);
    assert_eq!(read(&[("WATCHDOG_PID", "77")]).watchdog_pid, Some(77));
    assert_eq!(expected.watchdog_of(1), Some(Duration::from_secs(30)));
    let other = Supervision { watchdog_pid: Some(77), ..expected };
    assert_eq!((other.watchdog_of(78), other.watchdog_of(77)), (None, other.watchdog));
    // What is meant for nobody is not asked for.
    assert_eq!(good(&[("WATCHDOG_USEC", "0")]).supervision.watchdog, None);
    check(&[("WATCHDOG_USEC", "soon")], "WATCHDOG_USEC: must be a whole number of microseconds");
    check(&[("WATCHDOG_PID", "-1")], "WATCHDOG_PID: must be the id of a process");
}

#[test]
fn api_keys_fit_a_header() {
    for name in ["ONBOARDING_API_KEY", "ADMIN_API_KEY"] {
        let long = "x".repeat(1025);
        let secret = "mpl-abcdefghijklmnopqrstuvwxyz";
        for bad in ["fifteen-letters", "sixteen letters!", "sixteen-lettérs!", secret, &long] {
            check(&[(name, bad)], &format!("{name}: {}", var::ADMIN_API_KEY.allowed));
        }
    }
    let config = good(&[("ADMIN_API_KEY", "0123456789abcdef")]);
    assert!(config.admin_keys[0].key.matches(b"0123456789abcdef"));
    assert!(config.onboarding_api_key.is_none());
}

#[test]
fn the_jwt_secret() {
    let revealed =
        |vars| good(vars).jwt_secret.map(|s| String::from_utf8(s.reveal().clone()).unwrap());
    assert_eq!(revealed(&[]), None);
    assert_eq!(revealed(&[("PROVISIONING_JWT_SECRET", "b")]).as_deref(), Some("b"));
    let both = [("JWT_SECRET", "a"), ("PROVISIONING_JWT_SECRET", "b")];
    assert_eq!(revealed(&both).as_deref(), Some("a"));
    let published = "mqtt-publisher-lite-secret-key-change-in-production";
    for name in ["JWT_SECRET", "PROVISIONING_JWT_SECRET"] {
        let reason =
            "must not be the published default of the older service: anyone can sign with it";
        check(&[(name, published)], &format!("{name}: {reason}"));
        let text = format!("{name} is shorter than 32 bytes: it may be guessed from a token");
        assert_eq!(warnings(&[(name, &"x".repeat(31))]), [text]);
        assert_eq!(warnings(&[(name, &"x".repeat(32))]), [""; 0]);
    }
}

#[test]
fn secrets_come_from_files_too() {
    let path = "/secret";
    let from = |name: &str, bytes: &[u8]| {
        load(&[(&format!("{name}_FILE"), path), ("REDIS_HOST", "r")], &[(path, bytes)])
            .map_err(|e| e.to_string())
    };
    for (bytes, expected) in [("k\n", "k"), ("k\r\n", "k"), ("k\n\n", "k\n"), ("k ", "k ")] {
        let config = from("JWT_SECRET", bytes.as_bytes()).unwrap();
        assert_eq!(config.jwt_secret.unwrap().reveal(), expected.as_bytes());
    }
    assert_eq!(from("JWT_SECRET", b"\xff\0").unwrap().jwt_secret.unwrap().reveal(), b"\xff\0");
    let url = from("REDIS_URL", b"redis://:pw@other\n").unwrap().redis.unwrap();
    assert_eq!(place(&url), ("other".to_owned(), 6379));
    for name in var::ALL.iter().filter(|v| v.is_secret()).map(|v| v.name) {
        let line = format!("{name}_FILE=\"/secret\": must be a file that is not empty");
        assert_eq!(from(name, b"\n").err(), Some(line));
        let line = format!(
            "{name}_FILE=\"/none\": must be a readable file, but it gives: entity not found"
        );
        check(&[(&format!("{name}_FILE"), "/none")], &line);
        let line = format!("{name}: must be unset when {name}_FILE is set");
        check(&[(name, "x"), (&format!("{name}_FILE"), "/none")], &line);
    }
    assert_eq!(
        from("REDIS_PASSWORD", b"\xff").err().as_deref(),
        Some("REDIS_PASSWORD: must be UTF-8")
    );
}

/// Host and port; of a Unix socket its path and 0.
fn place(redis: &Redis) -> (String, u16) {
    match &redis.at {
        Place::Host(HostPort { host, port }) => (host.clone(), *port),
        Place::Socket(path) => (path.display().to_string(), 0),
        Place::Sentinels(_) | Place::Cluster(_) => panic!("several"),
    }
}

/// host, port, username, password, database, TLS
fn server(vars: &[(&str, &str)]) -> (String, u16, Option<String>, Option<String>, i64, bool) {
    let redis = good(vars).redis.unwrap_or_else(|| panic!("{vars:?}: no Redis"));
    let (host, port) = place(&redis);
    let password = redis.login.password.map(|secret| secret.reveal().clone());
    (host, port, redis.login.username, password, redis.db, redis.tls.is_some())
}

#[test]
fn redis_from_a_url() {
    let check = |url, host: &str, port, user: Option<&str>, password: Option<&str>, db, tls| {
        let (user, password) = (user.map(str::to_owned), password.map(str::to_owned));
        let expected = (host.to_owned(), port, user, password, db, tls);
        assert_eq!(server(&[("REDIS_URL", url)]), expected, "{url}");
        assert_eq!(server(&[("REDIS_URI", url)]), expected, "{url}");
    };
    check("redis://h", "h", 6379, None, None, 0, false);
    check("redis://h/", "h", 6379, None, None, 0, false);
    check("rediss://h:1/15", "h", 1, None, None, 15, true);
    check("redis://:p@h", "h", 6379, None, Some("p"), 0, false);
    check("redis://u:p%40%2F%23%3f@h", "h", 6379, Some("u"), Some("p@/#?"), 0, false);
    check("redis://default:@h", "h", 6379, None, None, 0, false);
    check("redis://:p@[::1]:7/3", "::1", 7, None, Some("p"), 3, false);
    check("redis://10.0.0.1", "10.0.0.1", 6379, None, None, 0, false);
    check("valkey://:p@h", "h", 6379, None, Some("p"), 0, false);
    check("valkeys://h/2", "h", 6379, None, None, 2, true);
    check("unix:///run/redis.sock", "/run/redis.sock", 0, None, None, 0, false);
    let all = "redis+unix:///run/a%20b?db=3&user=u&pass=p%26+";
    check(all, "/run/a b", 0, Some("u"), Some("p&+"), 3, false);
    check("unix:///s?pass=p", "/s", 0, None, Some("p"), 0, false);
}

#[test]
fn redis_urls_that_are_refused() {
    let form = var::REDIS_URL.allowed;
    let bad = [
        "h",
        "h:6379",
        "http://h",
        "unix://",
        "unix:sock",
        "unix://host/sock",
        "unix:///sock#x",
        "unix:///sock?protocol=resp3",
        "unix:///sock?db=x",
        "unix:///sock?db=1&db=1",
        "unix:///sock?pass=a&user=b&pass=c",
        "unix:///sock?db",
        "valkey+unix:///sock",
        "redis://",
        "redis:///1",
        "redis://h/x",
        "redis://h/-1",
        "redis://h/2147483648",
        "redis://h/1/2",
        "redis://h:0",
        "redis://h:65536",
        "redis://h?db=1",
        "redis://h?protocol=resp3",
        "rediss://h#insecure",
        "redis://h#",
        "redis://0.0.0.0",
        "redis://:a/b@h",
        "redis://:a#b@h",
        "redis://:%ff@h",
        "redis:h",
        "redis://h h",
    ];
    for url in bad {
        check(&[("REDIS_URL", url)], &format!("REDIS_URL: {form}"));
        check(&[("REDIS_URI", url)], &format!("REDIS_URI: {form}"));
    }
    check(
        &[("REDIS_URL", "redis://hunter2@h")],
        "REDIS_URL: names a user without a password; a password alone is redis://:password@host",
    );
}

#[test]
fn redis_from_its_parts() {
    let host = ("REDIS_HOST", "h");
    let password = ("REDIS_PASSWORD", "p@%40");
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(server(&[host]), ("h".into(), 6379, None, None, 0, false));
    assert_eq!(server(&[host, password]), ("h".into(), 6379, None, some("p@%40"), 0, false));
    assert_eq!(
        server(&[host, password, ("REDIS_USERNAME", "u"), ("REDIS_DB", "9"), ("REDIS_TLS", "1")]),
        ("h".into(), 6379, some("u"), some("p@%40"), 9, true)
    );
    assert_eq!(server(&[host, ("REDIS_USERNAME", "default")]).2, None);
    let socket = ("REDIS_HOST", "/run/redis.sock");
    assert_eq!(server(&[socket, password]).0, "/run/redis.sock");
    let reason = "must be false for a Unix socket, over which Redis speaks no TLS";
    check(&[socket, ("REDIS_TLS", "true")], &format!("REDIS_TLS=\"true\": {reason}"));
    for (written, expected) in [("::1", "::1"), ("[::1]", "::1"), ("a-b_c.d.", "a-b_c.d.")] {
        assert_eq!(server(&[("REDIS_HOST", written)]).0, expected);
    }
}

#[test]
fn sentinels_say_where_redis_is() {
    let list = ("REDIS_SENTINELS", "a, b:1,[::1]:2,::2, [::3]");
    let found = |vars: &[(&str, &str)]| match good(vars).redis.unwrap().at {
        Place::Sentinels(sentinels) => sentinels,
        other => panic!("{other:?}"),
    };
    let sentinels = found(&[list]);
    let known = sentinels.known.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    assert_eq!(known, "a:26379 b:1 [::1]:2 [::2]:26379 [::3]:26379");
    assert_eq!((&*sentinels.master, sentinels.login.username), ("mymaster", None));
    let more = [
        list,
        ("REDIS_SENTINEL_MASTER", "m"),
        ("REDIS_SENTINEL_USERNAME", "u"),
        ("REDIS_SENTINEL_PASSWORD", "hunter"),
        ("REDIS_PASSWORD", "other"),
        ("REDIS_DB", "2"),
    ];
    let sentinels = found(&more);
    assert_eq!((&*sentinels.master, sentinels.login.username.as_deref()), ("m", Some("u")));
    assert_eq!(sentinels.login.password.unwrap().reveal(), "hunter");
    let redis = good(&more).redis.unwrap();
    assert_eq!((redis.login.password.unwrap().reveal().as_str(), redis.db), ("other", 2));
    for (name, value) in
        [("REDIS_HOST", "h"), ("REDIS_URL", "redis://h"), ("REDIS_URI", "unix:///s")]
    {
        check(
            &[list, (name, value)],
            &format!("REDIS_SENTINELS={:?}: must be unset when {name} is set", list.1),
        );
    }
}

#[test]
fn a_cluster_has_several_nodes() {
    let cluster = ("REDIS_CLUSTER", "true");
    let found = |vars: &[(&str, &str)]| match good(&[&[cluster], vars].concat()).redis.unwrap().at {
        Place::Cluster(seeds) => {
            seeds.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(found(&[("REDIS_HOST", "a, b:1,[::1]:2"), ("REDIS_PORT", "7")]), "a:7 b:1 [::1]:2");
    assert_eq!(found(&[("REDIS_URL", "rediss://a")]), "a:6379");
    let url = ("REDIS_URL", "redis://u:p%2C,w@a:1,b:2,[::1]/0");
    assert_eq!(found(&[url]), "a:1 b:2 [::1]:6379");
    assert_eq!(good(&[cluster, url]).redis.unwrap().login.password.unwrap().reveal(), "p,,w");
    let host = ("REDIS_HOST", "a");
    let wrong: [(&[(&str, &str)], &str); 8] = [
        (&[], "REDIS_CLUSTER"),
        (&[host, ("REDIS_DB", "1")], r#"REDIS_DB="1": must be 0 when REDIS_CLUSTER is set"#),
        (&[("REDIS_URL", "redis://a/1")], r#"REDIS_DB="1": must be 0 when REDIS_CLUSTER is set"#),
        (
            &[("REDIS_SENTINELS", "a")],
            r#"REDIS_SENTINELS="a": must be unset when REDIS_CLUSTER is set"#,
        ),
        (
            &[("REDIS_HOST", "/s")],
            r#"REDIS_CLUSTER="true": must be false for a Unix socket, since its nodes are at TCP ports"#,
        ),
        (
            &[host, ("REDIS_KEY_PREFIX", "{x}")],
            r#"REDIS_KEY_PREFIX="{x}": must have no braces when REDIS_CLUSTER is set"#,
        ),
        (&[("REDIS_HOST", "a,,b")], "REDIS_HOST"),
        (&[("REDIS_URL", "redis://:hunter@a,b:x")], "REDIS_URL"),
    ];
    for (vars, line) in wrong {
        let error = load(&[&[cluster], vars].concat(), &[]).expect_err(line);
        let error = error.to_string();
        assert!(error.starts_with(line), "{error}");
        assert!(!error.contains("hunter"), "{error}");
    }
    assert!(load(&[("REDIS_HOST", "a,b")], &[]).is_err(), "several nodes without a cluster");
}

#[test]
fn which_redis_counts() {
    let url = ("REDIS_URL", "redis://a");
    assert!(good(&[url, ("REDIS_ENABLED", "false")]).redis.is_none());
    assert!(good(&[("REDIS_PORT", "1")]).redis.is_none());
    assert_eq!(server(&[url, ("REDIS_URI", "redis://b")]).0, "a");
    assert!(server(&[url, ("REDIS_TLS", "true")]).5);
    assert!(server(&[("REDIS_URL", "rediss://a"), ("REDIS_TLS", "false")]).5);
    let parts = [
        url,
        ("REDIS_HOST", "b"),
        ("REDIS_PORT", "nonsense"),
        ("REDIS_PASSWORD_FILE", "/none"),
        ("JWT_SECRET", "x"),
    ];
    assert_eq!(server(&parts).0, "a");
    let warning =
        "REDIS_URL is set, so these are ignored: REDIS_HOST, REDIS_PORT, REDIS_PASSWORD_FILE";
    assert!(good(&parts).warnings.contains(&warning.to_owned()));
}

#[test]
fn parts_of_redis_without_its_host_are_warned_of() {
    let check = |vars: &[(&str, &str)], ignored: &str| {
        let warning = "neither REDIS_URL nor REDIS_HOST is set, so tokens are kept in memory and \
                       these are ignored";
        let vars = [vars, &[("HTTP_HOST", "localhost")]].concat();
        let config = load(&vars, &[("/pw", b"p")]).unwrap();
        assert_eq!(config.warnings, [format!("{warning}: {ignored}")], "{vars:?}");
    };
    check(&[("REDIS_PASSWORD", "x"), ("REDIS_PORT", "6380")], "REDIS_PORT, REDIS_PASSWORD");
    check(&[("REDIS_PASSWORD_FILE", "/pw")], "REDIS_PASSWORD_FILE");
    check(&[("REDIS_HOST", ""), ("REDIS_URL", ""), ("REDIS_DB", "1")], "REDIS_DB");
    check(&[("REDIS_USERNAME", "u"), ("REDIS_PASSWORD", "p")], "REDIS_USERNAME, REDIS_PASSWORD");
    check(&[("REDIS_TLS", "true"), ("REDIS_TLS_CA", ROOT)], "REDIS_TLS, REDIS_TLS_CA");
    let quiet: [&[(&str, &str)]; 3] = [
        &[("REDIS_PORT", "1"), ("REDIS_ENABLED", "false")],
        &[("REDIS_KEY_PREFIX", "x:"), ("REDIS_TIMEOUT_MS", "10"), ("REDIS_POOL_SIZE", "1")],
        &[("REDIS_CONNECT_TIMEOUT_MS", "10"), ("REDIS_PORT", "")],
    ];
    for vars in quiet {
        assert_eq!(warnings(vars), [""; 0], "{vars:?}");
    }
}

/// Kubernetes sets `REDIS_PORT` for a service that is called redis, and `HTTP_PORT` for one called http.
#[test]
fn the_ports_of_kubernetes_are_not_ours() {
    let redis = ("REDIS_PORT", "tcp://10.0.0.1:6379");
    assert_eq!(warnings(&[redis]), [""; 0]);
    assert_eq!(server(&[redis, ("REDIS_HOST", "h")]).1, 6379);
    assert_eq!(server(&[redis, ("REDIS_URL", "redis://h:1")]).1, 1);
    let secret = ("JWT_SECRET", "0123456789abcdef0123456789abcdef");
    assert_eq!(warnings(&[redis, ("REDIS_URL", "redis://h:1"), secret]), [""; 0]);
    assert_eq!(good(&[("HTTP_PORT", "tcp://10.0.0.2:80")]).http.port, 3002);
    let bad = "REDIS_PORT=\"http://x\": must be a whole number from 1 to 65535";
    check(&[("REDIS_PORT", "http://x")], bad);
}

#[test]
fn an_empty_key_prefix_is_none_at_all() {
    let prefix = |vars| good(vars).redis.unwrap().key_prefix;
    assert_eq!(prefix(&[("REDIS_HOST", "h")]), "mqtt-lite:");
    assert_eq!(prefix(&[("REDIS_HOST", "h"), ("REDIS_KEY_PREFIX", "")]), "");
    assert_eq!(prefix(&[("REDIS_HOST", "h"), ("REDIS_KEY_PREFIX", "x:")]), "x:");
}

#[test]
fn redis_trusts_the_given_roots() {
    let tls = [("REDIS_URL", "rediss://h"), ("REDIS_TLS_CA", ROOT)];
    let ca = good(&tls).redis.unwrap().tls.unwrap().ca;
    assert_eq!(ca.unwrap(), Path::new(ROOT));
    let wants = "must be a readable PEM file with at least one certificate";
    let with = |bytes: &[u8]| {
        let vars = [("REDIS_HOST", "h"), ("REDIS_TLS", "1"), ("REDIS_TLS_CA", "/ca")];
        load(&vars, &[("/ca", bytes)]).map(|_| ()).map_err(|e| e.to_string())
    };
    let empty = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let none = "holds no CERTIFICATE in PEM, nor anything else";
    let foreign = "certificate number 1 in it cannot be read";
    for (bytes, why) in [(b"".as_slice(), none), (b"text", none), (empty, foreign)] {
        assert_eq!(with(bytes), Err(format!("REDIS_TLS_CA=\"/ca\": {why}")));
    }
    check(
        &[("REDIS_TLS_CA", "/none")],
        &format!("REDIS_TLS_CA=\"/none\": {wants}, but it gives: entity not found"),
    );
    check(
        &[("REDIS_HOST", "h"), ("REDIS_TLS_CA", ROOT)],
        &format!("REDIS_TLS_CA=\"{ROOT}\": needs REDIS_TLS=true or a rediss:// URL"),
    );
}

#[test]
fn redis_is_shown_a_certificate() {
    let (cert, key) = (("REDIS_TLS_CERT", ROOT), ("REDIS_TLS_KEY", "/pem/root.key"));
    let url = ("REDIS_URL", "rediss://h");
    assert!(good(&[url, cert, key]).redis.unwrap().tls.unwrap().own.is_some());
    check(&[url, cert], "REDIS_TLS_KEY: must be set when REDIS_TLS_CERT is set");
    check(&[url, key], "REDIS_TLS_CERT: must be set when REDIS_TLS_KEY is set");
    check(
        &[url, cert, ("REDIS_TLS_KEY", ROOT)],
        &format!("REDIS_TLS_KEY=\"{ROOT}\": holds no PRIVATE KEY in PEM, only: CERTIFICATE"),
    );
    check(
        &[("REDIS_HOST", "h"), cert, key],
        &format!("REDIS_TLS_CERT=\"{ROOT}\": needs REDIS_TLS=true or a rediss:// URL"),
    );
}

#[test]
fn unwise_combinations_are_warned_of() {
    let (onboarding, admin) =
        (("ONBOARDING_API_KEY", "0123456789abcdef"), ("ADMIN_API_KEY", "fedcba9876543210"));
    let seen = "used without TLS on 0.0.0.0: whoever sees the traffic can read it";
    assert_eq!(good(&[onboarding]).warnings, [format!("ONBOARDING_API_KEY {seen}")]);
    assert_eq!(
        good(&[onboarding, admin]).warnings,
        [format!("ONBOARDING_API_KEY and ADMIN_API_KEY {seen}")]
    );
    for quiet in ["127.0.0.2", "::1", "localhost"] {
        assert_eq!(good(&[admin, ("HTTP_HOST", quiet)]).warnings, [""; 0]);
    }
    let open = good(&[admin]).warnings;
    assert!(open[0].starts_with("ADMIN_API_KEY used without TLS") && open.len() == 2, "{open:?}");
    assert_eq!(
        warnings(&[("REENROLL", "allow")]),
        [
            "REENROLL=allow without ONBOARDING_API_KEY: whoever reaches the port gets a certificate in the \
          name of any device; set the key"
        ]
    );
    assert_eq!(warnings(&[("REENROLL", "allow"), onboarding]), [""; 0]);
    let tls = [onboarding, ("TLS_CERT", ROOT), ("TLS_KEY", "/pem/root.key")];
    assert_eq!(good(&tls).warnings, [""; 0]);
    let admins = ("ADMIN_API_KEYS", "anna:0123456789abcdef");
    assert_eq!(
        good(&[onboarding, admin, admins]).warnings[0],
        format!("ONBOARDING_API_KEY and ADMIN_API_KEY and ADMIN_API_KEYS {seen}")
    );
    assert!(good(&[admins]).warnings[0].starts_with("ADMIN_API_KEYS used without TLS"));
    for same in [("ADMIN_API_KEY", onboarding.1), admins] {
        assert_eq!(
            good(&[onboarding, same, ("HTTP_HOST", "::1")]).warnings,
            ["ONBOARDING_API_KEY is an admin key, too: whoever may onboard may revoke"]
        );
    }
    assert_eq!(
        warnings(&[("REDIS_HOST", "h")]),
        ["JWT_SECRET is unset: other instances on this Redis cannot verify our tokens"]
    );
}

/// What is secret is marked `hunter`; nothing that can be printed may contain it.
#[test]
fn secrets_are_never_printed() {
    let secrets: &[(&str, &str)] = &[
        ("JWT_SECRET", "hunter-1"),
        ("ONBOARDING_API_KEY", "hunter-2-0123456789"),
        ("ADMIN_API_KEY", "hunter-3-0123456789"),
        ("REDIS_HOST", "h"),
        ("REDIS_PASSWORD", "hunter-4"),
    ];
    let url = [secrets, &[("REDIS_URL", "redis://u:hunter-5@h/1")]].concat();
    for vars in [secrets, &url] {
        let config = good(vars);
        let printed = format!("{config:?} {config:#?} {}", config.shown.join("\n"));
        assert!(!printed.contains("hunter"), "{printed}");
        for set in ["JWT_SECRET", "ONBOARDING_API_KEY", "ADMIN_API_KEY", "REDIS_PASSWORD"] {
            assert!(printed.contains(&format!("{set}=(set)")), "{set}");
        }
    }
    let secret = var::ALL.iter().filter(|variable| variable.is_secret());
    for variable in secret.filter(|v| !v.name.contains("JWT_SECRET")) {
        for bad in ["hunter 2", "hunter://2", "redis://:hunter#2@h", "redis://hunter@h"] {
            if let Err(error) = load(&[(variable.name, bad)], &[]) {
                let printed = format!("{error} {error:?}");
                assert!(!printed.contains("hunter"), "{printed}");
            }
        }
    }
}

#[test]
fn a_value_cannot_forge_a_line() {
    let config = good(&[("DATA_DIR", "x\nREENROLL=allow")]);
    assert!(config.shown.contains(&"DATA_DIR=x\\nREENROLL=allow".to_owned()));
    let error = load(&[("HTTP_HOST", "x\ny\u{1b}[0m")], &[]).unwrap_err().to_string();
    assert_eq!(error.lines().count(), 1);
    assert!(!error.contains('\u{1b}'));
}
