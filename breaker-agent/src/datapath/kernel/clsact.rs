//! The clsact qdisc that we may have to take away again: by netlink, because an image has no `tc`.

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle, new_connection,
    packet_route::tc::{TcAttribute, TcHandle},
};

/// Major number of the clsact qdisc (linux/pkt_sched.h: TC_H_CLSACT is ffff:fff1).
const MAJOR: u16 = 0xffff;
const MINOR: u16 = 0xfff1;

/// Removes the clsact qdisc of an interface of this network namespace, if nobody's filter is on either of its directions.
/// Returns whether it did.
///
/// # Errors
/// What the kernel said.
pub(super) fn remove_if_empty(index: u32) -> Result<bool> {
    // The caller may be in a runtime already, and cannot wait in it; a thread has the caller's network namespace.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start")?;
        runtime.block_on(async {
            let (connection, handle, _) = new_connection().context("open a netlink socket")?;
            tokio::spawn(connection);
            let index = i32::try_from(index).context("the interface's index")?;
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
    .unwrap_or_else(|_| anyhow::bail!("the thread that removes a qdisc panicked"))
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
