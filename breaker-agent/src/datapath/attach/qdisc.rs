//! The qdisc that holds clsact filters: what an interface has there, and its removal. It uses netlink, because a
//! container image has no `tc`.

use std::future::Future;

use anyhow::{Context as _, Result};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle, new_connection,
    packet_route::tc::{TcAttribute, TcHandle},
};

/// Handle and parent of the qdiscs of kind clsact and ingress (linux/pkt_sched.h: `TC_H_INGRESS` is ffff:fff1, and so is
/// `TC_H_CLSACT`).
const MAJOR: u16 = 0xffff;
const MINOR: u16 = 0xfff1;

/// Runs a netlink request. The caller may run in a tokio runtime already, where it cannot block; a new thread inherits the
/// caller's network namespace.
fn request<T: Send + 'static, F: Future<Output = Result<T>>>(
    make: impl FnOnce(Handle) -> F + Send + 'static,
) -> Result<T> {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
        runtime.block_on(async {
            let (connection, handle, _) = new_connection().context("open a netlink socket")?;
            tokio::spawn(connection);
            make(handle).await
        })
    })
    .join()
    .unwrap_or_else(|_| anyhow::bail!("the thread of a netlink request panicked"))
}

/// Returns the kind of the qdisc that an interface has for ingress: `clsact`, `ingress` or none.
///
/// # Errors
/// The netlink request failed.
pub(crate) fn kind_on_ingress(index: u32) -> Result<Option<String>> {
    request(move |handle| async move {
        let index = i32::try_from(index).context("convert the interface index")?;
        let mut qdiscs = handle.qdisc().get().index(index).execute();
        while let Some(qdisc) = qdiscs.try_next().await.context("list the qdiscs")? {
            if qdisc.header.index == index && qdisc.header.parent == (TcHandle { major: MAJOR, minor: MINOR }) {
                let kind = qdisc.attributes.iter().find_map(|attribute| match attribute {
                    TcAttribute::Kind(kind) => Some(kind.clone()),
                    _ => None,
                });
                return Ok(kind);
            }
        }
        Ok(None)
    })
}

/// Removes the clsact qdisc of an interface in this network namespace, unless one of its directions still has a
/// filter. Returns whether the qdisc was removed.
///
/// # Errors
/// A netlink request failed.
pub(crate) fn remove_if_empty(index: u32) -> Result<bool> {
    request(move |handle| async move {
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
