//! `scripts/enroll.sh` with what devices have in the place of this machine's programs: other versions of
//! openssl, other programs for HTTP, files of other systems. What is said of an old version here was
//! seen with the real one.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use crate::ca::Chain;
use crate::support::clock::{FakeClock, now_s};
use crate::support::csr;
use crate::support::device::{Device, Outcome, Surroundings};
use crate::support::hostile::{Hostile, Reply};
use crate::support::https;
use crate::support::service::{Service, Setup};
use crate::support::temp::TempDir;
use crate::support::wait;

use Surroundings::{Busybox, Full, Wget};

/// OpenSSL 1.0.2: no `-no_check_time`; a blank in `subject= CN=…`; `verify` says of some errors that
/// they are, then OK, and ends with 0; `s_client` verifies nothing without `-verify`.
const OPENSSL_102: &str = r#"
case $* in *-no_check_time* | *-noservername*) echo "unknown option" >&2; exit 1 ;; esac
case $* in
s_client*-verify\ *) exec REAL "$@" ;;
s_client*)
    for word; do
        shift
        case $word in -verify_return_error) ;; *) set -- "$@" "$word" ;; esac
    done
    exec REAL "$@"
    ;;
verify*) REAL "$@" || echo OK; exit 0 ;;
*-subject\ *) REAL "$@" | sed 's/^subject=/subject= /' ;;
*) exec REAL "$@" ;;
esac"#;

/// LibreSSL: neither `-no_check_time` nor `-partial_chain`; its `s_client` verifies no name.
const LIBRESSL: &str = r#"
case $* in
*-no_check_time* | *-partial_chain* | *-verify_hostname* | *-noservername*)
    echo "unknown option" >&2
    exit 1
    ;;
*-subject\ *) REAL "$@" | sed 's/^subject=/subject= /' ;;
*) exec REAL "$@" ;;
esac"#;

/// One that knows no way around the clock.
const OTHER: &str = r#"
case $* in *-no_check_time* | *-partial_chain* | *-attime*) echo "unknown option" >&2; exit 1 ;; esac
exec REAL "$@""#;

/// OpenWrt's uclient-fetch of 2024: no `-S`; of an error it says the status alone, and ends with 8.
const UCLIENT: &str = r#"
usage() { echo 'Usage: wget [options] <URL> --header= --post-file=FILE' >&2; exit 1; }
for word; do case $word in -S | --help | --version | --tries* | --config*) usage ;; esac; done
REAL -nv --server-response "$@" 2>/tmp/uclient.$$ && { rm /tmp/uclient.$$; exit 0; }
sed -n 's,^ *HTTP/1.1 \([0-9]*\).*,HTTP error \1,p' /tmp/uclient.$$ | tail -n 1 >&2
rm /tmp/uclient.$$
exit 8"#;

fn http_url(service: &Service) -> String {
    format!("http://127.0.0.1:{}", service.port())
}

fn https_url(service: &Service) -> String {
    format!("https://localhost:{}", service.port())
}

#[track_caller]
fn check(outcome: &Outcome, code: i32, said: &str) {
    assert_eq!(outcome.code, Some(code), "{outcome:?}");
    assert!(outcome.said.contains(said), "{said}: {outcome:?}");
}

#[test]
fn an_old_openssl_will_do() {
    let (plain, secure) = (Setup::new().start(), https::start(Setup::new()));
    for (name, script) in [("1.0.2", OPENSSL_102), ("libressl", LIBRESSL)] {
        for surroundings in [Full, Busybox] {
            let id = format!("{name}-{surroundings:?}");
            let device = Device::new(&id, &http_url(&plain)).surroundings(surroundings);
            let device = device.program("openssl", script);
            device.must_enroll(&[]);
            let key = device.read("device.key");
            device.must_enroll(&[]);
            assert_eq!(device.read("device.key"), key, "{id}: the second run leaves it alone");
            let device = Device::new(&id, &https_url(&secure)).surroundings(surroundings);
            let outcome = device.program("openssl", script).enroll(&["--tries", "1"]);
            if (name, surroundings) == ("libressl", Busybox) {
                check(&outcome, 1, "curl is needed");
            } else {
                check(&outcome, 0, "is valid until");
            }
        }
    }
    assert!(!secure.log().contains("issued for libressl-Busybox"), "{}", secure.log());
    let lines = plain.index().len();
    let device = Device::new("d", &http_url(&plain)).program("openssl", OTHER);
    check(&device.enroll(&["--tries", "1"]), 1, "openssl cannot verify");
    assert_eq!(plain.index().len(), lines, "no token is spent on it");
    assert!(!plain.log().contains("issued for d,"), "{}", plain.log());
}

