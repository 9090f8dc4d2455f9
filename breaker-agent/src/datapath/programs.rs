//! Loads the programs into the kernel. They use the maps that are pinned; maps that are not pinned yet are created
//! and pinned.

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::{MapData, MapInfo, ProgramArray},
    programs::SchedClassifier,
};
use aya_log::EbpfLogger;
use breaker_common::TcHook;

use super::{
    attach::{cgroup, xdp},
    maps::{Maps, pinned},
    pins::PinDir,
    sizes::Sizes,
    sys,
};

/// The BPF object that `build.rs` built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("BREAKER_OBJECT"));

/// Names of the programs for a pod's interface, in the order of attaching: egress, ingress.
pub(super) const POD_PROGRAMS: [&str; 2] = ["breaker_out", "breaker_in"];
/// Names of the programs for an uplink, in the order of attaching: egress, ingress.
pub(super) const UPLINK_PROGRAMS: [&str; 2] = ["breaker_up_out", "breaker_up"];

/// Names of the full-path programs, by hook. The programs above call them by tail call.
const FULL_PATH_PROGRAMS: [(TcHook, &str); 4] = [
    (TcHook::PodIn, "brk_in_full"),
    (TcHook::PodOut, "brk_out_full"),
    (TcHook::UplinkIn, "brk_up_full"),
    (TcHook::UplinkOut, "brk_up_out_full"),
];

/// The programs in the kernel, and their maps.
#[expect(missing_debug_implementations, reason = "the logger has none")]
pub struct Loaded {
    /// The programs. Those for sockets are attached; those for interfaces are only loaded.
    pub programs: Ebpf,
    /// The tail-call map: hook → full-path program.
    pub tail_calls: TailCalls,
    /// The maps of the programs.
    pub maps: Maps,
    /// Whether the programs for the node's own sockets are attached, or why not.
    pub sockets: Result<(), String>,
    /// The reason why the XDP program could not be loaded; `Ok` if it is loaded or not wanted.
    pub xdp: Result<(), String>,
    /// Forwards the programs' log to the agent's log; `None` if the programs do not log.
    pub logger: Option<EbpfLogger<&'static dyn log::Log>>,
}

/// Options for loading the programs.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Sizes of the maps that are created. Maps that are pinned already keep their sizes.
    pub sizes: Sizes,
    /// kube-proxy's masquerade mark.
    pub masquerade_mark: u32,
    /// Log level of the programs. `None` removes the logging code from them, so that it costs nothing.
    pub log_level: Option<log::Level>,
    /// Whether to load and attach the programs for the node's own sockets.
    pub sockets: bool,
    /// Whether to load the XDP program.
    pub xdp: bool,
}

/// Loads the programs with the maps of a pin directory, and attaches those for the node's own sockets.
///
/// # Errors
/// The kernel refused a map or a program. The message includes the verifier's log.
pub fn load(pins: &PinDir, options: &Options) -> Result<Loaded> {
    let Options { sizes, masquerade_mark, log_level, .. } = options;
    let level: u8 = log_level.map_or(0, |level| u8::try_from(level as usize).unwrap_or(0));
    let netns = if options.sockets { sys::netns_cookie() } else { Err(anyhow::anyhow!("switched off")) };
    let cookie = netns.as_ref().copied().unwrap_or(0);
    let mut loader = EbpfLoader::new();
    loader
        .verifier_log_level(VerifierLogLevel::default())
        .override_global("AYA_LOG_LEVEL", &level, true)
        .override_global("MASQUERADE_MARK", masquerade_mark, true)
        .override_global("NODE_NETNS", &cookie, true);
    // A map that is pinned already keeps its size.
    let size_of = |name: &str, wanted: u32| MapInfo::from_pin(pins.map(name)).map_or(wanted, |info| info.max_entries());
    let connection_mask = size_of("CONNECTIONS", sizes.connection_buckets) - 1;
    let client_mask = size_of("CLIENTS", sizes.client_buckets) - 1;
    loader.override_global("CONNECTION_MASK", &connection_mask, true).override_global(
        "CLIENT_MASK",
        &client_mask,
        true,
    );
    for (name, ..) in pinned() {
        loader.map_pin_path(name, pins.map(name));
        let shared = sizes.shared().into_iter().find(|(of, _)| *of == name);
        let family = || sizes.by_name().into_iter().find(|(of, _)| name.trim_end_matches(['4', '6']) == *of);
        // As above: a map that is pinned already keeps its size.
        let pinned = MapInfo::from_pin(pins.map(name)).map(|info| info.max_entries());
        if let Some(entries) = pinned.ok().or(shared.or_else(family).map(|(_, entries)| entries)) {
            loader.map_max_entries(name, entries);
        }
    }
    let mut programs = loader.load(OBJECT).context("load the maps into the kernel")?;
    for name in POD_PROGRAMS.into_iter().chain(UPLINK_PROGRAMS).chain(FULL_PATH_PROGRAMS.map(|(_, name)| name)) {
        let program: &mut SchedClassifier = programs
            .program_mut(name)
            .with_context(|| format!("the BPF object has no program {name}"))?
            .try_into()
            .with_context(|| format!("{name} is not a tc program"))?;
        program.load().with_context(|| format!("load the program {name} into the kernel"))?;
    }
    // The programs for sockets and XDP are optional: everything else works without them.
    let sockets = netns.and_then(|_| cgroup::load(&mut programs));
    let xdp = if options.xdp { xdp::load(&mut programs) } else { Ok(()) }.map_err(|error| format!("{error:#}"));
    let logger = match log_level {
        Some(_) => Some(EbpfLogger::init(&mut programs).context("open the programs' log")?),
        None => None,
    };
    let tail_calls =
        TailCalls(programs.take_map("PROGRAMS").context("the BPF object has no map PROGRAMS")?.try_into()?);
    let maps = Maps::open(|name| programs.take_map(name).with_context(|| format!("the BPF object has no map {name}")))?;
    let sockets = sockets.and_then(|()| cgroup::attach(&mut programs, pins)).map_err(|error| format!("{error:#}"));
    if sockets.is_err() {
        cgroup::detach(pins)?;
    }
    Ok(Loaded { programs, tail_calls, maps, sockets, xdp, logger })
}

/// The map `PROGRAMS`, which tail calls use: hook → full-path program.
pub struct TailCalls(ProgramArray<MapData>);

impl std::fmt::Debug for TailCalls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TailCalls").finish_non_exhaustive()
    }
}

impl TailCalls {
    /// Puts the full-path programs into the map. From here on, all attached prefilters call them, also those of an
    /// earlier agent.
    ///
    /// # Errors
    /// The kernel refused a program.
    pub fn install_tail_calls(&mut self, programs: &Ebpf) -> Result<()> {
        for (hook, name) in FULL_PATH_PROGRAMS {
            let program: &SchedClassifier =
                programs.program(name).with_context(|| format!("the BPF object has no program {name}"))?.try_into()?;
            self.0.set(hook as u32, program.fd()?, 0).with_context(|| {
                format!(
                    "put {name} into the map PROGRAMS (which accepts only programs compatible with those of the agent \
                     that created it; breaker cleanup removes it)"
                )
            })?;
        }
        Ok(())
    }
}
