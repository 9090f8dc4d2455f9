//! An address family, IPv4 or IPv6, as the hooks see it: wire format, parser and maps. Code outside of these three is
//! generic over [`Family`].

pub use crate::wire::{V4, V6};
use crate::{parse::Parse, tables::Tables};

/// IPv4 or IPv6.
pub trait Family: Parse + Tables {}

impl<A: Parse + Tables> Family for A {}
