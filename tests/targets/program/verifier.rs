//! Every program passes this kernel's verifier, and needs less than a quarter of its instruction limit. The margin is
//! for other kernels, whose verifiers follow more paths through the same program, and for newer compilers, which lay
//! it out differently.

use anyhow::{Context as _, Result, bail};
use aya::{
    EbpfLoader,
    programs::{Program, ProgramInfo},
};

/// Instructions that the verifier processes before it rejects a program (BPF_COMPLEXITY_LIMIT_INSNS,
/// kernel/bpf/verifier.c).
const LIMIT: u32 = 1_000_000;
/// The budget of one program.
const BUDGET: u32 = LIMIT / 4;

fn load(program: &mut Program) -> Result<ProgramInfo> {
    match program {
        Program::SchedClassifier(program) => {
            program.load()?;
            Ok(program.info()?)
        }
        Program::CgroupSockAddr(program) => {
            program.load()?;
            Ok(program.info()?)
        }
        Program::CgroupSock(program) => {
            program.load()?;
            Ok(program.info()?)
        }
        Program::Xdp(program) => {
            program.load()?;
            Ok(program.info()?)
        }
        other => bail!("this test cannot load a program of type {:?}", other.prog_type()),
    }
}

#[test]
fn the_verifier_has_little_to_do() -> Result<()> {
    // The verifier knows the values of read-only globals and skips code that they make unreachable. With `NODE_NETNS`
    // at 0, most of the socket programs would be unreachable code. A log level of 0, the default, makes the logging
    // unreachable.
    let mut object = EbpfLoader::new()
        .override_global("NODE_NETNS", &1_u64, true)
        .override_global("AYA_LOG_LEVEL", &0_u8, true)
        .load(aya::include_bytes_aligned!(env!("BREAKER_OBJECT")))?;
    let mut counts = Vec::new();
    for (name, program) in object.programs_mut() {
        let info = load(program).with_context(|| format!("load {name}"))?;
        counts.push((name.to_owned(), info.verified_instruction_count().context("instruction count (kernel 5.16)")?));
    }
    counts.sort();
    println!("instructions processed by the verifier:");
    for (name, count) in &counts {
        println!("{name:20}{count:>8}{:>7.1} %", f64::from(*count) * 100.0 / f64::from(LIMIT));
    }
    assert_eq!(counts.len(), 20, "8 for tc, 1 for BPF_PROG_RUN, 9 for cgroups, 2 for XDP");
    for (name, count) in counts {
        assert!(count < BUDGET, "{name}: the verifier processed {count} instructions; the budget is {BUDGET}");
    }
    Ok(())
}
