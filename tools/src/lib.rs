//! What the measuring programs in `src/bin` share.
