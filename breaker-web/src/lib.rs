//! breaker's live page. The agent serves it for its node, and `kubectl breaker dashboard` for a cluster.
//!
//! ```text
//! producer (agent, dashboard) ── Update ──▶ hub ── messages ──▶ stream ── server-sent events ──▶ page/stream.js
//! ```
//!
//! | module | one concern |
//! |---|---|
//! | [`rows`] | what the page shows, as JSON: breakers, nodes, events, details |
//! | [`hub`] | keeps the rows, finds out what changed, and hands it to every reader |
//! | [`stream`] | `GET /v1/stream`: a reader's messages as server-sent events |
//! | [`files`] | the page's files, from `page/` and `vendor/` |
//! | [`failure`] | an answer that is an error |
//! | [`guard`] | headers that keep other sites away from the page and its data |
//!
//! `page/` has the page itself: HTML, CSS and ECMAScript modules, without a build step. `vendor/` has the code of others,
//! which `cargo xtask vendor` refreshes. The page never sends a request to another origin.

#![forbid(unsafe_code)]

pub mod failure;
pub mod files;
pub mod guard;
pub mod hub;
pub mod rows;
pub mod stream;
