//! Device onboarding server for MQTT fleets: one-time tokens for X.509 certificates.
//!
//! A device asks for a provisioning token, presents it with a certificate signing request, and gets
//! the certificate with which it connects to the MQTT broker. Tokens live in Redis; while Redis is
//! away the service goes on from memory. Several instances on one Redis keep one record of certificates.
//!
//! ```text
//!  device ──TCP/TLS──▶ edge ──whole, bounded requests──▶ lanes: tiny_http and a worker each (server)
//!                                                                   │
//!                      store (Redis ⇄ memory) ◀── provisioner ◀── api (routes, handlers)
//!                                  devices (rows) ◀──┘   └──▶ ca (CSR, sign, record, CRL)
//!                                        ▲                    ▲
//!                       (other instances) └────── share ──────┘
//! ```
//!
//! Each lane is for one kind of work, so that what signs and waits for the disk delays nothing else:
//! [`http::lanes`] is the table of kinds.
//!
//! The modules below stand in reading order, and each imports only what stands in its row or above:
//!
//! | layer | modules | may import |
//! |---|---|---|
//! | 0 | [`clock`] [`digits`] [`device`] [`serial`] [`subscriber`] [`pem`] [`json`] [`jwt`] [`mac`] [`problem`] [`http`] [`metrics`] [`config`] [`files`] [`trial`] [`locks`] [`socket`] [`stderr`] | layer 0 |
//! | 1 | [`devices`], [`store`], [`ca`] | layer 0, [`devices`] (its plain types); back ends also what `store` itself defines |
//! | 2 | [`share`] | layers 0 and 1, but no concrete store save in its own back end |
//! | 2 | [`provisioner`] | layers 0 and 1, [`share`], but no concrete store |
//! | 3 | [`api`] | layers 0 to 2 |
//! | 3 | [`edge`] | layer 0 |
//! | 4 | [`server`] | layer 0, [`api`], [`edge`] |
//! | 5 | [`service`] [`https`] [`cli`] [`logging`] [`notify`] `main` | everything |
//!
//! Words of our own:
//! - *edge*: the one thread that speaks with clients; nothing else reads what they send.
//! - *lane*: the way of requests from the edge to one worker: a Unix connection, on which only requests
//!   travel, and the edge's inbox, in which the answers come back.
//! - *session*: one connection as the edge sees it, from its beginning to its end.
//! - *place*: a connection's number among those that there may be; another has it later, of another
//!   *generation*.
//! - *private part*: what the edge tells a worker of a request beside what the client has sent.
//! - *ticket*: number and head of a request, which the edge keeps until its reply is sent.
//! - *answer*, *reply*: a worker answers a request; what the client gets of that is the reply.
//! - *proof*: a request of the edge's own; its answer shows that the worker of a lane works.
//! - *class*: what the routes tell the edge of a request: the kind of its lane, the form of its errors.
//! - *budget*: the bytes that may be held for all clients together.
//! - *mark*: says in Redis that a token is used or killed, and outlives the token.
//! - *lease*: says in Redis which token holds a device, of which it is the only one.
//! - *ledger*: what this process knows as used or killed, and which attempts are under way.
//! - *carry-over*: telling Redis, when it returns, what it does not know.
//! - *follow-up*: one thing of that, and what Redis has not confirmed.
//! - *row*: what is kept of a device beside its certificates.
//! - *bound*: a time in the row; what the device got up to then is dead, its tokens or its certificates.
//! - *record*: all certificates that exist, whoever has signed them.
//! - *holder*: names in Redis the newest certificate of a device.
//!
//! Invariants:
//! - [`provisioner`] knows no HTTP, no Redis, no environment. Only `main` reads the environment;
//!   only [`clock`] reads the time, but for the deadlines of sockets.
//! - No lock that a request may need is held across network I/O. Who writes the record, the rows or the
//!   CRL holds a lock across that and its `fsync`, for which no reader of memory waits.
//! - No secret type has a revealing `Debug`.
//! - A token consumed while degraded never becomes redeemable again. A certificate is on disk before
//!   it is answered; so is a kill, a block, a revocation.
//! - No answer says more than was done: a 200 is true of every instance, or says of which.
//! - Nothing that a client sends can grow memory, threads, file descriptors or waiting time without
//!   a bound, but the record of certificates, which is meant to grow.

pub mod clock;
pub mod device;
mod digits;
mod pem;
pub mod serial;
pub mod subscriber;

mod json;
pub mod jwt;
mod mac;
mod problem;

pub mod http;

mod metrics;

pub mod config;
mod files;
mod locks;
mod socket;
mod stderr;
mod trial;

pub mod devices;

pub mod store;

pub mod ca;

pub mod share;

mod provisioner;

pub mod api;
pub mod edge;

pub mod server;

pub mod logging;
mod notify;

mod https;
mod service;

pub mod cli;

// What tests and tools name beside the modules that are theirs to see.
pub use metrics::{EdgeCounters, Metrics};
pub use problem::Code;
pub use provisioner::Provisioner;
