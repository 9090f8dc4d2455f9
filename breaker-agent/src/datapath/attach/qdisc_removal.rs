//! Removal of a clsact qdisc that the agent created. It uses netlink, because a container image has no `tc`.

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle, new_connection,
    packet_route::tc::{TcAttribute, TcHandle},
};

/// Major number of the clsact qdisc (linux/pkt_sched.h: `TC_H_CLSACT` is ffff:fff1).
const MAJOR: u16 = 0xffff;
const MINOR: u16 = 0xfff1;

/// Removes the clsact qdisc of an interface in this network namespace, unless one of its directions still has a
/// filter. Returns whether the qdisc was removed.
///
/// # Errors
/// A netlink request failed.
pub(crate) fn remove_if_empty(index: u32) -> Result<bool> {
    // The caller may run in a tokio runtime already, where it cannot block. A new thread inherits the caller's
    // network namespace.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
        runtime.block_on(async {
            let (connection, handle, _) = new_connection().context("open a netlink socket")?;
            tokio::spawn(connection);
            let index = i32::try_from(index).context("convert the interface index")?;
            if has_filters(&handle, index).await? {
                return Ok(false);
            }
            let mut request = handle.qdisc().del(index);
            let header = &mut request.message_mut().header;
            header.parent = TcHandle { major: MAJOR, minor: MINOR };
            header.handle = TcHandle { major: MAJOR, minor: 0 };
            request.message_mut().attributes = vec![TcAttribute::Kind("clsact".into())];
            request.execute().await.context("remove the clsact qdisc")?;
            Ok(true)
        })
    })
    .join()
    .unwrap_or_else(|_| anyhow::bail!("the thread that removes the clsact qdisc panicked"))
}

async fn has_filters(handle: &Handle, index: i32) -> Result<bool> {
    let filters = || handle.traffic_filter(index).get();
    for request in [filters().ingress(), filters().egress()] {
        let found: Vec<_> = request.execute().try_collect().await.context("list the filters")?;
        if !found.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}
