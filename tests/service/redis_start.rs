//! How Redis is reached, what is said when it is not, and that nobody waits for it meanwhile.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write as _;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net;

use crate::support::csr::Csr;
use crate::support::port::Port;
use crate::support::proxy::{Mode, Proxy, Stop};
use crate::support::redis::{Redis, Way};
use crate::support::service::{Service, Setup, as_any_user};
use crate::support::temp::TempDir;
use crate::support::{check_error, wait};

#[test]
fn ways_in() {
    let check = |redis: &Redis, env: &[(&str, &str)]| {
        let service = Setup::new().envs(env).start();
        let ok = wait::until(Duration::from_secs(5), || {
            (service.health()["storage"] == "redis").then_some(())
        });
        assert!(ok.is_some(), "{env:?}:\n{}", service.log());
        let compact = service.token("d");
        assert!(redis.exists("mqtt-lite:device:d"), "{env:?}");
        assert_eq!(service.sign(&compact, &Csr::new("d").make()).status, 200);
        redis.cli(&["FLUSHALL"]);
    };
    let redis = Redis::start(&[]);
    let port = redis.port().to_string();
    check(&redis, &[("REDIS_URL", &redis.url())]);
    check(&redis, &[("REDIS_URI", &redis.url())]);
    check(&redis, &[("REDIS_HOST", "localhost"), ("REDIS_PORT", &port)]);
    check(&redis, &[("REDIS_URL", &redis.url()), ("REDIS_HOST", "192.0.2.1"), ("REDIS_PORT", "1")]);

    // A password is taken as it is: in its own variable nothing needs escaping.
    let password = "p@ss:w/rd%41 #?&";
    let redis = Redis::with_password(password);
    let port = redis.port().to_string();
    check(
        &redis,
        &[("REDIS_HOST", "127.0.0.1"), ("REDIS_PORT", &port), ("REDIS_PASSWORD", password)],
    );
    let file = crate::support::temp::TempDir::new().keep_file("password", &format!("{password}\n"));
    let file = file.path().display().to_string();
    check(
        &redis,
        &[("REDIS_HOST", "127.0.0.1"), ("REDIS_PORT", &port), ("REDIS_PASSWORD_FILE", &file)],
    );
    let url = format!("redis://:p%40ss%3Aw%2Frd%2541%20%23%3F%26@127.0.0.1:{port}");
    check(&redis, &[("REDIS_URL", &url)]);

    let redis = Redis::with_acl("device", "pw-of-device", "~* &* +@all");
    let url = format!("redis://device:pw-of-device@127.0.0.1:{}", redis.port());
    check(&redis, &[("REDIS_URL", &url)]);
}

#[test]
fn by_a_socket_and_with_a_certificate() {
    for way in [Way::Socket, Way::MutualTls] {
        let redis = Redis::by(way);
        let service = Setup::new().env_of(&redis.env()).start();
        service.wait_for_storage("redis");
        service.token("d");
        assert!(redis.exists("mqtt-lite:device:d"), "{way:?}");
    }
    let redis = Redis::by(Way::Socket);
    redis.cli(&["CONFIG", "SET", "requirepass", "p&+ %"]);
    let socket = redis.file("redis.sock");
    for env in [
        vec![("REDIS_URL", format!("redis+unix://{socket}?db=3&pass=p%26%2B%20%25"))],
        vec![
            ("REDIS_HOST", socket),
            ("REDIS_PASSWORD", "p&+ %".to_owned()),
            ("REDIS_DB", "3".to_owned()),
        ],
    ] {
        Setup::new().env_of(&env).start().wait_for_storage("redis");
    }
}

/// A socket that others own and may not open.
#[test]
fn a_socket_that_may_not_be_opened() {
    let redis = Redis::by(Way::Socket);
    let socket = redis.file("redis.sock");
    fs::set_permissions(&socket, Permissions::from_mode(0o000)).unwrap();
    let service = Setup::new().wrapper(as_any_user()).env_of(&redis.env()).start();
    let cause = "not allowed to open its socket, see its unixsocketperm";
    service.wait_for_log(&format!("Failed to connect to Redis: {socket}: {cause}"));
    fs::set_permissions(&socket, Permissions::from_mode(0o700)).unwrap();
    service.wait_for_storage("redis");
}

