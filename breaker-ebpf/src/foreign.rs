//! Programs of somebody else, for tests: what runs before and after ours must go on running.

#![no_std]
#![no_main]
#![cfg_attr(feature = "strict", deny(warnings))]

use aya_ebpf::{
    btf_maps::Array,
    macros::{btf_map, classifier},
    programs::TcContext,
};

/// Packets seen by [`foreign_in`] (0) and [`foreign_out`] (1).
#[btf_map]
static SEEN: Array<u64, 2> = Array::new();

fn count(index: u32) {
    if let Some(seen) = SEEN.get_ptr_mut(index) {
        // SAFETY: the kernel returned a pointer to a value of this map; a lost increment is fine for a test's counter.
        unsafe { *seen += 1 };
    }
}

/// Counts and passes on.
#[classifier]
pub fn foreign_in(_ctx: TcContext) -> i32 {
    count(0);
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Counts and passes on.
#[classifier]
pub fn foreign_out(_ctx: TcContext) -> i32 {
    count(1);
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

/// Does nothing: what calling a program costs by itself.
#[classifier]
pub fn empty(_ctx: TcContext) -> i32 {
    aya_ebpf::bindings::TC_ACT_UNSPEC
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// See the other binary.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
