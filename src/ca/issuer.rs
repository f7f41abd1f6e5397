//! The issuer: the CA's certificate and key, loaded or made, and what they sign.
//!
//! A CA that cannot do its work is refused when it is loaded, not when the first device asks.
//!
//! Relying parties compare names by their bytes, and rcgen cannot write every name that a CA of the
//! field has (a type that stands twice, some types of strings). So rcgen only lays a certificate or
//! a list out; the issuer's name is then put in as it stands in the CA's certificate, and the result
//! is signed.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, SanType,
    SerialNumber,
};
use sha2::{Digest as _, Sha256};
use time::{Duration, OffsetDateTime};
use x509_parser::asn1_rs::{FromDer as _, Tag};
use x509_parser::certificate::X509Certificate;
use x509_parser::error::X509Error;
use x509_parser::verify::verify_signature;

use super::CaError;
use super::csr::Csr;
use super::der::{self, Reader, tlv};
use super::key::{Kind, PrivateKey, PublicKey};
use crate::clock::{self, DAY_S, Now};
use crate::config;
use crate::device::DeviceId;
use crate::digits::hex;
use crate::files;
use crate::mac::MacKey;
use crate::pem;
use crate::serial::Serial;

/// The CA's certificate in its folder.
pub const CERTIFICATE: &str = "root-ca.crt";
/// The CA's private key in its folder.
pub const KEY: &str = "root-ca.key";
/// The certificate of a CA that is being made; see [`Issuer::make`].
const CERTIFICATE_BEGUN: &str = ".root-ca.crt.begun";
/// How far a new CA's `notBefore` lies back.
const CA_BACKDATE_S: u64 = 24 * 3600;
/// How far a certificate's `notBefore` lies back: devices' clocks lag.
pub const BACKDATE_S: u64 = 300;
/// The common name of a CA made here; a random number follows, so that two CAs differ in name.
const CA_NAME: &str = "MQTT Device CA";

/// A device's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The certificate in PEM.
    pub pem: String,
    /// The certificate in DER.
    pub der: Vec<u8>,
    /// Its serial number.
    pub serial: Serial,
    /// The device, which is its common name.
    pub device: DeviceId,
    /// Its last second, since 1970.
    pub not_after: u64,
}

impl Leaf {
    /// Whether it certifies this key.
    pub(super) fn is_for(&self, key: &PublicKey) -> bool {
        let parsed = X509Certificate::from_der(&self.der);
        parsed.is_ok_and(|(_, c)| PublicKey::from_spki(c.public_key()).as_ref() == Ok(key))
    }
}

/// A server's certificate.
#[derive(Debug)]
pub struct ServerCertificate {
    /// Its serial number.
    pub serial: Serial,
    /// The certificate in PEM.
    pub pem: String,
    /// The same, and behind it those between it and the root, which clients need who know the root
    /// only.
    pub chain_pem: String,
}

/// A CA that can sign.
pub struct Issuer {
    /// Lays out what [`Issuer::complete`] signs.
    layout: rcgen::Issuer<'static, PublicKey>,
    key: PrivateKey,
    key_identifier: KeyIdMethod,
    /// A Name (RFC 5280, 4.1.2.6) in DER, as it stands in the CA's certificate.
    subject: Vec<u8>,
    /// The file.
    certificate: PathBuf,
    /// Our CA, then up to the root as far as the file has it; in DER.
    chain: Vec<Vec<u8>>,
    chain_pem: String,
    fingerprint: String,
    validity_days: u32,
    /// Seals what instances of this CA leave for each other.
    pub mac_key: MacKey,
    /// The CA's first second, since 1970.
    pub not_before: u64,
    /// The CA's last second, since 1970.
    pub not_after: u64,
}

impl fmt::Debug for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Issuer({})", self.fingerprint)
    }
}

impl Issuer {
    /// Loads the CA of a folder and checks all but its dates; `None` if there is none.
    /// Its certificates will be valid for `validity_days`.
    pub fn load(dir: &Path, validity_days: u32) -> Result<Option<Self>, CaError> {
        let (certificate, key) = (dir.join(CERTIFICATE), dir.join(KEY));
        let text = |path: &Path| -> Result<Option<String>, CaError> {
            let Some(bytes) = files::read(path)? else { return Ok(None) };
            let text = pem::text(&bytes).map(|text| Some(text.into_owned()));
            text.ok_or_else(|| CaError::refused(path, "no PEM text: it is DER, or UTF-16"))
        };
        match (text(&certificate)?, text(&key)?) {
            (None, None) => Ok(None),
            (Some(_), None) => Err(CaError::refused(&key, "missing beside root-ca.crt")),
            (None, Some(_)) => Err(CaError::refused(&certificate, "missing beside root-ca.key")),
            (Some(certificate_text), Some(key_text)) => {
                files::warn_if_others_may_read(&key);
                let chain = certificates(&certificate_text)
                    .ok_or_else(|| CaError::refused(&certificate, "not PEM certificates"))?;
                Issuer::new(dir, chain, &key_text, validity_days).map(Some)
            }
        }
    }