#[test]
fn an_old_openssl_verifies_the_server() {
    let ours = Setup::new().start();
    let theirs = https::start(Setup::new().env("HTTP_HOST", "0.0.0.0"));
    let device = |id: &str, url: &str| {
        let device = Device::new(id, url).surroundings(Busybox).program("openssl", OPENSSL_102);
        fs::create_dir(device.folder()).unwrap();
        device
    };
    let foreign = device("foreign", &https_url(&theirs));
    fs::copy(ours.data("ca/root-ca.crt"), foreign.file("ca.crt")).unwrap();
    check(&foreign.enroll(&[]), 5, "is not verified by the CA");
    let other_name = device("name", &format!("https://127.0.0.2:{}", theirs.port()));
    fs::copy(theirs.data("ca/root-ca.crt"), other_name.file("ca.crt")).unwrap();
    check(&other_name.enroll(&[]), 5, "is not verified by the CA");
    assert!(!theirs.log().contains("issued for"), "{}", theirs.log());
}

/// With all behind it up to the root, without the root, and alone.
#[test]
fn a_ca_that_is_no_root() {
    let chain = Chain::new(3);
    for count in [3, 2, 1] {
        let [plain, secure] = [(); 2].map(|()| {
            let setup = Setup::new();
            chain.put_first(count, &setup);
            setup
        });
        let (plain, secure) = (plain.start(), https::start(secure));
        let ca = plain.read("ca/root-ca.crt");
        let pin = csr::x509_field(&ca, &["-fingerprint", "-sha256"]);
        for surroundings in [Full, Busybox] {
            for url in [http_url(&plain), https_url(&secure)] {
                let id = format!("d-{surroundings:?}");
                let device = Device::new(&id, &url).surroundings(surroundings);
                device.must_enroll(&["--ca-fingerprint", &pin]);
                assert_eq!(device.read("ca.crt"), ca, "all that the service has");
                let certificate = device.read("device.crt");
                device.must_enroll(&["--ca-fingerprint", &pin]);
                assert_eq!(device.read("device.crt"), certificate);
            }
        }
        // Where openssl wants a root, a CA without it is not enough, which is found out in time.
        let device = Device::new("e", &http_url(&plain)).program("openssl", LIBRESSL);
        let outcome = device.enroll(&["--tries", "1"]);
        match count {
            3 => check(&outcome, 0, "is valid until"),
            _ => check(&outcome, 1, "openssl cannot verify"),
        }
        assert_eq!(plain.log().contains("issued for e,"), count == 3, "{}", plain.log());
        // And an old curl, which does too, gives way to openssl.
        let curl = "case $* in *--version*) echo curl 7.64.0 ;; *) exec REAL \"$@\" ;; esac";
        let curl = format!("grep -qs cacert \"$3\" && exit 60\n{curl}");
        Device::new("f", &https_url(&secure)).program("curl", &curl).must_enroll(&[]);
    }
}

/// With wolfSSL, curl takes no folder of CAs that is empty.
#[test]
fn a_curl_that_wants_something_in_its_store() {
    let service = https::start(Setup::new());
    let wants = r#"
store=$(sed -n 's/^capath = "\(.*\)"/\1/p' "$3" 2>/dev/null)
[ -z "$store" ] || [ -n "$(ls "$store")" ] || exit 77
exec REAL "$@""#;
    let device = Device::new("d", &https_url(&service)).program("curl", wants);
    device.must_enroll(&["--tries", "1"]);
}

#[test]
fn a_program_that_is_missing_is_named_before_anything_is_done() {
    let service = Setup::new().start();
    let log = service.log();
    let without = |name: &str| {
        let device = Device::new("d", &http_url(&service)).surroundings(Wget);
        device.enroll(&["--help"]); // makes its folder of programs
        fs::remove_file(device.outside().join("bin").join(name)).unwrap();
        device.enroll(&["--tries", "1"])
    };
    for name in ["awk", "cmp", "mktemp", "openssl", "sync", "wc"] {
        check(&without(name), 1, &format!("{name} is missing"));
    }
    check(&without("wget"), 1, "curl or wget is missing");
    assert_eq!(service.log(), log, "nobody was asked");
}

#[test]
fn whatever_speaks_http() {
    let key = "onboarding-key-of-the-tests";
    let service = Setup::new().env("ONBOARDING_API_KEY", key).start();
    let dir = TempDir::new();
    let file = dir.file("key", key).display().to_string();
    let wrong = dir.file("wrong", "another-key-altogether").display().to_string();
    let own = |id: &str| Device::new(id, &http_url(&service)).surroundings(Wget);
    for (id, device) in [("gnu", own("gnu")), ("openwrt", own("openwrt").program("wget", UCLIENT))]
    {
        check(&device.enroll(&["--api-key-file", &wrong]), 4, "onboarding: 401");
        device.must_enroll(&["--api-key-file", &file]);
        assert!(service.log().contains(&format!("issued for {id},")), "{}", service.log());
        drop(device.enroll(&["--api-key-file", &file]));
    }
    let log = service.log();
    for (id, usage) in [
        ("old-openwrt", "Usage: wget [options] <URL> --post-file=FILE"),
        ("old-busybox", "BusyBox v1.20 Usage: wget [--header 'h: v'] [-O FILE] [-S]"),
    ] {
        let device = own(id).program("wget", &format!("echo \"{usage}\" >&2; exit 1"));
        check(&device.enroll(&["--api-key-file", &file]), 1, "curl is needed");
    }
    assert_eq!(service.log(), log, "nobody was asked");
}

