//! Every program is loaded by this kernel's verifier, and leaves it with room to spare: another kernel's verifier follows
//! more ways through the same program, and a compiler's next version lays it out differently.

use anyhow::{Context as _, Result, bail};
use aya::{
    EbpfLoader,
    programs::{Program, ProgramInfo},
};

/// What the verifier looks at before it gives up (BPF_COMPLEXITY_LIMIT_INSNS, kernel/bpf/verifier.c).
const LIMIT: u32 = 1_000_000;
/// Our share of it.
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
        other => bail!("a program of a type that this test does not know: {:?}", other.prog_type()),
    }
}

#[test]
fn the_verifier_has_little_to_do() -> Result<()> {
    // Constants are known to the verifier: without a network namespace of the node most of the sockets' programs would be
    // dead code, and not looked at. The log is what the default takes out.
    let mut object = EbpfLoader::new()
        .override_global("NODE_NETNS", &1_u64, true)
        .override_global("AYA_LOG_LEVEL", &0_u8, true)
        .load(aya::include_bytes_aligned!(env!("BREAKER_OBJECT")))?;
    let mut counts = Vec::new();
    for (name, program) in object.programs_mut() {
        let info = load(program).with_context(|| format!("load {name}"))?;
        counts.push((name.to_owned(), info.verified_instruction_count().context("kernel 5.16")?));
    }
    counts.sort();
    println!("instructions seen by the verifier:");
    for (name, count) in &counts {
        println!("{name:20}{count:>8}{:>7.1} %", f64::from(*count) * 100.0 / f64::from(LIMIT));
    }
    assert_eq!(counts.len(), 18, "all of tc's and of the sockets', and XDP's");
    for (name, count) in counts {
        assert!(count < BUDGET, "{name}: {count} instructions seen by the verifier, and its budget is {BUDGET}");
    }
    Ok(())
}
