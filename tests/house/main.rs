//! What holds the repository itself together: who imports whom, what the pages quote, and whether the
//! fixtures of the other tests do what they say.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "../support/mod.rs"]
mod support;

mod architecture;
mod docs;
mod harness;
