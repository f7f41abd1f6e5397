//! PEM text (RFC 7468): finds the blocks of a text, whatever stands around them.

use std::borrow::Cow;

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

/// Base64 that does not insist on its `=`.
pub const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What every block begins with.
pub const BEGIN: &str = "-----BEGIN ";

/// One block: its label and what it holds, which may be a private key: it has no `Debug`.
#[cfg_attr(test, derive(Debug, PartialEq, Eq))]
pub struct Block<'a> {
    /// `CERTIFICATE`, `PRIVATE KEY` …
    pub label: &'a str,
    pub der: Vec<u8>,
}

/// A PEM file as text; what stands outside the blocks may be in any character set. `None` if it is
/// binary (DER) or UTF-16, as some editors write it.
pub fn text(file: &[u8]) -> Option<Cow<'_, str>> {
    let is_binary = is_der(file) || file.contains(&0);
    (!is_binary).then(|| String::from_utf8_lossy(file))
}

/// Whether it is a SEQUENCE, as certificates and keys in DER are: by its length, if that is short.
pub fn is_der(file: &[u8]) -> bool {
    match file {
        [0x30, length @ ..=0x7f, content @ ..] => content.len() == usize::from(*length),
        [0x30, 0x81..=0x84, ..] => true,
        _ => false,
    }
}

/// All blocks of a text; text outside them is skipped. `None` if one is not whole, is not base64 or
/// has headers (an encrypted key).
pub fn blocks(text: &str) -> Option<Vec<Block<'_>>> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some((_, begun)) = rest.split_once(BEGIN) {
        let (label, body) = begun.split_once("-----")?;
        let (body, after) = body.split_once(&format!("-----END {label}-----"))?;
        found.push(Block { label, der: decode(body)? });
        rest = after;
    }
    Some(found)
}

/// Base64 with white space anywhere.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let mut plain = String::with_capacity(text.len());
    plain.extend(text.split_ascii_whitespace());
    BASE64.decode(plain).ok()
}

/// One block of text, in lines of 64.
pub fn encode(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}-----END {label}-----\n", lines(der))
}

/// Base64 in lines of 64.
pub fn lines(der: &[u8]) -> String {
    let mut text = String::new();
    for line in der.chunks(48) {
        BASE64.encode_string(line, &mut text);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_reads_back() {
        let der: Vec<u8> = (0..=255).collect();
        let text = encode("X", &der);
        assert!(text.lines().all(|l| l.len() <= 64), "{text}");
        assert_eq!(blocks(&text), Some(vec![Block { label: "X", der }]));
    }

    #[test]
    fn text_and_what_is_none() {
        let marked = b"\xef\xbb\xbf# caf\xe9\r\n-----BEGIN A-----\r\nAQI=\r\n-----END A-----";
        let text = text(marked).unwrap();
        assert_eq!(blocks(&text), Some(vec![Block { label: "A", der: vec![1, 2] }]));
        for none in [b"0\x82\x01\x00".as_slice(), b"\xff\xfe-\0-\0", b"-\0"] {
            assert_eq!(super::text(none), None);
        }
    }

    #[test]
    fn blocks_and_what_is_none() {
        let block = |label, der: &[u8]| Block { label, der: der.to_vec() };
        let two = "text\n-----BEGIN A B-----\nAQ\r\n I=\n-----END A B-----\n\n-----BEGIN C-----\n-----END C-----";
        assert_eq!(blocks(two), Some(vec![block("A B", &[1, 2]), block("C", &[])]));
        assert_eq!(blocks("no block"), Some(vec![]));
        for bad in [
            "-----BEGIN A-----\nAQI=",
            "-----BEGIN A",
            "-----BEGIN A-----\nAQI=\n-----END B-----",
            "-----BEGIN A-----\nProc-Type: 4,ENCRYPTED\n\nAQI=\n-----END A-----",
            "-----BEGIN A-----\nA\n-----END A-----",
        ] {
            assert_eq!(blocks(bad), None, "{bad}");
        }
    }
}
