//! The real program from outside: started, asked, cut off, killed, and what it leaves on disk and in
//! Redis. One module for each topic.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "../support/mod.rs"]
mod support;

mod bounds;
mod ca;
mod clock;
mod clones;
mod command_line;
mod configuration;
mod console;
mod copies;
mod crash;
mod csr_policy;
mod cut_off;
mod drain;
mod enroll;
mod enroll_attacks;
mod enroll_tools;
mod enrolment;
mod errors;
mod est;
mod faults;
mod flash_wear;
mod forged_tokens;
mod forgetful_redis;
mod health;
mod https;
mod https_auto;
mod instances;
mod interop_jwt;
mod metrics;
mod model_rows;
mod mosquitto;
mod notify;
mod onboarding;
mod openssl_ca;
mod outages;
mod page;
mod power_cut;
mod rate_limit;
mod redis_cluster;
mod redis_layout;
mod redis_returns;
mod redis_sentinel;
mod redis_start;
mod renewal;
mod replicas;
mod revocation;
mod rows;
mod server_certificates;
mod service_killed;
mod share;
mod sign_csr;
