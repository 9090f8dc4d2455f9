//! What the requests and answers of all HTTP versions have in common.

/// Largest part of a response body, in bytes, that is read and searched.
pub(super) const BODY_LIMIT: usize = 64 * 1024;

/// Headers that every request has, unless the check gives others of the same name.
pub(super) const DEFAULT_HEADERS: [(&str, &str); 2] =
    [("User-Agent", concat!("breaker/", env!("CARGO_PKG_VERSION"))), ("Accept", "*/*")];

/// A response as far as a check needs it.
#[derive(Debug)]
pub(super) struct Answer {
    pub status: u16,
    /// The body, or as much of it as came before the connection broke or the limit was reached.
    pub body: Vec<u8>,
}
