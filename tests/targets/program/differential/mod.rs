//! Differential test: random sequences of packets and decisions go through the programs and through the model of
//! their rules. Both must agree on every packet's verdict, bytes and mark, on the counters, and on every entry of the
//! flow tables.
//!
//! `cargo xtask test fuzz` runs many sequences. In the program tier a fixed set of a few hundred runs. A failing
//! sequence is shrunk and printed step by step, with the seed that reproduces it.

mod packet;
mod steps;

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use breaker_agent::datapath::sizes::Sizes;
use breaker_common::{BreakerState, PassReason};
use breaker_core::{
    datapath::Datapath as _,
    limits::{self, OnLimit, Rate, Scope},
    model::{EstablishedPolicy, FastPath, Mode, Service, ServiceName, WhenAllUnhealthy},
};
use breaker_tests::{
    model::{
        Hook, Model, Outcome, Seen,
        bytes::{Sum, word},
        limit::{self, Kind, Over},
        service,
    },
    packets::{DROP, NEXT, REDIRECT, RunResult, TestRig, plan_with, service_with},
    tables::Tables,
};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use rustix::time::{ClockId, clock_gettime};

use steps::{BACKUPS, Decision, SERVICES, Step, backend, frontend, sequences};

/// Sequences that run in the program tier.
const CASES: u32 = 400;
/// First seed in the program tier.
const SEED: u64 = 1;
/// Sequences per seed. To reproduce a failure, all sequences of its seed run again.
const BLOCK: u32 = 1000;
/// A sequence has fewer steps than this.
const STEPS: usize = 24;

#[test]
fn programs_and_model_agree() -> Result<()> {
    let number = |name: &str| -> Result<Option<u64>> {
        std::env::var(name).ok().map(|text| text.parse().with_context(|| format!("{name}={text}"))).transpose()
    };
    let cases = number("BREAKER_FUZZ_CASES")?.unwrap_or(CASES.into());
    let seed = number("BREAKER_FUZZ_SEED")?.unwrap_or(SEED);
    let bench = RefCell::new(Bench::new()?);
    let started = Instant::now();
    let mut done = 0;
    while done < cases {
        let block = seed + done / u64::from(BLOCK);
        let some = u32::try_from((cases - done).min(u64::from(BLOCK)))?;
        run(&bench, block, some)?;
        done += u64::from(some);
    }
    let (took, packets) = (started.elapsed(), bench.borrow().packets);
    println!("{done} sequences, {packets} packets, {:.0} sequences/s", rate(done, took));
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn rate(count: u64, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}

/// Runs `cases` sequences of one seed. The error shows the first failing sequence, shrunk.
fn run(bench: &RefCell<Bench>, seed: u64, cases: u32) -> Result<()> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 20_000, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let outcome = runner.run(&sequences(STEPS), |steps| {
        bench.borrow_mut().play(&steps, &mut None).map_err(|error| TestCaseError::fail(format!("{error:#}")))
    });
    match outcome {
        Ok(()) => Ok(()),
        Err(TestError::Fail(_, steps)) => {
            let mut story = Some(String::new());
            let end = bench.borrow_mut().play(&steps, &mut story);
            let why = end.err().map_or("the failure did not occur again".to_owned(), |error| format!("{error:#}"));
            bail!("{}{why}\nreproduce: cargo xtask test fuzz --cases {BLOCK} --seed {seed}", story.unwrap_or_default())
        }
        Err(TestError::Abort(reason)) => bail!("seed {seed}: {reason}"),
    }
}

/// The programs in the kernel with two services that share a backup.
struct Bench {
    rig: TestRig,
    tables: Tables,
    services: [Service; 2],
    epoch: u32,
    reasons: BTreeMap<PassReason, u64>,
    limited: [[[u64; 4]; 2]; 2],
    dry_run: u64,
    packets: u64,
}

