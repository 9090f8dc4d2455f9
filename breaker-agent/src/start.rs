//! Starts an agent: pins, programs, maps, sources and control, then the loop.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use breaker_common::POKE_NUMBER_BITS;
use breaker_core::{engine::Engine, model::Service};
use tokio::sync::{mpsc, watch};

use crate::{
    agent_loop::{Agent, Inputs, Source},
    check::{self, Checkers},
    clock::Clock,
    config::AgentConfig,
    control,
    datapath::{
        KernelDatapath,
        attach::Attacher,
        interfaces::{self, Wanted},
        masquerade, memory,
        moved_flows::MovedFlows,
        neighbors,
        options::{AttachMode, ConnectionSource, XdpPolicy},
        pins::{PinDir, PinError},
        preflight, programs,
        sizes::Sizes,
        sys::has_tcx,
    },
    heartbeat::Lease,
    interfaces::Interfaces,
    logging::Incidents,
    metrics::Instruments,
    process,
    resets::Resets,
    signals::Signals,
    source::{
        file::FileSource,
        kube::{self, KubeSource, NodeIdentity},
    },
    supervise,
    systemd::ServiceManager,
    web,
};

/// Where the services are configured.
#[derive(Clone, Debug)]
pub enum Origin {
    /// In a file.
    File {
        /// Its path.
        path: PathBuf,
        /// The content that was read at start. A different content later is a change.
        text: String,
        /// The services that the content describes.
        services: Vec<Service>,
    },
    /// In Kubernetes.
    Kubernetes(NodeIdentity),
}

/// Options of [`run`].
#[derive(Clone, Debug)]
pub struct Options {
    /// The section `agent` of the configuration.
    pub agent: AgentConfig,
    /// Where the services are configured.
    pub origin: Origin,
    /// Remove programs and maps at the end, instead of leaving them to the next agent.
    pub detach: bool,
    /// Counters of lost log lines and of panics.
    pub incidents: Incidents,
    /// Log level of the eBPF programs. With `None`, they are loaded with logging disabled.
    pub program_log: Option<log::Level>,
}

/// Runs an agent until it gets SIGTERM or SIGINT.
///
/// # Errors
/// The agent cannot start. An error before the first configuration is applied leaves the decisions and programs of
/// an earlier agent as they are.
pub async fn run(options: Options, mut signals: Signals) -> Result<()> {
    process::give_back_large_blocks();
    breaker_cli::install_crypto();
    let config = options.agent;
    anyhow::ensure!(
        config.attach != AttachMode::Tcx || has_tcx(),
        "agent.attach: Tcx needs kernel 6.6; allowed here: Auto, Clsact"
    );
    let pins = match &options.origin {
        Origin::File { .. } => PinDir::open(&config.pin_path)?,
        // During a rollout with maxSurge, the old agent runs until this one is ready.
        Origin::Kubernetes(_) => match take_over(&config.pin_path, &mut signals).await? {
            Some(pins) => pins,
            None => return Ok(()),
        },
    };
    let adopted = pins.adopted();
    let note_syns = match config.connections {
        ConnectionSource::Conntrack => false,
        ConnectionSource::Syns => true,
        ConnectionSource::Auto => preflight::untracked_connections().is_some_and(|why| {
            tracing::warn!("established connections are found by their SYNs, from now on: {why}");
            true
        }),
    };
    let loaded = programs::load(
        &pins,
        &programs::Options {
            sizes: sizes(&config),
            masquerade_mark: config.masquerade_mark,
            log_level: options.program_log,
            sockets: config.node_sockets,
            xdp: config.xdp != XdpPolicy::Off,
            note_syns,
            poke_number: fastrand::u32(..) & POKE_NUMBER_BITS,
        },
    )?;
    let xdp = match &loaded.xdp {
        Ok(()) => config.xdp,
        Err(why) => {
            tracing::warn!("XDP is not available; the tc programs handle all packets: {why}");
            XdpPolicy::Off
        }
    };
    if let (true, Err(why)) = (config.node_sockets, &loaded.sockets) {
        tracing::warn!("the node's own processes are not protected: {why}");
    }
    if let Some(logger) = loaded.logger {
        forward_log(logger);
    }
    let events = loaded.maps.events_ready()?;
    let attacher = Attacher::new(loaded.programs, loaded.tail_calls, &pins, config.attach, config.attach_order, xdp);
    let what = Wanted { veths: config.veths, uplinks: config.uplinks, globs: config.interfaces.clone() };
    let clock = Clock::start();
    let mut datapath = KernelDatapath::new(loaded.maps);
    let engine = Engine::new(clock.now(), &mut datapath).map_err(anyhow::Error::new)?;
    let (reports_in, reports) = check::reports::channel();
    let (commands_in, commands) = mpsc::channel(64);
    let (latest_event, latest_event_out) = watch::channel(0);
    let _socket = control::serve(&config.socket, commands_in.clone(), latest_event_out.clone())?;
    let instruments = Instruments::new().context("make the metrics")?;
    let node = match &options.origin {
        Origin::File { .. } => rustix::system::uname().nodename().to_string_lossy().into_owned(),
        Origin::Kubernetes(identity) => identity.node.clone(),
    };
    let addresses = web::Addresses { local: config.listen, metrics: config.metrics_listen, node };
    let listeners = web::serve(addresses, &commands_in, latest_event_out, &instruments).await;
    let mut access = None;
    let (source, services) = match options.origin {
        Origin::File { path, text, services } => (Source::File(FileSource::watch(&path, text)?), Some(services)),
        Origin::Kubernetes(mut identity) => {
            // Leave room for services that are no longer configured but still have flows.
            identity.room = (datapath.sizes().services as usize).saturating_sub(16).max(1);
            let client = tokio::select! {
                () = signals.end() => return Ok(()),
                client = kube::client(identity.kubeconfig.as_deref()) => client?,
            };
            let source = KubeSource::start(&client, &identity, &instruments);
            access = Some(source.access());
            (Source::Kubernetes(Box::new(source)), None)
        }
    };
    let (resets_in, resets_out) = mpsc::unbounded_channel();
    let resets = loaded.poker.and_then(|poker| {
        let flows = MovedFlows::open(&pins);
        flows
            .and_then(|flows| Resets::start(poker, flows, loaded.syns, resets_in))
            .map_err(|error| format!("{error:#}"))
    });
    if let Err(why) = &resets {
        tracing::warn!("established connections are reset at their clients' next segments only: {why}");
    }
    let (pods_wanted, pods_wanted_out) = watch::channel(false);
    let pods = neighbors::watch_pods(pods_wanted_out)?;
    let mut agent = Agent {
        clock,
        engine,
        datapath,
        interfaces: Interfaces::new(attacher),
        checkers: Checkers::start(reports_in, instruments.clone())?,
        instruments,
        listeners,
        service_manager: ServiceManager::of_process(),
        access,
        latest_event,
        lease: Lease::new(config.lease),
        service_count: None,
        update: Arc::default(),
        resets,
        resets_told: 0,
        sockets: loaded.sockets,
        masquerade_rule: masquerade_rule(&config),
        incompatible: preflight::socket_load_balancer(),
        bypass: preflight::other_datapath(),
        pods_wanted,
        needs_local_pods: false,
        unreported: true,
        reported_changes: 0,
        reported_at: Duration::ZERO,
        config: config.clone(),
        incidents: options.incidents,
        restored: BTreeMap::new(),
    };
    // The heartbeat comes first, then the decisions, then the programs that act on them. With Kubernetes as the
    // source, the decisions of an earlier agent stay in force until the source has delivered the first
    // configuration.
    agent.heartbeat();
    if let Some(services) = services {
        agent.configure(services.into_iter().map(Arc::new).collect());
    }
    let (present, interfaces) = interfaces::watch(what).await.context("watch the interfaces")?;
    let count = present.interfaces.len();
    let attached = agent.interfaces.begin(present)?;
    let (pid, attach, services) = (std::process::id(), agent.interfaces.attach_mode(), agent.service_count);
    tracing::info!(
        pid,
        adopted,
        attach = attach.label(),
        interfaces = count,
        services,
        "ready, attaching the programs"
    );
    agent
        .run(Inputs { reports, commands, interfaces, attached, resets: resets_out, pods, events, source, signals })
        .await;
    if options.detach {
        drop(agent);
        let cleaned = pins.remove()?;
        tracing::info!(links = cleaned.links, maps = cleaned.maps, "removed the datapath");
    } else {
        tracing::info!("the datapath stays in place; the next agent adopts it");
    }
    Ok(())
}