/// What Redis is shown is read from its files for each connection.
#[test]
fn a_certificate_that_is_replaced_while_it_serves() {
    let redis = Redis::by(Way::MutualTls);
    let other = Redis::with_tls();
    let dir = TempDir::new();
    let copy = |redis: &Redis| {
        for name in ["server.crt", "server.key"] {
            fs::copy(redis.file(name), dir.path().join(name)).unwrap();
        }
    };
    copy(&other);
    let path = |name: &str| dir.path().join(name).display().to_string();
    let service = Setup::new()
        .env("REDIS_URL", &redis.url())
        .env("REDIS_TLS_CA", &redis.tls_ca())
        .env("REDIS_TLS_CERT", &path("server.crt"))
        .env("REDIS_TLS_KEY", &path("server.key"))
        .start();
    service.wait_for_log("it does not take our certificate, see REDIS_TLS_CERT: ");
    copy(&redis);
    service.wait_for_storage("redis");
}

#[test]
fn by_tls_with_a_private_ca() {
    let redis = Redis::with_tls();
    let (port, ca) = (redis.port().to_string(), redis.tls_ca());
    for env in [
        vec![("REDIS_URL", redis.url()), ("REDIS_TLS_CA", ca.clone())],
        vec![
            ("REDIS_HOST", "localhost".to_owned()),
            ("REDIS_PORT", port),
            ("REDIS_TLS", "true".to_owned()),
            ("REDIS_TLS_CA", ca),
        ],
    ] {
        let env: Vec<(&str, &str)> = env.iter().map(|(n, v)| (*n, &**v)).collect();
        let service = Setup::new().envs(&env).start();
        service.wait_for_storage("redis");
        service.token("d");
        assert!(redis.exists("mqtt-lite:device:d"));
        redis.cli(&["FLUSHALL"]);
    }
}

