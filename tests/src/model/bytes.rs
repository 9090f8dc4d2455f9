//! Changes a frame and adjusts its checksums.
//!
//! One's complement arithmetic is arithmetic modulo 65535 in which zero has two forms, 0x0000 and 0xffff (RFC 1071). An
//! adjusted checksum is as right, or as wrong, as it was before the change.

/// A checksum that was changed. Its two forms of zero are equal, unless zero means that there is no checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    /// Offset in the frame.
    pub at: usize,
    /// Zero means "no checksum" (UDP, RFC 768).
    pub zero_is_none: bool,
}

/// A frame that is being changed.
#[derive(Clone, Debug)]
pub struct Edit {
    /// The frame.
    pub frame: Vec<u8>,
    /// Checksums that were changed so far.
    pub sums: Vec<Sum>,
}

impl Edit {
    /// Starts with a copy of a received frame.
    #[must_use]
    pub fn new(frame: &[u8]) -> Self {
        Self { frame: frame.to_vec(), sums: Vec::new() }
    }

    /// Replaces whole 16-bit words at an offset. `under` are the checksums that cover them.
    pub fn replace(&mut self, at: usize, new: &[u8], under: &[Sum]) {
        let old = self.frame[at..at + new.len()].to_vec();
        self.frame[at..at + new.len()].copy_from_slice(new);
        for sum in under {
            self.adjust(*sum, &old, new);
        }
    }

    /// Adjusts a checksum for words `old` that were replaced by `new`. A UDP checksum of zero stays zero.
    pub fn adjust(&mut self, sum: Sum, old: &[u8], new: &[u8]) {
        let check = word(&self.frame, sum.at);
        if sum.zero_is_none && check == 0 {
            return;
        }
        let check = (u32::from(check) + words(old) + 65535 - words(new)) % 65535;
        self.put_sum(sum, check);
    }

    /// Computes a checksum over `covered`, in which the checksum itself must be zero, and writes it.
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

/// The 16-bit number at an offset, read in network byte order.
#[must_use]
pub fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// The 32-bit number at an offset, read in network byte order.
#[must_use]
pub fn long(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) << 16 | u32::from(word(bytes, at + 2))
}

/// Sum of the 16-bit words modulo 65535. An odd last byte is padded with a zero byte.
#[must_use]
pub fn words(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .fold(0, |sum, c| (sum + u32::from(u16::from_be_bytes([c[0], c.get(1).copied().unwrap_or(0)]))) % 65535)
}
