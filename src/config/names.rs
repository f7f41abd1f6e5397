//! Variables that look like ours and count for nothing: misspelt, or the older service's.

use std::ffi::OsStr;

use super::variables as var;

/// What the older service had and this one has not, and what to do instead.
const OLDER: [(&str, &str); 7] = [
    ("ALLOW_ONBOARDING_WITH_ACTIVE_CERT", "REENROLL=allow takes its place"),
    ("CERT_VALIDITY_DAYS", "DEVICE_CERT_VALIDITY_DAYS takes its place"),
    ("PROVISIONING_ENABLED", "provisioning is all that this program does, so stop it to end that"),
    ("MQTT_TLS_CA_BASE64", "put the CA as root-ca.crt into CA_STORAGE_PATH"),
    ("MQTT_TLS_CA_KEY_BASE64", "put the CA's key as root-ca.key into CA_STORAGE_PATH"),
    ("CERT_CN_PREFIX", "onboard a device under its whole name, the prefix included"),
    (
        "AUTH_SECRET",
        "users are not known here, so set ONBOARDING_API_KEY and keep that check elsewhere",
    ),
];

/// A variable whose name begins so is meant for this program.
const PREFIXES: [&str; 4] = ["REDIS_", "TLS_", "ONBOARDING_", "ADMIN_"];

/// How many letters a name may differ from one of ours that is meant.
const NEAR: usize = 3;

/// Returns the warning for a variable with this name and value; none for our own variables, and for
/// those that have nothing to do with this program.
pub fn note(name: &str, value: &OsStr) -> Option<String> {
    if is_ours(name) || is_of_kubernetes(name, value) {
        return None;
    }
    if let Some((_, instead)) = OLDER.iter().find(|(older, _)| *older == name) {
        return Some(format!(
            "{name} was a variable of the older service and is ignored: {instead}"
        ));
    }
    // A setting that is no secret has no file.
    let of_file = name.strip_suffix("_FILE").filter(|name| is_ours(name));
    let (distance, nearest) = of_file.map(|name| (0, name.to_owned())).or_else(|| nearest(name))?;
    if distance > 1 && !PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
        return None;
    }
    let known = if distance <= NEAR {
        format!("did you mean {nearest}?")
    } else {
        "--help lists those that count".to_owned()
    };
    Some(format!("{name} is no variable of this program and is ignored: {known}"))
}

fn is_ours(name: &str) -> bool {
    var::ALL.iter().flat_map(var::Variable::names).any(|ours| ours == name)
}

/// What Kubernetes sets for each service that it has, in the style of Docker's links, such as
/// `REDIS_PORT=tcp://10.0.0.1:6379` for one that is called redis.
pub fn is_of_kubernetes(name: &str, value: &OsStr) -> bool {
    let made = ["_SERVICE_HOST", "_SERVICE_PORT", "_PORT_"].iter().any(|part| name.contains(part));
    let is_link = ["tcp://", "udp://", "sctp://"]
        .iter()
        .any(|scheme| value.as_encoded_bytes().starts_with(scheme.as_bytes()));
    made || (name.ends_with("_PORT") && is_link)
}

/// Of our names the one that is most like this, and by how many letters it differs.
fn nearest(name: &str) -> Option<(usize, String)> {
    let upper = name.to_ascii_uppercase();
    let all = var::ALL.iter().flat_map(var::Variable::names);
    all.map(|ours| (distance(&upper, &ours), ours)).min_by_key(|(distance, _)| *distance)
}

