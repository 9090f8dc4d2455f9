//! A rule of our own for the masquerade mark: a client outside, and a pod that is its own backup, are masqueraded also where no
//! kube-proxy is that would do it.
//!
//! A table of nftables, `inet breaker`, with one chain and one rule. Its chain comes behind kube-proxy's (priority 100, srcnat),
//! whichever mode that is in: what kube-proxy masquerades has its source by then, and netfilter asks no further chain.

use std::{ffi::CStr, io};

use anyhow::{Context as _, Result};
use netlink_bindings::{
    nftables::{Chained, CmpOps, MetaKeys, Nfgenmsg, PushExprListAttrs, Registers},
    traits::Pusher,
    utils::{finalize_nested_header, push_header, push_nested_header},
};
use netlink_socket2::NetlinkSocket;

const TABLE: &CStr = c"breaker";
const CHAIN: &CStr = c"postrouting";
/// IPv4 and IPv6 at once (include/uapi/linux/netfilter.h).
const NFPROTO_INET: u8 = 1;
/// The hook behind routing (include/uapi/linux/netfilter.h).
const POSTROUTING: u32 = 4;
/// kube-proxy's and everybody's is 100.
const PRIORITY: i32 = 110;
/// As kube-proxy does: two connections at once do not choose the same port (NF_NAT_RANGE_PROTO_RANDOM_FULLY).
const RANDOM_FULLY: u32 = 1 << 4;
/// A batch is nftables' (NFNL_SUBSYS_NFTABLES).
const SUBSYSTEM: u16 = 10;
/// The attributes of an expression of which the bindings have no words: NFTA_EXPR_DATA, and in it NFTA_MASQ_FLAGS.
const EXPR_DATA: u16 = 2;
const MASQ_FLAGS: u16 = 1;
/// Where the rule has the mark.
const REGISTER: u32 = Registers::Reg1 as u32;

/// Masquerades what has `mark`, and takes the mark away. A rule that is there is replaced, all at once.
///
/// # Errors
/// What the kernel said: no nftables, or no right to.
pub fn install(mark: u32) -> Result<()> {
    let mut socket = NetlinkSocket::new();
    let mut batch = Chained::new(socket.reserve_seq(16));
    batch.request().op_batch_begin_do(&of_batch());
    // A table that is to be removed must be there.
    batch.request().set_create().op_newtable_do(&of_inet()).encode().push_name(TABLE);
    batch.request().op_deltable_do(&of_inet()).encode().push_name(TABLE);
    batch.request().set_create().op_newtable_do(&of_inet()).encode().push_name(TABLE);
    batch
        .request()
        .set_create()
        .op_newchain_do(&of_inet())
        .encode()
        .push_table(TABLE)
        .push_name(CHAIN)
        .push_type(c"nat")
        .nested_hook()
        .push_num(POSTROUTING)
        .push_priority(PRIORITY)
        .end_nested();
    push_rule(&mut batch, mark);
    send(&mut socket, batch).context("write the rule for the masquerade mark (nftables)")
}

/// Takes the rule away, with its table; returns whether there was one.
///
/// # Errors
/// What the kernel said.
pub fn remove() -> Result<bool> {
    let mut socket = NetlinkSocket::new();
    let mut batch = Chained::new(socket.reserve_seq(16));
    batch.request().op_batch_begin_do(&of_batch());
    batch.request().op_deltable_do(&of_inet()).encode().push_name(TABLE);
    match send(&mut socket, batch) {
        Ok(()) => Ok(true),
        // No such table, or no nftables at all.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => Ok(false),
        Err(error) => Err(error).context("remove the rule for the masquerade mark: nft delete table inet breaker"),
    }
}

/// In nft's words: `meta mark & MARK == MARK meta mark set meta mark & ~MARK masquerade fully-random`. (A mark that stays would
/// have a tunnel's own packet masqueraded as well.)
fn push_rule(batch: &mut Chained<'_>, mark: u32) {
    let mut request = batch.request().set_create().set_append().op_newrule_do(&of_inet());
    let rule = request.encode().push_table(TABLE).push_chain(CHAIN).nested_expressions();
    let rule = load_mark(rule, mark).nested_elem().nested_data_cmp().push_sreg(REGISTER).push_op(CmpOps::Eq as u32);
    let rule = rule.nested_data().push_value(&mark.to_ne_bytes()).end_nested().end_nested().end_nested();
    let rule = load_mark(rule, !mark).nested_elem().nested_data_meta();
    let rule = rule.push_key(MetaKeys::Mark as u32).push_sreg(REGISTER).end_nested().end_nested();
    let mut masquerade = rule.nested_elem().push_name(c"masq");
    let bytes = masquerade.as_vec_mut();
    let data = push_nested_header(bytes, EXPR_DATA);
    push_header(bytes, MASQ_FLAGS, 4);
    bytes.extend(RANDOM_FULLY.to_be_bytes());
    finalize_nested_header(bytes, data);
}

/// `meta mark & MASK`, into the register.
fn load_mark<P: Pusher>(rule: PushExprListAttrs<P>, mask: u32) -> PushExprListAttrs<P> {
    let rule = rule.nested_elem().nested_data_meta();
    let rule = rule.push_dreg(REGISTER).push_key(MetaKeys::Mark as u32).end_nested().end_nested();
    let rule = rule.nested_elem().nested_data_bitwise().push_sreg(REGISTER).push_dreg(REGISTER).push_len(4);
    let rule = rule.nested_mask().push_value(&mask.to_ne_bytes()).end_nested();
    rule.nested_xor().push_value(&[0; 4]).end_nested().end_nested().end_nested()
}

/// All of a batch, or nothing.
fn send(socket: &mut NetlinkSocket, mut batch: Chained<'_>) -> io::Result<()> {
    batch.request().op_batch_end_do(&of_batch());
    Ok(socket.request_chained(&batch.finalize())?.recv_all()?)
}

fn of_batch() -> Nfgenmsg {
    let mut header = Nfgenmsg::new();
    header.set_res_id(SUBSYSTEM);
    header
}

fn of_inet() -> Nfgenmsg {
    Nfgenmsg { nfgen_family: NFPROTO_INET, ..Nfgenmsg::default() }
}
