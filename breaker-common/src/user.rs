//! Marks the map types that userspace may read and write as plain bytes ([`aya::Pod`]).
#![expect(unsafe_code, reason = "aya::Pod is an unsafe trait")]

use aya::Pod;

use crate::{
    Address, Backend, DownBackendKey, EndpointKey, EndpointRole, FilterWords, Flow, FlowKey, Fragment, FragmentKey,
    Heartbeat, ReturnPath, ReturnPathKey, Reverse, ReverseKey, Route, ServiceCounters, ServiceRecord, ServiceRuntime,
    SocketKey, SocketOrigin, Switch, Table,
};
use crate::{Bucket, ClientState, ConnectionState, LimitCounters, LimitedClient, Limiter, ServiceLimits};

macro_rules! pod {
    ($($type:ty),+ $(,)?) => {
        // SAFETY: the type is `repr(C)`, consists of integers and arrays of integers only (userspace instantiates
        // enum parameters with `u8`) and has no padding, so any bytes are a valid value. The layout tests check
        // this.
        $(unsafe impl Pod for $type {})+
    };
}

macro_rules! pod_of_address {
    ($($type:ty),+ $(,)?) => {
        // SAFETY: as in `pod!`, for both implementors of `Address`.
        $(unsafe impl<A: Address> Pod for $type {})+
    };
}

pod!(
    DownBackendKey,
    EndpointRole,
    FilterWords,
    Bucket<ClientState>,
    Bucket<ConnectionState>,
    Heartbeat,
    LimitCounters,
    LimitedClient,
    Limiter,
    ServiceLimits,
    ReturnPath,
    ReturnPathKey,
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
