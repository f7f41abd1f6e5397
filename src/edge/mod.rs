//! The only door to the network: limits, deadlines, strict HTTP/1.1 framing, TLS.
//!
//! One thread waits for all sockets. What a client sends is read whole and found well formed here
//! before anything behind sees it; then it goes down a *lane*, a private Unix connection to a
//! `tiny_http` server with one worker, written anew in our own words. The answer comes back through
//! memory. So a client that is slow, huge, malformed or many costs a descriptor and a few hundred
//! bytes, never a thread.
//!
//! In reading order, and each imports only what stands before it, which a test holds:
//! - [`settings`] is what all of them use; [`limits`] says what all clients together may hold and
//!   [`proxies`] who the client is behind a proxy; [`poll`] waits for sockets, [`inbox`] for other
//!   threads, [`timers`] for deadlines; [`fields`] writes what stands in heads.
//! - [`chunked`] and [`head`] say what is well formed; [`reader`] turns one client's bytes into
//!   requests, and [`session`] is what happens to one connection from its beginning to its end. No I/O
//!   in these four.
//! - [`lane`] is our end of the lanes; [`render`] is what a client gets to read; [`tls`] is one
//!   connection's encryption; [`client`] is a client's socket.
//! - [`listen`] lets clients in; [`connections`] keeps them, [`drive`] does what their sessions want,
//!   and [`run`] is the loop.

mod chunked;
mod client;
mod connections;
mod drive;
mod fields;
pub mod head;
mod inbox;
mod lane;
mod limits;
mod listen;
mod poll;
mod proxies;
mod reader;
mod render;
mod run;
mod session;
mod settings;
mod timers;
mod tls;

pub use fields::{JSON, Sender, read_private};
pub use run::{Edge, Handle, Outbox};
pub use settings::{BODY_MAX, Deadlines, LaneAddress, Settings, Wait};
