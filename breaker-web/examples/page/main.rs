//! Serves the live page with made-up data, for the tests of the page in a browser: the server is the product's, its
//! producer is not.

mod data;

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use axum::{
    Json, Router,
    extract::{Path, State},
    routing::{get, post},
};
use breaker_web::{
    files, guard,
    hub::{Hub, Update},
    rows::{Detail, EventRow},
    stream,
};
use clap::Parser;
use jiff::{Timestamp, ToSpan as _};
use tokio::{
    net::TcpListener,
    sync::Mutex,
    time::{MissedTickBehavior, interval, sleep},
};

use data::{Data, Shape};

/// Serves the live page of breaker with made-up data on a loopback address.
#[derive(Parser)]
struct Args {
    /// Port to listen on; 0 = any. The address is printed.
    #[arg(long, default_value_t = 0)]
    port: u16,
    /// Number of breakers.
    #[arg(long, default_value_t = 12)]
    breakers: usize,
    /// Number of nodes. With 1, the page is that of a node.
    #[arg(long, default_value_t = 3)]
    nodes: usize,
}

struct Server {
    data: Mutex<Data>,
    hub: Arc<Hub>,
    is_resting: AtomicBool,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let args = Args::parse();
    let data = Data::new(Shape { breakers: args.breakers, nodes: args.nodes });
    let hub = Hub::new(data.scope());
    let server = Arc::new(Server { data: Mutex::new(data), hub, is_resting: AtomicBool::new(false) });
    tokio::spawn(produce(server.clone()));
    let page = guard::guarded(files::routes().merge(stream::routes(server.hub.clone())).merge(routes(server)));
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, args.port))).await?;
    println!("http://{}/", listener.local_addr()?);
    axum::serve(listener, page).await?;
    Ok(())
}

fn routes(server: Arc<Server>) -> Router {
    Router::new()
        .route("/v1/breakers/{*name}", get(detail))
        .route("/v1/nodes/{node}/services/{*name}", get(service))
        .route("/test/open/{*name}", post(open))
        .route("/test/replay", post(replay))
        .route("/test/rest/{is_resting}", post(rest))
        .with_state(server)
}

/// New counts once a second, as the agent has them.
async fn produce(server: Arc<Server>) {
    let mut second = interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_first = true;
    loop {
        second.tick().await;
        if server.is_resting.load(Ordering::Relaxed) {
            continue;
        }
        let mut data = server.data.lock().await;
        let events = if std::mem::take(&mut is_first) { data.first_events() } else { Vec::new() };
        server.publish(&mut data, Timestamp::now(), events);
        server.hub.complete();
    }
}

impl Server {
    fn publish(&self, data: &mut Data, now: Timestamp, events: Vec<EventRow>) {
        data.advance(now);
        let update = Update {
            counts: data.counts(),
            nodes: Some(data.nodes()),
            events,
            notes: Some(Vec::new()),
            ..Update::of_all(data.breakers().to_vec())
        };
        self.hub.publish(now, update);
    }
}

/// Publishes the last five minutes again, so that the charts of a page that has just been opened are full.
async fn replay(State(server): State<Arc<Server>>) -> &'static str {
    let mut data = server.data.lock().await;
    for second in (0..300).rev() {
        server.publish(&mut data, Timestamp::now() - second.seconds(), Vec::new());
        sleep(Duration::from_millis(3)).await;
    }
    "done"
}

async fn detail(State(server): State<Arc<Server>>, Path(name): Path<String>) -> Json<Option<Detail>> {
    Json(server.data.lock().await.detail(&name))
}

async fn service(
    State(server): State<Arc<Server>>,
    Path((_, name)): Path<(String, String)>,
) -> Json<Option<serde_json::Value>> {
    Json(server.data.lock().await.service(&name))
}

/// Opens a breaker, as an agent publishes it: at once.
async fn open(State(server): State<Arc<Server>>, Path(name): Path<String>) -> &'static str {
    let mut data = server.data.lock().await;
    let Some((row, event)) = data.open(&name) else { return "there is no such breaker" };
    let update = Update { breakers: vec![row], events: vec![event], ..Update::default() };
    server.hub.publish(Timestamp::now(), update);
    "open"
}

/// Makes the producer rest, like that of an agent whose main loop hangs, or go on.
async fn rest(State(server): State<Arc<Server>>, Path(is_resting): Path<bool>) -> &'static str {
    server.is_resting.store(is_resting, Ordering::Relaxed);
    "done"
}
