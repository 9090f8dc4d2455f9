//! The demo: injects faults and prints their effects.

mod limits;

use std::{
    io::{IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use anyhow::Result;
use breaker_tests::lab::{
    client::{Load, Plan, Record},
    service::Fault,
    stage::{Checks, Lab, Moment, Play},
};
use serde_json::json;

/// Injects every fault, once with the default checks and once with fast ones; then shows limits.
pub fn demo(json: bool, keep: bool) -> Result<()> {
    let mut teller = Printer::new(!json);
    teller.say("Setting up the lab: a node like one of k3s, in network namespaces of its own.");
    let mut lab = Lab::new(Checks::Default)?;
    lab.agent.start()?;
    teller.introduce(&lab);
    let mut plays = Vec::new();
    for checks in [Checks::Default, Checks::Fast] {
        if checks == Checks::Fast {
            teller.say("\nNow with checks every 100 ms; three failures mean Down (the agent reloads its file):");
            lab.configure(checks, "")?;
            lab.agent.wait_reload(Duration::from_secs(10))?;
        }
        for fault in Fault::ALL {
            teller.begin(fault, checks);
            let plan = Plan { per_second: 50, ..Plan::usual(lab.vip) };
            let play = lab.play(fault, checks, plan, |moment| teller.watch(&moment))?;
            teller.end(&play);
            plays.push(play);
        }
    }
    let limits = limits::play(&mut lab, &mut teller)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&json!({ "faults": plays, "limits": limits }))?);
    } else {
        teller.table(&plays);
    }
    if keep {
        let ns = lab.world.node(0).ns().name().to_owned();
        let (socket, pins) = (lab.agent.socket(), lab.agent.pinned("maps"));
        let look = format!(
            "The lab and its agent keep running. Inspect them:\n\
             \x20 {} status --socket {}\n\
             \x20 ip netns exec {} curl -s http://{}/\n\
             \x20 ip -n {ns} -d link ; nsenter --net=/run/netns/{ns} iptables-save -t nat\n\
             \x20 bpftool map dump pinned {}/SWITCHES | head\n\
             \x20 ip netns exec {} curl -s -X POST http://127.0.0.1/fakeerrormodeon\n\
             Remove them:\n  {}",
            breaker_tests::lab::binary("breaker")?.display(),
            socket.display(),
            lab.client.ns.name(),
            lab.vip,
            pins.display(),
            lab.primary.pod.ns.name(),
            lab.world.keep(),
        );
        if json {
            eprintln!("{look}");
        } else {
            println!("\n{look}");
        }
        // The lab's processes must outlive this one.
        std::mem::forget(lab);
    }
    Ok(())
}

/// Prints the demo's progress for people.
struct Printer {
    talk: bool,
    colour: bool,
    injected: Instant,
    from: Instant,
    column: usize,
}

