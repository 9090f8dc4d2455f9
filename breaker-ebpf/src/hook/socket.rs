//! Redirects sockets in the host network namespace: those of node processes and of pods with `hostNetwork`. Their
//! packets pass no veth, so cgroup hooks at connect(2), sendmsg(2), recvmsg(2) and getpeername(2) replace the
//! destination before there is a packet.
//!
//! A connection to a VIP is decided like a SYN. Its socket is connected to the backend itself, so no packet needs
//! translation later, and the connection stays on that backend. A datagram from an unconnected socket is decided
//! each time, by the same hash, so the flow moves when the service's tables or state change. The original
//! destination is recorded, so that the process never sees a backend's address.
//!
//! The hooks see the sockets of every process on the node, including those in pods. Sockets in other network
//! namespaces are left alone, because their packets pass a veth.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_ANY, BPF_NOEXIST, bpf_sock_addr},
    btf_maps::LruHashMap,
    helpers::generated::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_set_retval},
    macros::btf_map,
    programs::{SockAddrContext, SockContext},
};
use breaker_common::{
    DEFAULT_SOCKETS, EventKind, FlowKey, PROTO_TCP, PROTO_UDP, PassReason, SLOT_PASSTHROUGH, SLOT_REJECT, SocketKey,
    SocketOrigin, hash, switch_flags,
};

use super::socket_admission::{Over, SocketRequest, ask, fails_over, is_at_backup, tag_of};
use crate::{
    agent, count, endpoint, event,
    family::{Family, V4, V6},
    limit::{connection_table, settings},
    select, service,
    wire::Wire as _,
};

/// Cookie of the host network namespace (`SO_NETNS_COOKIE`), the only one whose sockets are redirected. The loader
/// sets it. 0: redirect no sockets.
#[unsafe(no_mangle)]
static NODE_NETNS: aya_ebpf::Global<u64> = aya_ebpf::Global::new(0);

/// Original destinations of redirected sockets. The programs access addresses as words; the map's type has them as
/// bytes, which are easier to read in a dump.
#[btf_map]
static SOCKETS: LruHashMap<SocketKey, SocketOrigin, { DEFAULT_SOCKETS as usize }> = LruHashMap::new();

type Key = SocketKey<V6>;
type Origin = SocketOrigin<V6>;

#[inline(always)]
fn sockets() -> &'static LruHashMap<Key, Origin, { DEFAULT_SOCKETS as usize }> {
    // SAFETY: the two types have the same layout and differ only in whether an address is words or bytes. As in
    // `tables.rs`, a map definition contains only pointers that are never followed.
    unsafe { &*(&raw const SOCKETS).cast() }
}

/// Return value of a cgroup hook: continue with the system call.
pub const PROCEED: i32 = 1;
/// Return value of a cgroup hook: the system call fails.
const REFUSE: i32 = 0;
/// `ECONNREFUSED` (asm-generic/errno.h).
const CONNECTION_REFUSED: i32 = 111;

/// The socket address that a system call passes to the kernel or gets from it.
struct Sock<'a> {
    ctx: &'a SockAddrContext,
}

impl Sock<'_> {
    #[inline(always)]
    fn raw(&self) -> *mut bpf_sock_addr {
        self.ctx.sock_addr
    }

    /// Returns whether the socket is in the host network namespace.
    #[inline(always)]
    fn is_nodes(&self) -> bool {
        let ours = NODE_NETNS.load();
        // SAFETY: the context is valid while the program runs.
        ours != 0 && unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) } == ours
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: as in `is_nodes`.
        unsafe { bpf_get_socket_cookie(self.ctx.as_ptr()) }
    }

    /// The socket's protocol number if it is TCP or UDP.
    #[inline(always)]
    fn proto(&self) -> Option<u8> {
        // SAFETY: as in `is_nodes`.
        let proto = unsafe { (*self.raw()).protocol } as u8;
        (proto == PROTO_TCP || proto == PROTO_UDP).then_some(proto)
    }

    #[inline(always)]
    fn v4(&self) -> V4 {
        // SAFETY: as in `is_nodes`.
        V4::from_word(unsafe { (*self.raw()).user_ip4 })
    }

    #[inline(always)]
    fn set_v4(&self, addr: V4) {
        // SAFETY: as in `is_nodes`; programs of this type may write the field.
        unsafe { (&raw mut (*self.raw()).user_ip4).write_volatile(addr.word()) };
    }

    #[inline(always)]
    fn v6(&self) -> V6 {
        let at = self.raw();
        // SAFETY: as in `is_nodes`. Volatile reads of single words: the verifier allows no wider access to this
        // field.
        let word = |i: usize| unsafe { (&raw const (*at).user_ip6[i]).read_volatile() };
        V6::from_words([word(0), word(1), word(2), word(3)])
    }

    #[inline(always)]
    fn set_v6(&self, addr: V6) {
        let (at, words) = (self.raw(), addr.in_words());
        // SAFETY: as in `set_v4`. Single words, as in `v6`.
        let set = |i: usize| unsafe { (&raw mut (*at).user_ip6[i]).write_volatile(words[i]) };
        set(0);
        set(1);
        set(2);
        set(3);
    }

    /// The port in wire order. The kernel stores it in the first two bytes of `user_port`.
    #[inline(always)]
    fn port(&self) -> [u8; 2] {
        // SAFETY: as in `is_nodes`.
        let bytes = unsafe { (*self.raw()).user_port }.to_ne_bytes();
        [bytes[0], bytes[1]]
    }

    #[inline(always)]
    fn set_port(&self, port: [u8; 2]) {
        let word = u32::from_ne_bytes([port[0], port[1], 0, 0]);
        // SAFETY: as in `set_v4`.
        unsafe { (&raw mut (*self.raw()).user_port).write_volatile(word) };
    }
}

