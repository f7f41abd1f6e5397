//! Which requests are signed, and what the certificates look like, by `openssl` on both ends.
//!
//! Whatever a request asks for beyond its key and its checked name must not be in the certificate.

use crate::support::check_error;
use crate::support::clock::{now_s, parse_utc};
use crate::support::csr::{self, Csr};
use crate::support::http::Response;
use crate::support::service::Service;
use crate::support::token;

/// Extensions of every device certificate, and no others.
const EXTENSIONS: [&str; 5] = [
    "X509v3 Authority Key Identifier",
    "X509v3 Basic Constraints",
    "X509v3 Extended Key Usage",
    "X509v3 Key Usage",
    "X509v3 Subject Key Identifier",
];

#[test]
fn keys_and_digests_that_are_signed() {
    let service = Service::start(&[]);
    for (n, (key, digest)) in [
        ("ec:prime256v1", "sha256"),
        ("ec:prime256v1", "sha384"),
        ("ec:secp384r1", "sha256"),
        ("ec:secp384r1", "sha384"),
        ("ed25519", "-"),
        ("rsa:2048", "sha256"),
        ("rsa:2048", "sha384"),
        ("rsa:2048", "sha512"),
        ("rsa:3072", "sha256"),
        ("rsa:4096", "sha256"),
        ("rsa:4096", "sha512"),
    ]
    .into_iter()
    .enumerate()
    {
        let device = format!("good-{n}");
        let request = Csr::new(&device).key(key).digest(digest).make();
        let answer = service.sign(&service.token(&device), &request);
        assert_eq!(answer.status, 200, "{key} {digest}: {}", answer.text());
        check_profile(&answer, &device, key.starts_with("rsa"));
        let leaf = answer.field("certificate");
        let asked = csr::openssl(&["req", "-noout", "-pubkey"], &request);
        assert_eq!(csr::openssl(&["x509", "-noout", "-pubkey"], &leaf), asked, "{key}: the key");
    }
}

#[test]
fn keys_and_digests_that_are_not_signed() {
    let service = Service::start(&[]);
    let compact = service.token("d");
    let check = |key: &str, digest: &str, args: &[&str]| {
        let request = Csr::new("d").key(key).digest(digest).args(args).make();
        let what = format!("{key} {digest} {args:?}");
        check_error(&service.sign(&compact, &request), 400, "UNSUPPORTED_CSR_KEY_TYPE", &what);
    };
    check("rsa:1024", "sha256", &[]);
    check("ec:secp256k1", "sha256", &[]);
    check("ec:secp521r1", "sha256", &[]);
    check("ec:secp224r1", "sha256", &[]);
    check("ed448", "-", &[]);
    check("rsa:2048", "sha1", &[]);
    check("rsa:2048", "md5", &[]);
    check("rsa:2048", "sha224", &[]);
    check("rsa:2048", "sha256", &["-sigopt", "rsa_padding_mode:pss"]);
    check("ec:prime256v1", "sha1", &[]);
    check("ec:prime256v1", "sha512", &[]);
    assert_eq!(
        service.sign(&compact, &Csr::new("d").make()).status,
        200,
        "the token is still good"
    );
}

#[test]
fn what_a_request_asks_for_is_not_given() {
    let service = Service::start(&[]);
    let check = |device: &str, request: Csr| {
        let answer = service.sign(&service.token(device), &request.make());
        assert_eq!(answer.status, 200, "{device}: {}", answer.text());
        check_profile(&answer, device, false);
    };
    let csr = Csr::new;
    check(
        "sans",
        csr("sans").extensions("subjectAltName = DNS:broker.example, IP:10.0.0.1, URI:urn:x"),
    );
    check(
        "ca",
        csr("ca")
            .extensions("basicConstraints = critical, CA:TRUE\nkeyUsage = keyCertSign, cRLSign"),
    );
    check("server", csr("server").extensions("extendedKeyUsage = serverAuth, codeSigning"));
    check("unknown", csr("unknown").extensions("1.2.3.4.5.6 = critical, ASN1:UTF8String:anything"));
    check("challenge", csr("challenge").attributes("challengePassword = s3cret1234"));
    check("attribute", csr("attribute").attributes("unstructuredName = a name"));
    check(
        "everything",
        csr("everything")
            .names("C = DE\nO = Some Org\nCN = everything\nemailAddress = a@b.example")
            .extensions(
                "subjectAltName = DNS:x\nbasicConstraints = CA:TRUE\nsubjectKeyIdentifier = hash",
            ),
    );
}

