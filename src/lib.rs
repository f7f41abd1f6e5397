//! Device onboarding server for MQTT fleets: one-time tokens for X.509 certificates.

pub mod clock;
pub mod device;
pub mod edge;
pub mod json;
pub mod jwt;
pub mod problem;
pub mod serial;
pub mod server;
pub mod store;
