//! Which requests are signed, and what the certificates look like, by `openssl` on both ends.
//!
//! Whatever a request asks for beyond its key and its checked name must not be in the certificate.

use crate::support::check_error;
use crate::support::clock::{now_s, parse_utc};
use crate::support::csr::{self, Csr};
use crate::support::http::Response;
use crate::support::service::Service;
use crate::support::temp::TempDir;
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

/// A PKCS#10 request by hand, for what `openssl` does not make: its own version and subject, a P-256
/// key, signed by `openssl`.
fn by_hand(version: u8, common_name: &[u8]) -> String {
    let key = csr::key_file(csr::P256).display().to_string();
    let public = token::pem_to_der(&csr::openssl(&["pkey", "-in", &key, "-pubout"], ""));
    let oid = [0x06, 3, 0x55, 4, 3];
    let attribute = tlv(0x31, &tlv(0x30, &[&oid[..], common_name].concat()));
    let info = [tlv(2, &[version]), tlv(0x30, &attribute), public, vec![0xa0, 0]].concat();
    let info = tlv(0x30, &info);
    let dir = TempDir::new();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("info"), &info).unwrap();
    csr::openssl(
        &["dgst", "-sha256", "-sign", &key, "-out", &path("signature"), &path("info")],
        "",
    );
    let signature = [&[0][..], &std::fs::read(path("signature")).unwrap()].concat();
    let ecdsa_with_sha256 = [0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
    let request = [info, ecdsa_with_sha256.to_vec(), tlv(3, &signature)].concat();
    token::der_to_pem("CERTIFICATE REQUEST", &tlv(0x30, &request))
}

/// Tag, length under 256, content.
fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u8::try_from(content.len()).unwrap();
    let head = if length < 128 { vec![tag, length] } else { vec![tag, 0x81, length] };
    [&head, content].concat()
}

#[test]
fn requests_as_the_libraries_of_the_field_write_them() {
    let service = Service::start(&[("REENROLL", "allow")]);
    let utf16: Vec<u8> = "device-1".bytes().flat_map(|b| [0, b]).collect();
    let utf32: Vec<u8> = "device-1".bytes().flat_map(|b| [0, 0, 0, b]).collect();
    let ascii = b"device-1";
    for (what, version, name) in [
        ("version 1 (0), as it should be", 0, tlv(0x0c, ascii)),
        ("version 2 (1), wolfSSL's default", 1, tlv(0x0c, ascii)),
        ("version 3 (2), of old OpenSSL configurations", 2, tlv(0x0c, ascii)),
        ("PrintableString", 0, tlv(0x13, ascii)),
        ("IA5String", 0, tlv(0x16, ascii)),
        ("T61String", 0, tlv(0x14, ascii)),
        ("VisibleString", 0, tlv(0x1a, ascii)),
        ("BMPString", 0, tlv(0x1e, &utf16)),
        ("UniversalString", 2, tlv(0x1c, &utf32)),
    ] {
        let answer = service.sign(&service.token("device-1"), &by_hand(version, &name));
        assert_eq!(answer.status, 200, "{what}: {}", answer.text());
        check_profile(&answer, "device-1", false);
    }
    let compact = service.token("device-1");
    let refused = |what: &str, version, name: &[u8], code: &str, why: &str| {
        let answer = service.sign(&compact, &by_hand(version, name));
        check_error(&answer, 400, code, what);
        assert!(answer.field("error").contains(why), "{what}: {}", answer.text());
    };
    let plain = tlv(0x0c, ascii);
    refused("version 4", 3, &plain, "INVALID_CSR", "its version is none of 0 to 2");
    refused("version -1", 0xff, &plain, "INVALID_CSR", "its version is none of 0 to 2");
    let mismatch = "CSR_DEVICE_MISMATCH";
    for (what, name) in [
        ("half a character", tlv(0x1e, &utf16[..15])),
        ("a character outside of the plane", tlv(0x1e, &[&utf16[..14], &[0xd8, 0]].concat())),
        (
            "the other byte order",
            tlv(0x1e, &"device-1".bytes().flat_map(|b| [b, 0]).collect::<Vec<_>>()),
        ),
        ("a zero behind it", tlv(0x14, b"device-1\0")),
        ("ASCII that is called UTF-32", tlv(0x1c, ascii)),
        ("ASCII that is called UTF-16", tlv(0x1e, ascii)),
        ("a number", tlv(2, ascii)),
        ("T61 with an accent", tlv(0x14, b"device-\xe9")),
    ] {
        refused(what, 0, &name, mismatch, "equal to the device id");
    }
    assert_eq!(service.sign(&compact, &by_hand(0, &plain)).status, 200, "the token is still good");
}