/// Each cause by its name, with host and port, and never the password.
#[test]
fn what_keeps_it_out_is_said() {
    const SAID: &str = "Failed to connect to Redis: ";
    let check = |env: &[(&str, &str)], server: &str, cause: &str| {
        let begin = Instant::now();
        let service = Setup::new().envs(env).env("REDIS_CONNECT_TIMEOUT_MS", "700").start();
        let took = begin.elapsed();
        assert!(took < Duration::from_secs(4), "{env:?}: the start waited {took:?}");
        let log = service.wait_for_log(SAID);
        let reason = log.split(SAID).nth(1).unwrap().lines().next().unwrap();
        println!("{reason}");
        let expected = format!("{server}: {cause}");
        assert!(reason.starts_with(&expected), "{env:?}: {reason}, expected {expected}");
        assert!(!log.contains("a-password"), "{log}");
        service.wait_for_log("⚠️  Provisioning tokens will not be persistent");
        service.wait_for_log("(In-Memory)");
        let health = service.health();
        assert_eq!((&health["status"], &health["storage"]), (&"degraded".into(), &"memory".into()));
        assert_eq!(
            (&health["redis"]["enabled"], &health["redis"]["connected"]),
            (&true.into(), &false.into())
        );
        let ready = service.http.get("/ready");
        assert!(ready.status == 200 && ready.text().contains("Redis is away"), "{}", ready.text());
        let compact = service.token("d");
        assert_eq!(service.sign(&compact, &Csr::new("d").make()).status, 200);
    };
    let at = |redis: &Redis| format!("127.0.0.1:{}", redis.port());
    let url = |scheme: &str, redis: &Redis| format!("{scheme}://{}", at(redis));

    let nobody = Port::any();
    let closed = format!("127.0.0.1:{}", nobody.number());
    let no_name = "no-such-host.invalid:6379";
    check(&[("REDIS_URL", &format!("redis://{closed}"))], &closed, "connection refused");
    check(&[("REDIS_URL", &format!("redis://{no_name}"))], no_name, "the name was not found");
    let hung = Redis::start(&[]);
    let stopped = hung.stop();
    check(&[("REDIS_URL", &hung.url())], &at(&hung), "no answer in time");
    drop(stopped);

    let locked = Redis::with_password("the-right-password");
    let wrong = format!("redis://:a-password@{}", at(&locked));
    check(&[("REDIS_URL", &wrong)], &at(&locked), "wrong user name or password? WRONGPASS ");
    let none = url("redis", &locked);
    check(&[("REDIS_URL", &none)], &at(&locked), "it wants a password: NOAUTH ");
    let restricted = Redis::with_acl("device", "a-password", "~mqtt-lite:* +@all -eval");
    let user = format!("redis://device:a-password@{}", at(&restricted));
    let cause = "EVAL is not allowed, docs/redis.md has the rights that its user needs: NOPERM ";
    check(&[("REDIS_URL", &user)], &at(&restricted), cause);

    let plain = Redis::start(&[]);
    let cause = "TLS failed, is this a plain port? ";
    check(&[("REDIS_URL", &url("rediss", &plain))], &at(&plain), cause);
    let cause = "ERR DB index is out of range";
    check(&[("REDIS_URL", &format!("{}/99", plain.url()))], &at(&plain), cause);
    let full = Redis::start(&["--maxclients", "3"]);
    let mut held = Vec::new();
    wait::for_true("it is full", || {
        held.push(TcpStream::connect(("127.0.0.1", full.port())).unwrap());
        full.try_cli(&["PING"]).contains("max number of clients")
    });
    let cause = "ERR max number of clients reached";
    check(&[("REDIS_URL", &full.url())], &at(&full), cause);
    let with_password = format!("redis://:a-password@{}", at(&full));
    check(&[("REDIS_URL", &with_password)], &at(&full), cause);
    drop(held);

    let tls = Redis::with_tls();
    let cause = "no answer of Redis, does the server want TLS? ";
    check(&[("REDIS_URL", &url("redis", &tls))], &at(&tls), cause);
    let other = Redis::with_tls();
    let cause = "its certificate is of a CA that is not trusted, see REDIS_TLS_CA: ";
    check(&[("REDIS_URL", &tls.url())], &at(&tls), cause);
    let env = [("REDIS_URL", &*tls.url()), ("REDIS_TLS_CA", &*other.tls_ca())];
    check(&env, &at(&tls), cause);
    // Its CA as its own certificate, as many a quick start has it.
    let ca_shown = Redis::with_tls();
    let (ca, key) = (ca_shown.tls_ca(), ca_shown.tls_ca().replace("ca.crt", "ca.key"));
    ca_shown.cli(&["CONFIG", "SET", "tls-cert-file", &ca, "tls-key-file", &key]);
    let cause = "its certificate is one of a CA (CA:TRUE), which no server may show: ";
    let env = [("REDIS_URL", &*ca_shown.url()), ("REDIS_TLS_CA", &*ca)];
    check(&env, &at(&ca_shown), cause);
    tls.cli(&["CONFIG", "SET", "tls-auth-clients", "yes"]);
    let env = [("REDIS_URL", &*tls.url()), ("REDIS_TLS_CA", &*tls.tls_ca())];
    check(&env, &at(&tls), "it wants a client certificate, see REDIS_TLS_CERT: ");

    let socket = Redis::by(Way::Socket);
    let path = socket.file("redis.sock");
    let url_of = |path: &str| format!("unix://{path}");
    let nowhere = socket.file("none.sock");
    let cause = "there is no such socket, is Redis running, with its unixsocket there?";
    check(&[("REDIS_URL", &url_of(&nowhere))], &nowhere, cause);
    check(&[("REDIS_URL", &format!("unix://{path}?db=99"))], &path, "ERR DB index is out of range");
    drop(socket);

    // A proxy that does not know the command, as some for clusters are.
    let proxy = Proxy::start(plain.port());
    let hangs_up = proxy.trap("mqtt-lite:live", Stop::Before); // in one write with INFO
    thread::scope(|scope| {
        scope.spawn(|| {
            hangs_up.wait();
            hangs_up.throw_away();
        });
        let server = format!("127.0.0.1:{}", proxy.port());
        let cause = "connection closed at the greeting, by a proxy that knows no INFO?";
        check(&[("REDIS_URL", &proxy.url())], &server, cause);
    });
    let mail = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = mail.local_addr().unwrap().to_string();
    // Each connection is greeted: which of them the cause is told of is not ours to say.
    thread::spawn(move || {
        for client in mail.incoming() {
            let _ = client.unwrap().write_all(b"220 mail.example ESMTP\r\n");
        }
    });
    let cause = "no answer of Redis, does the server want TLS?";
    check(&[("REDIS_URL", &format!("redis://{server}"))], &server, cause);
}

