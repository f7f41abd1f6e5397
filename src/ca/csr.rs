//! Certificate signing requests (PKCS#10, RFC 2986): read, checked, and reduced to the two things
//! that are used, the public key and the common name.
//!
//! What else a request asks for is stepped over unread, `CA:TRUE` and all: it can neither fail the
//! request nor find its way into a certificate.

use std::borrow::Cow;
use std::fmt;

use x509_parser::asn1_rs::{Any, BitString, FromDer as _, Oid, Tag};
use x509_parser::oid_registry::{
    OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA,
    OID_SIG_ECDSA_WITH_SHA256, OID_SIG_ECDSA_WITH_SHA384, OID_SIG_ED25519, OID_X509_COMMON_NAME,
};
use x509_parser::verify::verify_signature;
use x509_parser::x509::{AlgorithmIdentifier, SubjectPublicKeyInfo};

use super::der::{Reader, whole};
use super::key::{KeyError, Kind, PublicKey};
use crate::device::DeviceId;
use crate::pem;
use crate::problem::{Code, Problem};

/// A request whose sender holds the private key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Csr {
    key: PublicKey,
    common_name: Result<String, &'static str>,
}

impl Csr {
    /// Reads PEM, PEM with literal `\n`, base64 of PEM, or base64 of DER, and checks syntax, key and
    /// signature algorithm, and signature, in this order.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        let der = der_of(text).map_err(invalid)?;
        let request = Request::read(&der).map_err(invalid)?;
        let key = PublicKey::from_spki(&request.key).map_err(unsupported)?;
        if !goes_with(&request.algorithm, key.kind) {
            let what = "; its signature is of another kind";
            return Err(refused(Code::UnsupportedCsrKeyType, what));
        }
        verify_signature(&request.key, &request.algorithm, &request.signature, request.signed)
            .map_err(|_| Code::CsrSignatureInvalid)?;
        Ok(Csr { key, common_name: request.common_name })
    }

    /// Whether the request has exactly one common name and it is the device's, to the letter.
    pub fn belongs_to(&self, device: &DeviceId) -> Result<(), Problem> {
        match &self.common_name {
            Ok(name) if name == device.as_str() => Ok(()),
            Ok(_) => Err(another_name("another")),
            Err(found) => Err(another_name(found)),
        }
    }

    /// The device that it is for.
    pub fn device(&self) -> Result<DeviceId, Problem> {
        let name = self.common_name.as_ref().map_err(|found| another_name(found))?;
        DeviceId::parse(name).ok_or_else(|| another_name("one that is no device id"))
    }

    /// Whose possession it proves.
    pub fn key(&self) -> &PublicKey {
        &self.key
    }
}

/// What exactly is wrong with a request, behind what the table says.
fn refused(code: Code, what: impl fmt::Display) -> Problem {
    Problem::from(code).text(format!("{}{what}", code.row().2))
}

fn invalid(why: &str) -> Problem {
    refused(Code::InvalidCsr, format_args!(": {why}"))
}

fn another_name(found: &str) -> Problem {
    refused(Code::CsrDeviceMismatch, format_args!("; it has {found}"))
}

fn unsupported(key: KeyError) -> Problem {
    match key {
        KeyError::Malformed | KeyError::Encrypted => invalid("its key cannot be read"),
        other => refused(Code::UnsupportedCsrKeyType, format_args!("; its {other}")),
    }
}

fn der_of(text: &str) -> Result<Vec<u8>, &'static str> {
    if text.contains(pem::BEGIN) {
        return der_of_pem(text);
    }
    let bytes = pem::decode(&unescaped(text)).ok_or("neither PEM nor Base64")?;
    match std::str::from_utf8(&bytes) {
        Ok(inner) if inner.contains(pem::BEGIN) => der_of_pem(inner),
        _ => Ok(bytes),
    }
}

