//! The chunked transfer coding (RFC 9112, 7.1), decoded as the bytes come in.
//!
//! Strict: hexadecimal digits, CR LF and nothing else between the data, because a message that two
//! servers read differently can carry a second one past the first of them. Extensions and trailers
//! are read past up to their CR LF, whatever their text is, under a bound of their own, and dropped.
//! State is a few words; nothing is kept.

use crate::problem::Code;

/// Bytes of chunk extensions and of trailers in one message, each. No client that we know sends either.
const EXTRAS_MAX: usize = 4096;
/// Digits of a chunk's size; a size that fits `BODY_MAX` needs five, more can only be zeros.
const DIGITS_MAX: u8 = 16;

/// Where in a chunked body the next byte belongs.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    at: At,
    /// Of the size line: the number so far; then: the data bytes still to come.
    left: usize,
    digits: u8,
    extras: usize,
    /// Data bytes decoded so far.
    total: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Size,
    /// White space after the size, which only a semicolon may end.
    Space,
    /// After a semicolon.
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// At the start of a trailer line.
    Trailer,
    TrailerText,
    TrailerLf,
    EndLf,
    End,
}

impl Decoder {
    /// Decodes from `input` onto the end of `body`, `max` bytes in all; returns how many bytes it
    /// used and whether the body is complete.
    pub fn feed(
        &mut self,
        input: &[u8],
        body: &mut Vec<u8>,
        max: usize,
    ) -> Result<(usize, bool), Code> {
        let mut rest = input;
        while self.at != At::End {
            if self.at == At::Data {
                rest = self.data(rest, body);
            }
            let Some((&byte, tail)) = rest.split_first() else { break };
            self.byte(byte, max)?;
            rest = tail;
        }
        Ok((input.len() - rest.len(), self.at == At::End))
    }

    fn data<'a>(&mut self, input: &'a [u8], body: &mut Vec<u8>) -> &'a [u8] {
        let (data, rest) = input.split_at(self.left.min(input.len()));
        body.extend_from_slice(data);
        self.left -= data.len();
        self.total += data.len();
        if self.left == 0 {
            self.at = At::DataCr;
        }
        rest
    }

    fn byte(&mut self, byte: u8, max: usize) -> Result<(), Code> {
        self.at = match (self.at, byte) {
            (At::Size, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => return self.digit(byte, max),
            (At::Size, b'\r') if self.digits > 0 => At::SizeLf,
            (At::Size | At::Space, b';') if self.digits > 0 => self.extra(At::Extension)?,
            (At::Size | At::Space, b' ' | b'\t') if self.digits > 0 => self.extra(At::Space)?,
            (At::SizeLf, b'\n') => self.size_is_known(),
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::Size,
            (At::Extension, b'\r') => At::SizeLf,
            (At::Extension, b) if is_text(b) => self.extra(At::Extension)?,
            (At::Trailer, b'\r') => At::EndLf,
            (At::Trailer, b) if is_token(b) => self.trailer(At::TrailerText)?,
            (At::TrailerText, b'\r') => At::TrailerLf,
            (At::TrailerText, b) if is_text(b) => self.trailer(At::TrailerText)?,
            (At::TrailerLf, b'\n') => At::Trailer,
            (At::EndLf, b'\n') => At::End,
            _ => return Err(Code::BadRequest),
        };
        Ok(())
    }

    /// Refuses a size that does not fit before any of its data is taken.
    fn digit(&mut self, byte: u8, max: usize) -> Result<(), Code> {
        let value = (byte as char).to_digit(16).unwrap_or(0) as usize;
        self.digits += 1;
        self.left = self.left.saturating_mul(16).saturating_add(value);
        match (self.digits > DIGITS_MAX, self.left > max.saturating_sub(self.total)) {
            (true, _) => Err(Code::BadRequest),
            (_, true) => Err(Code::BodyTooLarge),
            _ => Ok(()),
        }
    }

    fn size_is_known(&mut self) -> At {
        self.digits = 0;
        if self.left > 0 {
            return At::Data;
        }
        self.extras = 0;
        At::Trailer
    }

    fn extra(&mut self, next: At) -> Result<At, Code> {
        self.extras += 1;
        if self.extras > EXTRAS_MAX { Err(Code::BadRequest) } else { Ok(next) }
    }

    fn trailer(&mut self, next: At) -> Result<At, Code> {
        self.extra(next).map_err(|_| Code::HeadersTooLarge)
    }
}