/// Decision about a destination.
enum Choice {
    /// The destination is left unchanged.
    Stays,
    /// The system call fails with an error.
    Refused,
    /// The destination becomes the backend with this id.
    Backend(u32),
}

/// Decides about a socket's connection or datagram to `vip` (`port` in wire order), and counts the decision. Stores
/// the service's index in `service` if `vip` is one of its frontends and the socket is in the host network
/// namespace.
#[inline(always)]
fn decide<A: Family>(sock: &Sock<'_>, vip: A, port: [u8; 2], proto: u8, cookie: u64, service: &mut u32) -> Choice {
    let Some(role) = endpoint::find(vip, port, proto) else { return Choice::Stays };
    let Some(index) = endpoint::index(role.service) else { return Choice::Stays };
    let Some(switch) = service::switch(index) else { return Choice::Stays };
    if !sock.is_nodes() {
        return Choice::Stays;
    }
    *service = index;
    let dry_run = switch.has(switch_flags::DRY_RUN);
    let limited = switch.has(switch_flags::LIMITED);
    if !service::tracks(index, &switch) && !dry_run && !limited {
        count::service(index, |c| &mut c.new_primary);
        return Choice::Stays;
    }
    // The socket has no source port yet, so the hash uses the socket's cookie in place of the client's address.
    let hash = |seed| hash::flow(cookie, vip.folded(), [0; 2], port, proto, seed);
    let mut chosen = if agent::may_act_on_decision(&switch, agent::now_ns()) {
        select::choose_with_hash(index, role.route, &switch, false, hash)
    } else {
        count::reason(PassReason::AgentLost);
        count::service(index, |c| &mut c.agent_lost);
        select::Choice { slot: SLOT_PASSTHROUGH, permit: false }
    };
    if limited && chosen.slot != SLOT_REJECT {
        let request =
            SocketRequest { service: index, switch: switch.to_word(), cookie, vip: vip.folded(), port, proto };
        // A flow of datagrams that a limit has sent to the backup before stays there.
        if chosen.slot == SLOT_PASSTHROUGH && proto == PROTO_UDP && fails_over(index) && is_at_backup(&request) {
            let slot = select::backup_slot_with_hash(index, role.route, &switch, hash);
            if slot < SLOT_REJECT {
                chosen = select::Choice { slot, permit: false };
            }
        }
        if let Over::Refused(tier) = ask(&request, chosen.slot != SLOT_PASSTHROUGH) {
            if chosen.permit {
                service::return_permit(index, switch.epoch);
            }
            let over = if tier == settings::PRIMARY && fails_over(index) {
                select::backup_slot_with_hash(index, role.route, &switch, hash)
            } else {
                SLOT_REJECT
            };
            if over >= SLOT_REJECT {
                return Choice::Refused;
            }
            settings::count(index, |c| &mut c.failed_over);
            if let Over::Refused(_) = ask(&request, true) {
                return Choice::Refused;
            }
            chosen = select::Choice { slot: over, permit: false };
        }
    }
    if dry_run || chosen.slot == SLOT_PASSTHROUGH {
        let would_move = dry_run && chosen.slot != SLOT_PASSTHROUGH;
        count::service(index, |c| &mut c.new_primary);
        if chosen.permit && !dry_run {
            count::service(index, |c| &mut c.half_open);
        }
        if would_move {
            count::service(index, |c| &mut c.dry_run);
        }
        return Choice::Stays;
    }
    if chosen.slot == SLOT_REJECT {
        count::service(index, |c| &mut c.rejected);
        return Choice::Refused;
    }
    Choice::Backend(chosen.slot)
}

/// Hook for the release of a socket: a TCP connection in the host network namespace is no longer counted by its
/// limits.
#[inline(always)]
pub fn on_release(ctx: &SockContext) -> i32 {
    let ours = NODE_NETNS.load();
    // SAFETY: the context is valid while the program runs.
    if ours == 0 || !agent::counts_sockets() || unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } != ours {
        return PROCEED;
    }
    // SAFETY: as above: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if let Some(entry) = connection_table::find(tag_of(cookie), true) {
        entry.release();
    }
    PROCEED
}

