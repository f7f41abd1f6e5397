//! The program as an operator starts it: what it prints, where, and how it exits.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::process::Command;
use std::thread;

/// Exit code, standard output, standard error.
#[allow(clippy::unwrap_used, reason = "a test that cannot start the program has failed")]
fn run(args: &[&str], vars: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_mqtt-publisher-lite"))
        .args(args)
        .env_clear()
        .envs(vars.iter().copied())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn help_and_version_go_to_standard_output() {
    let (code, out, err) = run(&["--version"], &[("PORT", "not read")]);
    assert_eq!((code, out.as_str(), err.as_str()), (Some(0), "mqtt-publisher-lite 0.1.0\n", ""));
    let (code, out, err) = run(&["--help"], &[]);
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(out.contains("check-config") && out.contains("REDIS_URL*"));
}

#[test]
fn what_is_wrong_takes_one_line_and_exits_2() {
    let check = |args: &[&str], vars: &[(&str, &str)], line: &str| {
        let expected = (Some(2), String::new(), format!("mqtt-publisher-lite: {line}\n"));
        assert_eq!(run(args, vars), expected);
    };
    check(&["--port"], &[], "unknown argument \"--port\" (see --help)");
    let port = [("PORT", "80 80")];
    check(&[], &port, "PORT=\"80 80\": must be a whole number from 1 to 65535");
    check(&["check-config"], &port, "PORT=\"80 80\": must be a whole number from 1 to 65535");
    check(
        &["check-config"],
        &[("ADMIN_API_KEY", "hunter2")],
        "ADMIN_API_KEY: must be 16 to 1024 visible ASCII characters, not beginning with mpl-",
    );
    check(
        &["check-config"],
        &[("REDIS_PASSWORD_FILE", "/dev/zero")],
        "REDIS_PASSWORD_FILE=\"/dev/zero\": must be a readable file, but it gives: file too large",
    );
}

#[test]
fn check_config_shows_what_counts_without_secrets() {
    let file = std::env::temp_dir().join(format!("admin-key-{}", std::process::id()));
    std::fs::write(&file, "hunter-0123456789\n").unwrap();
    let vars = [
        ("ADMIN_API_KEY_FILE", file.to_str().unwrap()),
        ("REDIS_URL", "rediss://u:hunter2@redis.lan:1/2"),
        ("HTTP_PORT", "8080"),
    ];
    let (code, out, err) = run(&["check-config", "--offline"], &vars);
    std::fs::remove_file(&file).unwrap();
    assert_eq!(code, Some(0));
    let lines = ["PORT=8080", "ADMIN_API_KEY=(set)", "REDIS_HOST=redis.lan", "REDIS_DB=2"];
    for line in lines {
        assert!(out.lines().any(|l| l == line), "{line} in {out}");
    }
    assert!(err.contains("warning: ADMIN_API_KEY used without TLS on 0.0.0.0"));
    assert!(!out.contains("hunter") && !err.contains("hunter"));
}

#[test]
fn healthcheck_asks_the_local_server() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let server = thread::spawn(move || {
        for status in ["200 OK", "503 Service Unavailable"] {
            let mut stream = listener.accept().unwrap().0;
            let _ = stream.read(&mut [0; 1024]).unwrap();
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n").unwrap();
        }
    });
    let ask = || run(&["healthcheck"], &[("PORT", &port)]);
    assert_eq!(ask(), (Some(0), String::new(), String::new()));
    let not_well = format!(
        "mqtt-publisher-lite: 127.0.0.1:{port} is not well, \
         it answers \"HTTP/1.1 503 Service Unavailable\"\n"
    );
    assert_eq!(ask(), (Some(1), String::new(), not_well));
    server.join().unwrap();
    let (code, _, err) = ask();
    assert_eq!((code, err.lines().count()), (Some(1), 1), "{err}");
    assert_eq!(run(&["healthcheck"], &[("PORT", "x")]).0, Some(1));
}
