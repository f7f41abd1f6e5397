//! The one table of error code, HTTP status and text.
//!
//! Every layer's error becomes a [`Problem`]: what the client is told, and, apart from it, what the
//! log is told. A code is part of the contract with deployed clients; so are most of the texts.

use std::borrow::Cow;
use std::fmt;

use serde_json::Value;

use crate::device::DeviceId;

macro_rules! codes {
    ($($variant:ident $status:literal $code:literal $text:literal;)*) => {
        /// Every error code of the HTTP API.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code {
            $(#[doc = concat!($status, " `", $code, "`: ", $text)] $variant,)*
        }

        impl Code {
            /// All codes, in the order of the table.
            pub const ALL: &[Code] = &[$(Code::$variant),*];

            /// (HTTP status, code for programs, text for people).
            pub const fn row(self) -> (u16, &'static str, &'static str) {
                match self { $(Code::$variant => ($status, $code, $text),)* }
            }
        }
    };
}

codes! {
    BadRequest 400 "BAD_REQUEST" "The request is malformed";
    InvalidJson 400 "INVALID_JSON" "The request body must be a JSON object";
    DeviceIdRequired 400 "DEVICE_ID_REQUIRED" "device_id is required and must be a non-empty string";
    DeviceIdInvalid 400 "DEVICE_ID_INVALID" "device_id must be 1 to 64 characters of A-Z a-z 0-9 . _ : -";
    CsrRequired 400 "CSR_REQUIRED" "csr is required and must be a Base64-encoded PEM string";
    InvalidCsr 400 "INVALID_CSR" "csr is not a valid PKCS#10 certificate signing request";
    CsrSignatureInvalid 400 "CSR_SIGNATURE_INVALID" "The signature of the CSR is invalid";
    CsrDeviceMismatch 400 "CSR_DEVICE_MISMATCH" "The CSR must have exactly one common name, equal to the device id";
    UnsupportedCsrKeyType 400 "UNSUPPORTED_CSR_KEY_TYPE" "The CSR needs an ECDSA P-256 or P-384, Ed25519 or RSA 2048 to 4096 key, signed with SHA-256, SHA-384 or SHA-512";
    SecretInvalid 401 "SECRET_INVALID" "The secret of the device's registration is missing, wrong, used or ended";
    ApiKeyRequired 401 "API_KEY_REQUIRED" "A valid API key is required in the Authorization header (Bearer)";
    ClientCertificateRequired 401 "CLIENT_CERTIFICATE_REQUIRED" "A client certificate is required";
    ClientCertificateInvalid 401 "CLIENT_CERTIFICATE_INVALID" "The client certificate was not issued by this CA";
    ClientCertificateExpired 401 "CLIENT_CERTIFICATE_EXPIRED" "The client certificate has expired";
    ClientCertificateRevoked 401 "CLIENT_CERTIFICATE_REVOKED" "The client certificate is revoked";
    TokenMissing 401 "TOKEN_MISSING" "provisioning_token is required in Authorization header (Bearer token) or request body";
    TokenInvalidFormat 401 "TOKEN_INVALID_FORMAT" "The provisioning token is malformed";
    TokenInvalidSignature 401 "TOKEN_INVALID_SIGNATURE" "The provisioning token's signature is invalid";
    TokenInvalidType 401 "TOKEN_INVALID_TYPE" "The token is not a provisioning token";
    TokenExpired 401 "TOKEN_EXPIRED" "The provisioning token has expired";
    TokenNotFound 401 "TOKEN_NOT_FOUND" "Token not found in system";
    TokenAlreadyUsed 401 "TOKEN_ALREADY_USED" "The provisioning token has already been used";
    TokenDeviceMismatch 401 "TOKEN_DEVICE_MISMATCH" "Device ID mismatch";
    AdminDisabled 403 "ADMIN_DISABLED" "Admin endpoints are disabled: ADMIN_API_KEY is not set";
    AdminForbidden 403 "ADMIN_FORBIDDEN" "A valid admin API key is required in the Authorization header (Bearer)";
    ReplaceForbidden 403 "REPLACE_FORBIDDEN" "replace needs the onboarding API key";
    DeviceBlocked 403 "DEVICE_BLOCKED" "The device is blocked";
    DeviceNotRegistered 403 "DEVICE_NOT_REGISTERED" "The device has no registration that permits it to enrol";
    NotFound 404 "NOT_FOUND" "Not found";
    CertificateNotFound 404 "CERTIFICATE_NOT_FOUND" "Certificate not found";
    DeviceNotFound 404 "DEVICE_NOT_FOUND" "Nothing is known of this device";
    MethodNotAllowed 405 "METHOD_NOT_ALLOWED" "Method not allowed";
    RequestTimeout 408 "REQUEST_TIMEOUT" "The request did not arrive in time";
    TokenAlreadyActive 409 "TOKEN_ALREADY_ACTIVE" "A provisioning token for this device is already active.";
    DeviceHasActiveCertificate 409 "DEVICE_HAS_ACTIVE_CERTIFICATE" "Device already has an active certificate";
    BodyTooLarge 413 "BODY_TOO_LARGE" "The request body must be at most 65536 bytes";
    UnsupportedMediaType 415 "UNSUPPORTED_MEDIA_TYPE" "Content-Type must be application/json";
    RateLimited 429 "RATE_LIMITED" "Too many requests";
    HeadersTooLarge 431 "HEADERS_TOO_LARGE" "The request head is too large";
    InternalError 500 "INTERNAL_ERROR" "Internal server error";
    NotImplemented 501 "NOT_IMPLEMENTED" "The only transfer coding is chunked";
    ServiceUnavailable 503 "SERVICE_UNAVAILABLE" "Temporarily unavailable, please try again";
    StoreFull 503 "STORE_FULL" "No room for further provisioning tokens, please try again later";
    ClockNotSet 503 "CLOCK_NOT_SET" "The clock of this server is not set yet, please try again";
}

