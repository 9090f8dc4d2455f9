//! Checksums and hashes: pure functions that the programs use.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use breaker_common::{TABLE_SIZES, csum, hash};
use proptest::prelude::*;

/// The Internet checksum of RFC 1071, written independently of the programs.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}

proptest! {
    /// Updating the checksum for four changed bytes gives the same as computing it anew (RFC 1624).
    #[test]
    fn incremental_checksums_are_the_whole_ones(mut header in any::<[u8; 20]>(), new in any::<[u8; 4]>()) {
        prop_assume!(header.iter().any(|b| *b != 0));
        let before = checksum(&header);
        let old: [u8; 4] = header[12..16].try_into().unwrap();
        header[12..16].copy_from_slice(&new);
        prop_assume!(header.iter().any(|b| *b != 0));
        let after = csum::replaced(before, csum::words4(old), csum::words4(new));
        // 0x0000 and 0xffff are the same number in one's complement.
        prop_assert!(after == checksum(&header) || (after ^ checksum(&header)) == 0xffff && (after == 0 || after == 0xffff));
    }

    #[test]
    fn shares_and_slots_are_in_range(client in any::<[u8; 4]>(), port in any::<[u8; 2]>(), seed in any::<u32>()) {
        let hash = hash::flow(u64::from(u32::from_ne_bytes(client)), 7, port, [0, 80], 6, seed);
        prop_assert!(hash::permille(hash) < 1000 && TABLE_SIZES.iter().all(|slots| hash::slot(hash, *slots) < *slots));
    }
}

/// One client's ports spread evenly over slots and shares, and services with different seeds move different
/// connections.
#[test]
fn one_clients_connections_spread() {
    let hash = |port: u16, seed| hash::flow(0x0a2a_0004, 0x0a2b_000a, port.to_be_bytes(), [0x1f, 0x90], 6, seed);
    let mut slots = vec![0u32; TABLE_SIZES[1] as usize];
    let mut half = 0;
    let mut both = 0;
    for port in 32768..60999u16 {
        let (a, b) = (hash(port, 1), hash(port, 2));
        slots[hash::slot(a, TABLE_SIZES[1]) as usize] += 1;
        half += u32::from(hash::permille(a) < 500);
        both += u32::from(hash::permille(a) < 500 && hash::permille(b) < 500);
    }
    assert!(slots.iter().all(|n| (60..170).contains(n)), "{slots:?}");
    assert!((13_500..14_700).contains(&half), "{half}");
    assert!((6_600..7_500).contains(&both), "{both}");
}
