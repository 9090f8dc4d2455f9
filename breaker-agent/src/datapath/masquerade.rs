//! breaker's own nftables rule for the masquerade mark. With it, external clients and pods that are their own
//! backup are masqueraded also on nodes without kube-proxy.
//!
//! The table `inet breaker` has one chain, with this rule only. The chain runs after kube-proxy's chain (priority 100,
//! srcnat), in every mode of kube-proxy. A connection that kube-proxy masquerades already has its new source then, and
//! netfilter runs no further nat chain for it.

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
/// Protocol family for IPv4 and IPv6 together (include/uapi/linux/netfilter.h).
const NFPROTO_INET: u8 = 1;
/// Number of the hook after routing (include/uapi/linux/netfilter.h).
const POSTROUTING: u32 = 4;
/// Priority of the chain. kube-proxy and most others use 100.
const PRIORITY: i32 = 110;
/// Random source ports, as kube-proxy uses them, so that two simultaneous connections do not choose the same port
/// (`NF_NAT_RANGE_PROTO_RANDOM_FULLY`).
const RANDOM_FULLY: u32 = 1 << 4;
/// Subsystem that a batch belongs to (`NFNL_SUBSYS_NFTABLES`).
const SUBSYSTEM: u16 = 10;
/// Numbers of expression attributes that the bindings do not have: `NFTA_EXPR_DATA`, and `NFTA_MASQ_FLAGS` in it.
const EXPR_DATA: u16 = 2;
const MASQ_FLAGS: u16 = 1;
/// Register in which the rule holds the mark.
const REGISTER: u32 = Registers::Reg1 as u32;

/// Installs the rule: it masquerades packets that have `mark`, and clears the mark. An existing rule is replaced in
/// one transaction.
///
/// # Errors
/// The kernel refused the transaction: it has no nftables, or the agent lacks the capability.
pub fn install(mark: u32) -> Result<()> {
    let mut socket = NetlinkSocket::new();
    let mut batch = Chained::new(socket.reserve_seq(16));
    batch.request().op_batch_begin_do(&of_batch());
    // Create the table first, because removing a table that does not exist is an error.
    batch.request().set_create().op_newtable_do(&of_inet()).encode().push_name(TABLE);
    batch.request().op_deltable_do(&of_inet()).encode().push_name(TABLE);
    batch.request().set_create().op_newtable_do(&of_inet()).encode().push_name(TABLE);
    push_chain(&mut batch);
    push_rule(&mut batch, mark);
    send(&mut socket, batch).context("write the rule for the masquerade mark (nftables)")
}

/// Installs the rule if there is none: somebody may have flushed all rules. Returns whether there was none.
///
/// # Errors
/// The kernel refused the transaction.
pub fn restore(mark: u32) -> Result<bool> {
    let mut socket = NetlinkSocket::new();
    let mut batch = Chained::new(socket.reserve_seq(16));
    batch.request().op_batch_begin_do(&of_batch());
    // The whole batch fails if the table exists.
    batch.request().set_create().set_excl().op_newtable_do(&of_inet()).encode().push_name(TABLE);
    push_chain(&mut batch);
    push_rule(&mut batch, mark);
    match send(&mut socket, batch) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error).context("write the rule for the masquerade mark (nftables)"),
    }
}

/// Removes the rule with its table. Returns whether the table existed.
///
/// # Errors
/// The kernel refused the transaction.
pub fn remove() -> Result<bool> {
    let mut socket = NetlinkSocket::new();
    let mut batch = Chained::new(socket.reserve_seq(16));
    batch.request().op_batch_begin_do(&of_batch());
    batch.request().op_deltable_do(&of_inet()).encode().push_name(TABLE);
    match send(&mut socket, batch) {
        Ok(()) => Ok(true),
        // The table does not exist, or the kernel has no nftables.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => Ok(false),
        Err(error) => Err(error).context("remove the table of the masquerade rule: nft delete table inet breaker"),
    }
}

/// Adds the chain to a batch.
fn push_chain(batch: &mut Chained<'_>) {
    let mut request = batch.request().set_create().op_newchain_do(&of_inet());
    let chain = request.encode().push_table(TABLE).push_name(CHAIN).push_type(c"nat");
    chain.nested_hook().push_num(POSTROUTING).push_priority(PRIORITY).end_nested();
}

/// Adds the rule to a batch. In nft's syntax:
/// `meta mark & MARK == MARK meta mark set meta mark & ~MARK masquerade fully-random`
///
/// The mark is cleared because otherwise the outer packet of a tunnel would be masqueraded as well.
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

/// Loads `meta mark & MASK` into the register.
fn load_mark<P: Pusher>(rule: PushExprListAttrs<P>, mask: u32) -> PushExprListAttrs<P> {
    let rule = rule.nested_elem().nested_data_meta();
    let rule = rule.push_dreg(REGISTER).push_key(MetaKeys::Mark as u32).end_nested().end_nested();
    let rule = rule.nested_elem().nested_data_bitwise().push_sreg(REGISTER).push_dreg(REGISTER).push_len(4);
    let rule = rule.nested_mask().push_value(&mask.to_ne_bytes()).end_nested();
    rule.nested_xor().push_value(&[0; 4]).end_nested().end_nested().end_nested()
}

/// Sends a batch. The kernel applies all of it or nothing.
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
