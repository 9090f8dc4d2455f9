//! Loading the programs, with the maps that are pinned or that will be.

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::{Map, MapData, MapInfo, ProgramArray},
    programs::SchedClassifier,
};
use aya_log::EbpfLogger;
use breaker_common::Place;

use super::{
    maps::{Maps, pinned},
    pins::PinDir,
    sizes::Sizes,
    sockets, xdp,
};

/// The object that `build.rs` built.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("BREAKER_OBJECT"));

/// Names of the programs of a pod's interface, egress first: as they are attached.
pub(super) const POD_PROGRAMS: [&str; 2] = ["breaker_out", "breaker_in"];
/// Names of the programs of an uplink.
pub(super) const UPLINK_PROGRAMS: [&str; 2] = ["breaker_up_out", "breaker_up"];

/// Names of the programs that look closer, which those call.
const LOOK_PROGRAMS: [(Place, &str); 4] = [
    (Place::PodIn, "breaker_in_look"),
    (Place::PodOut, "breaker_out_look"),
    (Place::UplinkIn, "breaker_up_look"),
    (Place::UplinkOut, "breaker_up_out_look"),
];

/// Programs in the kernel, and their maps.
#[expect(missing_debug_implementations, reason = "the logger has none")]
pub struct Loaded {
    /// The programs, loaded but not attached.
    pub programs: Ebpf,
    /// Where those are that others call.
    pub tail_calls: TailCalls,
    /// Their maps.
    pub maps: Maps,
    /// Whether the node's own sockets are seen, or why not.
    pub sockets: Result<(), String>,
    /// Whether there is a program for XDP, or why not.
    pub xdp: Result<(), String>,
    /// Carries the programs' log to ours, if they log.
    pub logger: Option<EbpfLogger<&'static dyn log::Log>>,
}

/// How the programs are loaded.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How large the maps are to be, where they are not there yet.
    pub sizes: Sizes,
    /// kube-proxy's masquerade mark.
    pub masquerade_mark: u32,
    /// The programs' own log level: `None` takes the log out of them, so that it costs nothing.
    pub log_level: Option<log::Level>,
    /// Whether programs for the node's own sockets are loaded and attached, too.
    pub sockets: bool,
    /// Whether the program for XDP is loaded, too.
    pub xdp: bool,
}

/// Loads the programs on the maps of a pin directory.
///
/// # Errors
/// What the kernel said, the verifier's log included.
pub fn load(pins: &PinDir, options: &Options) -> Result<Loaded> {
    let Options { sizes, masquerade_mark, log_level, .. } = options;
    let level: u8 = log_level.map_or(0, |level| u8::try_from(level as usize).unwrap_or(0));
    let netns = if options.sockets { sockets::netns_cookie() } else { Err(anyhow::anyhow!("switched off")) };
    let cookie = netns.as_ref().copied().unwrap_or(0);
    let mut loader = EbpfLoader::new();
    loader
        .verifier_log_level(VerifierLogLevel::default())
        .override_global("AYA_LOG_LEVEL", &level, true)
        .override_global("MASQUERADE_MARK", masquerade_mark, true)
        .override_global("NODE_NETNS", &cookie, true);
    // A map that is there stays as large as it was made.
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
        // A map that is there stays as large as it was made.
        let pinned = MapInfo::from_pin(pins.map(name)).map(|info| info.max_entries());
        if let Some(entries) = pinned.ok().or(shared.or_else(family).map(|(_, entries)| entries)) {
            loader.map_max_entries(name, entries);
        }
    }
    let mut programs = loader.load(OBJECT).context("load the maps into the kernel")?;
    for name in POD_PROGRAMS.into_iter().chain(UPLINK_PROGRAMS).chain(LOOK_PROGRAMS.map(|(_, name)| name)) {
        let program: &mut SchedClassifier = programs
            .program_mut(name)
            .with_context(|| format!("the object has no program {name}"))?
            .try_into()
            .with_context(|| format!("{name} is no tc program"))?;
        program.load().with_context(|| format!("load the program {name} into the kernel"))?;
    }
    // Without them everything else works as well.
    let sockets = netns.and_then(|_| sockets::load(&mut programs));
    let xdp = if options.xdp { xdp::load(&mut programs) } else { Ok(()) }.map_err(|error| format!("{error:#}"));
    let logger = match log_level {
        Some(_) => Some(EbpfLogger::init(&mut programs).context("open the programs' log")?),
        None => None,
    };
    let tail_calls = TailCalls(programs.take_map("PROGRAMS").context("the object has no map PROGRAMS")?.try_into()?);
    let maps = Maps::open(|name| programs.take_map(name).with_context(|| format!("the object has no map {name}")))?;
    let sockets = sockets.and_then(|()| sockets::attach(&mut programs, pins)).map_err(|error| format!("{error:#}"));
    if sockets.is_err() {
        sockets::detach(pins)?;
    }
    Ok(Loaded { programs, tail_calls, maps, sockets, xdp, logger })
}

/// Where the programs are that others call.
pub struct TailCalls(ProgramArray<MapData>);

impl std::fmt::Debug for TailCalls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TailCalls").finish_non_exhaustive()
    }
}

impl TailCalls {
    /// Lets the programs that are attached, an earlier agent's too, call these: from here on they translate.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn lead_to(&mut self, programs: &Ebpf) -> Result<()> {
        for (place, name) in LOOK_PROGRAMS {
            let program: &SchedClassifier =
                programs.program(name).with_context(|| format!("the object has no program {name}"))?.try_into()?;
            self.0.set(place as u32, program.fd()?, 0).with_context(|| {
                format!(
                    "put {name} in its place (only programs like an earlier agent's are taken: see breaker cleanup)"
                )
            })?;
        }
        Ok(())
    }
}

/// Opens the maps of a pin directory without programs.
pub(super) fn open_pinned(path_of: impl Fn(&str) -> std::path::PathBuf) -> Result<Maps> {
    Maps::open(|name| {
        let data = MapData::from_pin(path_of(name)).with_context(|| format!("open the pinned map {name}"))?;
        Map::from_map_data(data).with_context(|| format!("the pinned map {name}"))
    })
}