/// Makes the system call fail with `ECONNREFUSED`. Returns the value that the hook must return.
#[inline(always)]
fn refuse() -> i32 {
    // SAFETY: the argument is a plain number. (Kernels before 5.18 lack this helper and reject the program at load.)
    unsafe { bpf_set_retval(-CONNECTION_REFUSED) };
    REFUSE
}

/// Records the socket's original destination, and counts the redirect. Addresses and ports are in wire order.
#[inline(always)]
fn record_redirect<A: Family>(
    cookie: u64,
    vip: A,
    vip_port: [u8; 2],
    backend: V6,
    backend_port: [u8; 2],
    proto: u8,
    service: u32,
) {
    let key = Key { cookie, backend, backend_port, pad: [0; 6] };
    let origin = Origin { vip: vip.mapped(), vip_port, pad: 0, service };
    let first = sockets().insert(&key, &origin, BPF_NOEXIST as u64).is_ok();
    if !first {
        // The socket already used this backend, perhaps for another VIP. The most recent VIP replaces the recorded
        // one.
        let _ = sockets().insert(&key, &origin, BPF_ANY as u64);
    }
    if first || proto == PROTO_TCP {
        count::service(service, |c| &mut c.new_backup);
        if let Some(switch) = service::switch(service) {
            let key = FlowKey { client: A::ZERO, vip, client_port: [0; 2], vip_port, proto, pad: [0; 3] };
            event::send(EventKind::FlowMoved, service, &switch, &key, None);
        }
    }
}

/// Removes the record of a redirect to a destination that the process itself names now: its answers are the backend's
/// own. Addresses and ports are in wire order.
#[inline(always)]
fn forget_redirect<A: Family>(cookie: u64, addr: A, port: [u8; 2], proto: u8) {
    // Only a backend can have such a record, and all packets of a backend in use take the full path.
    if endpoint::filter_match(addr, port, proto).all_packets {
        let _ = sockets().remove(Key { cookie, backend: addr.mapped(), backend_port: port, pad: [0; 6] });
    }
}

/// Decides about a destination and replaces it if needed. `set` writes an address in the form that the socket's
/// family uses.
#[inline(always)]
fn redirect<A: Family>(sock: &Sock<'_>, vip: A, set: impl FnOnce(A)) -> i32 {
    let Some(proto) = sock.proto() else { return PROCEED };
    let (port, cookie) = (sock.port(), sock.cookie());
    let mut service = 0;
    match decide(sock, vip, port, proto, cookie, &mut service) {
        Choice::Stays => {
            forget_redirect(cookie, vip, port, proto);
            PROCEED
        }
        Choice::Refused => refuse(),
        Choice::Backend(id) => {
            let Some(backend) = select::backend::<A>(id) else { return PROCEED };
            record_redirect(cookie, vip, port, backend.addr.mapped(), backend.port, proto, service);
            set(backend.addr);
            sock.set_port(backend.port);
            PROCEED
        }
    }
}

/// Hook for connect(2) and sendmsg(2) on IPv4 sockets.
#[inline(always)]
pub fn redirect4(ctx: &SockAddrContext) -> i32 {
    let sock = Sock { ctx };
    redirect(&sock, sock.v4(), |addr| sock.set_v4(addr))
}

/// Hook for connect(2) and sendmsg(2) on IPv6 sockets, whose destination may be an IPv4-mapped address.
#[inline(always)]
pub fn redirect6(ctx: &SockAddrContext) -> i32 {
    let sock = Sock { ctx };
    let vip = sock.v6();
    match vip.as_v4() {
        Some(vip) => redirect(&sock, vip, |addr| sock.set_v6(addr.mapped())),
        None => redirect(&sock, vip, |addr| sock.set_v6(addr)),
    }
}

/// Looks up the original destination of a socket that was redirected to this backend.
#[inline(always)]
fn origin(sock: &Sock<'_>, backend: V6) -> Option<Origin> {
    // Most sockets that reach this hook belong to pods.
    if !sock.is_nodes() {
        return None;
    }
    let key = Key { cookie: sock.cookie(), backend, backend_port: sock.port(), pad: [0; 6] };
    // SAFETY: the value is copied out at once.
    unsafe { sockets().get(&key) }.copied()
}

/// Hook for recvmsg(2) and getpeername(2) on IPv4 sockets: replaces a backend's address by the original destination.
#[inline(always)]
pub fn restore4(ctx: &SockAddrContext) -> i32 {
    let sock = Sock { ctx };
    if let Some(origin) = origin(&sock, sock.v4().mapped())
        && let Some(vip) = origin.vip.as_v4()
    {
        sock.set_v4(vip);
        sock.set_port(origin.vip_port);
    }
    PROCEED
}

/// Hook for recvmsg(2) and getpeername(2) on IPv6 sockets: replaces a backend's address by the original destination.
#[inline(always)]
pub fn restore6(ctx: &SockAddrContext) -> i32 {
    let sock = Sock { ctx };
    if let Some(origin) = origin(&sock, sock.v6()) {
        sock.set_v6(origin.vip);
        sock.set_port(origin.vip_port);
    }
    PROCEED
}