fn der_of_pem(text: &str) -> Result<Vec<u8>, &'static str> {
    let text = unescaped(text);
    let mut blocks = pem::blocks(&text).ok_or("its PEM is broken")?.into_iter();
    let (Some(block), None) = (blocks.next(), blocks.next()) else {
        return Err("its PEM has more than one block");
    };
    match block.label {
        "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST" => Ok(block.der),
        _ => Err("its PEM is no CERTIFICATE REQUEST"),
    }
}

/// Line ends that were escaped once too often on their way through JSON.
fn unescaped(text: &str) -> Cow<'_, str> {
    if !text.contains('\\') {
        return text.into();
    }
    text.replace("\\r", "\r").replace("\\n", "\n").into()
}

fn goes_with(signature: &AlgorithmIdentifier<'_>, key: Kind) -> bool {
    let allowed: &[Oid<'_>] = match key {
        Kind::P256 | Kind::P384 => &[OID_SIG_ECDSA_WITH_SHA256, OID_SIG_ECDSA_WITH_SHA384],
        Kind::Ed25519 => &[OID_SIG_ED25519],
        Kind::Rsa => &[OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA],
    };
    // RSA's are NULL, the others' absent; some tools mix them up, which means nothing.
    let no_parameters = signature.parameters.as_ref().is_none_or(|p| p.tag() == Tag::Null);
    no_parameters && allowed.contains(&signature.algorithm)
}

/// CertificationRequest (RFC 2986, 4.2).
struct Request<'a> {
    /// CertificationRequestInfo, which the signature covers.
    signed: &'a [u8],
    common_name: Result<String, &'static str>,
    key: SubjectPublicKeyInfo<'a>,
    algorithm: AlgorithmIdentifier<'a>,
    signature: BitString<'a>,
}

impl<'a> Request<'a> {
    fn read(der: &'a [u8]) -> Result<Self, &'static str> {
        let (broken, unread) = ("not the DER of a request", "its signature cannot be read");
        let mut outer = Reader(der);
        let mut request = Reader(outer.next(Tag::Sequence).ok_or(broken)?);
        if !outer.is_empty() {
            return Err("something follows the request");
        }
        let signed = request.element(Tag::Sequence).ok_or(broken)?;
        let algorithm = request.element(Tag::Sequence).ok_or(broken)?;
        let signature = request.element(Tag::BitString).ok_or(broken)?;
        let (_, algorithm) = AlgorithmIdentifier::from_der(algorithm).map_err(|_| unread)?;
        let (_, signature) = BitString::from_der(signature).map_err(|_| unread)?;
        if !request.is_empty() {
            return Err("something follows its signature");
        }
        let info = whole(signed, Tag::Sequence).ok_or(broken)?;
        let (common_name, key) = read_info(Reader(info))?;
        Ok(Request { signed, common_name, key, algorithm, signature })
    }
}

/// The two things of a CertificationRequestInfo that are used.
fn read_info(
    mut info: Reader<'_>,
) -> Result<(Result<String, &'static str>, SubjectPublicKeyInfo<'_>), &'static str> {
    // RFC 2986 knows 0 only. What others write (wolfSSL 1 or 2) means nothing else, and all large
    // libraries read it.
    let version = info.next(Tag::Integer).ok_or("it has no version")?;
    if !matches!(version, [0..=2]) {
        return Err("its version is none of 0 to 2");
    }
    let name = info.next(Tag::Sequence).and_then(common_names);
    let common_name = match name.ok_or("its subject cannot be read")?.as_slice() {
        [] => Err("none"),
        [Some(one)] => Ok(one.clone()),
        [None] => Err("one that is no text"),
        _ => Err("several"),
    };
    let key = info.element(Tag::Sequence).ok_or("it has no key")?;
    let (_, key) = SubjectPublicKeyInfo::from_der(key).map_err(|_| "its key cannot be read")?;
    // Some tools leave even the empty set of attributes out.
    let attributes = info.is_empty() || info.next(Tag(0)).is_some();
    if attributes && info.is_empty() {
        Ok((common_name, key))
    } else {
        Err("its attributes cannot be read")
    }
}

