//! HTTPS: the certificate and key on disk, read again when asked to.
//!
//! The configuration is swapped as a whole: connections keep the one they began with, new ones get
//! the new one, and files that cannot be used change nothing.
//!
//! A client is asked for a certificate. Here it is only seen that the client holds its key; a
//! verifier that judged more would have to break the handshake, and the client would never learn
//! why. Whoever needs to know who the client is must judge the certificate.

use std::error::Error;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{
    WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{
    DigitallySignedStruct, DistinguishedName, ServerConfig, ServerConnection, SignatureScheme,
};

/// Most bytes of certificates that a client may show. They are kept with the connection, and in the
/// ticket of its session. A certificate of ours has 500, one of RSA 4096 with its CA 3,000.
const CERTIFICATES_MAX: usize = 8 * 1024;

/// Where the server's certificate and key are.
#[derive(Clone, Debug)]
pub struct Files {
    /// The certificate and what leads from it to a root, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM: PKCS#8, PKCS#1 or SEC1.
    pub key: PathBuf,
}

/// Why the files cannot be used.
#[derive(Debug)]
pub enum TlsError {
    /// Not there, or not PEM.
    File(PathBuf, pem::Error),
    /// No certificate in the file.
    Empty(PathBuf),
    /// The two do not make a server.
    Unusable(rustls::Error),
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TlsError::File(path, why) => write!(f, "{}: {why}", path.display()),
            TlsError::Empty(path) => write!(f, "{}: no certificate in it", path.display()),
            TlsError::Unusable(why) => write!(f, "certificate and key: {why}"),
        }
    }
}

impl Error for TlsError {}

impl From<rustls::Error> for TlsError {
    fn from(error: rustls::Error) -> Self {
        TlsError::Unusable(error)
    }
}

/// The configuration that new connections get.
pub struct Acceptor {
    files: Files,
    config: Mutex<Arc<ServerConfig>>,
}

impl Acceptor {
    /// Reads the files.
    ///
    /// # Errors
    /// When they cannot be used.
    pub fn new(files: Files) -> Result<Self, TlsError> {
        let config = Mutex::new(load(&files)?);
        Ok(Acceptor { files, config })
    }

    /// Reads the files again.
    ///
    /// # Errors
    /// When they cannot be used; then everything stays as it was.
    pub fn reload(&self) -> Result<(), TlsError> {
        let config = load(&self.files)?;
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    /// The server's side of a new connection.
    ///
    /// # Errors
    /// When rustls finds its configuration wanting.
    pub fn accept(&self) -> Result<ServerConnection, rustls::Error> {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        ServerConnection::new(Arc::clone(&config))
    }
}

fn load(files: &Files) -> Result<Arc<ServerConfig>, TlsError> {
    let chain = certificates(&files.certificate)?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|e| TlsError::File(files.key.clone(), e))?;
    let provider = ring::default_provider();
    let verifier = AnyClient(provider.signature_verification_algorithms);
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS12, &TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // A session, the client's certificates included, lives in its ticket, not in our memory.
    config.ticketer = ring::Ticketer::new()?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// Takes any certificate, or none, from whoever holds its key.
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

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |e| TlsError::File(path.to_path_buf(), e);
    let chain = CertificateDer::pem_file_iter(path).map_err(failed)?;
    let chain = chain.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if chain.is_empty() { Err(TlsError::Empty(path.to_path_buf())) } else { Ok(chain) }
}
