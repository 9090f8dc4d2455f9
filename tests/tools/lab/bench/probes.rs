//! CPU time and memory of the agent at 1,000 checks per second.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use breaker_tests::lab::{
    kubeproxy,
    stage::{Checks, Lab, entry},
};

use super::Row;

const SERVICES: u8 = 50;
const FOR: Duration = Duration::from_secs(5);

pub(super) fn rows() -> Result<Vec<Row>> {
    let mut lab = Lab::new(Checks::Fast)?;
    // Each service has two checks, every 100 ms. The paths differ, because the agent makes equal checks only once.
    let mut services = String::from("services:\n");
    for n in 0..SERVICES {
        let name = format!("dummy-{n}");
        let (primary, backup) = (lab.primary.address(), lab.backup.address());
        let text = entry(&name, kubeproxy::vip(n), primary, backup, Checks::Fast, "");
        let _ = write!(services, "{}", text.replace("path: /ready", &format!("path: '/ready?{n}'")));
    }
    lab.agent.write_config("", &services)?;
    lab.agent.start()?;
    std::thread::sleep(Duration::from_secs(2));
    let pid = lab.agent.pid()?;
    let (before, started) = (cpu_seconds(pid)?, Instant::now());
    std::thread::sleep(FOR);
    let used = (cpu_seconds(pid)? - before) / started.elapsed().as_secs_f64();
    let memory = resident_mib(pid)?;
    let row = |name: &str, value: f64, unit: &'static str| Row {
        name: format!("probes: {name}"),
        value,
        unit,
        base: "1,000 HTTP checks per second".into(),
        ratio: None,
        spread: None,
        aim: "",
    };
    Ok(vec![row("the agent's part of a core", used * 100.0, "%"), row("the agent's memory", memory, "MiB")])
}

fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("read /proc/PID/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
    // proc_pid_stat(5): utime and stime are the fields 14 and 15, in ticks of 1/100 s; `fields` begins with field 3.
    Ok((ticks(11) + ticks(12)) / 100.0)
}

fn resident_mib(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("read /proc/PID/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS in /proc/PID/status")?;
    Ok(line.split_whitespace().next().and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0)
}
