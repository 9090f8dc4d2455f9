//! Maps in our own memory (BPF_F_MMAPABLE): whole words are stored and read at once, without a system call.
#![expect(unsafe_code, reason = "memory that is shared with the kernel")]

use std::{
    os::fd::BorrowedFd,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use anyhow::{Context as _, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// An array map's values.
#[derive(Debug)]
pub(super) struct SharedArray {
    start: NonNull<u8>,
    length: usize,
    stride: usize,
}

// SAFETY: the memory is shared with the kernel and other CPUs anyway; every access is atomic.
unsafe impl Send for SharedArray {}

impl SharedArray {
    /// Maps an array map of `entries` values of `value_size` bytes.
    pub(super) fn new(map: BorrowedFd<'_>, value_size: usize, entries: u32) -> Result<Self> {
        // The kernel rounds values up to 8 bytes and the whole to pages (kernel/bpf/arraymap.c).
        let stride = value_size.next_multiple_of(8);
        let length = (stride * entries as usize).next_multiple_of(rustix::param::page_size());
        // SAFETY: a new mapping at an address of the kernel's choice; the length is the map's.
        let start =
            unsafe { mmap(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, map, 0) }
                .context("map an array into memory (mmap)")?;
        let start = NonNull::new(start.cast()).context("mmap returned null")?;
        Ok(Self { start, length, stride })
    }

    fn at(&self, index: u32, offset: usize, size: usize) -> NonNull<u8> {
        let place = index as usize * self.stride + offset;
        assert!(place + size <= self.length && place.is_multiple_of(size), "index {index} offset {offset} is outside");
        // SAFETY: checked to be inside of the mapping.
        unsafe { self.start.add(place) }
    }

    /// The 64-bit word at `offset` of a value.
    pub(super) fn word(&self, index: u32, offset: usize) -> &AtomicU64 {
        // SAFETY: inside, aligned (checked by `at`, the mapping starts at a page), lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.at(index, offset, 8).as_ptr().cast()) }
    }

    /// Stores a 64-bit word.
    pub(super) fn store(&self, index: u32, offset: usize, word: u64) {
        self.word(index, offset).store(word, Ordering::SeqCst);
    }

    /// Writes a whole value, word by word: whoever reads it meanwhile may see some of each.
    pub(super) fn write<T: aya::Pod>(&self, index: u32, value: &T) {
        let words = size_of::<T>() / 8;
        debug_assert_eq!((size_of::<T>() % 8, self.stride), (0, size_of::<T>()), "values of this map are whole words");
        let from: *const T = value;
        for word in 0..words {
            // SAFETY: inside of the value; `Pod` says that any bytes of it may be looked at, and it may be aligned by less.
            let bytes = unsafe { from.cast::<u64>().add(word).read_unaligned() };
            self.word(index, word * 8).store(bytes, Ordering::Relaxed);
        }
    }

    /// Reads a whole value, word by word: some of it may be older than the rest.
    pub(super) fn read<T: aya::Pod>(&self, index: u32) -> T {
        debug_assert_eq!((size_of::<T>() % 8, self.stride), (0, size_of::<T>()), "values of this map are whole words");
        let mut value = std::mem::MaybeUninit::<T>::uninit();
        for word in 0..size_of::<T>() / 8 {
            let bytes = self.word(index, word * 8).load(Ordering::Relaxed);
            // SAFETY: inside of the value, which may be aligned by less.
            unsafe { value.as_mut_ptr().cast::<u64>().add(word).write_unaligned(bytes) };
        }
        // SAFETY: every byte was written, and `Pod` says that any bytes are a value.
        unsafe { value.assume_init() }
    }

    /// The 32-bit word at `offset` of a value.
    pub(super) fn word32(&self, index: u32, offset: usize) -> &AtomicU32 {
        // SAFETY: as for `word`.
        unsafe { AtomicU32::from_ptr(self.at(index, offset, 4).as_ptr().cast()) }
    }

    /// Stores a 32-bit word.
    pub(super) fn store32(&self, index: u32, offset: usize, word: u32) {
        self.word32(index, offset).store(word, Ordering::SeqCst);
    }
}

impl Drop for SharedArray {
    fn drop(&mut self) {
        // SAFETY: our own mapping; no reference outlives `self`.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
    }
}
