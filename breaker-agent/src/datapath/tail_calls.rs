//! The map of the full-path programs, which the attached programs call by tail call.

use anyhow::{Context as _, Result};
use aya::{
    Ebpf,
    maps::{MapData, ProgramArray},
    programs::SchedClassifier,
};
use breaker_common::TcHook;

/// Names of the full-path programs, by hook. The attached programs call them by tail call.
pub(super) const FULL_PATH_PROGRAMS: [(TcHook, &str); 4] = [
    (TcHook::PodIn, "brk_in_full"),
    (TcHook::PodOut, "brk_out_full"),
    (TcHook::UplinkIn, "brk_up_full"),
    (TcHook::UplinkOut, "brk_up_out_full"),
];

/// The map `PROGRAMS`, which tail calls use: hook → full-path program.
pub struct TailCalls(ProgramArray<MapData>);

impl std::fmt::Debug for TailCalls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TailCalls").finish_non_exhaustive()
    }
}

impl TailCalls {
    /// Takes the map from the loaded programs.
    ///
    /// # Errors
    /// The BPF object has no such map.
    pub fn take_from(programs: &mut Ebpf) -> Result<Self> {
        Ok(Self(programs.take_map("PROGRAMS").context("the BPF object has no map PROGRAMS")?.try_into()?))
    }

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
