//! Memory that the agent and its maps take when it starts.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use breaker_tests::lab::stage::{Checks, Lab};

use crate::wait_all_up;

/// A memory cgroup of its own. Dropping it removes it; it has no processes then.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes a cgroup in the hierarchy of version 1, or in that of version 2. `None`: the machine has no memory cgroups.
    fn make(name: &str) -> Result<Option<Self>> {
        let old = Path::new("/sys/fs/cgroup/memory");
        let root = if old.is_dir() { old } else { Path::new("/sys/fs/cgroup") };
        if root != old && fs::write(root.join("cgroup.subtree_control"), "+memory").is_err() {
            return Ok(None);
        }
        let path = root.join(name);
        fs::create_dir(&path).context("make a cgroup")?;
        Ok(Some(Self(path)))
    }

    /// Memory in bytes that is charged to the cgroup, without the pages of files: those of the binary are shared by all
    /// processes on the machine that read it, and the kernel takes them back when it needs them.
    fn bytes(&self) -> Result<u64> {
        let read = |file: &str| fs::read_to_string(self.0.join(file)).with_context(|| format!("read {file}"));
        let usage = read("memory.current").or_else(|_| read("memory.usage_in_bytes"))?;
        let stat = read("memory.stat")?;
        let files = field(&stat, "file").or_else(|| field(&stat, "cache")).context("pages of files")?;
        let usage: u64 = usage.trim().parse().context("the usage is a number")?;
        Ok(usage.saturating_sub(files))
    }

    /// Per-CPU memory in bytes that is charged to the cgroup. Version 1 does not tell: 0.
    fn per_cpu(&self) -> Result<u64> {
        Ok(field(&fs::read_to_string(self.0.join("memory.stat"))?, "percpu").unwrap_or(0))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// The number behind a name at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut values =
        text.lines().filter_map(|line| line.strip_prefix(name)?.trim_start_matches(':').trim().split(' ').next());
    values.find_map(|value| value.parse().ok())
}

/// Per-CPU memory of the machine, in bytes.
fn machine_per_cpu() -> Result<u64> {
    Ok(field(&fs::read_to_string("/proc/meminfo")?, "Percpu").context("no Percpu in /proc/meminfo")? << 10)
}

/// Possible CPUs of the machine.
fn possible_cpus() -> Result<u64> {
    let text = fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit(['-', ',']).next().context("no CPUs")?;
    Ok(last.parse::<u64>().context("the number of a CPU")? + 1)
}

/// TRIALS D1, D2: with the sizes of a node of 16 GiB, agent and maps take at most 48 MiB on two CPUs, and at most 24 MiB
/// more on 128 possible CPUs. Memory that no cgroup is charged for counts, too.
#[test]
fn d1_the_agent_starts_with_little_memory_on_any_number_of_cpus() -> Result<()> {
    const MIB: u64 = 1 << 20;
    let mut lab = Lab::new(Checks::Fast)?;
    let Some(cgroup) = Cgroup::make(&format!("breaker-test-{}", std::process::id()))? else {
        eprintln!("skipped: no memory cgroups");
        return Ok(());
    };
    let node = "  maxServices: 8192\n  maxFlows: 131072\n";
    lab.agent.write_config(node, &lab.services(Checks::Fast, ""))?;
    let join = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", cgroup.0.display());
    lab.agent.launch_by(&["sh", "-c", &join, "sh"]);
    let before = machine_per_cpu()?;
    lab.agent.start()?;
    wait_all_up(&lab)?;
    let uncharged = machine_per_cpu()?.saturating_sub(before).saturating_sub(cgroup.per_cpu()?);
    let (charged, cpus) = (cgroup.bytes()?, possible_cpus()?);
    let allowed = 48 * MIB + cpus.saturating_sub(2) * 24 * MIB / 126;
    let found = format!(
        "{cpus} possible CPUs: {:.1} MiB charged to the agent, {:.1} MiB to no cgroup, {:.1} MiB allowed",
        mib(charged),
        mib(uncharged),
        mib(allowed)
    );
    println!("{found}");
    ensure!(charged + uncharged <= allowed, "{found}");
    lab.agent.stop()
}

#[expect(clippy::cast_precision_loss, reason = "printed with one decimal")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
