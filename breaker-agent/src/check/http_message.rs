//! The parts of requests and answers that all HTTP versions share.

use breaker_core::model::HttpGet;

/// Largest part of a response body, in bytes, that is read and searched.
pub(super) const BODY_LIMIT: usize = 64 * 1024;

/// Headers that every request has, unless the check gives others of the same name.
const DEFAULT_HEADERS: [(&str, &str); 2] =
    [("User-Agent", concat!("breaker/", env!("CARGO_PKG_VERSION"))), ("Accept", "*/*")];

/// Returns whether the check gives a header of this name. Names are compared without regard to case (RFC 9110,
/// section 5.1).
pub(super) fn is_given(get: &HttpGet, name: &str) -> bool {
    get.headers.iter().any(|(given, _)| given.eq_ignore_ascii_case(name))
}

/// The default headers of a request: those that the check does not give itself.
pub(super) fn default_headers(get: &HttpGet) -> impl Iterator<Item = (&'static str, &'static str)> {
    DEFAULT_HEADERS.into_iter().filter(|(name, _)| !is_given(get, name))
}

/// A response as far as a check needs it.
#[derive(Debug)]
pub(super) struct Answer {
    pub status: u16,
    /// The body, or as much of it as came before the connection broke or the limit was reached.
    pub body: Vec<u8>,
}
