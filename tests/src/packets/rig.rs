//! Runs the programs in the kernel on single packets (BPF_PROG_TEST_RUN).

use anyhow::{Context as _, Result, ensure};
use aya::{
    TestRun as _,
    programs::{SchedClassifier, TestRunOptions, Xdp},
};
use breaker_agent::datapath::{KernelDatapath, pins::PinDir, programs, sizes::Sizes};
use breaker_core::{datapath::Datapath as _, plan::ServicePlan};
use rustix::{
    net::{AddressFamily, SocketType, netdevice::name_to_index, socket},
    process::getpid,
    thread::gettid,
};

use super::Segment;
use crate::lab::{netns::NetNs, world::World};

/// Action `TC_ACT_UNSPEC`, which is also `TCX_NEXT`: the next program on the hook runs, then the host network stack.
pub const NEXT: u32 = u32::MAX;
/// Action `TC_ACT_SHOT`: the packet is dropped.
pub const DROP: u32 = 2;
/// Action `TC_ACT_REDIRECT`: the packet goes to another interface.
pub const REDIRECT: u32 = 7;
/// `XDP_PASS`: the packet continues to the host network stack.
pub const XDP_PASS: u32 = 2;
/// `XDP_TX`: the packet is sent back out of the interface that it arrived on.
pub const XDP_TX: u32 = 3;

/// The acknowledgment number of pokes in tests.
pub const POKE_NUMBER: u32 = 0x6272_6b72;