#[test]
fn it_is_found_when_it_comes() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    proxy.set(Mode::Refuse);
    let service = Setup::new().env("REDIS_URL", &proxy.url()).start();
    assert_eq!(service.health()["storage"], "memory");
    let compact = service.token("early");
    proxy.set(Mode::Pass);
    service.wait_for_storage("redis");
    assert_eq!(service.health()["status"], "ok");
    check_error(&service.onboard("early"), 409, "TOKEN_ALREADY_ACTIVE", "it was carried over");
    wait::for_true("it is in Redis", || redis.exists("mqtt-lite:device:early"));
    assert_eq!(service.sign(&compact, &Csr::new("early").make()).status, 200);
}

#[test]
fn losing_it_while_serving_neither_crashes_nor_hangs() {
    let mut redis = Redis::start(&[]);
    let service = with(&redis);
    let (before, csr) = (service.token("before"), Csr::new("before").make());
    let mark = service.log().len();
    redis.kill9();
    for n in 0..20 {
        let begin = Instant::now();
        let answer = service.onboard(&format!("during-{n}"));
        assert_eq!(answer.status, 200, "{}", answer.text());
        assert!(begin.elapsed() < Duration::from_millis(1500), "{n}: {:?}", begin.elapsed());
    }
    service.wait_for_storage("memory");
    let answer = wait::until(Duration::from_secs(3), || {
        Some(service.sign(&before, &csr)).filter(|a| a.status == 200)
    });
    assert!(answer.is_some(), "a token of this instance can be consumed during the outage");
    check_error(&service.sign(&before, &csr), 401, "TOKEN_ALREADY_USED", "once");
    let warnings =
        service.log()[mark..].lines().filter(|l| l.contains("WARN") && l.contains("Redis")).count();
    assert_eq!(warnings, 1, "one warning, not one per request: {}", &service.log()[mark..]);
    let lost = format!("Redis is lost (127.0.0.1:{}: ", redis.port());
    assert!(service.log().contains(&lost), "{}", service.log());
    redis.start_again();
    service.wait_for_storage("redis");
    check_error(&service.sign(&before, &csr), 401, "TOKEN_ALREADY_USED", "after the return");
    check_error(&service.onboard("during-0"), 409, "TOKEN_ALREADY_ACTIVE", "after the return");
}

#[test]
fn a_hung_redis_costs_its_time_out_at_most_and_only_once() {
    let redis = Redis::start(&[]);
    let service = with(&redis);
    let stopped = redis.stop();
    let begin = Instant::now();
    assert_eq!(service.onboard("first").status, 200);
    assert!(begin.elapsed() < Duration::from_millis(1500), "{:?}", begin.elapsed());
    service.wait_for_storage("memory");
    let begin = Instant::now();
    for n in 0..10 {
        assert_eq!(service.onboard(&format!("later-{n}")).status, 200);
    }
    assert!(begin.elapsed() < Duration::from_millis(500), "ten took {:?}", begin.elapsed());
    drop(stopped);
    service.wait_for_storage("redis");
}

/// A balancer or Redis itself closes what was idle for long. What comes next does not pay for it.
#[test]
fn a_connection_that_was_cut_while_idle_is_renewed_before_it_is_used() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let service = Setup::new().env("REDIS_URL", &proxy.url()).start();
    service.wait_for_storage("redis");
    let cuts: [&dyn Fn(); 2] = [&|| proxy.reset(), &|| {
        redis.cli(&["CLIENT", "KILL", "TYPE", "normal"]);
    }];
    for (n, cut) in cuts.iter().enumerate() {
        let device = format!("d{n}");
        let (compact, csr) = (service.token(&device), Csr::new(&device).make());
        wait::for_true("it is idle", || service.token_count() == 1);
        thread::sleep(Duration::from_millis(300)); // long enough to count as idle
        cut();
        wait::for_true("all connections are closed", || proxy.open() == 0);
        let answer = service.sign(&compact, &csr);
        assert_eq!(answer.status, 200, "{}\n{}", answer.text(), service.log());
        assert!(!service.log().contains("Redis is lost"), "{}", service.log());
        wait::for_true("it is cleaned up", || service.token_count() == 0);
    }
}

