//! How soon what is known about a backend counts: a flip against connects, a signal against the map.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use dataplane_ebpf::health::{Health, State};
use dataplane_user::model::Object;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    Plan, feed,
    figure::{Figure, Goal},
    race::{pin, two_cpus},
    rig::{CONNECT_PORT, Rig, SERVICE_PORT, backend_of, nowhere, vip},
    sample::quantile,
    wire::{Race, Request},
    worker::now_ns,
};
use crate::lab::{Pod, Process};

const RACED: u16 = 30;
const SIGNALLED: u16 = 31;

pub fn measure(rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    let mut figures = flips(rig, plan)?;
    figures.extend(signals(rig, plan)?);
    Ok(figures)
}

fn flips(rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    let words = rig.service(RACED, &[(nowhere(1), CONNECT_PORT), (nowhere(2), CONNECT_PORT)])?;
    let request = Request::FlipRace { to: vip(RACED), backend: words[0].0, flips: plan.flips };
    let race: Race = rig.client.ask(&request)?;
    if race.stale_ns.len() < plan.flips as usize / 10 {
        bail!("only {} of {} flips were seen by a connect: the machine is too busy", race.stale_ns.len(), plan.flips);
    }
    let us = |samples: &[u64], q| quantile(samples, q) / 1000.0;
    let what = format!("{} flips against {} connects", race.stale_ns.len(), race.connects);
    Ok(vec![
        Figure::new("flip_to_last_stale_p99", us(&race.stale_ns, 0.99), "us")
            .goal(Goal::ValueAtMost(5.0))
            .note(format!("flip to the hook entry of the last connect that still chose it; {what}")),
        Figure::new("flip_to_last_stale_worst", us(&race.stale_ns, 1.0), "us")
            .goal(Goal::ValueAtMost(5.0))
            .note("the worst of them"),
        Figure::new("flip_to_next_connect_p50", us(&race.avoided_ns, 0.5), "us")
            .goal(Goal::ValueAtMost(5.0))
            .note("flip to the return of the next connect, which avoids it (the whole system call)"),
        Figure::new("flip_to_next_connect_p99", us(&race.avoided_ns, 0.99), "us").note("the same, p99"),
    ])
}

/// A real SIGTERM to the init of a container, and the moment at which another CPU sees the word changed.
fn signals(rig: &mut Rig, plan: &Plan) -> Result<Vec<Figure>> {
    let name = format!("bench/{SIGNALLED}");
    let backend = backend_of(rig.server_pod(), &name, CONNECT_PORT);
    rig.feed.send(&feed::upsert(Object::Service(feed::service(&name, vip(SIGNALLED).ip(), SERVICE_PORT))))?;
    rig.feed.send(&feed::upsert(Object::Backend(backend)))?;
    let id = rig.backend(rig.server_address, CONNECT_PORT)?;
    let [target, bystander] = [rig.server_pod(), rig.bare_server_pod()].map(paused);
    let (target, bystander) = (target?, bystander?);
    let (pid, bystander) = (Pid::from_raw(target.pid()), Pid::from_raw(bystander.pid()));

    let health = rig.pins.health()?;
    let word = health.word(id);
    let [cpu_kill, cpu_watch] = two_cpus()?;
    let ready = word.load(Ordering::SeqCst);
    if Health(ready).state() != State::Ready {
        bail!("the backend of the signalled pod is not ready: {:?}", Health(ready).state());
    }
    let (seen_ns, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let [mut sent_to_seen, mut call] = [const { Vec::new() }; 2];
    let (mut before_return, mut unseen) = (0, 0);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            pin(cpu_watch)?;
            while !stop.load(Ordering::Relaxed) {
                if word.load(Ordering::SeqCst) != ready && seen_ns.load(Ordering::SeqCst) == 0 {
                    seen_ns.store(now_ns(), Ordering::SeqCst);
                }
                std::hint::spin_loop();
            }
            Ok::<_, anyhow::Error>(())
        });
        let killer = scope.spawn(|| {
            pin(cpu_kill)?;
            for _ in 0..plan.signals {
                // The target must have taken the signal before, and the agent the event of it.
                std::thread::sleep(Duration::from_micros(500));
                word.store(ready, Ordering::SeqCst);
                seen_ns.store(0, Ordering::SeqCst);
                let before = now_ns();
                kill(pid, Signal::SIGTERM)?;
                let changed = word.load(Ordering::SeqCst) != ready;
                let after = now_ns();
                let deadline = Instant::now() + Duration::from_millis(50);
                while seen_ns.load(Ordering::SeqCst) == 0 && Instant::now() < deadline {
                    std::hint::spin_loop();
                }
                match seen_ns.load(Ordering::SeqCst) {
                    // The target had not yet run to take the signal before: to the kernel this was no new one.
                    0 => unseen += 1,
                    // The watcher may have waited for its CPU; at the latest it was when kill() had returned.
                    seen if changed => sent_to_seen.push(seen.min(after).saturating_sub(before)),
                    seen => sent_to_seen.push(seen.saturating_sub(before)),
                }
                before_return += u64::from(changed);
                std::thread::sleep(Duration::from_micros(500));
                let before = now_ns();
                kill(bystander, Signal::SIGTERM)?;
                call.push(now_ns() - before);
            }
            Ok::<_, anyhow::Error>(())
        });
        let killed = killer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        stop.store(true, Ordering::Relaxed);
        watcher.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        killed
    })?;
    word.store(ready, Ordering::SeqCst);
    if unseen * 2 > plan.signals {
        bail!(
            "{unseen} of {} SIGTERMs to the pod's init changed no health word: is the signal program attached?",
            plan.signals
        );
    }
    let us = |samples: &[u64], q| quantile(samples, q) / 1000.0;
    let what = format!("{before_return} of {} before kill() had returned", call.len());
    Ok(vec![
        Figure::new("sigterm_to_map_p50", us(&sent_to_seen, 0.5), "us")
            .against(us(&call, 0.5))
            .note(format!("kill() called to word seen changed on another CPU; baseline: kill() itself, of a process of no pod of the node; {what}")),
        Figure::new("sigterm_to_map_p99", us(&sent_to_seen, 0.99), "us").against(us(&call, 0.99)).note("the same, p99"),
    ])
}

/// The init of a container that handles SIGTERM by doing nothing.
fn paused(pod: &Pod) -> Result<Process> {
    let own = std::env::current_exe()?;
    let process = pod.spawn(&[own.to_string_lossy().as_ref(), "pause"])?;
    wait_for_handler(Pid::from_raw(process.pid()))?;
    Ok(process)
}

/// Until the process handles SIGTERM: an init without a handler does not even get it.
fn wait_for_handler(pid: Pid) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("read the target's status")?;
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).map(str::trim).unwrap_or("0");
        let arguments = std::fs::read(format!("/proc/{pid}/cmdline"))?;
        // Between fork and exec it still has this process's handler, and its way of ending.
        let executed = arguments.ends_with(b"\0pause\0");
        if executed && u64::from_str_radix(caught, 16)? & (1 << (Signal::SIGTERM as u64 - 1)) != 0 {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("process {pid} does not handle SIGTERM");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
