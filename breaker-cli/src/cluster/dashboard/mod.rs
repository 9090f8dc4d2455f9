//! `kubectl breaker dashboard`: the live page for a cluster, with the caller's own rights, on a loopback address.
//!
//! ```text
//! API server ── watches ──▶ world ─┐
//!                                  ├─▶ feed ── rows ──▶ breaker_web::hub ──▶ server ──▶ browser
//! agents ── port-forward ──────────┴─▶ numbers
//! ```
//!
//! | module | one concern |
//! |---|---|
//! | [`world`] | what the API server says: breakers, reports of nodes, Events |
//! | [`agents`] | requests to the agents, through the API server to their loopback addresses |
//! | [`numbers`] | sums of the nodes' counts of connections |
//! | [`rows`] | conversion to the rows of the page |
//! | [`feed`] | publishes rows when something changed, and numbers once a second |
//! | [`server`] | the page, its data and its token |

mod agents;
mod feed;
mod numbers;
mod rows;
mod server;
mod world;

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result};
use breaker_web::{
    hub::Hub,
    rows::{Scope, ScopeKind},
};
use tokio::net::TcpListener;

use super::{
    args::{ConnectionArgs, DashboardArgs},
    connection::{Connection, explain},
};
use crate::output::out;

/// Serves the page until interrupted.
pub(super) async fn run(connection: &Connection, how: &ConnectionArgs, args: &DashboardArgs) -> Result<()> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, args.port));
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("--port: cannot listen on {address}; choose another port, or 0 for any"))?;
    let address = listener.local_addr().context("find the port")?;
    connection.client.apiserver_version().await.map_err(|error| explain(error, "ask the API server"))?;
    let scope = Scope {
        kind: ScopeKind::Cluster,
        name: connection.cluster.clone(),
        namespace: connection.namespace.clone(),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    let hub = Hub::new(scope);
    let world = world::watch(connection);
    let agents = agents::Agents::new(connection.client.clone());
    let token = server::token()?;
    tokio::spawn(feed::run(hub.clone(), connection.client.clone(), world.clone(), agents.clone()));
    let what = connection.namespace.as_ref().map_or("all namespaces".into(), |name| format!("the namespace {name}"));
    out(&format!(
        "http://{address}/#token={token}\n\
         Open this address in a browser on this machine. The page shows {what}, with your own rights, until you press \
         Ctrl-C here.\n"
    ))?;
    let prefix = rows::command_prefix(how);
    axum::serve(listener, server::routes(hub, world, agents, token, prefix)).await.context("serve the page")
}