/// The name service as one program sees it: `/etc/hosts` and `/etc/resolv.conf` of its own.
struct Names {
    dir: TempDir,
}

impl Names {
    fn new(hosts: &str, resolver: &str) -> Names {
        let names = Names { dir: TempDir::new() };
        names.dir.file("hosts", hosts);
        names.dir.file("resolv.conf", resolver);
        names
    }

    /// Before the program, in a mount namespace of its own.
    fn wrapper(&self) -> Vec<String> {
        let script = "mount --bind $0/hosts /etc/hosts && \
            mount --bind $0/resolv.conf /etc/resolv.conf && exec \"$@\"";
        let dir = self.dir.path().display().to_string();
        ["unshare", "-rm", "sh", "-c", script, &dir].map(str::to_owned).to_vec()
    }

    /// In the same file, which is what is mounted.
    fn set_hosts(&self, hosts: &str) {
        let file =
            OpenOptions::new().write(true).truncate(true).open(self.dir.path().join("hosts"));
        file.unwrap().write_all(hosts.as_bytes()).unwrap();
    }

    fn start(&self, env: &[(&str, &str)]) -> Service {
        let wrapper = self.wrapper();
        let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
        Setup::new().wrapper(&wrapper).envs(env).start()
    }
}

/// A name has two addresses. The first swallows what is sent to it, or takes connections and never
/// answers on them.
#[test]
fn a_name_with_a_dead_address() {
    for takes_connections in [false, true] {
        let redis = Redis::start(&[]);
        let address = SocketAddr::from((Ipv6Addr::LOCALHOST, redis.port()));
        let dead = net::socket(net::AddressFamily::INET6, net::SocketType::STREAM, None).unwrap();
        net::bind(&dead, &address).unwrap();
        net::listen(&dead, if takes_connections { 100 } else { 0 }).unwrap();
        let filling = || TcpStream::connect_timeout(&address, Duration::from_millis(100)).ok();
        let _queued: Vec<TcpStream> = match takes_connections {
            false => std::iter::from_fn(filling).take(10).collect(),
            true => vec![],
        };
        let names = Names::new("::1 redis.test\n127.0.0.1 redis.test\n", "");
        let url = format!("redis://redis.test:{}", redis.port());
        let service = names.start(&[("REDIS_URL", &url), ("REDIS_CONNECT_TIMEOUT_MS", "1000")]);
        service.wait_for_storage("redis");
    }
}

/// Resolver and Redis hang together. It is an outage soon, and the answer is used when it comes.
#[test]
fn a_resolver_that_hangs() {
    let redis = Redis::start(&[]);
    let proxy = Proxy::start(redis.port());
    let _silent =
        UdpSocket::bind(("127.0.0.153", 53)).expect("a port for which one has to be root");
    let resolver = "nameserver 127.0.0.153\noptions timeout:4 attempts:1\n";
    let names = Names::new("127.0.0.1 redis.test\n", resolver);
    let url = format!("redis://redis.test:{}", proxy.port());
    let service = names.start(&[("REDIS_URL", &url), ("REDIS_CONNECT_TIMEOUT_MS", "1000")]);
    service.wait_for_storage("redis");
    let (compact, csr) = (service.token("d"), Csr::new("d").make());
    names.set_hosts("");
    proxy.reset();
    let begin = Instant::now();
    let answer = wait::until(Duration::from_secs(3), || {
        Some(service.sign(&compact, &csr)).filter(|answer| answer.status == 200)
    });
    assert!(answer.is_some(), "503 for {:?}\n{}", begin.elapsed(), service.log());
    assert!(service.log().contains("its name is still being looked up"), "{}", service.log());
    names.set_hosts("127.0.0.1 redis.test\n");
    service.wait_for_storage("redis");
}