impl Bench {
    fn new() -> Result<Self> {
        let sizes = Sizes { flows: 512, pending: 2048, ..Sizes::for_memory(1024) };
        let rig = TestRig::with_sizes(&sizes)?;
        let tables = Tables::open(&rig)?;
        let service = |index: usize| {
            let frontends = [false, true].map(|v6| frontend(index, v6));
            let frontends: Vec<_> = frontends.iter().flat_map(|f| [(*f, "TCP"), (*f, "UDP")]).collect();
            let backups: Vec<_> = BACKUPS[index].iter().flat_map(|b| [backend(*b, false), backend(*b, true)]).collect();
            service_with(SERVICES[index], &frontends, &backups, "")
        };
        let services = [service(0)?, service(1)?];
        Ok(Self {
            rig,
            tables,
            services,
            epoch: 0,
            reasons: BTreeMap::new(),
            limited: Default::default(),
            dry_run: 0,
            packets: 0,
        })
    }

    /// Plays a sequence; fails at the first difference between programs and model. The steps are written to `story`
    /// if there is one.
    fn play(&mut self, steps: &[Step], story: &mut Option<String>) -> Result<()> {
        let mut model = self.begin()?;
        for step in steps {
            if let Step::Decide(decision) = step {
                self.decide(&mut model, decision)?;
                if let Some(story) = story {
                    writeln!(story, "{decision:?}")?;
                }
            }
            let Some((hook, frame)) = step.frame(&model.book) else { continue };
            let ran = self.rig.run(program(hook), &frame)?;
            self.packets += 1;
            let reason = self.counted()?;
            let (limited, would_move) = (self.limited()?, self.would_move()?);
            let seen =
                Seen { sent_away: ran.action == REDIRECT, frame: &ran.bytes, reason, limited: &limited, would_move };
            let expected = model.pass(hook, &frame, seen);
            if let Some(story) = story {
                writeln!(story, "{step:?}\n  sent     {}", hex(&frame))?;
                writeln!(story, "  programs {}\n  model    {}", hex(&ran.bytes), hex(&expected.frame))?;
            }
            agree(&ran, &expected)?;
            ensure!(reason == expected.reason, "counted reason {reason:?}, model: {:?}", expected.reason);
            ensure!(limited == expected.limited, "over limits {limited:?}, model: {:?}", expected.limited);
            for name in SERVICES {
                let counts = self.rig.datapath.limits(&ServiceName::new(name), 0)?.concurrent;
                let model = [0, 1].map(|tier| model.ledger.concurrent(name, tier, None));
                ensure!(counts == model, "{name} counts {counts:?}, model: {model:?}");
            }
            let book = self.tables.read()?;
            ensure!(book.flows == model.book.flows, "flows: {:#?}\nmodel: {:#?}", book.flows, model.book.flows);
            ensure!(
                book.ways_back == model.book.ways_back,
                "reverse entries: {:#?}\nmodel: {:#?}",
                book.ways_back,
                model.book.ways_back
            );
        }
        Ok(())
    }

    /// Resets programs and model to the same state: no flows, both services open.
    fn begin(&mut self) -> Result<Model> {
        self.tables.clear()?;
        // The agent forgets which backends had flows only for services that are closed and have no flows left.
        self.decide_both(BreakerState::Closed)?;
        self.rig.datapath.sweep(None)?;
        while !self.rig.datapath.events().is_empty() {}
        let model = self.decide_both(BreakerState::Open)?;
        self.reasons = self.rig.datapath.reasons()?.into_iter().collect();
        self.limited()?;
        self.would_move()?;
        Ok(model)
    }

    fn decide_both(&mut self, state: BreakerState) -> Result<Model> {
        let mut model = Model::default();
        for service in 0..2 {
            let decision = Decision {
                service,
                state,
                share: if state == BreakerState::Closed { 1000 } else { 0 },
                draining: false,
                usable: 2,
                dry_run: false,
                reset_on_open: false,
                reset_on_close: false,
                reset_on_backup_down: false,
                reject: false,
                half_open_limit: 1,
                primary_accepts: false,
                fast: false,
                keeps_client: false,
                near: false,
                in_epoch: false,
                limits: None,
            };
            self.decide(&mut model, &decision)?;
        }
        Ok(model)
    }