/// The common names of a Name (RFC 5280, 4.1.2.4); `None` for one that is no text.
fn common_names(name: &[u8]) -> Option<Vec<Option<String>>> {
    let mut names = Vec::new();
    let mut rdns = Reader(name);
    while !rdns.is_empty() {
        let mut attributes = Reader(rdns.next(Tag::Set)?);
        while !attributes.is_empty() {
            let mut attribute = Reader(attributes.next(Tag::Sequence)?);
            let (_, oid) = Oid::from_der(attribute.element(Tag::Oid)?).ok()?;
            let value = attribute.any()?;
            attribute.is_empty().then_some(())?;
            if oid == OID_X509_COMMON_NAME {
                names.push(text(&value));
            }
        }
    }
    Some(names)
}

/// What a string of any type spells (X.680, 41). A T61String is taken for Latin-1, as everybody does.
fn text(value: &Any<'_>) -> Option<String> {
    let bytes = value.data;
    match value.tag() {
        Tag::Utf8String => std::str::from_utf8(bytes).ok().map(str::to_owned),
        Tag::NumericString
        | Tag::PrintableString
        | Tag::Ia5String
        | Tag::VisibleString
        | Tag::T61String => Some(bytes.iter().copied().map(char::from).collect()),
        Tag::BmpString => wide(bytes.chunks(2), |unit| u16::from_be_bytes(unit).into()),
        Tag::UniversalString => wide(bytes.chunks(4), u32::from_be_bytes),
        _ => None,
    }
}