/// Creates a network namespace that forwards packets and has default routes over one interface, and moves the calling
/// thread into it. Returns the namespace and the interface's index. BPF_PROG_TEST_RUN runs a program in its caller's
/// namespace, and the programs look up that namespace's routes.
fn enter_node(world: &World) -> Result<(NetNs, u32)> {
    let ns = NetNs::create(&format!("{}-rig", world.id()))?;
    ns.ip(&["link", "add", "uplink", "type", "veth", "peer", "name", "beyond"])?;
    for interface in ["uplink", "beyond"] {
        ns.ip(&["link", "set", interface, "up"])?;
    }
    for family in ["-4", "-6"] {
        ns.ip(&[family, "route", "add", "default", "dev", "uplink"])?;
    }
    ns.sysctl(&["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])?;
    ns.settle()?;
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).context("open a socket")?;
    let uplink = name_to_index(&socket, "uplink").context("look up the index of the interface uplink")?;
    Ok((ns, uplink))
}

/// Result of one test run of a program.
#[derive(Clone, Debug)]
pub struct RunResult {
    /// Action that the program returned.
    pub action: u32,
    /// The packet after the run.
    pub bytes: Vec<u8>,
    /// The packet's mark (`skb->mark`) after the run.
    pub mark: u32,
}

/// The programs and their maps, loaded for test runs and pinned on a BPF file system of their own.
#[derive(Debug)]
pub struct TestRig {
    /// The datapath to which tests apply plans.
    pub datapath: KernelDatapath,
    programs: aya::Ebpf,
    pins: PinDir,
    node: NetNs,
    /// Index of the interface on which packets appear to arrive.
    uplink: u32,
    _world: World,
}

/// Offset of `mark` in `struct __sk_buff` (include/uapi/linux/bpf.h).
const SKB_MARK: usize = 8;

/// Offset of `ifindex` in `struct __sk_buff`.
const SKB_IFINDEX: usize = 40;

const SKB_SIZE: usize = 192;

/// Loads the programs. Uses the maps that are pinned below `pins`, and creates the ones that are missing.
fn loaded(pins: &PinDir, sizes: &Sizes) -> Result<(KernelDatapath, aya::Ebpf)> {
    let options = programs::Options {
        sizes: *sizes,
        masquerade_mark: breaker_common::DEFAULT_MASQUERADE_MARK,
        log_level: None,
        sockets: false,
        xdp: true,
        note_syns: false,
        poke_number: POKE_NUMBER,
    };
    let mut loaded = programs::load(pins, &options)?;
    loaded.tail_calls.install_tail_calls(&loaded.programs)?;
    loaded.xdp.map_err(anyhow::Error::msg).context("load the XDP program")?;
    let mut datapath = KernelDatapath::new(loaded.maps);
    datapath.heartbeat(std::time::Duration::ZERO, 0);
    Ok((datapath, loaded.programs))
}

impl TestRig {
    /// Loads the programs, and moves the calling thread into the rig's network namespace for the rest of its life.
    ///
    /// # Errors
    /// Fails without root, and if the kernel refuses a program or map. Fails on the process's first thread: removing
    /// the namespace kills every process whose first thread is in it.
    pub fn new() -> Result<Self> {
        Self::with_sizes(&Sizes::for_memory(1024))
    }

    /// Like [`TestRig::new`], with maps of these sizes.
    ///
    /// # Errors
    /// As for [`TestRig::new`].
    pub fn with_sizes(sizes: &Sizes) -> Result<Self> {
        ensure!(gettid() != getpid(), "create a rig on another thread than the process's first one");
        let world = World::new(0)?;
        let (node, uplink) = enter_node(&world)?;
        let pins = PinDir::open(&world.bpffs().join("rig"))?;
        let (datapath, programs) = loaded(&pins, sizes)?;
        Ok(Self { datapath, programs, pins, node, uplink, _world: world })
    }

    /// Simulates a restart of the agent: reloads the programs on the pinned maps, and adopts the maps' content.
    ///
    /// # Errors
    /// Fails if the kernel refuses a program, or if the maps cannot be adopted.
    pub fn restart(&mut self) -> Result<()> {
        (self.datapath, self.programs) = loaded(&self.pins, &Sizes::for_memory(1024))?;
        self.datapath.adopt()?;
        Ok(())
    }

    /// Runs a program of tc once on a packet.
    ///
    /// # Errors
    /// Fails if there is no such program, or if the kernel refuses the run.
    pub fn run(&mut self, program: &str, packet: &[u8]) -> Result<RunResult> {
        self.repeat(program, packet, 1).map(|(ran, _)| ran)
    }

    /// Runs a program of tc on a packet `times` times. Returns the result of the last run, and the average duration of
    /// one run in nanoseconds.
    ///
    /// # Errors
    /// Fails if there is no such program, or if the kernel refuses the run.
    pub fn repeat(&mut self, program: &str, packet: &[u8], times: u32) -> Result<(RunResult, u128)> {
        let program: &SchedClassifier = self.programs.program(program).context("no such program")?.try_into()?;
        let mut out = vec![0; packet.len() + 256];
        let mut came_by = vec![0; SKB_SIZE];
        came_by[SKB_IFINDEX..SKB_IFINDEX + 4].copy_from_slice(&self.uplink.to_ne_bytes());
        let mut context = vec![0; SKB_SIZE];
        let result = program.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&came_by),
            ctx_out: Some(&mut context),
            repeat: times,
            ..TestRunOptions::new()
        })?;
        out.truncate(result.data_size_out as usize);
        let mark = <[u8; 4]>::try_from(&context[SKB_MARK..SKB_MARK + 4]).map_or(0, u32::from_ne_bytes);
        Ok((RunResult { action: result.return_value, bytes: out, mark }, result.duration.as_nanos()))
    }

    /// Runs the XDP program on a packet. Returns the action (an `xdp_action`) and the packet after the run.
    ///
    /// # Errors
    /// Fails if the kernel refuses the run.
    pub fn run_xdp(&mut self, packet: &[u8]) -> Result<(u32, Vec<u8>)> {
        let program: &Xdp = self.programs.program("breaker_xdp_fr").context("no program breaker_xdp_fr")?.try_into()?;
        let mut out = vec![0; packet.len() + 256];
        let options = TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), ..TestRunOptions::new() };
        let result = program.test_run(options)?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value, out))
    }

    /// The network namespace that the programs run in.
    #[must_use]
    pub const fn node(&self) -> &NetNs {
        &self.node
    }

    /// Path of a pinned map.
    #[must_use]
    pub fn map(&self, name: &str) -> std::path::PathBuf {
        self.pins.map(name)
    }

    /// A loaded program of tc.
    ///
    /// # Errors
    /// Fails if there is no such program.
    pub fn program(&self, name: &str) -> Result<&SchedClassifier> {
        Ok(self.programs.program(name).context("no such program")?.try_into()?)
    }

    /// Runs `breaker_in` on a segment that a pod sends.
    ///
    /// # Errors
    /// Fails if the kernel refuses the run.
    pub fn from_pod(&mut self, segment: &Segment) -> Result<RunResult> {
        self.run("breaker_in", &segment.bytes())
    }

    /// Runs `breaker_out` on a segment that goes to a pod.
    ///
    /// # Errors
    /// Fails if the kernel refuses the run.
    pub fn to_pod(&mut self, segment: &Segment) -> Result<RunResult> {
        self.run("breaker_out", &segment.bytes())
    }

    /// Runs `breaker_in` on any frame that a pod sends.
    ///
    /// # Errors
    /// Fails if the kernel refuses the run.
    pub fn raw_from_pod(&mut self, packet: &[u8]) -> Result<RunResult> {
        self.run("breaker_in", packet)
    }

    /// Runs `breaker_out` on any frame that goes to a pod.
    ///
    /// # Errors
    /// Fails if the kernel refuses the run.
    pub fn raw_to_pod(&mut self, packet: &[u8]) -> Result<RunResult> {
        self.run("breaker_out", packet)
    }

    /// Writes a plan into the maps.
    ///
    /// # Errors
    /// Fails if the kernel refuses a write.
    pub fn apply(&mut self, plan: &ServicePlan) -> Result<()> {
        Ok(self.datapath.apply(plan)?)
    }
}