    fn decide(&mut self, model: &mut Model, decision: &Decision) -> Result<()> {
        let service = &mut self.services[decision.service];
        let policy = |reset| if reset { EstablishedPolicy::Reset } else { EstablishedPolicy::Keep };
        service.mode = if decision.dry_run { Mode::DryRun } else { Mode::Enforce };
        (service.on_open, service.on_close) = (policy(decision.reset_on_open), policy(decision.reset_on_close));
        service.when_all_unhealthy =
            if decision.reject { WhenAllUnhealthy::Reject } else { WhenAllUnhealthy::PassThrough };
        service.breaker.half_open_connections = decision.half_open_limit;
        let limits = decision.limits.map(|limits| configured(&limits));
        if limits.is_some() && service.limits.is_some() && limits != service.limits {
            wait_for_coarse_clock();
        }
        service.limits = limits;
        service.fast_path = if decision.fast { FastPath::PeerRedirect } else { FastPath::Off };
        service.keep_client.frontends =
            if decision.keeps_client { service.frontends.iter().copied().collect() } else { BTreeSet::new() };
        let usable = service.backups[0].backends.iter().take(decision.usable * 2).copied().collect::<Vec<_>>();
        self.epoch += 1;
        let name = SERVICES[decision.service];
        let before = model.services.get(name).filter(|s| decision.in_epoch && s.state == decision.state);
        let (epoch, half_open_taken) = before.map_or((self.epoch, 0), |s| (s.epoch, s.half_open_taken));
        let mut plan = plan_with(service, decision.state, epoch, decision.share, decision.draining, &usable);
        plan.primary_accepts = decision.primary_accepts;
        let unusable = &service.backups[0].backends[usable.len()..];
        let down: Vec<_> = if decision.reset_on_backup_down && !usable.is_empty() {
            unusable.iter().map(|b| b.address).collect()
        } else {
            Vec::new()
        };
        plan.reset_flows_to(down.iter().copied().collect());
        self.rig.apply(&plan)?;
        let pods = service.backups[0].backends.iter().map(|b| b.address.ip());
        // The services share a backup pod, so its location holds for both.
        model.near = if decision.near { pods.collect() } else { BTreeSet::new() };
        self.rig.datapath.set_local_pods(model.near.iter().map(|ip| (*ip, 1)).collect());
        model.any_fast |= decision.fast;
        match &decision.limits {
            None => model.ledger.forget(name),
            Some(limits) if !limit::counts(limits) => {
                let counted =
                    model.services.get(name).and_then(|s| s.limits).is_some_and(|limits| limit::counts(&limits));
                if counted {
                    model.ledger.forget_connections(name);
                }
            }
            Some(_) => {}
        }
        let overflowed = decision.limits.is_some() && model.services.get(name).is_some_and(|s| s.overflowed);
        let backups: Vec<_> = usable.iter().map(|b| b.address).collect();
        model.backends.extend(backups.iter().flat_map(|b| [(*b, 6), (*b, 17)]));
        model.services.insert(
            name,
            service::Service {
                frontends: service.frontends.iter().map(|f| f.address).collect(),
                backups,
                state: decision.state,
                share: decision.share,
                epoch,
                draining: decision.draining,
                dry_run: decision.dry_run,
                reset_on_open: decision.reset_on_open,
                reset_on_close: decision.reset_on_close,
                down,
                reject: decision.reject,
                fast: decision.fast,
                keeps_client: decision.keeps_client,
                half_open_limit: decision.half_open_limit,
                half_open_taken,
                primary_accepts: decision.primary_accepts,
                limits: decision.limits,
                overflowed,
            },
        );
        Ok(())
    }

    /// The limits that the last packet exceeded, as (tier, kind): the primary's first.
    fn limited(&mut self) -> Result<Vec<(usize, Kind)>> {
        let mut found = Vec::new();
        for (name, before) in SERVICES.iter().zip(&mut self.limited) {
            let counters = self.rig.datapath.limits(&ServiceName::new(name), 0)?.counters;
            for (tier, kind) in [0, 1].into_iter().flat_map(|tier| (0..4).map(move |kind| (tier, kind))) {
                let now = counters.limited[tier][kind] + counters.dry_run[tier][kind];
                if std::mem::replace(&mut before[tier][kind], now) < now {
                    found.push((tier, kind));
                }
            }
        }
        Ok(found)
    }

