//! What of a reply a client's socket did not take yet.
//!
//! A client that takes a reply slowly holds less and less: memory is given back whenever half is out.

use std::collections::VecDeque;

#[derive(Default)]
pub struct Unsent(VecDeque<u8>);

impl Unsent {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn held(&self) -> usize {
        self.0.capacity()
    }

    /// Keeps `bytes`; `to_come` more of the reply will follow.
    pub fn push(&mut self, bytes: &[u8], to_come: usize) {
        if !bytes.is_empty() {
            self.0.reserve_exact(bytes.len() + to_come);
            self.0.extend(bytes);
        }
    }

    /// What to write next; nothing if nothing is left.
    pub fn first(&self) -> &[u8] {
        self.0.as_slices().0
    }

    /// So many bytes of [`Unsent::first`] are out.
    pub fn advance(&mut self, n: usize) {
        self.0.drain(..n.min(self.0.len()));
        if self.0.len() <= self.0.capacity() / 2 {
            self.0.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_is_given_back() {
        let reply: Vec<u8> = (0..150_000).map(|i| (i % 251) as u8).collect();
        let (mut unsent, mut out) = (Unsent::default(), Vec::new());
        let mut to_come = reply.len();
        for bytes in reply.chunks(10_007) {
            to_come -= bytes.len();
            unsent.push(bytes, to_come);
            assert_eq!(unsent.held(), reply.len(), "nothing is left to doubling");
        }
        while !unsent.is_empty() {
            let left = reply.len() - out.len();
            assert!((left..2 * left).contains(&unsent.held()) || unsent.held() == left);
            let n = unsent.first().len().min(7_001);
            out.extend_from_slice(&unsent.first()[..n]);
            unsent.advance(n);
        }
        assert_eq!(unsent.held(), 0);
        assert!(out == reply);
        // After all is taken, more can be added.
        unsent.push(b"ab", 1);
        unsent.advance(2);
        unsent.push(b"c", 0);
        assert_eq!((unsent.first(), unsent.held()), (b"c".as_slice(), 1));
    }
}
