//! HTTPS: how connections are accepted with the server's certificate, which may be replaced.
//!
//! The configuration is swapped as a whole: connections keep the one they began with, new ones get
//! the new one.
//!
//! A client is asked for a certificate. Here it is only seen that the client holds its key; a
//! verifier that judged more would have to break the handshake, and the client would never learn
//! why. Code that needs to know who the client is must judge the certificate itself.

mod handshakes;
mod stream;
mod turns;

use std::sync::{Arc, Mutex};

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{
    WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::{TLS12, TLS13};
use rustls::{DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme};

pub use handshakes::{Computed, HandshakeStep, Handshakes};
pub use stream::{RECORD, STATE_HELD, Stream};

use crate::locks::locked;

/// Most bytes of certificates that a client may show. They are kept with the connection, and in the
/// ticket of its session. A certificate of ours has 500, one of RSA 4096 with its CA 3,000.
const CERTIFICATES_MAX: usize = 8 * 1024;

pub struct Acceptor {
    config: Mutex<Option<Arc<ServerConfig>>>,
}

impl Acceptor {
    /// Shows this certificate; without one, none is accepted yet.
    pub fn new(shown: Option<Arc<CertifiedKey>>) -> Result<Self, rustls::Error> {
        Ok(Acceptor { config: Mutex::new(shown.map(server_config).transpose()?) })
    }

    pub fn replace(&self, shown: Arc<CertifiedKey>) -> Result<(), rustls::Error> {
        let config = server_config(shown)?;
        *locked(&self.config) = Some(config);
        Ok(())
    }

    pub fn accept(&self) -> Result<Stream, rustls::Error> {
        let config = locked(&self.config).clone();
        Stream::new(config.ok_or_else(|| rustls::Error::General("no certificate yet".into()))?)
    }
}

fn server_config(shown: Arc<CertifiedKey>) -> Result<Arc<ServerConfig>, rustls::Error> {
    let provider = ring::default_provider();
    let verifier = AnyClient(provider.signature_verification_algorithms);
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS12, &TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(shown)));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // A session, the client's certificates included, lives in its ticket, not in our memory.
    config.ticketer = ring::Ticketer::new()?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// Takes any certificate, or none, from a client that holds its key.
#[derive(Debug)]
struct AnyClient(WebPkiSupportedAlgorithms);

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// Names no CA, so that clients show what they have.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    /// SECURITY: this says nothing of who the client is; only the worker's judgement does.
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let all = intermediates.iter().fold(end_entity.len(), |sum, der| sum + der.len());
        if all > CERTIFICATES_MAX {
            return Err(rustls::Error::General("the client's certificates are too large".into()));
        }
        Ok(ClientCertVerified::assertion())
    }

    // SECURITY: these two are what proves that the client holds the key.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