/// It serves with as many connections as it gets; one of the four is for the record.
#[test]
fn a_server_that_allows_fewer_connections() {
    let redis = Redis::start(&["--maxclients", "3"]);
    let _other = TcpStream::connect(("127.0.0.1", redis.port())).unwrap();
    let service =
        Setup::new().envs(&[("REDIS_URL", &redis.url()), ("REDIS_POOL_SIZE", "4")]).start();
    service.wait_for_storage("redis");
    let cause = "ERR max number of clients reached";
    service.wait_for_log(&format!(" of 3 connections: 127.0.0.1:{}: {cause}", redis.port()));
    assert_eq!(service.sign(&service.token("d"), &Csr::new("d").make()).status, 200);
}

/// A tunnel: the host is not the one that the certificate names.
#[test]
fn the_name_in_the_certificate_of_the_server() {
    let redis = Redis::with_tls();
    let names = Names::new("127.0.0.1 tunnel.test\n", "");
    let (port, ca) = (redis.port().to_string(), redis.tls_ca());
    let env = [
        ("REDIS_HOST", "tunnel.test"),
        ("REDIS_PORT", &*port),
        ("REDIS_TLS", "true"),
        ("REDIS_TLS_CA", &*ca),
    ];
    let service = names.start(&env);
    service.wait_for_log(&format!("tunnel.test:{port}: its certificate is for another name: "));
    let named = [&env[..], &[("REDIS_TLS_SERVER_NAME", "localhost")]].concat();
    names.start(&named).wait_for_storage("redis");
    let exit = Setup::new().envs(&[("REDIS_HOST", "h"), ("REDIS_TLS_SERVER_NAME", "h2")]).run();
    assert_eq!(exit.code, Some(2), "{}", exit.log);
    assert!(
        exit.log.contains("REDIS_TLS_SERVER_NAME=\"h2\": needs REDIS_TLS=true"),
        "{}",
        exit.log
    );
}

#[test]
fn a_password_that_changes_while_it_serves() {
    let redis = Redis::with_password("first");
    let port = redis.port().to_string();
    let file = TempDir::new().keep_file("password", "first\n");
    let path = file.path().display().to_string();
    let env =
        [("REDIS_HOST", "127.0.0.1"), ("REDIS_PORT", &*port), ("REDIS_PASSWORD_FILE", &*path)];
    let service = Setup::new().envs(&env).start();
    service.wait_for_storage("redis");
    let compact = service.token("d");
    redis.cli(&["CONFIG", "SET", "requirepass", "second"]);
    fs::write(file.path(), "second\n").unwrap();
    redis.try_cli(&["-a", "second", "CLIENT", "KILL", "TYPE", "normal"]);
    let csr = Csr::new("d").make();
    wait::for_true("it is redeemed", || service.sign(&compact, &csr).status == 200);
    assert!(!service.log().contains("Redis is lost"), "{}", service.log());
    let mark = service.log().len();
    service.signal("HUP");
    let log = service.wait_for_log_after(mark, "SIGHUP: TLS certificate and key");
    assert!(!log[mark..].contains("REDIS_PASSWORD"), "it is in use already: {}", &log[mark..]);
}