/// Letters to be put in, taken out, changed, or exchanged with their neighbour, to make one name of
/// the other (optimal string alignment).
fn distance(one: &str, other: &str) -> usize {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    let mut above: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in other.iter().enumerate() {
            let at = |row: &[usize], j: usize| row.get(j).copied().unwrap_or(usize::MAX - 1);
            let changed = at(&last, j) + usize::from(a != b);
            let mut least = changed.min(at(&last, j + 1) + 1).min(at(&row, j) + 1);
            let swapped =
                i > 0 && j > 0 && one.get(i - 1) == Some(b) && other.get(j - 1) == Some(a);
            if swapped {
                least = least.min(at(&above, j - 1) + 1);
            }
            row.push(least);
        }
        above = std::mem::replace(&mut last, row);
    }
    last.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, value: &str, expected: &str) {
        let note = note(name, OsStr::new(value)).unwrap_or_default();
        match expected {
            "" => assert_eq!(note, "", "{name}"),
            _ => assert!(note.starts_with(name) && note.ends_with(expected), "{name}: {note}"),
        }
    }

    #[test]
    fn misspelt_names_are_noted_with_what_was_meant() {
        for (name, meant) in [
            ("ONBOARDING_APIKEY", "ONBOARDING_API_KEY"),
            ("REDIS_PASSWD", "REDIS_PASSWORD"),
            ("REDIS_PASWORD_FILE", "REDIS_PASSWORD_FILE"),
            ("TLS_CRET", "TLS_CERT"),
            ("TLS_KEYS", "TLS_KEY"),
            ("REENROL", "REENROLL"),
            ("HTTP_PROT", "HTTP_PORT"),
            ("JWT_SECRETS", "JWT_SECRET"),
            ("redis_url", "REDIS_URL"),
            ("ADMIN_APIKEY", "ADMIN_API_KEY"),
            ("PORT_FILE", "PORT"),
            ("TLS_CERT_FILE", "TLS_CERT"),
            ("ENROLMENT_FILE", "ENROLMENT"),
        ] {
            check(name, "x", &format!("is ignored: did you mean {meant}?"));
        }
        check("REDIS_SOMETHING", "x", "is ignored: --help lists those that count");
        check("ONBOARDING_KEY", "x", "is ignored: --help lists those that count");
        check("CERT_VALIDITY_DAYS", "365", "DEVICE_CERT_VALIDITY_DAYS takes its place");
        for (older, instead) in OLDER {
            check(older, "x", instead);
        }
        check("ALLOW_ONBOARDING_WITH_ACTIVE_CERT", "true", "REENROLL=allow takes its place");
    }

    #[test]
    fn ours_and_strangers_are_not() {
        for variable in var::ALL {
            check(variable.name, "x", "");
        }
        for name in [
            "JWT_SECRET_FILE",
            "PATH",
            "HOME",
            "LANG",
            "TERM",
            "HOSTNAME",
            "SHLVL",
            "NO_COLOR",
            "NOTIFY_SOCKET",
            "WATCHDOG_USEC",
            "RUNTIME_DIRECTORY",
            "JOURNAL_STREAM",
            "INVOCATION_ID",
            "PWD",
            "USER",
        ] {
            check(name, "x", "");
        }
        for (name, value) in [
            ("REDIS_PORT", "tcp://10.0.0.1:6379"),
            ("REDIS_SERVICE_HOST", "10.0.0.1"),
            ("REDIS_SERVICE_PORT_REDIS", "6379"),
            ("REDIS_PORT_6379_TCP_ADDR", "10.0.0.1"),
            ("REDIS_MASTER_PORT", "tcp://10.0.0.1:6379"),
            ("REDIS_MASTER_SERVICE_HOST", "10.0.0.1"),
        ] {
            check(name, value, "");
        }
        assert!(!is_of_kubernetes("REDIS_PORT", OsStr::new("6379")));
    }

    #[test]
    fn distances() {
        for (one, other, expected) in [
            ("", "ab", 2),
            ("ab", "ab", 0),
            ("ab", "ba", 1),
            ("abc", "axc", 1),
            ("abcd", "acbx", 2),
        ] {
            assert_eq!(distance(one, other), expected, "{one} {other}");
            assert_eq!(distance(other, one), expected, "{other} {one}");
        }
    }
}
