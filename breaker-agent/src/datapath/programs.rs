//! Loads the programs into the kernel. They use the maps that are pinned; maps that are not pinned yet are created
//! and pinned.

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::MapInfo,
    programs::{ProgramType, SchedClassifier},
    sys::BpfHelper,
};
use aya_log::EbpfLogger;

use super::{
    attach::{POD_PROGRAMS, UPLINK_PROGRAMS, cgroup, xdp},
    maps::{Maps, pinned},
    memory::possible_cpus,
    pins::PinDir,
    poke::Poker,
    sizes::{Sizes, with_reserve},
    syns::Syns,
    sys,
    tail_calls::{FULL_PATH_PROGRAMS, TailCalls},
};

/// Connections in `SYNS`, at most: each takes some 120 bytes.
const MOST_SYNS: u32 = 131_072;

/// The BPF object that `build.rs` built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("BREAKER_OBJECT"));

/// The programs in the kernel, and their maps.
#[expect(missing_debug_implementations, reason = "the logger has none")]
pub struct Loaded {
    /// The programs. Those for sockets are attached; those for interfaces are only loaded.
    pub programs: Ebpf,
    /// The tail-call map: hook → full-path program.
    pub tail_calls: TailCalls,
    /// The program that pokes clients, or why it could not be loaded.
    pub poker: Result<Poker, String>,
    /// The connections to primaries that the programs note; `None` if they note none.
    pub syns: Option<Syns>,
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
    /// Whether the programs note connections to primaries by their SYNs.
    pub note_syns: bool,
    /// The acknowledgment number of pokes, within [`breaker_common::POKE_NUMBER_BITS`].
    pub poke_number: u32,
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
    let has_xfrm = u8::from(
        sys::has_helper(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_skb_get_xfrm_state).unwrap_or(false),
    );
    let note_syns = u8::from(options.note_syns);
    let mut loader = EbpfLoader::new();
    loader
        .verifier_log_level(VerifierLogLevel::default())
        .override_global("AYA_LOG_LEVEL", &level, true)
        .override_global("MASQUERADE_MARK", masquerade_mark, true)
        .override_global("HAS_XFRM", &has_xfrm, true)
        .override_global("NOTE_SYNS", &note_syns, true)
        .override_global("POKE_NUMBER", &options.poke_number, true)
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
    let cpus = possible_cpus();
    for (name, ..) in pinned() {
        loader.map_pin_path(name, pins.map(name));
        // As above: a map that is pinned already keeps its size.
        let pinned = MapInfo::from_pin(pins.map(name)).map(|info| info.max_entries());
        if let Some(entries) = pinned.ok().or(sizes.entries_of(name, cpus)) {
            loader.map_max_entries(name, entries);
        }
    }
    // An LRU map takes its memory at once, so it is small where nothing is noted.
    loader.map_max_entries("SYNS", if options.note_syns { with_reserve(sizes.flows.min(MOST_SYNS), cpus) } else { 1 });
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
    let poker = Poker::load(&mut programs, pins, options.poke_number).map_err(|error| format!("{error:#}"));
    let syns = if options.note_syns { Some(Syns::take_from(&mut programs)?) } else { None };
    let xdp = if options.xdp { xdp::load(&mut programs) } else { Ok(()) }.map_err(|error| format!("{error:#}"));
    let logger = match log_level {
        Some(_) => Some(EbpfLogger::init(&mut programs).context("open the programs' log")?),
        None => None,
    };
    let tail_calls = TailCalls::take_from(&mut programs)?;
    let maps = Maps::open(|name| programs.take_map(name).with_context(|| format!("the BPF object has no map {name}")))?;
    let sockets =
        sockets.and_then(|()| cgroup::attach(&mut programs, &pins.links())).map_err(|error| format!("{error:#}"));
    if sockets.is_err() {
        cgroup::detach(pins)?;
    }
    Ok(Loaded { programs, tail_calls, poker, syns, maps, sockets, xdp, logger })
}