/// Rather no answer than one from memory.
#[test]
fn without_a_redis_that_is_required_nothing_is_answered() {
    let mut redis = Redis::start(&[]);
    let url = redis.url();
    redis.kill9();
    let begin = Instant::now();
    let service = thread::scope(|scope| {
        let env = [("REDIS_URL", &*url), ("REDIS_REQUIRED", "true")];
        let service = scope.spawn(move || Setup::new().envs(&env).start());
        thread::sleep(Duration::from_millis(2500)); // more than REDIS_CONNECT_TIMEOUT_MS
        redis.start_again();
        service.join().unwrap()
    });
    assert!(begin.elapsed() > Duration::from_millis(2500), "the start has not waited");
    assert_eq!(service.health()["storage"], "redis");
    let (compact, csr) = (service.token("d"), Csr::new("d").make());
    redis.kill9();
    for _ in 0..3 {
        check_error(&service.onboard("e"), 503, "SERVICE_UNAVAILABLE", "onboarding");
        check_error(&service.sign(&compact, &csr), 503, "SERVICE_UNAVAILABLE", "redeeming");
    }
    let ready = || service.http.get("/ready");
    wait::for_true("/ready says so", || ready().status == 503);
    let reason = format!("Redis is away: 127.0.0.1:{}: connection refused", redis.port());
    assert_eq!(ready().json()["reasons"], serde_json::json!([reason]));
    redis.start_again();
    wait::for_true("/ready is content", || ready().status == 200);
    assert_eq!(service.onboard("e").status, 200);
    check_error(&service.onboard("d"), 409, "TOKEN_ALREADY_ACTIVE", "carried over");
    assert_eq!(service.sign(&compact, &csr).status, 200);

    let exit = Setup::new().env("REDIS_REQUIRED", "true").run();
    assert_eq!(exit.code, Some(2), "{}", exit.log);
    assert!(
        exit.log
            .contains("REDIS_REQUIRED=\"true\": needs REDIS_URL, REDIS_HOST or REDIS_SENTINELS"),
        "{}",
        exit.log
    );
}

/// Somebody has to do something about these.
#[test]
fn an_outage_that_will_not_end_by_itself_is_a_warning() {
    let check = |url: &str, cause: Option<&str>| {
        let service = Setup::new().env("REDIS_URL", url).start();
        service.wait_for_log("Failed to connect to Redis: ");
        let ready = service.http.get("/ready");
        assert_eq!(ready.status, 200, "memory serves: {}", ready.text());
        let warnings = ready.json()["warnings"].to_string();
        let said = "Redis is away and will not be back by itself: 127.0.0.1:";
        match cause {
            Some(cause) => {
                assert!(warnings.contains(said) && warnings.contains(cause), "{warnings}")
            }
            None => assert!(!warnings.contains(said), "{warnings}"),
        }
    };
    let locked = Redis::with_password("right");
    check(
        &format!("redis://:wrong@127.0.0.1:{}", locked.port()),
        Some("wrong user name or password"),
    );
    check(&format!("redis://127.0.0.1:{}", locked.port()), Some("it wants a password"));
    let restricted = Redis::with_acl("device", "pw-of-device", "~mqtt-lite:* +@all -eval");
    let url = format!("redis://device:pw-of-device@127.0.0.1:{}", restricted.port());
    check(&url, Some("EVAL is not allowed"));
    let plain = Redis::start(&[]);
    check(&format!("{}/99", plain.url()), Some("DB index is out of range"));
    let port = plain.port().to_string();
    let replica = Redis::start(&["--replicaof", "127.0.0.1", &port]);
    check(&replica.url(), Some("READONLY"));
    let tls = Redis::with_tls();
    check(&tls.url(), Some("CA that is not trusted"));
    let mut gone = Redis::start(&[]);
    gone.kill9();
    check(&gone.url(), None);
    let full = Redis::start(&["--maxmemory", "1"]);
    check(&full.url(), None);
}

#[test]
fn a_policy_that_may_drop_marks_is_warned_of() {
    let redis = Redis::start(&["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]);
    let service = with(&redis);
    let log = service.log();
    assert!(log.lines().any(|l| l.contains("WARN") && l.contains("noeviction")), "{log}");
    let ready = service.http.get("/ready");
    assert!(ready.status == 200 && ready.text().contains("noeviction"), "{}", ready.text());
    let redis = Redis::start(&[]);
    assert!(!with(&redis).log().contains("noeviction"));
}

#[test]
fn connections_are_few() {
    let redis = Redis::start(&[]);
    let service = with(&redis);
    thread::scope(|scope| {
        for n in 0..16 {
            let service = &service;
            scope.spawn(move || service.token(&format!("d{n}")));
        }
    });
    let clients = redis.cli(&["CLIENT", "LIST"]).lines().count() - 1; // without redis-cli's own
    println!("{clients} connections");
    assert!((1..=16).contains(&clients), "managed free tiers allow 30: {clients}");
}

fn with(redis: &Redis) -> Service {
    let service = Setup::new().env("REDIS_URL", &redis.url()).start();
    service.wait_for_storage("redis");
    service
}
