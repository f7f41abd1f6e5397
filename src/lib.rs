//! Device onboarding server for MQTT fleets: one-time tokens for X.509 certificates.

pub mod clock;
pub mod config;
pub mod device;
pub mod json;
pub mod jwt;
pub mod problem;
pub mod serial;
pub mod store;