#[test]
fn the_refusal_says_what_is_wrong() {
    let service = Service::start(&[]);
    let compact = service.token("d");
    let check = |text: &str, code: &str, why: &str| {
        let answer = service.sign(&compact, text);
        check_error(&answer, 400, code, why);
        assert!(answer.field("error").ends_with(why), "{why:?}: {}", answer.text());
    };
    let pem = Csr::new("d").make();
    let der = token::pem_to_der(&pem);
    check("garbage!", "INVALID_CSR", ": neither PEM nor Base64");
    check(&pem.replacen('M', "?", 1), "INVALID_CSR", ": its PEM is broken");
    check(
        &pem.replace("CERTIFICATE REQUEST", "CERTIFICATE"),
        "INVALID_CSR",
        ": its PEM is no CERTIFICATE REQUEST",
    );
    check(&format!("{pem}{pem}"), "INVALID_CSR", ": its PEM has more than one block");
    check("Z2FyYmFnZQ==", "INVALID_CSR", ": not the DER of a request");
    check(
        &token::base64_of(&[&der[..], &[5, 0]].concat()),
        "INVALID_CSR",
        ": something follows the request",
    );
    let made = |key: &str, digest: &str, names: &str| {
        Csr::new("d").key(key).digest(digest).names(names).make()
    };
    let kind = "UNSUPPORTED_CSR_KEY_TYPE";
    check(&made("rsa:1024", "sha256", "CN = d"), kind, "; its RSA key has 1024 bits");
    check(&made("ec:secp521r1", "sha256", "CN = d"), kind, "; its key is on another curve");
    check(&made("ed448", "-", "CN = d"), kind, "; its key is of another kind");
    check(&made("rsa:2048", "sha1", "CN = d"), kind, "; its signature is of another kind");
    let mismatch = "CSR_DEVICE_MISMATCH";
    check(&made(csr::P256, "sha256", "O = d"), mismatch, "; it has none");
    check(&made(csr::P256, "sha256", "0.CN = d\n1.CN = d"), mismatch, "; it has several");
    check(&made(csr::P256, "sha256", "CN = e"), mismatch, "; it has another");
}

/// Points whose multiples are few: anyone can make a signature that such a key verifies, so that it
/// proves nothing. All encodings of them that a lenient decoder takes.
const SMALL_ORDER: [(&str, &str); 14] = [
    ("order 1", "0100000000000000000000000000000000000000000000000000000000000000"),
    ("order 2", "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    ("order 4", "0000000000000000000000000000000000000000000000000000000000000000"),
    ("order 4, the other", "0000000000000000000000000000000000000000000000000000000000000080"),
    ("order 8", "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),
    ("order 8, the other", "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85"),
    ("order 8, the third", "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"),
    ("order 8, the fourth", "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa"),
    ("order 1 with a sign", "0100000000000000000000000000000000000000000000000000000000000080"),
    ("order 2 with a sign", "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"),
    ("order 4 as p", "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    ("order 4 as p, the other", "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff"),
    ("order 1 as p + 1", "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
    (
        "order 1 as p + 1 with a sign",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    ),
];

#[test]
fn keys_that_prove_nothing() {
    let service = Service::start(&[("REENROLL", "allow")]);
    let request = token::pem_to_der(&Csr::new("device-1").key("ed25519").digest("-").make());
    let name = request.windows(8).position(|w| w == b"device-1").unwrap();
    // BIT STRING of 33 bytes, none of their bits unused; there is one.
    let key = request.windows(3).position(|w| w == [3, 33, 0]).unwrap() + 3;
    for (what, point) in SMALL_ORDER {
        let point: Vec<u8> =
            (0..32).map(|n| u8::from_str_radix(&point[2 * n..2 * n + 2], 16).unwrap()).collect();
        // R is the neutral point and S zero: right whenever the hash is a multiple of the order,
        // which is one name of eight.
        for digit in b'0'..=b'9' {
            let mut forged = request.clone();
            forged[name + 7] = digit;
            forged[key..key + 32].copy_from_slice(&point);
            let signature = forged.len() - 64;
            forged[signature..].fill(0);
            forged[signature] = 1;
            let device = format!("device-{}", char::from(digit));
            let compact = service.token(&device);
            let answer = service.sign(&compact, &token::base64_of(&forged));
            check_error(&answer, 400, "UNSUPPORTED_CSR_KEY_TYPE", what);
            assert!(
                answer.field("error").ends_with("; its Ed25519 key proves nothing"),
                "{}",
                answer.text()
            );
            // The token is still good.
            assert_eq!(service.sign(&compact, &Csr::new(&device).make()).status, 200);
        }
    }
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