/// Opens the pin directory as soon as no other agent holds it. `None`: the agent is to end.
async fn take_over(path: &Path, signals: &mut Signals) -> Result<Option<PinDir>> {
    const INTERVAL: Duration = Duration::from_millis(500);
    let mut told = false;
    loop {
        match PinDir::open(path) {
            Ok(pins) => return Ok(Some(pins)),
            Err(PinError::Busy { pid, .. }) if !std::mem::replace(&mut told, true) => {
                tracing::info!(pid, "another agent is running on {}, waiting for its end", path.display());
            }
            Err(PinError::Busy { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            () = signals.end() => return Ok(None),
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}

/// The sizes of the maps: from the configuration, otherwise from the node's memory.
fn sizes(config: &AgentConfig) -> Sizes {
    let by_memory = memory::default_sizes();
    let sizes =
        config.max_services.map_or(by_memory, |services| Sizes::for_services(services).with_flows(by_memory.flows));
    let sizes = config.max_flows.map_or(sizes, |flows| sizes.with_flows(flows));
    if let Some((full, limit)) = memory::over_limit(&sizes) {
        tracing::warn!(
            "full maps would take {full} MiB, and the memory limit is {limit} MiB; lower agent.maxServices or \
             agent.maxFlows, or raise the limit"
        );
    }
    sizes
}

/// Installs breaker's own netfilter rule for the masquerade mark, or removes it if the configuration says so. A
/// node with kube-proxy does not need it. The error says why there is no rule.
fn masquerade_rule(config: &AgentConfig) -> Result<(), String> {
    let outcome = if config.masquerade_rule {
        masquerade::install(config.masquerade_mark)
    } else {
        masquerade::remove().and_then(|_| Err(anyhow::anyhow!("switched off")))
    };
    outcome.map_err(|error| {
        let why = format!("{error:#}");
        tracing::info!("no masquerade rule of breaker's own is installed, kube-proxy's is needed: {why}");
        why
    })
}

/// Forwards log messages of the eBPF programs to the agent's log.
fn forward_log(mut logger: aya_log::EbpfLogger<&'static dyn log::Log>) {
    /// Polling interval. The task runs only with `--program-log`, so it costs nothing otherwise.
    const INTERVAL: Duration = Duration::from_millis(100);
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(INTERVAL);
        loop {
            interval.tick().await;
            let _ = supervise::contained_call(|| logger.flush());
        }
    });
}
