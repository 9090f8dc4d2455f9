//! End-to-end tests on a real cluster. The program installs breaker and the lab, runs the scenarios, and uninstalls
//! both. It uses kubectl only, so any cluster will do. For actions that kubectl cannot carry out (power a node off),
//! commands are given as options; without them, the scenarios that need them are skipped and reported as such.

mod cluster;
mod kube_proxy_rules;
mod load;
mod measure;
mod scenarios;

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use clap::Parser;
use serde_json::json;

use cluster::{Cluster, Hooks};

/// Tests breaker on a real cluster.
#[derive(Parser)]
struct Cli {
    /// Kubeconfig file of the cluster.
    #[arg(long, value_name = "FILE", env = "KUBECONFIG")]
    kubeconfig: PathBuf,
    /// Command that loads an image archive onto every node; {} stands for the archive's path.
    #[arg(long, value_name = "CMD", default_value = "k3s ctr images import {}")]
    load_image: String,
    /// Command that runs its appended arguments on a machine outside the cluster that reaches the nodes.
    #[arg(long, value_name = "CMD")]
    lan: Option<String>,
    /// Command that runs its appended arguments on a node, in its network; {} stands for the node's name.
    #[arg(long, value_name = "CMD")]
    on_node: Option<String>,
    /// Command that powers a node off; {} stands for the node's name.
    #[arg(long, value_name = "CMD", requires = "start_node")]
    stop_node: Option<String>,
    /// Command that powers a node on again; {} stands for the node's name.
    #[arg(long, value_name = "CMD", requires = "stop_node")]
    start_node: Option<String>,
    /// Command that stops the API server.
    #[arg(long, value_name = "CMD", requires = "start_api")]
    stop_api: Option<String>,
    /// Command that starts the API server again.
    #[arg(long, value_name = "CMD", requires = "stop_api")]
    start_api: Option<String>,
    /// Program of Helm, 3 or 4, with which to try the chart; may be given several times.
    #[arg(long, value_name = "FILE")]
    helm: Vec<PathBuf>,
    /// Play only scenarios whose name contains one of these texts.
    #[arg(long, value_name = "TEXT", value_delimiter = ',')]
    only: Vec<String>,
    /// Do not uninstall breaker and the lab.
    #[arg(long)]
    keep: bool,
    /// Measure instead of testing.
    #[arg(long)]
    bench: bool,
    /// Directory of the image archives.
    #[arg(long, value_name = "DIR", default_value = "dist")]
    dist: PathBuf,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<bool> {
    let hooks = Hooks {
        load_image: cli.load_image,
        lan: cli.lan,
        on_node: cli.on_node,
        node: cli.stop_node.zip(cli.start_node),
        api: cli.stop_api.zip(cli.start_api),
        helm: cli.helm,
    };
    let cluster = Cluster::new(cli.kubeconfig, hooks)?;
    println!("cluster: {} nodes", cluster.nodes.len());
    let setup = Instant::now();
    let outcome = scenarios::install(&cluster, &cli.dist).context("install").and_then(|()| {
        println!("installed in {:.1} s", setup.elapsed().as_secs_f64());
        if cli.bench { measure::all(&cluster).map(|()| true) } else { play(&cluster, &cli.only) }
    });
    if let Err(error) = &outcome {
        println!("{error:#}\n{}", cluster.diagnosis());
    }
    if !cli.keep {
        scenarios::uninstall(&cluster).context("uninstall")?;
        println!("uninstalled: nothing is left in any node's kernel");
    }
    outcome
}

fn play(cluster: &Cluster, only: &[String]) -> Result<bool> {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for scenario in scenarios::ALL {
        if !only.is_empty() && !only.iter().any(|text| scenario.name.contains(text.as_str())) {
            continue;
        }
        if let Some(why) = (scenario.skip)(cluster) {
            println!("skipped  {:<28} {why}", scenario.name);
            skipped += 1;
            continue;
        }
        let started = Instant::now();
        let outcome = scenarios::restore_lab(cluster).and_then(|()| (scenario.play)(cluster));
        let took = started.elapsed();
        match outcome {
            Ok(words) => {
                println!("ok       {:<28} {:>5.1} s  {words}", scenario.name, took.as_secs_f64());
                passed += 1;
            }
            Err(error) => {
                println!("FAILED   {:<28} {:>5.1} s  {error:#}", scenario.name, took.as_secs_f64());
                println!("{}", cluster.diagnosis());
                failed += 1;
                // Restore what the scenario broke, so that the next one starts from a healthy cluster.
                cluster.mend();
            }
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    Ok(failed == 0)
}

/// Polls a condition every 100 ms. The error has the last reason why it did not hold.
fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        let last = match look() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if start.elapsed() > limit {
            let why = last.map(|error| format!(": {error:#}")).unwrap_or_default();
            anyhow::bail!("timed out after {} s, waiting for {what}{why}", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Prints a measurement as one line of JSON.
fn row(name: &str, value: f64, unit: &str, note: &str) {
    println!("{}", json!({ "name": name, "value": (value * 100.0).round() / 100.0, "unit": unit, "note": note }));
}
