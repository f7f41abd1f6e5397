//! The edge alone, with a handler that is simple enough to predict. One module for each topic.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "../support/mod.rs"]
mod support;

mod before;
mod common;
mod conformance;
mod files;
mod http;
mod lanes;
mod limits;
mod tls;
