//! Size, alignment and padding of everything in the maps.

use crate::*;
use core::mem::{align_of, offset_of, size_of};

/// Sizes are part of the ABI: raise `ABI_VERSION` when one changes.
#[test]
fn sizes_are_pinned() {
    assert_eq!(crate::ABI_VERSION, 10, "check every number below when you raise this");
    assert_eq!((size_of::<EndpointKey<V4>>(), size_of::<EndpointKey<V6>>()), (8, 20));
    assert_eq!(size_of::<EndpointRole>(), 12);
    assert_eq!(size_of::<FilterWords>(), 16);
    assert_eq!(size_of::<Route>(), 20);
    assert_eq!(size_of::<Table>(), 256);
    assert_eq!((size_of::<Switch>(), align_of::<Switch>()), (8, 8));
    assert_eq!(size_of::<ServiceRecord>(), 160);
    assert_eq!((size_of::<ServiceRuntime>(), align_of::<ServiceRuntime>()), (8, 8));
    assert_eq!((size_of::<Backend<V4>>(), size_of::<Backend<V6>>()), (16, 28));
    assert_eq!((size_of::<FlowKey<V4>>(), size_of::<FlowKey<V6>>()), (16, 40));
    assert_eq!((size_of::<Flow<V4>>(), size_of::<Flow<V6>>()), (36, 48));
    assert_eq!((size_of::<ReverseKey<V4>>(), size_of::<ReverseKey<V6>>()), (16, 40));
    assert_eq!((size_of::<Reverse<V4>>(), size_of::<Reverse<V6>>()), (32, 56));
    assert_eq!((size_of::<FragmentKey<V4>>(), size_of::<FragmentKey<V6>>()), (16, 40));
    assert_eq!((size_of::<Fragment<V4>>(), size_of::<Fragment<V6>>()), (20, 44));
    assert_eq!((size_of::<SocketKey>(), size_of::<SocketOrigin>()), (32, 24));
    assert_eq!((size_of::<ReturnPathKey>(), size_of::<ReturnPath>()), (8, 16));
    assert_eq!(size_of::<DownBackendKey>(), 8);
    assert_eq!(size_of::<Heartbeat>(), 40);
    assert_eq!(size_of::<ServiceCounters>(), 104);
    assert_eq!(size_of::<Event>(), 80);
}

#[test]
fn userspace_and_programs_agree_on_the_layout() {
    assert_eq!(size_of::<Switch>(), size_of::<Switch<u8>>());
    assert_eq!(size_of::<ServiceRecord>(), size_of::<ServiceRecord<u8>>());
    assert_eq!(size_of::<Flow<V4>>(), size_of::<Flow<V4, u8>>());
    assert_eq!(size_of::<Flow<V6>>(), size_of::<Flow<V6, u8>>());
    assert_eq!(size_of::<Event>(), size_of::<Event<u8, u8>>());
}

/// The last field ends where the type ends, so there is no padding at the end. The sum of the field sizes shows
/// that there is none in between.
#[test]
fn no_implicit_padding() {
    assert_eq!(offset_of!(ServiceRecord, pad) + 1, size_of::<ServiceRecord>());
    for (address, flow, last) in [
        (4, size_of::<Flow<V4>>(), offset_of!(Flow<V4>, last_seen_tick)),
        (16, size_of::<Flow<V6>>(), offset_of!(Flow<V6>, last_seen_tick)),
    ] {
        assert_eq!((flow, last + 4), (address + 32, address + 2 + 2 + 4 + 4 + 4 + 1 + 1 + 1 + 1 + 4 + 4 + 4));
    }
    for (address, reverse, last) in [
        (4, size_of::<Reverse<V4>>(), offset_of!(Reverse<V4>, next_hop)),
        (16, size_of::<Reverse<V6>>(), offset_of!(Reverse<V6>, next_hop)),
    ] {
        assert_eq!((reverse, last + address), (2 * address + 24, 2 * address + 2 + 2 + 4 + 1 + 3 + 4 + 4 + 4));
    }
    assert_eq!(offset_of!(Event, pad) + 7, 8 + 4 + 4 + 3 * 16 + 2 + 2 + 2 + 1 + 1 + 1 + 7);
}

/// The agent and the programs both compute the position. If they disagreed, the programs would never find the
/// endpoint.
#[test]
fn an_endpoints_bit_stays_where_it_is() {
    let v4 = filter_bit(V4::new([10, 43, 0, 10]), 8080_u16.to_be_bytes(), PROTO_TCP);
    let v6 = filter_bit(V6::new([0xfd, 0, 0, 43, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10]), [0x1f, 0x90], PROTO_TCP);
    assert_eq!((v4, v6), ((15_801, 1 << 4), (797, 1 << 14)));
}

/// Consecutive addresses get positions far apart, so that few endpoints share a bit.
#[test]
fn endpoints_share_few_bits() {
    let mut words = [0_u64; crate::FILTER_WORDS as usize];
    let mut shared = 0;
    for n in 0..32_768_u32 {
        let [_, _, c, d] = n.to_be_bytes();
        let (word, bit) = filter_bit(V4::new([10, 42, c, d]), [0, 80], PROTO_TCP);
        shared += u32::from(words[word as usize] & bit != 0);
        words[word as usize] |= bit;
    }
    assert!(shared < 1500, "{shared}");
}

#[test]
fn the_switch_is_one_word() {
    let switch = Switch { epoch: 0x0102_0304, share: 999, state: BreakerState::HalfOpen as u8, flags: 0x21 };
    assert_eq!(Switch::from_word(switch.to_word()), switch);
    assert_eq!(switch.buffer(), 1);
    assert_eq!(offset_of!(Switch<u8>, share), 4);
    assert_eq!(offset_of!(Switch<u8>, state), 6);
}

#[test]
fn numbers_convert_back_and_unknown_ones_do_not() {
    for &reason in StateReason::ALL {
        assert_eq!(StateReason::try_from(reason as u8), Ok(reason));
    }
    assert_eq!(BreakerState::try_from(3), Err(crate::UnknownNumber(3)));
}
