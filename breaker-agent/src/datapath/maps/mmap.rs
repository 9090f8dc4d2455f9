//! Array maps that are mapped into the agent's memory (`BPF_F_MMAPABLE`). The agent reads and stores whole words
//! atomically, without a system call.
#![expect(unsafe_code, reason = "memory that is shared with the kernel")]

use std::{
    os::fd::BorrowedFd,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use anyhow::{Context as _, Result};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The values of an array map, in memory that the agent shares with the kernel.
#[derive(Debug)]
pub(crate) struct SharedArray {
    start: NonNull<u8>,
    length: usize,
    stride: usize,
}

// SAFETY: the kernel and other CPUs access the same memory in any case, and every access here is atomic.
unsafe impl Send for SharedArray {}

impl SharedArray {
    /// Maps an array map into memory. It has `entries` values of `value_size` bytes.
    pub(crate) fn new(map: BorrowedFd<'_>, value_size: usize, entries: u32) -> Result<Self> {
        // The kernel rounds each value up to 8 bytes, and the whole array up to pages (kernel/bpf/arraymap.c).
        let stride = value_size.next_multiple_of(8);
        let length = (stride * entries as usize).next_multiple_of(rustix::param::page_size());
        // SAFETY: the kernel chooses the address of the new mapping, and the length is the map's.
        let start =
            unsafe { mmap(std::ptr::null_mut(), length, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, map, 0) }
                .context("map an array into memory (mmap)")?;
        let start = NonNull::new(start.cast()).context("mmap returned null")?;
        Ok(Self { start, length, stride })
    }

    fn at(&self, index: u32, offset: usize, size: usize) -> NonNull<u8> {
        let place = index as usize * self.stride + offset;
        assert!(
            place + size <= self.length && place.is_multiple_of(size),
            "index {index} offset {offset} is outside of the map or not aligned"
        );
        // SAFETY: the assertion above keeps the address inside of the mapping.
        unsafe { self.start.add(place) }
    }

    /// Returns the 64-bit word at a byte offset of a value. Panics if the word is outside of the map or not aligned.
    pub(crate) fn word(&self, index: u32, offset: usize) -> &AtomicU64 {
        // SAFETY: `at` checks that the word is inside and aligned (the mapping starts at a page); the mapping lives
        // as long as `self`.
        unsafe { AtomicU64::from_ptr(self.at(index, offset, 8).as_ptr().cast()) }
    }

    /// Stores a 64-bit word.
    pub(crate) fn store(&self, index: u32, offset: usize, word: u64) {
        self.word(index, offset).store(word, Ordering::SeqCst);
    }

    /// Writes a value word by word. A concurrent reader may see old and new words mixed.
    pub(crate) fn write<T: aya::Pod>(&self, index: u32, value: &T) {
        let words = size_of::<T>() / 8;
        debug_assert_eq!((size_of::<T>() % 8, self.stride), (0, size_of::<T>()), "values of this map are whole words");
        let from: *const T = value;
        for word in 0..words {
            // SAFETY: the word is inside of the value. `Pod` allows every byte of it to be read. The read is
            // unaligned, because the value's alignment may be less than 8.
            let bytes = unsafe { from.cast::<u64>().add(word).read_unaligned() };
            self.word(index, word * 8).store(bytes, Ordering::Relaxed);
        }
    }

    /// Reads a value word by word. If it is being written meanwhile, old and new words may be mixed.
    pub(crate) fn read<T: aya::Pod>(&self, index: u32) -> T {
        debug_assert_eq!((size_of::<T>() % 8, self.stride), (0, size_of::<T>()), "values of this map are whole words");
        let mut value = std::mem::MaybeUninit::<T>::uninit();
        for word in 0..size_of::<T>() / 8 {
            let bytes = self.word(index, word * 8).load(Ordering::Relaxed);
            // SAFETY: the word is inside of the value. The write is unaligned, because the value's alignment may be
            // less than 8.
            unsafe { value.as_mut_ptr().cast::<u64>().add(word).write_unaligned(bytes) };
        }
        // SAFETY: every byte was written, and `Pod` makes every bit pattern a valid value.
        unsafe { value.assume_init() }
    }

    /// Returns the 32-bit word at a byte offset of a value. Panics if the word is outside of the map or not aligned.
    pub(crate) fn word32(&self, index: u32, offset: usize) -> &AtomicU32 {
        // SAFETY: as for `word`.
        unsafe { AtomicU32::from_ptr(self.at(index, offset, 4).as_ptr().cast()) }
    }

    /// Stores a 32-bit word.
    pub(crate) fn store32(&self, index: u32, offset: usize, word: u32) {
        self.word32(index, offset).store(word, Ordering::SeqCst);
    }
}

impl Drop for SharedArray {
    fn drop(&mut self) {
        // SAFETY: the mapping is our own, and no reference into it outlives `self`.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
    }
}