    /// Makes a new CA: ECDSA P-256, `years` long.
    ///
    /// The certificate is first written under another name, then the key, then the certificate gets
    /// its name. So a key without a certificate is either one whose certificate waits under that
    /// other name (see [`Issuer::finish`]) or one whose certificate somebody else must find.
    pub fn make(dir: &Path, years: u32, validity_days: u32, now: Now) -> Result<Self, CaError> {
        let key = KeyPair::generate().map_err(CaError::signing)?;
        let certificate = ca_params(years, now)?.self_signed(&key).map_err(CaError::signing)?;
        let key_pem = key.serialize_pem();
        let chain = vec![certificate.der().to_vec()];
        let issuer = Issuer::new(dir, chain, &key_pem, validity_days)?;
        let (begun, pem) = (dir.join(CERTIFICATE_BEGUN), issuer.chain_pem());
        files::write_atomic(&begun, pem.as_bytes(), 0o644)?;
        files::write_atomic(&dir.join(KEY), key_pem.as_bytes(), 0o600)?;
        files::rename_synced(&begun, &dir.join(CERTIFICATE))?;
        Ok(issuer)
    }

    /// Finishes what [`Issuer::make`] had begun when the power went.
    pub fn finish(dir: &Path) -> Result<(), CaError> {
        let begun = dir.join(CERTIFICATE_BEGUN);
        let there = |name| dir.join(name).exists();
        if there(CERTIFICATE_BEGUN) && there(KEY) && !there(CERTIFICATE) {
            log::warn!("{} was not finished when the service stopped; it is now", CERTIFICATE);
            return Ok(files::rename_synced(&begun, &dir.join(CERTIFICATE))?);
        }
        Ok(files::remove_if_there(&begun)?)
    }

    fn new(
        dir: &Path,
        chain: Vec<Vec<u8>>,
        key_pem: &str,
        validity_days: u32,
    ) -> Result<Self, CaError> {
        let certificate = dir.join(CERTIFICATE);
        let refused = |why: String| CaError::refused(&certificate, why);
        let key_refused = |why: String| CaError::refused(&dir.join(KEY), why);
        let key = PrivateKey::read(key_pem).map_err(|e| key_refused(e.and_what_is_needed()))?;
        let parsed = parse_all(&chain).ok_or_else(|| refused("not X.509 certificates".into()))?;
        let ours = parsed.first().ok_or_else(|| refused("not PEM certificates".into()))?;
        let public = PublicKey::from_spki(ours.public_key());
        public.map_err(|e| refused(e.and_what_is_needed()))?;
        check_is_key_of(&key.public, &parsed).map_err(key_refused)?;
        check_chain(&parsed).map_err(refused)?;
        let key_identifier = key_identifier(ours).map_err(|why| refused(why.into()))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.key_identifier_method = key_identifier.clone();
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let (not_before, not_after) = super::validity_of(ours);
        Ok(Issuer {
            layout: rcgen::Issuer::new(params, key.public.clone()),
            mac_key: MacKey::derive(&key.number),
            key,
            key_identifier,
            subject: ours.subject().as_raw().to_vec(),
            fingerprint: fingerprint(chain.first().map_or(&[], Vec::as_slice)),
            validity_days,
            not_before,
            not_after,
            certificate: certificate.clone(),
            chain_pem: chain.iter().map(|der| certificate_pem(der)).collect(),
            chain: chain.clone(),
        })
    }

    fn signed(&self, params: &CertificateParams, key: &PublicKey) -> Result<Vec<u8>, CaError> {
        let laid_out = params.signed_by(key, &self.layout).map_err(CaError::signing)?;
        // Behind version, serial number and algorithm (RFC 5280, 4.1).
        self.complete(laid_out.der(), 3, None)
    }

    /// Signs a list (RFC 5280, 5.1), with `revoked` as its entries, if there are any.
    pub(super) fn signed_list(
        &self,
        params: &CertificateRevocationListParams,
        revoked: &[u8],
    ) -> Result<Vec<u8>, CaError> {
        let laid_out = params.signed_by(&self.layout).map_err(CaError::signing)?;
        let revoked = (!revoked.is_empty()).then(|| tlv(0x30, revoked));
        // The name stands behind version and algorithm, the entries before the extensions.
        self.complete(laid_out.der(), 2, revoked.as_deref().map(|revoked| (5, revoked)))
    }

    /// Puts the CA's name into the place of the issuer's, another element where it goes, and signs.
    fn complete(
        &self,
        laid_out: &[u8],
        issuer_at: usize,
        inserted: Option<(usize, &[u8])>,
    ) -> Result<Vec<u8>, CaError> {
        let parts = || {
            let [to_sign, algorithm, _] =
                Reader(der::whole(laid_out, Tag::Sequence)?).elements()?.try_into().ok()?;
            let mut parts = Reader(der::whole(to_sign, Tag::Sequence)?).elements()?;
            *parts.get_mut(issuer_at)? = &self.subject;
            if let Some((at, element)) = inserted {
                (at <= parts.len()).then(|| parts.insert(at, element))?;
            }
            Some((tlv(0x30, &parts.concat()), algorithm))
        };
        let (to_sign, algorithm) =
            parts().ok_or_else(|| CaError::signing("what is to be signed cannot be read"))?;
        let signature = self.key.sign(&to_sign).map_err(CaError::signing)?;
        let signature = tlv(0x03, &[&[0], &*signature].concat());
        Ok(tlv(0x30, &[&*to_sign, algorithm, &signature].concat()))
    }

    /// Whether the CA is valid at this time.
    pub fn check_dates(&self, now: Now) -> Result<(), CaError> {
        super::check_clock(Some(self), now)?;
        if now.unix_s() > self.not_after {
            let date = clock::rfc3339(self.not_after.saturating_mul(1000));
            let why = format!("the CA expired at {date}");
            return Err(CaError::refused(&self.certificate, why));
        }
        Ok(())
    }

    /// Whether the clock stands before the CA's `notBefore`.
    pub(super) fn check_begin(&self, now: Now) -> Result<(), CaError> {
        if now.unix_s() >= self.not_before {
            return Ok(());
        }
        let date = clock::rfc3339(self.not_before.saturating_mul(1000));
        let ca = format!("{}, which begins at {date}", self.certificate.display());
        Err(CaError::ClockBeforeCa(ca))
    }