#[test]
fn names_that_do_not_match() {
    let service = Service::start(&[]);
    let compact = service.token("device-1");
    let check = |names: &str| {
        let answer = service.sign(&compact, &Csr::new("").names(names).make());
        check_error(&answer, 400, "CSR_DEVICE_MISMATCH", names);
    };
    for name in ["device-10", "device-", "xdevice-1", "Device-1", "other", "device-1 x", "device_1"]
    {
        check(&format!("CN = {name}"));
    }
    check("O = device-1");
    check("0.CN = device-1\n1.CN = device-1");
    check("0.CN = device-1\n1.CN = device-2");
    check("0.CN = device-2\n1.CN = device-1");
    check("CN = other\nOU = device-1");
    check("CN = other\nserialNumber = device-1");
    check("CN = 'device-1 '");
    // A multi-valued RDN, too, has to have exactly one common name.
    check("CN = device-1\n+CN = device-2");
    assert_eq!(service.sign(&compact, &Csr::new("device-1").make()).status, 200);
}

#[test]
fn a_request_must_be_signed_by_its_own_key() {
    let service = Service::start(&[]);
    let compact = service.token("d");
    for key in ["ec:prime256v1", "ec:secp384r1", "ed25519", "rsa:2048"] {
        let digest = if key == "ed25519" { "-" } else { "sha256" };
        let mut der = token::pem_to_der(&Csr::new("d").key(key).digest(digest).make());
        *der.last_mut().unwrap() ^= 1;
        let answer = service.sign(&compact, &token::der_to_pem("CERTIFICATE REQUEST", &der));
        check_error(&answer, 400, "CSR_SIGNATURE_INVALID", key);
    }
    // The name changed after signing: the signature no longer fits, whatever the name is now.
    let pem = Csr::new("e").make();
    let mut der = token::pem_to_der(&pem);
    let at = der.windows(3).position(|w| w == [0x0c, 1, b'e']).unwrap();
    der[at + 2] = b'd';
    let answer = service.sign(&compact, &token::der_to_pem("CERTIFICATE REQUEST", &der));
    check_error(&answer, 400, "CSR_SIGNATURE_INVALID", "another name");
    assert_eq!(service.sign(&compact, &Csr::new("d").make()).status, 200);
}

#[test]
fn what_is_no_request() {
    let service = Service::start(&[]);
    let compact = service.token("d");
    let pem = Csr::new("d").make();
    let der = token::pem_to_der(&pem);
    let ca = service.read("ca/root-ca.crt");
    let key = csr::new_key(csr::P256);
    let cut = token::der_to_pem("CERTIFICATE REQUEST", &der[..der.len() - 1]);
    let longer = token::der_to_pem("CERTIFICATE REQUEST", &[&der[..], b"\0"].concat());
    let half = &pem[..pem.len() / 2];
    let wrong_label = pem.replace("CERTIFICATE REQUEST", "CERTIFICATE");
    let empty = "-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n";
    let zeros = token::der_to_pem("CERTIFICATE REQUEST", &[0; 300]);
    let deep = token::der_to_pem("CERTIFICATE REQUEST", &[0x30, 0x80].repeat(4000));
    let huge_length =
        token::der_to_pem("CERTIFICATE REQUEST", &[0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 1]);
    for (what, text) in [
        ("garbage", "garbage"),
        ("a certificate", &ca),
        ("a private key", &key),
        ("cut DER", &cut),
        ("longer DER", &longer),
        ("half a PEM", half),
        ("another label", &wrong_label),
        ("an empty PEM", empty),
        ("zeros", &zeros),
        ("deeply nested", &deep),
        ("a length of 4 GiB", &huge_length),
        ("base64 of garbage", "Z2FyYmFnZQ=="),
        ("not ASCII", "ä-----BEGIN"),
        ("one bracket", "-----BEGIN CERTIFICATE REQUEST-----"),
    ] {
        check_error(&service.sign(&compact, text), 400, "INVALID_CSR", what);
    }
    // Every truncation of a good request is refused, none brings the server down.
    for end in (1..der.len()).step_by(7) {
        let answer = service.sign(&compact, &token::base64_of(&der[..end]));
        check_error(&answer, 400, "INVALID_CSR", &format!("the first {end} bytes"));
    }
    assert_eq!(service.sign(&compact, &pem).status, 200);
}

