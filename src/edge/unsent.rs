//! What of a reply a client's socket did not take yet.
//!
//! In pieces of one size: each is given back as soon as it is out, so that a client that takes a
//! reply slowly holds less and less, and what thousands of replies leave behind in the heap fits the next.

use std::collections::VecDeque;

/// A piece; the last of a reply has what is left. Four TLS records.
const PIECE: usize = 64 * 1024;

/// Bytes to be written.
#[derive(Default)]
pub struct Unsent {
    pieces: VecDeque<Vec<u8>>,
    /// How much of the first piece is out.
    done: usize,
    held: usize,
}

impl Unsent {
    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Bytes of memory held.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Keeps `bytes`; `to_come` more of the reply will follow.
    pub fn push(&mut self, mut bytes: &[u8], to_come: usize) {
        while !bytes.is_empty() {
            if self.pieces.back().is_none_or(|last| last.len() == last.capacity()) {
                let piece = Vec::with_capacity(PIECE.min(bytes.len() + to_come));
                self.held += piece.capacity();
                self.pieces.push_back(piece);
            }
            let Some(last) = self.pieces.back_mut() else { return };
            let (now, later) = bytes.split_at(bytes.len().min(last.capacity() - last.len()));
            last.extend_from_slice(now);
            bytes = later;
        }
    }

    /// What to write next; nothing if nothing is left.
    pub fn first(&self) -> &[u8] {
        self.pieces.front().and_then(|piece| piece.get(self.done..)).unwrap_or_default()
    }

    /// So many bytes of [`Unsent::first`] are out.
    pub fn advance(&mut self, n: usize) {
        self.done += n;
        if self.first().is_empty() {
            self.held -= self.pieces.pop_front().map_or(0, |piece| piece.capacity());
            self.done = 0;
        }
        if self.pieces.is_empty() {
            self.pieces = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_out_is_given_back_piece_by_piece() {
        let reply: Vec<u8> = (0..5 * PIECE / 2).map(|i| (i % 251) as u8).collect();
        let (mut unsent, mut out) = (Unsent::default(), Vec::new());
        let (mut to_come, mut most) = (reply.len(), 0);
        for bytes in reply.chunks(10_007) {
            to_come -= bytes.len();
            unsent.push(bytes, to_come);
            most = most.max(unsent.held());
        }
        assert_eq!(most, reply.len(), "nothing is left to doubling");
        while !unsent.is_empty() {
            let left = reply.len() - out.len();
            assert!((left..left + PIECE).contains(&unsent.held()), "{left} of {}", unsent.held());
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