    /// Signs a device's certificate, for so many days or as many as are set. Of the request only the
    /// key is taken; that it is the device's ([`Csr::belongs_to`]) is checked once more.
    pub fn sign(
        &self,
        csr: &Csr,
        device: &DeviceId,
        serial: Serial,
        days: Option<u32>,
        now: Now,
    ) -> Result<Leaf, CaError> {
        self.check_dates(now)?;
        csr.belongs_to(device).map_err(|problem| CaError::signing(problem.message()))?;
        let days = u64::from(days.unwrap_or(self.validity_days));
        let (not_before, not_after) = self.validity(days * DAY_S, now);
        let mut params = leaf_params(not_before, not_after, serial);
        params.distinguished_name.push(DnType::CommonName, device.as_str());
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if csr.key().kind == Kind::Rsa {
            params.key_usages.push(KeyUsagePurpose::KeyEncipherment);
        }
        let der = self.signed(&params, csr.key())?;
        let pem = certificate_pem(&der);
        Ok(Leaf { pem, der, serial, device: device.clone(), not_after })
    }

    /// Signs a certificate for a server with this key and these DNS names and IP addresses, for so
    /// many seconds; the first name is its common name.
    pub fn server_certificate(
        &self,
        names: &[String],
        key: &PublicKey,
        life_s: u64,
        now: Now,
    ) -> Result<ServerCertificate, CaError> {
        self.check_dates(now)?;
        let names =
            names.iter().map(|name| config::server_name(name).ok_or_else(|| bad_name(name)));
        let names = names.collect::<Result<Vec<_>, _>>()?;
        let first = names.first().ok_or_else(|| bad_name(""))?.as_str();
        let serial = Serial::random().map_err(CaError::signing)?;
        let (not_before, not_after) = self.validity(life_s, now);
        let mut params = leaf_params(not_before, not_after, serial);
        if first.len() <= 64 {
            params.distinguished_name.push(DnType::CommonName, first);
        }
        params.subject_alt_names = names.iter().map(|n| alt_name(n)).collect::<Result<_, _>>()?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let pem = certificate_pem(&self.signed(&params, key)?);
        let between = self.chain.iter().filter(|der| !is_self_issued(der));
        let chain_pem = pem.clone() + &between.map(|der| certificate_pem(der)).collect::<String>();
        Ok(ServerCertificate { serial, pem, chain_pem })
    }

    /// Whether this CA signed the certificate.
    pub fn has_signed(&self, certificate: &X509Certificate<'_>) -> bool {
        let ca = X509Certificate::from_der(self.certificate_der());
        ca.is_ok_and(|(_, ca)| is_signed_by(certificate, &ca).is_ok())
    }

    /// A certificate in DER, and nothing behind it, that this CA has signed.
    pub(super) fn read_signed<'d>(&self, der: &'d [u8]) -> Option<X509Certificate<'d>> {
        let (rest, certificate) = X509Certificate::from_der(der).ok()?;
        (rest.is_empty() && self.has_signed(&certificate)).then_some(certificate)
    }

    /// First and last second of a certificate signed now.
    fn validity(&self, life_s: u64, now: Now) -> (u64, u64) {
        let now_s = now.unix_s();
        let end = now_s.saturating_add(life_s);
        (now_s.saturating_sub(BACKDATE_S), end.min(self.not_after))
    }

    /// The CA's certificate in PEM, and behind it those up to the root, as far as they are known.
    pub fn chain_pem(&self) -> &str {
        &self.chain_pem
    }

    /// The same in DER.
    pub fn chain(&self) -> &[Vec<u8>] {
        &self.chain
    }

    /// Its folder.
    pub(super) fn dir(&self) -> &Path {
        self.certificate.parent().unwrap_or(Path::new(""))
    }

    /// The CA's certificate in DER.
    pub fn certificate_der(&self) -> &[u8] {
        self.chain.first().map_or(&[], Vec::as_slice)
    }

    /// SHA-256 of the CA's certificate, lower-case hexadecimal.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    pub(super) fn key_identifier(&self) -> KeyIdMethod {
        self.key_identifier.clone()
    }
}

/// SHA-256 in lower-case hexadecimal.
pub fn fingerprint(der: &[u8]) -> String {
    hex(&Sha256::digest(der))
}

fn ca_params(years: u32, now: Now) -> Result<CertificateParams, CaError> {
    let serial = Serial::random().map_err(CaError::signing)?;
    let short: String = serial.to_string().chars().skip(24).collect();
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(serial.der()));
    params.not_before = clock::utc(now.unix_s().saturating_sub(CA_BACKDATE_S));
    params.not_after = years_later(clock::utc(now.unix_s()), years);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("{CA_NAME} {short}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// The same day of a later year, 9999 at most; a 29 February may become a 28th.
fn years_later(from: OffsetDateTime, years: u32) -> OffsetDateTime {
    let year = from.year().saturating_add(i32::try_from(years).unwrap_or(i32::MAX)).min(9999);
    from.replace_year(year).or_else(|_| (from - Duration::DAY).replace_year(year)).unwrap_or(from)
}

/// What all certificates signed here have in common.
fn leaf_params(not_before: u64, not_after: u64, serial: Serial) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(serial.der()));
    (params.not_before, params.not_after) = (clock::utc(not_before), clock::utc(not_after));
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
}

fn alt_name(name: &str) -> Result<SanType, CaError> {
    match name.parse::<IpAddr>() {
        Ok(address) => Ok(SanType::IpAddress(address)),
        Err(_) => name.try_into().map(SanType::DnsName).map_err(|_| bad_name(name)),
    }
}