fn is_text(byte: u8) -> bool {
    matches!(byte, b'\t' | b' '..=b'~' | 0x80..)
}

/// A character of a field name (RFC 9110, 5.6.2).
pub fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 65536;

    fn decode(pieces: &[&[u8]]) -> Result<(Vec<u8>, bool), Code> {
        let (mut decoder, mut body, mut done) = (Decoder::default(), Vec::new(), false);
        for piece in pieces {
            let (used, end) = decoder.feed(piece, &mut body, MAX)?;
            assert!(end || used == piece.len());
            done = end;
        }
        Ok((body, done))
    }

    #[test]
    fn the_same_however_it_is_split() {
        let input = b"5 ; a = \"b;\\\"c\" ;d=e\r\nhello\r\n00A \t; x\r\n, wide wor\r\n2\r\nld\r\n0\r\nX: y\r\nZ:\r\n\r\n";
        let whole = decode(&[input]).unwrap();
        assert_eq!(whole, (b"hello, wide world".to_vec(), true));
        for cut in 0..input.len() {
            let (a, b) = input.split_at(cut);
            assert_eq!(decode(&[a, b]).as_ref(), Ok(&whole), "cut at {cut}");
        }
        let bytes: Vec<&[u8]> = input.chunks(1).collect();
        assert_eq!(decode(&bytes).as_ref(), Ok(&whole));
    }

    #[test]
    fn what_follows_the_body_is_left_alone() {
        let (mut decoder, mut body) = (Decoder::default(), Vec::new());
        assert_eq!(decoder.feed(b"1\r\nx\r\n0\r\n\r\nGET", &mut body, MAX), Ok((11, true)));
    }

    #[test]
    fn malformed_is_refused_at_once() {
        for bad in [
            "\r\n",
            " 1\r\n",
            "g\r\n",
            "+1\r\n",
            "-1\r\n",
            "0x1\r\n",
            "1_0\r\n",
            "\n",
            "1\n",
            "1\rx",
            "1 x\r\n",
            "1;a\nb",
            "1;a\rb",
            "1;a\0\r\n",
            ";a\r\n",
            "1\r\nxy",
            "1\r\nx\n",
            "1\r\nx\r\r",
            "1\r\nx0",
            "0\r\n\n",
            "0\r\n X: y\r\n",
            "0\r\n: y\r\n",
            "0\r\nX: y\n",
            "0\r\nX: \x01\r\n",
            "0\r\n\r\r",
            "00000000000000001\r\n",
        ] {
            assert_eq!(decode(&[bad.as_bytes()]), Err(Code::BadRequest), "{bad:?}");
        }
    }

    #[test]
    fn sizes_extensions_and_trailers_are_bounded() {
        let full = [b"10000\r\n".as_slice(), &[b'x'; MAX], b"\r\n"].concat();
        assert_eq!(decode(&[&full, b"0\r\n\r\n"]).unwrap().0.len(), MAX);
        assert_eq!(decode(&[&full, b"1\r\n"]), Err(Code::BodyTooLarge));
        for size in ["10001", "ffffffffffffffff", "8000000000000000"] {
            assert_eq!(decode(&[size.as_bytes()]), Err(Code::BodyTooLarge), "{size}");
        }
        assert_eq!(decode(&[b"1;", &[b'x'; EXTRAS_MAX + 1]]), Err(Code::BadRequest));
        assert_eq!(decode(&[b"1", &[b' '; EXTRAS_MAX + 1]]), Err(Code::BadRequest));
        let many = "1;x\r\ny\r\n".repeat(EXTRAS_MAX + 1);
        assert_eq!(decode(&[many.as_bytes()]), Err(Code::BadRequest));
        assert_eq!(decode(&[b"0\r\nX:", &[b'x'; EXTRAS_MAX]]), Err(Code::HeadersTooLarge));
    }
}
