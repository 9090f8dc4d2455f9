//! What userspace may read and write as plain bytes.
#![expect(unsafe_code, reason = "aya::Pod is an unsafe trait")]

use aya::Pod;

use crate::layout::{
    Backend4, EndpointKey4, EndpointRole, Flow4, FlowKey4, Heartbeat, Reverse4, ReverseKey4, ServiceCounters,
    ServiceRecord, ServiceRuntime, Switch,
};

macro_rules! pod {
    ($($type:ty),+ $(,)?) => {
        // SAFETY: `repr(C)`, integers and arrays of them only (the enums' places hold `u8` in userspace), no padding:
        // any bytes are a value. The layout tests pin that.
        $(unsafe impl Pod for $type {})+
    };
}

pod!(
    Backend4,
    EndpointKey4,
    EndpointRole,
    Flow4<u8>,
    FlowKey4,
    Heartbeat,
    Reverse4,
    ReverseKey4,
    ServiceCounters,
    ServiceRecord<u8>,
    ServiceRuntime,
    Switch<u8>,
);