fn bad_name(name: &str) -> CaError {
    CaError::Failed(format!("{name:?} is neither a DNS name nor an IP address"))
}

pub(super) fn certificate_pem(der: &[u8]) -> String {
    pem::encode("CERTIFICATE", der)
}

/// The certificates of a PEM text that holds nothing else.
fn certificates(text: &str) -> Option<Vec<Vec<u8>>> {
    let blocks = pem::blocks(text).filter(|blocks| !blocks.is_empty())?;
    blocks.into_iter().map(|b| (b.label == "CERTIFICATE").then_some(b.der)).collect()
}

fn parse_all(chain: &[Vec<u8>]) -> Option<Vec<X509Certificate<'_>>> {
    let parse = |der| X509Certificate::from_der(der).ok().filter(|(rest, _)| rest.is_empty());
    chain.iter().map(|der| Some(parse(der)?.1)).collect()
}

/// Whether each certificate is a CA's and signed by the next one: relying parties go that way.
fn check_chain(chain: &[X509Certificate<'_>]) -> Result<(), String> {
    chain.first().map_or(Ok(()), check_is_ca)?;
    if chain.first().is_some_and(|ours| ours.subject().iter().next().is_none()) {
        return Err("the subject is empty".to_owned());
    }
    for (number, pair) in (1..).zip(chain.windows(2)) {
        let [lower, upper] = pair else { continue };
        let signed = match is_signed_by(lower, upper) {
            // A root may sign with what this program does not know; others will.
            Err(X509Error::SignatureUnsupportedAlgorithm) => true,
            other => other.is_ok(),
        };
        if !signed {
            return Err(format!(
                "certificate {number} is not signed by certificate {}: first our CA, then whoever \
                 signed it, up to the root",
                number + 1
            ));
        }
        let below =
            upper.basic_constraints().ok().flatten().and_then(|c| c.value.path_len_constraint);
        let why = match check_is_ca(upper) {
            Ok(()) if below.is_some_and(|below| below < number) => {
                "its pathlen allows no CA below it"
            }
            Ok(()) => continue,
            Err(why) => why,
        };
        return Err(format!("certificate {}: {why}", number + 1));
    }
    Ok(())
}

/// Whether the key is that of the first.
fn check_is_key_of(key: &PublicKey, chain: &[X509Certificate<'_>]) -> Result<(), String> {
    let is_key_of =
        |ca: &X509Certificate<'_>| PublicKey::from_spki(ca.public_key()).as_ref() == Ok(key);
    match chain.iter().position(is_key_of) {
        Some(0) => Ok(()),
        Some(_) => {
            Err("the key of a later certificate in root-ca.crt: ours must be the first".to_owned())
        }
        None => Err("not the key of root-ca.crt".to_owned()),
    }
}

/// By name and by signature.
fn is_signed_by(lower: &X509Certificate<'_>, upper: &X509Certificate<'_>) -> Result<(), X509Error> {
    if lower.issuer().as_raw() != upper.subject().as_raw() {
        return Err(X509Error::SignatureVerificationError);
    }
    verify_signature(
        upper.public_key(),
        &lower.signature_algorithm,
        &lower.signature_value,
        lower.tbs_certificate.as_ref(),
    )
}

/// Whether it is a root: relying parties have that one, or do not trust it.
fn is_self_issued(der: &[u8]) -> bool {
    let read = X509Certificate::from_der(der);
    read.is_ok_and(|(_, c)| c.issuer().as_raw() == c.subject().as_raw())
}

fn check_is_ca(certificate: &X509Certificate<'_>) -> Result<(), &'static str> {
    let unreadable = "an extension stands twice or cannot be read";
    let constraints = certificate.basic_constraints().map_err(|_| unreadable)?;
    if !constraints.is_some_and(|c| c.value.ca) {
        return Err("not a CA certificate (basicConstraints lacks CA:TRUE)");
    }
    // Without the extension every use is allowed (RFC 5280, 4.2.1.3).
    match certificate.key_usage().map_err(|_| unreadable)?.map(|u| u.value) {
        Some(usage) if !usage.key_cert_sign() => Err("keyUsage lacks keyCertSign"),
        Some(usage) if !usage.crl_sign() => Err("keyUsage lacks cRLSign"),
        _ => Ok(()),
    }
}

/// The CA's own key identifier, so that chains are found by it; its key's hash if it has none.
fn key_identifier(certificate: &X509Certificate<'_>) -> Result<KeyIdMethod, &'static str> {
    use x509_parser::extensions::ParsedExtension::SubjectKeyIdentifier;
    use x509_parser::oid_registry::OID_X509_EXT_SUBJECT_KEY_IDENTIFIER as OID;
    let found = certificate
        .get_extension_unique(&OID)
        .map_err(|_| "subjectKeyIdentifier stands twice")?
        .map(|extension| extension.parsed_extension());
    match found {
        None => Ok(KeyIdMethod::Sha256),
        Some(SubjectKeyIdentifier(id)) => Ok(KeyIdMethod::PreSpecified(id.0.to_vec())),
        Some(_) => Err("subjectKeyIdentifier cannot be read"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::crl::Crl;
    use crate::ca::tests::{must, run, run_program};
    use crate::clock;
    use crate::files::test_dir::TestDir;
    use std::fs;

    const CA_EXTENSIONS: &str =
        "-addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign";

    fn load(dir: &Path) -> Result<Issuer, String> {
        Issuer::load(dir, 90).map_err(|e| e.to_string())?.ok_or_else(|| "none".to_owned())
    }

    fn device() -> DeviceId {
        DeviceId::parse("device-1").unwrap()
    }

    /// Makes a key by `openssl <how>`, and a request for `device-1` with it.
    fn request(dir: &Path, how: &str, more: &str) -> Csr {
        must(dir, &format!("{how} -out key.pem"));
        must(dir, &format!("req -new -key key.pem -subj /CN=device-1 -out csr.pem {more}"));
        Csr::parse(&fs::read_to_string(dir.join("csr.pem")).unwrap()).unwrap()
    }

    /// Signs a P-256 request and lets openssl judge.
    fn signs(issuer: &Issuer, dir: &Path) {
        let csr = request(dir, "ecparam -genkey -name prime256v1 -noout", "");
        let leaf =
            issuer.sign(&csr, &device(), Serial::random().unwrap(), None, clock::now()).unwrap();
        fs::write(dir.join("leaf.pem"), &leaf.pem).unwrap();
        let said = must(dir, "verify -purpose sslclient -CAfile root-ca.crt leaf.pem");
        assert_eq!(said, "leaf.pem: OK\n");
    }

    #[test]
    fn a_new_ca_is_what_was_promised() {
        let dir = TestDir::new();
        let now = clock::now();
        let issuer = Issuer::make(&dir, 10, 90, now).unwrap();
        let text = must(&dir, "x509 -in root-ca.crt -noout -text");
        for line in [
            "Public Key Algorithm: id-ecPublicKey",
            "NIST CURVE: P-256",
            "X509v3 Basic Constraints: critical\n                CA:TRUE, pathlen:0",
            "X509v3 Key Usage: critical\n                Certificate Sign, CRL Sign",
            "X509v3 Subject Key Identifier:",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        assert_eq!(issuer.not_before, now.unix_s() - CA_BACKDATE_S);
        let days = (issuer.not_after - now.unix_s()) / 86_400;
        assert!((3651..=3653).contains(&days), "{days}");
        let sha256 = must(&dir, "x509 -in root-ca.crt -noout -fingerprint -sha256");
        let plain: String = sha256.trim().chars().filter(|c| *c != ':').collect();
        assert!(plain.to_lowercase().ends_with(issuer.fingerprint()));
        use std::os::unix::fs::MetadataExt as _;
        let mode = |name| fs::metadata(dir.join(name)).unwrap().mode() & 0o777;
        assert_eq!((mode(KEY), mode(CERTIFICATE)), (0o600, 0o644));
        assert_eq!(fs::read_dir(&*dir).unwrap().count(), 2);

        let again = load(&dir).unwrap();
        assert_eq!(again.certificate_der(), issuer.certificate_der());
        assert_eq!(again.chain_pem(), fs::read_to_string(dir.join(CERTIFICATE)).unwrap());
        signs(&again, &dir);
    }

    #[test]
    fn a_ca_half_made_is_finished() {
        let dir = TestDir::new();
        let issuer = Issuer::make(&dir, 10, 90, clock::now()).unwrap();
        fs::rename(dir.join(CERTIFICATE), dir.join(CERTIFICATE_BEGUN)).unwrap();
        Issuer::finish(&dir).unwrap();
        assert_eq!(load(&dir).unwrap().fingerprint(), issuer.fingerprint());
        fs::remove_file(dir.join(KEY)).unwrap();
        fs::rename(dir.join(CERTIFICATE), dir.join(CERTIFICATE_BEGUN)).unwrap();
        Issuer::finish(&dir).unwrap();
        assert_eq!(load(&dir).unwrap_err(), "none");
    }

    #[test]
    fn cas_of_openssl() {
        let subject = "/C=DE/O=Müller~&~Söhne/OU=Werk~(1)/CN=Alte~CA,~v1.0/emailAddress=a@b.c";
        for (make_key, more) in [
            ("genrsa -traditional -out root-ca.key 2048", ""),
            ("genrsa -out root-ca.key 3072", "-sha384"),
            ("ecparam -genkey -name prime256v1 -out root-ca.key", ""),
            ("ecparam -genkey -noout -name secp384r1 -out root-ca.key", ""),
            ("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out root-ca.key", ""),
            ("genpkey -algorithm ED25519 -out root-ca.key", ""),
            (
                "genpkey -algorithm ED25519 -out root-ca.key",
                "-addext subjectKeyIdentifier=none -addext authorityKeyIdentifier=none",
            ),
            (
                "genpkey -algorithm ED25519 -out root-ca.key",
                "-addext subjectKeyIdentifier=0102030405 -addext authorityKeyIdentifier=none",
            ),
        ] {
            let dir = TestDir::new();
            must(&dir, make_key);
            must(
                &dir,
                &format!(
                    "req -x509 -key root-ca.key -out root-ca.crt -days 30 -utf8 -subj {subject} {CA_EXTENSIONS} {more}"
                ),
            );
            let issuer = load(&dir).unwrap_or_else(|e| panic!("{make_key} {more}: {e}"));
            signs(&issuer, &dir);
            let text = must(&dir, "x509 -in leaf.pem -noout -ext authorityKeyIdentifier");
            let ski = run(&dir, "x509 -in root-ca.crt -noout -ext subjectKeyIdentifier").unwrap();
            if !more.contains("none") {
                let id = ski.lines().nth(1).unwrap().trim();
                assert!(text.contains(id), "{text} {ski}");
            }
            let end = issuer.not_after;
            let csr = request(&dir, "genpkey -algorithm ED25519", "");
            let leaf =
                issuer.sign(&csr, &device(), Serial::from([0x40; 16]), None, clock::now()).unwrap();
            assert_eq!(leaf.not_after, end, "never past the CA's end");
        }
    }

    /// Of this the certificates' issuer, and the list's, are the bytes of the CA's subject.
    #[test]
    fn subjects_of_every_kind() {
        let config = |lines: &str, mask: &str| {
            format!(
                "[req]\nprompt=no\nutf8=yes\nstring_mask={mask}\ndistinguished_name=dn\n\
                x509_extensions=ca\n[dn]\n{lines}\n[ca]\nbasicConstraints=critical,CA:TRUE\n\
                keyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n"
            )
        };
        let (utf8, bmp, t61) = ("utf8only", "MASK:0x800", "MASK:0x4");
        for (lines, mask) in [
            ("0.DC=example\n1.DC=org\nCN=CA", utf8),
            ("CN=CA\n0.OU=one\n1.OU=two\n2.OU=one", utf8),
            ("O=x\n+CN=CA\n+OU=y\nL=z", utf8),
            ("O=Müller\nCN=中文", bmp),
            ("O=Müller\nCN=CA", t61),
            ("O=Example\nCN=CA", "default"),
            ("C=DE\nemailAddress=a@b.example\nserialNumber=1\n1.2.3.4=any", "nombstr"),
            ("CN=CA", "MASK:0x100"),
        ] {
            let dir = TestDir::new();
            fs::write(dir.join("c.cnf"), config(lines, mask)).unwrap();
            must(&dir, "ecparam -genkey -noout -name prime256v1 -out root-ca.key");
            must(&dir, "req -x509 -new -key root-ca.key -out root-ca.crt -days 30 -config c.cnf");
            let issuer = load(&dir).unwrap_or_else(|e| panic!("{lines} {mask}: {e}"));
            signs(&issuer, &dir);
            let leaf = fs::read_to_string(dir.join("leaf.pem")).unwrap();
            let leaf = pem::blocks(&leaf).unwrap().remove(0).der;
            let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
            assert_eq!(leaf.issuer().as_raw(), issuer.subject, "{lines} {mask}");
            let list = Crl::sign(&issuer, &[], 0, clock::now()).unwrap();
            list.write(&dir).unwrap();
            must(&dir, "verify -crl_check -CAfile root-ca.crt -CRLfile crl.pem leaf.pem");
        }
    }

    /// Makes a CA `name` with a key, and a certificate by `signer` or by itself.
    fn ca_by(dir: &Path, name: &str, signer: Option<&str>, basic: &str) {
        let extensions = format!(
            "basicConstraints=critical,{basic}\nkeyUsage=critical,keyCertSign,cRLSign\n\
            subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        );
        fs::write(dir.join("ext"), extensions).unwrap();
        must(dir, &format!("ecparam -genkey -noout -name prime256v1 -out {name}.key"));
        must(dir, &format!("req -new -key {name}.key -subj /CN={name} -out {name}.csr"));
        let by = match signer {
            Some(ca) => format!("-CA {ca}.crt -CAkey {ca}.key -set_serial 7"),
            None => format!("-signkey {name}.key"),
        };
        must(dir, &format!("x509 -req -in {name}.csr -days 30 -extfile ext {by} -out {name}.crt"));
    }

    #[test]
    fn chains() {
        let dir = TestDir::new();
        ca_by(&dir, "root", None, "CA:TRUE");
        ca_by(&dir, "upper", Some("root"), "CA:TRUE,pathlen:1");
        ca_by(&dir, "ours", Some("upper"), "CA:TRUE,pathlen:0");
        ca_by(&dir, "other", None, "CA:TRUE");
        ca_by(&dir, "narrow", Some("upper"), "CA:TRUE,pathlen:0");
        ca_by(&dir, "below", Some("narrow"), "CA:TRUE,pathlen:0");
        ca_by(&dir, "leaf", Some("other"), "CA:FALSE");
        let text = |name: &str| fs::read_to_string(dir.join(format!("{name}.crt"))).unwrap();
        let put = |key: &str, chain: &[&str]| {
            fs::copy(dir.join(format!("{key}.key")), dir.join(KEY)).unwrap();
            let texts = chain.iter().map(|name| format!("A comment\n{}", text(name)));
            fs::write(dir.join(CERTIFICATE), texts.collect::<String>()).unwrap();
            load(&dir)
        };
        // The root alone; all; and without the root, which others have.
        for chain in [&["root"][..], &["ours", "upper", "root"], &["ours", "upper"], &["ours"]] {
            let issuer = put(chain[0], chain).unwrap();
            let pem: String = chain.iter().map(|name| text(name)).collect();
            assert_eq!(issuer.chain_pem(), pem);
            let key = KeyPair::generate().unwrap();
            let made = issuer
                .server_certificate(
                    &["localhost".to_owned()],
                    &PublicKey::of(&key),
                    9,
                    clock::now(),
                )
                .unwrap();
            let between: String = chain.iter().filter(|n| **n != "root").map(|n| text(n)).collect();
            let count = |pem: &str| pem.matches("BEGIN").count();
            assert!(made.chain_pem.ends_with(&between));
            assert_eq!(count(&made.chain_pem), 1 + count(&between));
            let csr = request(&dir, "genpkey -algorithm ED25519", "");
            let serial = Serial::random().unwrap();
            let leaf = issuer.sign(&csr, &device(), serial, None, clock::now()).unwrap();
            fs::write(dir.join("leaf.pem"), leaf.pem).unwrap();
            fs::write(dir.join("chain.pem"), [&*pem, &text("upper")].concat()).unwrap();
            must(&dir, "verify -x509_strict -CAfile root.crt -untrusted chain.pem leaf.pem");
        }
        let check = |key: &str, chain: &[&str], why: &str| {
            let said = put(key, chain).unwrap_err();
            assert!(said.contains("root-ca.") && said.contains(why), "{chain:?}: {said}");
        };
        check("ours", &["root", "upper", "ours"], "key of a later certificate in root-ca.crt");
        check("ours", &["ours", "root"], "certificate 1 is not signed by certificate 2: first our");
        check("ours", &["ours", "upper", "other"], "certificate 2 is not signed by certificate 3");
        check("ours", &["ours", "ours"], "certificate 1 is not signed by certificate 2");
        check("root", &["root", "other"], "certificate 1 is not signed by certificate 2");
        check("below", &["below", "narrow"], "certificate 2: its pathlen allows no CA below it");
        check("leaf", &["leaf", "other"], "CA:TRUE");
        let key = fs::read_to_string(dir.join("ours.key")).unwrap();
        fs::write(dir.join(CERTIFICATE), text("ours") + &key).unwrap();
        let said = load(&dir).unwrap_err();
        assert!(said.contains("not PEM certificates"), "{said}");
    }

    #[test]
    fn cas_that_are_refused() {
        let dir = TestDir::new();
        let self_signed = |more: &str| {
            must(&dir, &format!("req -x509 -key root-ca.key -out root-ca.crt -days 30 {more}"));
            load(&dir).unwrap_err()
        };
        let check = |said: String, file: &str, why: &str| {
            let path = dir.join(file);
            assert!(said.starts_with(path.to_str().unwrap()) && said.contains(why), "{said}");
        };
        must(&dir, "ecparam -genkey -name prime256v1 -out root-ca.key");
        let plain = format!("-subj /CN=x {CA_EXTENSIONS}");
        let with = |bc: &str, ku: &str| {
            format!(
                "-subj /CN=x -addext basicConstraints=critical,{bc} -addext keyUsage=critical,{ku}"
            )
        };
        check(self_signed(&with("CA:FALSE", "keyCertSign,cRLSign")), CERTIFICATE, "CA:TRUE");
        check(self_signed(&with("CA:TRUE", "keyCertSign")), CERTIFICATE, "cRLSign");
        check(self_signed(&with("CA:TRUE", "cRLSign")), CERTIFICATE, "keyCertSign");
        check(self_signed(&format!("-subj / {CA_EXTENSIONS}")), CERTIFICATE, "subject is empty");

        must(&dir, &format!("req -x509 -key root-ca.key -out root-ca.crt {plain}"));
        must(&dir, "ecparam -genkey -name prime256v1 -out root-ca.key");
        check(load(&dir).unwrap_err(), KEY, "not the key of root-ca.crt");
        must(&dir, "genpkey -algorithm ED25519 -out root-ca.key");
        check(load(&dir).unwrap_err(), KEY, "not the key of root-ca.crt");
        must(&dir, "genrsa -out root-ca.key 1024");
        check(load(&dir).unwrap_err(), KEY, "RSA 2048");
        must(&dir, &format!("req -x509 -key root-ca.key -out root-ca.crt {plain}"));
        check(load(&dir).unwrap_err(), KEY, "RSA 2048");
        must(&dir, "ecparam -genkey -name secp521r1 -out root-ca.key");
        check(load(&dir).unwrap_err(), KEY, "P-384");
        must(&dir, "genpkey -algorithm ED25519 -aes128 -pass pass:abcd -out root-ca.key");
        check(load(&dir).unwrap_err(), KEY, "encrypted");
        for (name, other) in [(KEY, CERTIFICATE), (CERTIFICATE, KEY)] {
            fs::write(dir.join(name), "garbage").unwrap();
            check(load(&dir).unwrap_err(), name, "PEM");
            fs::remove_file(dir.join(name)).unwrap();
            check(load(&dir).unwrap_err(), name, &format!("missing beside {other}"));
            must(&dir, "genpkey -algorithm ED25519 -out root-ca.key");
        }
    }

    #[test]
    fn a_clock_before_the_ca_and_a_ca_that_has_expired() {
        let dir = TestDir::new();
        must(&dir, "genpkey -algorithm ED25519 -out root-ca.key");
        let req = format!(
            "req -x509 -key root-ca.key -out root-ca.crt -days 30 -subj /CN=x {CA_EXTENSIONS}"
        );
        run_program(&dir, "faketime", &format!("2020-01-01~00:00:00 openssl {req}")).unwrap();
        let issuer = load(&dir).unwrap();
        let csr = request(&dir, "genpkey -algorithm ED25519", "");
        let sign =
            |now| issuer.sign(&csr, &device(), Serial::from([0x40; 16]), None, now).unwrap_err();
        let error = sign(clock::now());
        assert!(
            error.to_string().contains("root-ca.crt: the CA expired at 2020-01-31T00:00:"),
            "{error}"
        );
        let early = |unix_ms| Now { unix_ms, mono_ms: 0 };
        assert!(matches!(sign(early(0)), CaError::ClockNotSet));

        run_program(&dir, "faketime", &format!("2090-01-01~00:00:00 openssl {req}")).unwrap();
        let error = load(&dir).unwrap().check_dates(clock::now()).unwrap_err();
        assert!(matches!(error, CaError::ClockBeforeCa(_)));
        assert!(error.to_string().contains("root-ca.crt, which begins at 2090-01-01T"), "{error}");
    }

    #[test]
    fn certificates_keep_to_the_profile() {
        let dir = TestDir::new();
        let issuer = Issuer::make(&dir, 10, 90, clock::now()).unwrap();
        let asks = "-addext subjectAltName=DNS:evil.example,IP:1.2.3.4 -addext basicConstraints=critical,CA:TRUE -addext keyUsage=keyCertSign,cRLSign -addext extendedKeyUsage=serverAuth -addext 1.2.3.4.5=critical,DER:0500";
        for (how, more, rsa) in [
            ("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256", "", false),
            ("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256", "-sha384", false),
            ("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384", "-sha384", false),
            ("genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384", asks, false),
            ("genpkey -algorithm ED25519", asks, false),
            ("genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048", asks, true),
            ("genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048", "-sha384 -newhdr", true),
            ("genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:4096", "-sha512", true),
        ] {
            let csr = request(&dir, how, more);
            let (serial, now) = (Serial::random().unwrap(), clock::now());
            let leaf = issuer.sign(&csr, &device(), serial, None, now).unwrap();
            assert_eq!(crate::ca::validity(&leaf.der).unwrap().0, now.unix_s() - 300);
            assert_eq!(leaf.not_after, now.unix_s() + 90 * 86_400);
            fs::write(dir.join("leaf.pem"), &leaf.pem).unwrap();
            let text = must(
                &dir,
                "x509 -in leaf.pem -noout -text -nameopt RFC2253 -certopt no_pubkey,no_sigdump",
            );
            let usage =
                if rsa { "Digital Signature, Key Encipherment" } else { "Digital Signature" };
            for line in [
                "Version: 3 (0x2)".to_owned(),
                "Subject: CN=device-1\n".to_owned(),
                "X509v3 Basic Constraints: critical\n                CA:FALSE\n".to_owned(),
                format!("X509v3 Key Usage: critical\n                {usage}\n"),
                "X509v3 Extended Key Usage: \n                TLS Web Client Authentication\n"
                    .to_owned(),
                "X509v3 Subject Key Identifier:".to_owned(),
                "X509v3 Authority Key Identifier:".to_owned(),
            ] {
                assert!(text.contains(&line), "{line} in {text}");
            }
            assert_eq!(text.matches("X509v3").count(), 6, "extensions and their title: {text}");
            assert!(!text.contains("1.2.3"), "{text}");
            let verify = "-x509_strict -purpose sslclient -CAfile root-ca.crt leaf.pem";
            assert_eq!(must(&dir, &format!("verify {verify}")), "leaf.pem: OK\n");
            let serial = format!("serial={serial:X}\n");
            assert_eq!(must(&dir, "x509 -in leaf.pem -noout -serial"), serial);
            let key = must(&dir, "pkey -in key.pem -pubout");
            assert_eq!(must(&dir, "x509 -in leaf.pem -noout -pubkey"), key);
        }
        let other = DeviceId::parse("device-10").unwrap();
        let csr = request(&dir, "genpkey -algorithm ED25519", "");
        assert!(issuer.sign(&csr, &other, Serial::from([0x40; 16]), None, clock::now()).is_err());
    }

    #[test]
    fn certificates_for_servers() {
        let dir = TestDir::new();
        let issuer = Issuer::make(&dir, 10, 90, clock::now()).unwrap();
        let names = ["broker.local", "*.example.org", "192.168.1.5", "fe80::1"];
        let key = KeyPair::generate().unwrap();
        let made = issuer
            .server_certificate(
                &names.map(str::to_owned),
                &PublicKey::of(&key),
                365 * DAY_S,
                clock::now(),
            )
            .unwrap();
        fs::write(dir.join("server.pem"), &made.chain_pem).unwrap();
        fs::write(dir.join("server.key"), key.serialize_pem()).unwrap();
        must(
            &dir,
            "verify -x509_strict -purpose sslserver -verify_hostname broker.local -CAfile root-ca.crt server.pem",
        );
        must(
            &dir,
            "verify -purpose sslserver -verify_ip 192.168.1.5 -CAfile root-ca.crt server.pem",
        );
        assert!(run(&dir, "verify -purpose sslclient -CAfile root-ca.crt server.pem").is_err());
        let text = must(&dir, "x509 -in server.pem -noout -text");
        assert!(
            text.contains(
                "DNS:broker.local, DNS:*.example.org, IP Address:192.168.1.5, IP Address:FE80"
            ),
            "{text}"
        );
        assert_eq!(
            must(&dir, "pkey -in server.key -pubout"),
            must(&dir, "x509 -in server.pem -noout -pubkey")
        );
        let typed = ["2001:DB8:0::1".to_owned()];
        let key = PublicKey::of(&key);
        let made = issuer.server_certificate(&typed, &key, 1, clock::now()).unwrap();
        fs::write(dir.join("server.pem"), &made.pem).unwrap();
        let subject = must(&dir, "x509 -in server.pem -noout -subject");
        assert_eq!(subject.trim(), "subject=CN = 2001:db8::1", "as it is in the record");
        for bad in ["", "a b", "-a", "a..b", "*", "a.*.b", "ä.de", "a/b", "10.0.0.256", "10.0.0"] {
            let error =
                issuer.server_certificate(&[bad.to_owned()], &key, 1, clock::now()).unwrap_err();
            assert!(error.to_string().contains("neither a DNS name nor an IP address"), "{bad}");
        }
        assert!(issuer.server_certificate(&[], &key, 1, clock::now()).is_err());
    }

    #[test]
    fn years_of_a_leap_day() {
        let leap = OffsetDateTime::from_unix_timestamp(1_709_208_000).unwrap(); // 2024-02-29
        assert_eq!(years_later(leap, 4) - leap, Duration::days(1461));
        assert_eq!(years_later(leap, 1) - leap, Duration::days(365));
        assert_eq!(years_later(leap, u32::MAX).year(), 9999);
    }
}