#[test]
fn a_key_as_editors_leave_it() {
    const ODD: &str = r#"k"e\y'#$%s`(x)*&\\n"#;
    let (plain, secure) = (
        Setup::new().env("ONBOARDING_API_KEY", ODD).start(),
        https::start(Setup::new().env("ONBOARDING_API_KEY", ODD)),
    );
    let dir = TempDir::new();
    let good = ["\r\n", "\n", "", " \t\r\n", "\r\nof the second line"];
    for (n, end) in good.iter().enumerate() {
        let key = format!("{}{ODD}{end}", if n % 2 == 0 { "\u{feff}" } else { "" });
        let file = dir.file("key", &key).display().to_string();
        for surroundings in [Full, Busybox, Wget] {
            let urls = [http_url(&plain), https_url(&secure)];
            for url in &urls[..if surroundings == Wget || n > 0 { 1 } else { 2 }] {
                let device = Device::new(&format!("d{n}-{surroundings:?}"), url);
                device.surroundings(surroundings).must_enroll(&["--api-key-file", &file]);
            }
        }
    }
    let log = plain.log();
    for bad in ["", "\n", "\r\n", "two words of a key ü", "\u{fffd}\u{1b}[31m-key-of-the-tests"] {
        let file = dir.file("key", bad).display().to_string();
        let device = Device::new("d", &http_url(&plain));
        check(&device.enroll(&["--api-key-file", &file]), 1, "is no key");
    }
    assert_eq!(plain.log(), log, "nobody was asked");
}

/// Quotes, colons and the like in the names of folders, and what others may do in those above.
#[test]
fn folders_of_any_name() {
    let clock = FakeClock::at(now_s());
    let env = clock.env();
    let pairs: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, &**value)).collect();
    for surroundings in [Full, Busybox] {
        clock.set_right();
        let service = https::start(Setup::new().envs(&pairs));
        let device = Device::new("d", &https_url(&service)).surroundings(surroundings);
        let odd = r#"ab:c "d" \e 'f' $g"#;
        let temporary = device.outside().join(odd);
        fs::create_dir(&temporary).unwrap();
        let mut env = clock.env();
        env.push(("TMPDIR", temporary.display().to_string()));
        let device = device.in_folder(&format!("{odd}/{odd}/mqtt")).env(&env);
        device.must_enroll(&[]);
        let mode =
            |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&device.folder()), 0o700);
        assert_eq!(mode(device.folder().parent().unwrap()), 0o755);
        clock.set(now_s() + 70 * 86_400);
        device.must_enroll(&[]);
        assert!(service.log().contains("in renewal of"), "{}", service.log());
        assert_eq!(fs::read_dir(&temporary).unwrap().count(), 1, "nothing is left behind");
    }
}

/// Before its clock is set a device cannot judge a certificate: that is no reason to distrust.
#[test]
fn a_clock_that_is_not_right_yet() {
    let service = https::start(Setup::new());
    let year = 365 * 86_400;
    for surroundings in [Full, Busybox] {
        for (n, time) in
            [86_400, now_s() - 20 * 86_400, now_s() + 30 * year].into_iter().enumerate()
        {
            let clock = FakeClock::at(time);
            let device = Device::new("d", &https_url(&service)).surroundings(surroundings);
            let device = device.env(&clock.env());
            let outcome = device.enroll(&["--tries", "1"]);
            check(&outcome, 3, if n < 2 { "it is not set yet" } else { "expired" });
            assert!(device.files().iter().all(|name| name == "device.key.new"), "{outcome:?}");
            clock.set_right();
            if n == 0 {
                let device = Device::new(&format!("{surroundings:?}"), &https_url(&service));
                device.surroundings(surroundings).env(&clock.env()).must_enroll(&[]);
            }
        }
        // Between the CA's beginning and the server's.
        let clock = FakeClock::at(now_s() - 43_200);
        let device = Device::new("e", &https_url(&service)).surroundings(surroundings);
        check(&device.env(&clock.env()).enroll(&["--tries", "1"]), 3, "not yet valid");
    }
    assert!(!service.log().contains("issued for d,"), "{}", service.log());
    // Without TLS nothing depends on it.
    let plain = Setup::new().start();
    let clock = FakeClock::at(86_400);
    Device::new("d", &http_url(&plain)).env(&clock.env()).must_enroll(&[]);
}

/// A server that never answers must not hold the lock for ever; not every device has `timeout`.
#[test]
fn a_server_that_is_silent() {
    for surroundings in [Full, Busybox, Wget] {
        let server = Hostile::start(|_| Reply::Silence);
        let device = Device::new("d", &server.url()).surroundings(surroundings);
        // The minute that the script waits is over in a second.
        let device = device.program("sleep", "exec REAL 1");
        check(&device.enroll(&["--tries", "2"]), 3, "giving up for now after 2 attempts");
        let asked = server.requests().len() as u64;
        wait::for_true("it hung up each time", || server.hung_up() == asked);
    }
}
