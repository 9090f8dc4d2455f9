//! Changing a frame, and the checksums with it.
//!
//! One's complement arithmetic is arithmetic modulo 65535, and zero has two forms, 0x0000 and 0xffff (RFC 1071). A checksum
//! that follows a change stays as right, or as wrong, as it was.

/// A checksum that was recomputed: two forms of it are equal, but where zero says that there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    /// Where it stands.
    pub at: usize,
    /// Zero means "no checksum" (UDP, RFC 768).
    pub zero_is_none: bool,
}

/// A frame that is being changed.
#[derive(Clone, Debug)]
pub struct Edit {
    /// The frame.
    pub frame: Vec<u8>,
    /// Checksums that were changed along.
    pub sums: Vec<Sum>,
}

impl Edit {
    /// Of a frame that came.
    #[must_use]
    pub fn new(frame: &[u8]) -> Self {
        Self { frame: frame.to_vec(), sums: Vec::new() }
    }

    /// Replaces whole words; `under` are the checksums that are over them.
    pub fn replace(&mut self, at: usize, new: &[u8], under: &[Sum]) {
        let old = self.frame[at..at + new.len()].to_vec();
        self.frame[at..at + new.len()].copy_from_slice(new);
        for sum in under {
            self.adjust(*sum, &old, new);
        }
    }

    /// Lets a checksum follow words that were replaced by others.
    pub fn adjust(&mut self, sum: Sum, old: &[u8], new: &[u8]) {
        let check = word(&self.frame, sum.at);
        if sum.zero_is_none && check == 0 {
            return;
        }
        let check = (u32::from(check) + words(old) + 65535 - words(new)) % 65535;
        self.put_sum(sum, check);
    }

    /// Writes a checksum anew: what makes `covered` sum up to nothing.
    pub fn checksum(&mut self, sum: Sum, covered: &[&[u8]]) {
        let total: u32 = covered.iter().map(|bytes| words(bytes)).sum();
        self.put_sum(sum, (65535 - total % 65535) % 65535);
    }

    fn put_sum(&mut self, sum: Sum, residue: u32) {
        let form = if residue == 0 { 0xffff } else { u16::try_from(residue).unwrap_or(0) };
        self.frame[sum.at..sum.at + 2].copy_from_slice(&form.to_be_bytes());
        if !self.sums.contains(&sum) {
            self.sums.push(sum);
        }
    }
}

/// The 16 bits at a place, in wire order.
#[must_use]
pub fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// The 32 bits at a place, in wire order.
#[must_use]
pub fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) << 16 | u32::from(word(bytes, at + 2))
}

/// The sum of 16-bit words, modulo 65535; an odd last byte is filled up with zero.
#[must_use]
pub fn words(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .fold(0, |sum, c| (sum + u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))) % 65535)
}