/// An error on its way to the client.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    pub code: Code,
    /// For the client, instead of the table's text; a client may match on the latter.
    pub text: Option<Cow<'static, str>>,
    pub fields: Vec<(&'static str, Value)>,
    /// Whom it concerns, for the log only.
    pub device: Option<Box<DeviceId>>,
    /// For the log only.
    pub log: Option<String>,
    /// `Retry-After`, in seconds: a 429 and a 503 always have one (RFC 9110, 10.2.3).
    pub retry_after_s: Option<u64>,
    /// `Allow`: a 405 has the methods of its path (RFC 9110, 10.2.1).
    pub allow: Option<Box<str>>,
}

impl Problem {
    /// Says to the client `text` instead of the table's.
    pub fn text(mut self, text: impl Into<Cow<'static, str>>) -> Self {
        self.text = Some(text.into());
        self
    }

    pub fn field(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.fields.push((name, value.into()));
        self
    }

    pub fn of(mut self, device: &DeviceId) -> Self {
        self.device = Some(Box::new(device.clone()));
        self
    }

    pub fn log(mut self, why: impl fmt::Display) -> Self {
        self.log = Some(why.to_string());
        self
    }

    /// Says `more` to the log, before what it is told already.
    pub fn log_more(mut self, more: impl fmt::Display) -> Self {
        self.log = Some(match self.log {
            Some(why) => format!("{more}: {why}"),
            None => more.to_string(),
        });
        self
    }

    pub fn status(&self) -> u16 {
        self.code.row().0
    }

    pub fn message(&self) -> &str {
        self.text.as_deref().unwrap_or(self.code.row().2)
    }
}

impl From<Code> for Problem {
    fn from(code: Code) -> Self {
        let retry_after_s = matches!(code.row().0, 429 | 503).then_some(1);
        let (text, device, log, allow) = (None, None, None, None);
        Problem { code, text, fields: Vec::new(), device, log, retry_after_s, allow }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, code, _) = self.code.row();
        match &self.log {
            Some(why) => write!(f, "{code}: {why}"),
            None => f.write_str(code),
        }
    }
}

impl std::error::Error for Problem {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_code_stands_once_and_is_an_error() {
        let names: HashSet<_> = Code::ALL.iter().map(|c| c.row().1).collect();
        assert_eq!(names.len(), Code::ALL.len());
        for code in Code::ALL {
            let (status, name, text) = code.row();
            assert!((400..600).contains(&status), "{name}");
            assert!(name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'), "{name}");
            assert!(!text.is_empty() && !text.contains('"'), "{name}");
        }
    }

    #[test]
    fn a_503_says_when_to_come_back() {
        assert_eq!(Problem::from(Code::StoreFull).retry_after_s, Some(1));
        assert_eq!(Problem::from(Code::NotFound).retry_after_s, None);
    }
}
