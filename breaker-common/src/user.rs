//! What userspace may read and write as plain bytes.
#![expect(unsafe_code, reason = "aya::Pod is an unsafe trait")]

use aya::Pod;

use crate::layout::{
    Address, Backend, EndpointKey, EndpointRole, FilterWords, Flow, FlowKey, Fragment, FragmentKey, Heartbeat, Reverse,
    ReverseKey, Route, ServiceCounters, ServiceRecord, ServiceRuntime, SocketKey, SocketOrigin, Switch, Table,
};
use crate::limits::{Bucket, ClientState, ConnectionState, LimitCounters, LimitedClient, Limiter, ServiceLimits};

macro_rules! pod {
    ($($type:ty),+ $(,)?) => {
        // SAFETY: `repr(C)`, integers and arrays of them only (the enums' places hold `u8` in userspace), no padding:
        // any bytes are a value. The layout tests pin that.
        $(unsafe impl Pod for $type {})+
    };
}

macro_rules! pod_of_address {
    ($($type:ty),+ $(,)?) => {
        // SAFETY: as above, for both kinds of address that there are.
        $(unsafe impl<A: Address> Pod for $type {})+
    };
}

pod!(
    EndpointRole,
    FilterWords,
    Bucket<ClientState>,
    Bucket<ConnectionState>,
    Heartbeat,
    LimitCounters,
    LimitedClient,
    Limiter,
    ServiceLimits,
    Route,
    ServiceCounters,
    ServiceRecord<u8>,
    ServiceRuntime,
    SocketKey,
    SocketOrigin,
    Switch<u8>,
    Table,
);

pod_of_address!(
    Backend<A>,
    EndpointKey<A>,
    Flow<A, u8>,
    FlowKey<A>,
    Fragment<A>,
    FragmentKey<A>,
    Reverse<A>,
    ReverseKey<A>,
);