    /// Whether a dry run would have moved or refused the last packet.
    fn would_move(&mut self) -> Result<bool> {
        let counters = SERVICES.map(|name| self.rig.datapath.counters(&ServiceName::new(name)));
        let now = counters.into_iter().map(|c| c.map(|c| c.dry_run)).sum::<Result<u64, _>>()?;
        Ok(std::mem::replace(&mut self.dry_run, now) < now)
    }

    /// The reason for which the last packet was passed, if one was counted. Fails if more than one was.
    fn counted(&mut self) -> Result<Option<PassReason>> {
        // The packets of a second are more than the events that a CPU sends in one.
        let all = self.rig.datapath.reasons()?.into_iter();
        let now: BTreeMap<PassReason, u64> = all.filter(|(reason, _)| *reason != PassReason::EventLost).collect();
        let before = std::mem::replace(&mut self.reasons, now);
        let mut new = self.reasons.iter().filter(|(reason, count)| before.get(reason) != Some(count));
        let counted = new.next().map(|(reason, _)| *reason);
        ensure!(new.next().is_none(), "counted twice: {before:?}, {:?}", self.reasons);
        Ok(counted)
    }
}

/// Waits until the coarse clock shows what the precise clock shows now. The programs read the clock that a tier's
/// limits need (`now_for` in breaker-ebpf/src/limit/mod.rs): after a change of limits, the coarse clock could show a time
/// before the last take, and a bucket that was charged by the precise clock would seem fuller than it is.
fn wait_for_coarse_clock() {
    let now = clock_gettime(ClockId::Monotonic);
    while clock_gettime(ClockId::MonotonicCoarse) < now {
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
}

/// The model's limits as configuration. [`Scope::Cluster`] and 3,600 nodes make a token come back only after an hour.
fn configured(limits: &limit::Limits) -> limits::Limits {
    const NODES: u32 = 3600;
    let many = |count: u32| count * NODES;
    let rate = |burst: Option<u32>| burst.map(|burst| Rate { per_second: 1, burst: many(burst) });
    let [primary, backup] = limits.map(|tier| limits::TierLimits {
        rate: rate(tier.burst),
        concurrent: tier.concurrent.map(many),
        client_rate: rate(tier.client_burst),
        client_concurrent: tier.client_concurrent.map(many),
        on_limit: match tier.over {
            Over::Reset => OnLimit::Reset,
            Over::Drop => OnLimit::Drop,
            Over::Failover => OnLimit::Failover,
        },
    });
    limits::Limits { primary, backup, client_prefix: 64, idle: limits::IDLE, scope: Scope::Cluster, nodes: NODES }
}

const fn program(hook: Hook) -> &'static str {
    match hook {
        Hook::FromPod => "breaker_in",
        Hook::ToPod => "breaker_out",
        Hook::FromOutside => "breaker_up",
        Hook::ToOutside => "breaker_up_out",
    }
}

fn agree(ran: &RunResult, expected: &Outcome) -> Result<()> {
    let action = match (expected.dropped, expected.sent_away) {
        (true, _) => DROP,
        (false, true) => REDIRECT,
        (false, false) => NEXT,
    };
    ensure!(ran.action == action, "action {:#x}, model: {action:#x}", ran.action);
    ensure!(ran.mark == expected.mark, "mark {:#x}, model: {:#x}", ran.mark, expected.mark);
    let (mut programs, mut model) = (ran.bytes.clone(), expected.frame.clone());
    ensure!(programs.len() == model.len(), "{} bytes, model: {}", programs.len(), model.len());
    for Sum { at, zero_is_none } in &expected.sums {
        let same = word(&programs, *at) % 65535 == word(&model, *at) % 65535;
        if same && !(*zero_is_none && word(&programs, *at) == 0) {
            programs[*at..at + 2].fill(0);
            model[*at..at + 2].fill(0);
        }
    }
    let differs = (0..model.len()).find(|at| programs[*at] != model[*at]);
    ensure!(differs.is_none(), "the byte at {} differs", differs.unwrap_or(0));
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for part in bytes.chunks(2) {
        let _ = write!(text, " ");
        for byte in part {
            let _ = write!(text, "{byte:02x}");
        }
    }
    text
}
