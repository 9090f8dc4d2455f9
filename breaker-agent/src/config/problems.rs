//! The problems of a configuration, and functions that read single values. On a problem they report it and continue.

use std::{
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::Path,
    time::Duration,
};

use serde_saphyr::{Location, Spanned};

use super::ConfigError;

/// One day in milliseconds: the longest time that a field accepts.
pub(super) const DAY: u64 = 86_400_000;

/// Collects problems. A field with a problem gets a default, so that later problems are found as well.
pub(super) struct Problems<'a> {
    file: &'a Path,
    found: Vec<ConfigError>,
}

impl<'a> Problems<'a> {
    pub(super) const fn new(file: &'a Path) -> Self {
        Self { file, found: Vec::new() }
    }

    /// Returns the value if there were no problems, else the problems.
    pub(super) fn result<T>(self, value: T) -> Result<T, Vec<ConfigError>> {
        if self.found.is_empty() { Ok(value) } else { Err(self.found) }
    }

    pub(super) fn add(&mut self, at: Location, field: &str, problem: String) {
        self.found.push(ConfigError { file: self.file.to_owned(), line: at.line(), field: field.to_owned(), problem });
    }

    /// Returns a number. The default stands for a missing number, and for one outside of the allowed range, which is
    /// reported.
    pub(super) fn number(
        &mut self,
        value: Option<&Spanned<u64>>,
        field: &str,
        default: u64,
        allowed: RangeInclusive<u64>,
    ) -> u64 {
        let Some(value) = value else { return default };
        if allowed.contains(&value.value) {
            return value.value;
        }
        let (least, most) = (allowed.start(), allowed.end());
        self.add(value.referenced, field, format!("{} is not allowed; allowed: {least} to {most}", value.value));
        default
    }

    pub(super) fn u32(
        &mut self,
        value: Option<&Spanned<u64>>,
        field: &str,
        default: u32,
        allowed: RangeInclusive<u32>,
    ) -> u32 {
        let allowed = u64::from(*allowed.start())..=u64::from(*allowed.end());
        u32::try_from(self.number(value, field, u64::from(default), allowed)).unwrap_or(default)
    }

    pub(super) fn percent(
        &mut self,
        value: Option<&Spanned<u64>>,
        field: &str,
        default: u8,
        allowed: RangeInclusive<u64>,
    ) -> u8 {
        u8::try_from(self.number(value, field, u64::from(default), allowed)).unwrap_or(default)
    }

    pub(super) fn millis(&mut self, value: Option<&Spanned<u64>>, field: &str, default: u64, least: u64) -> Duration {
        Duration::from_millis(self.number(value, field, default, least..=DAY))
    }

    /// Returns the meaning of one of the allowed words. The default stands for a missing word, and for any other word,
    /// which is reported.
    pub(super) fn word<T: Copy>(
        &mut self,
        value: Option<&Spanned<String>>,
        field: &str,
        words: &[(&str, T)],
        default: T,
    ) -> T {
        let Some(value) = value else { return default };
        if let Some((_, meaning)) = words.iter().find(|(word, _)| *word == value.value) {
            return *meaning;
        }
        let allowed: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        self.add(value.referenced, field, format!("{:?} is not allowed; allowed: {}", value.value, allowed.join(", ")));
        default
    }

    pub(super) fn port(&mut self, value: &Spanned<u64>, field: &str) -> u16 {
        u16::try_from(self.number(Some(value), field, 1, 1..=65535)).unwrap_or(1)
    }

    pub(super) fn optional_port(&mut self, value: Option<&Spanned<u64>>, field: &str) -> Option<u16> {
        value.map(|value| self.port(value, field))
    }

    /// Checks a host name, which may have a port.
    pub(super) fn host(&mut self, host: &Spanned<String>, field: &str) {
        if host.value.contains('@') || host.value.parse::<http::uri::Authority>().is_err() {
            let problem = format!("{:?} is not allowed; allowed: a host name, optionally with a port", host.value);
            self.add(host.referenced, field, problem);
        }
    }

    pub(super) fn address(&mut self, address: &Spanned<String>, port: &Spanned<u64>, field: &str) -> SocketAddr {
        let port = self.port(port, &format!("{field}.port"));
        let field = format!("{field}.address");
        let mut refuse = |why: &str| {
            self.add(
                address.referenced,
                &field,
                format!("{:?} {why}; allowed: an IP address of a host", address.value),
            );
            IpAddr::from([127, 0, 0, 1])
        };
        let no_host = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => ip.is_broadcast(),
            // No packet carries an IPv4-mapped address. A link-local address means nothing without an interface.
            IpAddr::V6(ip) => ip.to_ipv4_mapped().is_some() || ip.is_unicast_link_local(),
        };
        let ip = match address.value.parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() || ip.is_multicast() || no_host(&ip) => refuse("is not a host's address"),
            Ok(ip) => ip,
            Err(_) => refuse("is not an IP address"),
        };
        SocketAddr::new(ip, port)
    }
}
