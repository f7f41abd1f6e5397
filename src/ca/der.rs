//! DER (X.690, 10): elements read one after the other, and written.

use x509_parser::asn1_rs::{Any, FromDer as _, Tag};

/// DER elements, one after the other.
#[derive(Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// Whether nothing follows.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next element.
    pub fn any(&mut self) -> Option<Any<'a>> {
        let (rest, any) = Any::from_der(self.0).ok()?;
        self.0 = rest;
        Some(any)
    }

    /// The content of the next element.
    pub fn next(&mut self, tag: Tag) -> Option<&'a [u8]> {
        self.any().filter(|any| any.tag() == tag).map(|any| any.data)
    }

    /// The next element with its head.
    pub fn element(&mut self, tag: Tag) -> Option<&'a [u8]> {
        let before = self.0;
        self.next(tag)?;
        before.get(..before.len() - self.0.len())
    }
}

/// The content of the one element that `der` is.
pub fn whole(der: &[u8], tag: Tag) -> Option<&[u8]> {
    let mut reader = Reader(der);
    reader.next(tag).filter(|_| reader.is_empty())
}

/// Tag, length (X.690, 8.1.3) and content.
pub fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut der = vec![tag];
    match u8::try_from(content.len()) {
        Ok(short @ 0..=127) => der.push(short),
        _ => {
            let be = content.len().to_be_bytes();
            let len: Vec<u8> = be.into_iter().skip_while(|b| *b == 0).collect();
            der.push(0x80 | len.len() as u8);
            der.extend(len);
        }
    }
    der.extend(content);
    der
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths() {
        for (len, head) in [
            (0, vec![4, 0]),
            (127, vec![4, 127]),
            (128, vec![4, 0x81, 128]),
            (256, vec![4, 0x82, 1, 0]),
        ] {
            let der = tlv(4, &vec![7; len]);
            assert_eq!(der[..der.len() - len], head);
            assert_eq!(whole(&der, Tag::OctetString).map(<[u8]>::len), Some(len));
        }
    }
}