fn wide<'a, const N: usize>(
    mut units: impl Iterator<Item = &'a [u8]>,
    number: impl Fn([u8; N]) -> u32,
) -> Option<String> {
    units.try_fold(String::new(), |mut text, unit| {
        text.push(char::from_u32(number(unit.try_into().ok()?))?);
        Some(text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::der;
    use crate::ca::tests::must;
    use crate::files::test_dir::TestDir;
    use base64::Engine as _;
    use std::fs;

    /// A key by `openssl <how>` and a request with it.
    fn made(dir: &TestDir, how: &str, more: &str) -> String {
        must(dir, &format!("{how} -out key.pem"));
        must(dir, &format!("req -new -key key.pem -out csr.pem {more}"));
        fs::read_to_string(dir.join("csr.pem")).unwrap()
    }

    const P256: &str = "ecparam -genkey -noout -name prime256v1";
    const RSA: &str = "genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048";

    fn check(text: &str, expected: Result<(), Code>) {
        assert_eq!(Csr::parse(text).map(drop).map_err(|problem| problem.code), expected, "{text}");
    }

    #[test]
    fn four_ways_to_write_a_request() {
        let dir = TestDir::new();
        let pem = made(&dir, P256, "-subj /CN=device-1");
        let der = pem::blocks(&pem).unwrap().remove(0).der;
        let base64 = |bytes: &[u8]| pem::BASE64.encode(bytes);
        let literal = pem.replace('\n', "\\n");
        let wrapped: String = base64(&der).chars().map(|c| format!("{c}\r\n")).collect();
        let good = [
            pem.clone(),
            pem.replace('\n', "\r\n"),
            literal.clone(),
            literal.replace("\\n", "\\r\\n"),
            base64(pem.as_bytes()),
            base64(literal.as_bytes()),
            base64(pem.as_bytes()).trim_end_matches('=').to_owned(),
            base64(&der),
            wrapped,
            format!("  {pem}  "),
            pem.replace("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"),
            format!("Certificate Request:\n    Data:\n{pem}"),
        ];
        for text in &good {
            check(text, Ok(()));
        }
        let der_and = |more: &[u8]| base64(&[&der, more].concat());
        for bad in [
            "",
            " ",
            "garbage",
            "!",
            "AAAA",
            "-----BEGIN CERTIFICATE REQUEST-----",
            "-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----",
            &pem.replace("CERTIFICATE REQUEST", "CERTIFICATE"),
            &pem.replacen('M', "?", 1),
            &format!("{pem}{pem}"),
            &der_and(&[0]),
            &der_and(&der),
            &base64(&der[..der.len() - 1]),
            &pem::encode("CERTIFICATE REQUEST", &[&der[..], &[5, 0]].concat()),
            &base64(&base64(pem.as_bytes()).into_bytes()),
        ] {
            check(bad, Err(Code::InvalidCsr));
        }
    }

    #[test]
    fn keys_and_signature_algorithms() {
        let dir = TestDir::new();
        let try_out = |how: &str, more: &str, expected| {
            check(&made(&dir, how, &format!("-subj /CN=d {more}")), expected);
        };
        let unsupported = Err(Code::UnsupportedCsrKeyType);
        let rsa = |bits: u32| format!("genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:{bits}");
        for more in ["-sha256", "-sha384", "-sha512"] {
            try_out(RSA, more, Ok(()));
        }
        try_out(RSA, "-sha1", unsupported);
        try_out(RSA, "-sha224", unsupported);
        try_out(RSA, "-sigopt rsa_padding_mode:pss", unsupported);
        try_out("genpkey -algorithm RSA-PSS -pkeyopt rsa_keygen_bits:2048", "", unsupported);
        try_out(&rsa(1024), "", unsupported);
        try_out(&rsa(2047), "", unsupported);
        try_out(&format!("{RSA} -pkeyopt rsa_keygen_pubexp:3"), "", Ok(()));
        for more in ["-sha256", "-sha384"] {
            try_out(P256, more, Ok(()));
            try_out("ecparam -genkey -noout -name secp384r1", more, Ok(()));
        }
        try_out(P256, "-sha1", unsupported);
        try_out(P256, "-sha512", unsupported);
        try_out("ecparam -genkey -noout -name prime256v1 -param_enc explicit", "", unsupported);
        try_out(P256, "", Ok(()));
        try_out("ec -in key.pem -conv_form compressed", "", unsupported);
        try_out("ecparam -genkey -noout -name secp256k1", "", unsupported);
        try_out("ecparam -genkey -noout -name secp521r1", "", unsupported);
        try_out("genpkey -algorithm ED25519", "", Ok(()));
        try_out("genpkey -algorithm ED448", "", unsupported);
    }

    #[test]
    fn what_else_is_asked_for_is_ignored() {
        let dir = TestDir::new();
        let config = "[req]\nprompt=no\ndistinguished_name=dn\nattributes=at\nreq_extensions=ex\n\
            [dn]\nO=Example\nCN=device-1\n\
            [at]\nchallengePassword=secret\nunstructuredName=\u{e9}\n\
            [ex]\nsubjectAltName=DNS:a.example\nbasicConstraints=critical,CA:TRUE\n1.2.3.4=critical,DER:ff\n";
        fs::write(dir.join("c.cnf"), config).unwrap();
        let csr = Csr::parse(&made(&dir, P256, "-config c.cnf")).unwrap();
        assert_eq!(csr.belongs_to(&DeviceId::parse("device-1").unwrap()), Ok(()));
    }

    #[test]
    fn strings_of_every_type() {
        let check = |tag, bytes: &[u8], expected: Option<&str>| {
            let der = der::tlv(tag, bytes);
            let (_, any) = Any::from_der(&der).unwrap();
            assert_eq!(text(&any).as_deref(), expected, "{tag:#x} {bytes:?}");
        };
        check(0x0c, "dé".as_bytes(), Some("dé"));
        check(0x0c, &[0xff], None);
        for latin in [0x12, 0x13, 0x14, 0x16, 0x1a] {
            check(latin, b"d-1", Some("d-1"));
            check(latin, &[b'd', 0xe9], Some("dé"));
        }
        check(0x1e, &[0, b'd', 0x20, 0xac], Some("d€"));
        check(0x1c, &[0, 0, 0, b'd', 0, 1, 0xf6, 0x00], Some("d😀"));
        for (tag, bytes) in [
            (0x1e, &[0, b'd', 0][..]),
            (0x1e, &[0xd8, 0, 0xdc, 0]),
            (0x1c, &[0, 0, 0]),
            (0x1c, &[0xff, 0, 0, 0]),
            (0x04, b"d"),
            (0x03, b"\0d"),
        ] {
            check(tag, bytes, None);
        }
    }

    #[test]
    fn one_common_name_and_the_whole_of_it() {
        let dir = TestDir::new();
        let device = DeviceId::parse("device-1").unwrap();
        let try_out = |subject: &str, expected| {
            let text = made(&dir, P256, &format!("-utf8 -multivalue-rdn -subj {subject}"));
            assert_eq!(Csr::parse(&text).unwrap().belongs_to(&device), expected, "{subject}");
        };
        try_out("/CN=device-1", Ok(()));
        try_out("/O=x/CN=device-1/OU=y", Ok(()));
        try_out("/O=x+CN=device-1", Ok(()));
        for (subject, found) in [
            ("/CN=device-10", "another"),
            ("/CN=device-", "another"),
            ("/CN=Device-1", "another"),
            ("/CN=device-1~", "another"),
            ("/CN=dévice-1", "another"),
            ("/O=device-1", "none"),
            ("/", "none"),
            ("/CN=device-1/CN=device-1", "several"),
            ("/CN=device-1/CN=device-2", "several"),
            ("/CN=device-2+CN=device-1", "several"),
        ] {
            try_out(subject, Err(another_name(found)));
        }
    }

    /// xorshift64: the same mutations every time.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % bound as u64) as usize
        }
    }

    fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len().max(1));
            match random.below(6) {
                0 => bytes.truncate(at),
                1 => bytes.insert(at.min(bytes.len()), random.below(256) as u8),
                2 if at < bytes.len() => drop(bytes.remove(at)),
                3 if at < bytes.len() => bytes[at] = [0, 0x7f, 0x80, 0x84, 0xff][random.below(5)],
                _ if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
                _ => {}
            }
        }
    }

    #[test]
    fn a_signature_covers_the_request_and_garbage_does_no_harm() {
        let dir = TestDir::new();
        let asks =
            "-subj /O=x/CN=device-1 -addext subjectAltName=DNS:a -addext basicConstraints=CA:TRUE";
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for how in [P256, "genpkey -algorithm ED25519", RSA] {
            let pem = made(&dir, how, asks);
            let der = pem::blocks(&pem).unwrap().remove(0).der;
            let whole = Csr::parse(&pem).unwrap();
            let mut refused = 0;
            for _ in 0..12_000 {
                let (mut text, mut bytes) = (pem.clone().into_bytes(), der.clone());
                mutate(&mut text, &mut random);
                let _ = Csr::parse(&String::from_utf8_lossy(&text));
                mutate(&mut bytes, &mut random);
                match Csr::parse(&pem::BASE64.encode(&bytes)) {
                    Ok(csr) => assert_eq!(csr, whole, "only what is not signed may differ"),
                    Err(_) => refused += 1,
                }
            }
            assert!(refused > 11_000, "{refused}");
        }
    }

    #[test]
    fn a_broken_signature() {
        let dir = TestDir::new();
        for how in [P256, RSA, "genpkey -algorithm ED25519"] {
            let pem = made(&dir, how, "-subj /CN=device-1");
            let mut der = pem::blocks(&pem).unwrap().remove(0).der;
            *der.last_mut().unwrap() ^= 1;
            check(&pem::BASE64.encode(&der), Err(Code::CsrSignatureInvalid));
            let name = der.windows(8).position(|w| w == b"device-1").unwrap();
            *der.last_mut().unwrap() ^= 1;
            der[name + 7] = b'2';
            check(&pem::BASE64.encode(&der), Err(Code::CsrSignatureInvalid));
        }
    }
}