impl Printer {
    fn new(talk: bool) -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { talk, colour, injected: Instant::now(), from: Instant::now(), column: 0 }
    }

    fn say(&self, text: &str) {
        if self.talk {
            println!("{text}");
        }
    }

    fn introduce(&self, lab: &Lab) {
        self.say(&format!(
            "  client pod {} connects to the Service VIP {} 50 times a second; 4 more clients keep their connections\n\
             \x20 dummy-deployment  {}   the primary      (P in the timeline below)\n\
             \x20 backup-deployment {}   the backup       (B; x = a request failed, . = no request has ended yet)\n\
             \x20 the timeline shows the outcomes of new connections, one character per 100 ms\n\
             \x20 breaker checks /ready; its programs are on the pods' veths (closed: all packets pass untouched)",
            lab.client.address,
            lab.vip,
            lab.primary.address(),
            lab.backup.address(),
        ));
    }

    fn begin(&mut self, fault: Fault, checks: Checks) {
        let what = match fault {
            Fault::FakeError => "the primary answers checks with 503, and requests hang",
            Fault::Kill => "the primary's process is killed",
            Fault::BlackHole => "packets to the primary are dropped",
        };
        self.say(&format!("\n{}: {what} (checks: {})", self.bold(fault.name()), checks.name()));
        self.from = Instant::now();
        self.column = 0;
    }

    fn bold(&self, text: &str) -> String {
        if self.colour { format!("\x1b[1m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn watch(&mut self, moment: &Moment<'_>) {
        match moment {
            Moment::Well(load) => self.strip(load),
            Moment::Injected(load) => {
                self.strip(load);
                self.injected = Instant::now();
                self.line("the fault is injected");
            }
            Moment::Open(load) => {
                self.strip(load);
                self.line("Closed -> Open: new connections go to the backup");
            }
            Moment::OnBackup(load) => {
                // Time for people to see it, and for requests that hang to reach their time limit.
                std::thread::sleep(Duration::from_secs(1));
                self.strip(load);
                self.line("the backup answers all clients; now the fault is removed");
            }
            Moment::Closed(load) => {
                self.strip(load);
                self.line("Open -> Closed: packets pass untouched to kube-proxy again");
            }
            Moment::Back(load) => {
                self.strip(load);
                self.newline();
            }
        }
    }

    fn line(&mut self, text: &str) {
        self.newline();
        if self.talk {
            println!("  {:>6} ms  {text}", self.injected.elapsed().as_millis());
        }
    }

    fn newline(&mut self) {
        if self.talk && self.column > 0 {
            println!();
        }
        self.column = 0;
    }

    /// Prints one character for every 100 ms since the last call: the outcome of the new connections that began then.
    fn strip(&mut self, load: &Load) {
        const SLICE: Duration = Duration::from_millis(100);
        let mut from = std::mem::replace(&mut self.from, Instant::now());
        if !self.talk {
            return;
        }
        let records = load.records();
        let new: Vec<&Record> = records.iter().filter(|r| !r.keep_alive && r.at >= from).collect();
        // A slice that is not complete yet is not printed.
        while from + SLICE <= self.from {
            let slice: Vec<_> = new.iter().filter(|r| r.at >= from && r.at < from + SLICE).collect();
            from += SLICE;
            let backup = slice.iter().filter(|r| r.outcome.pod().is_some_and(|pod| pod.contains(".1.3:"))).count();
            let (mark, colour) = if slice.iter().any(|r| !r.outcome.is_success()) {
                ('x', "31")
            } else if slice.is_empty() {
                ('.', "31")
            } else if backup * 2 > slice.len() {
                ('B', "33")
            } else {
                ('P', "32")
            };
            if self.column == 0 {
                print!("             ");
            }
            if self.colour {
                print!("\x1b[{colour}m{mark}\x1b[0m");
            } else {
                print!("{mark}");
            }
            self.column += 1;
        }
        let _ = std::io::stdout().flush();
    }

    fn end(&self, play: &Play) {
        self.say(&format!(
            "  recovered after {} ms; {} of {} requests failed; on the primary again {} ms after the fault was removed",
            play.recovered_ms, play.failed_requests, play.requests, play.back_on_primary_ms
        ));
    }

    fn table(&self, plays: &[Play]) {
        self.say(&format!(
            "\n{}",
            self.bold("FAULT      CHECKS      RECOVERED  FAILED        WRONG  BACK     WHY IT OPENED")
        ));
        for play in plays {
            let reason = play.transitions.first().map_or("", |step| step.reason.as_str());
            self.say(&format!(
                "{:<10} {:<11} {:>6} ms  {:>4} of {:<5} {:>5}  {:>4} ms  {reason}",
                play.fault.name(),
                play.checks,
                play.recovered_ms,
                play.failed_requests,
                play.requests,
                play.wrong_answers,
                play.back_on_primary_ms,
            ));
        }
        self.say("\nRequests sent to the primary before a check noticed the fault can fail: no proxy repeats them.");
    }
}
