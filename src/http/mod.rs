//! What the edge and the API both speak of: which way a request goes, and what a reply is.

mod json;
pub mod lanes;
mod reply;

pub(crate) use json::Json;
pub use lanes::LaneKind;
pub use reply::Reply;

use crate::clock::Now;
use crate::problem::Problem;

/// The methods that any endpoint has, and the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `GET`
    Get,
    /// `HEAD`
    Head,
    /// `POST`
    Post,
    /// `PUT`
    Put,
    /// `DELETE`
    Delete,
    /// `OPTIONS`
    Options,
    /// One that no endpoint has.
    Other,
}

impl Method {
    /// All that some endpoint has, as a 405 of the edge has to name them (RFC 9110, 15.5.6).
    pub const ALLOW: &str = "GET, HEAD, POST, PUT, DELETE, OPTIONS";

    const NAMES: [(Method, &str); 6] = [
        (Method::Get, "GET"),
        (Method::Head, "HEAD"),
        (Method::Post, "POST"),
        (Method::Put, "PUT"),
        (Method::Delete, "DELETE"),
        (Method::Options, "OPTIONS"),
    ];

    /// As it stands on the wire.
    pub fn name(self) -> &'static str {
        let named = Self::NAMES.iter().find(|(method, _)| *method == self);
        named.map_or("another method", |(_, name)| name)
    }

    /// Reads a method name; they are case-sensitive (RFC 9110, 9.1).
    pub fn parse(name: &str) -> Self {
        let named = Self::NAMES.iter().find(|(_, known)| *known == name);
        named.map_or(Method::Other, |(method, _)| *method)
    }

    /// The method whose handler answers: `HEAD` works wherever `GET` does.
    pub fn or_get(self) -> Self {
        if self == Method::Head { Method::Get } else { self }
    }
}

/// What the edge has to know of a request to hand it on.
#[derive(Clone, Copy, Debug)]
pub struct Class {
    /// The lanes that it goes to.
    pub lane: LaneKind,
    /// The client's certificate goes with it. Elsewhere it would be bytes for nothing.
    pub client_certificate: bool,
    /// Over plain HTTP the answer is 404.
    pub https_only: bool,
    /// How an error is told to who sent it.
    pub refuse: fn(&Problem, Now) -> Reply,
}

impl Class {
    /// The class of most requests, and of those to no endpoint.
    pub const PLAIN: Class = Class {
        lane: lanes::PLAIN,
        client_certificate: false,
        https_only: false,
        refuse: Reply::problem,
    };
}

/// Tells the class of a request by its method and its path, which has no query.
pub type Classify = fn(method: &str, path: &str) -> Class;