#[test]
fn every_flipped_byte_of_a_request_is_refused() {
    let service = Service::start(&[]);
    let compact = service.token("d");
    let der = token::pem_to_der(&Csr::new("d").make());
    for at in 0..der.len() {
        let mut bad = der.clone();
        bad[at] ^= 0x21;
        let answer = service.sign(&compact, &token::base64_of(&bad));
        assert_eq!(answer.status, 400, "byte {at}: {}", answer.text());
    }
    assert_eq!(service.sign(&compact, &token::base64_of(&der)).status, 200);
}

#[test]
fn no_certificate_outlives_the_ca() {
    let service =
        Service::start(&[("ROOT_CA_VALIDITY_YEARS", "1"), ("DEVICE_CERT_VALIDITY_DAYS", "3650")]);
    let answer = service.sign(&service.token("d"), &Csr::new("d").make());
    assert_eq!(answer.status, 200, "{}", answer.text());
    let end = |pem: &str| parse_utc(&csr::x509_field(pem, &["-enddate", "-dateopt", "iso_8601"]));
    assert_eq!(end(&answer.field("certificate")), end(&answer.field("ca_certificate")));
    csr::verify_with_openssl(&answer.field("ca_certificate"), &answer.field("certificate"))
        .unwrap();
}

#[track_caller]
fn check_profile(answer: &Response, device: &str, rsa: bool) {
    let (leaf, ca) = (answer.field("certificate"), answer.field("ca_certificate"));
    csr::verify_with_openssl(&ca, &leaf).unwrap();
    let text = csr::x509_text(&leaf);
    assert_eq!(
        csr::x509_field(&leaf, &["-subject", "-nameopt", "RFC2253"]),
        format!("CN={device}")
    );
    let mut extensions: Vec<&str> = text
        .lines()
        .skip_while(|line| !line.contains("X509v3 extensions"))
        .skip(1)
        .take_while(|line| !line.contains("Signature Algorithm"))
        .filter(|line| line.starts_with("            ") && !line.starts_with("             "))
        .map(|line| line.trim().split(':').next().unwrap())
        .collect();
    extensions.sort_unstable();
    assert_eq!(extensions, EXTENSIONS, "{text}");
    let follows = |heading: &str| {
        let mut lines = text.lines().skip_while(|line| !line.contains(heading));
        (lines.next().unwrap().trim().to_owned(), lines.next().unwrap().trim().to_owned())
    };
    let usage = if rsa { "Digital Signature, Key Encipherment" } else { "Digital Signature" };
    for (heading, critical, value) in [
        ("Basic Constraints", true, "CA:FALSE"),
        ("X509v3 Key Usage", true, usage),
        ("Extended Key Usage", false, "TLS Web Client Authentication"),
    ] {
        let (head, found) = follows(heading);
        assert_eq!((head.ends_with("critical"), &*found), (critical, value), "{heading}");
    }
    let key_id = |pem: &str, which: &str| {
        let said = csr::openssl(&["x509", "-noout", "-ext", which], pem);
        said.lines().nth(1).unwrap().trim().trim_start_matches("keyid:").to_owned()
    };
    assert_eq!(key_id(&leaf, "authorityKeyIdentifier"), key_id(&ca, "subjectKeyIdentifier"));
    assert!(text.contains("Version: 3 (0x2)"));
    let date = |which: &str| parse_utc(&csr::x509_field(&leaf, &[which, "-dateopt", "iso_8601"]));
    let (start, end) = (date("-startdate"), date("-enddate"));
    assert!((now_s() - 300).abs_diff(start) <= 5, "notBefore is five minutes back");
    assert_eq!(end - start, 300 + 90 * 86_400, "90 days from now");
}
