//! Connections as fast as they go: connect, say a line, hear the answer, be closed, again.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use serde::{Deserialize, Serialize};

use super::reason;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Whom to connect: a server's --echo-tcp address, or a service in front of it
    #[arg(long)]
    pub target: SocketAddr,
    /// Stop after so many; SIGTERM stops it earlier
    #[arg(long, default_value_t = 100_000)]
    pub connections: u64,
    #[arg(long, default_value_t = 8)]
    pub threads: usize,
    /// Milliseconds that a connect or an answer may take
    #[arg(long, default_value_t = 15_000)]
    pub timeout: u64,
    /// File for the result, as JSON
    #[arg(long)]
    pub result: PathBuf,
    #[arg(long, hide = true)]
    pub ready_file: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    pub connections: u64,
    pub failed: u64,
    pub reasons: BTreeMap<String, u64>,
    /// Answers by server.
    pub servers: BTreeMap<String, u64>,
    pub connect_p50_us: u64,
    pub connect_p99_us: u64,
    pub connect_max_us: u64,
    pub seconds: f64,
}

struct Tally {
    outcome: Outcome,
    connects: Histogram<u64>,
}

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn stop(_: libc::c_int) {
    STOP.store(true, Ordering::Relaxed);
}

pub fn main(options: &Options) -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(stop), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler only stores to an atomic.
    unsafe { sigaction(Signal::SIGTERM, &action) }?;
    super::say_ready(options.ready_file.as_deref())?;
    let started = AtomicU64::new(0);
    let start = Instant::now();
    let tallies = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..options.threads).map(|_| scope.spawn(|| connect_until_done(options, &started))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a thread of the storm panicked")).collect::<Vec<_>>()
    });
    let mut all = Tally::new();
    for tally in tallies {
        all.add(tally);
    }
    all.outcome.seconds = start.elapsed().as_secs_f64();
    all.outcome.connect_p50_us = all.connects.value_at_quantile(0.5);
    all.outcome.connect_p99_us = all.connects.value_at_quantile(0.99);
    all.outcome.connect_max_us = all.connects.max();
    std::fs::write(&options.result, serde_json::to_string_pretty(&all.outcome)?)
        .with_context(|| format!("write {}", options.result.display()))
}

impl Tally {
    fn new() -> Self {
        Self { outcome: Outcome::default(), connects: Histogram::new(3).expect("3 digits are allowed") }
    }

    fn add(&mut self, other: Self) {
        self.outcome.connections += other.outcome.connections;
        self.outcome.failed += other.outcome.failed;
        for (reason, count) in other.outcome.reasons {
            *self.outcome.reasons.entry(reason).or_default() += count;
        }
        for (server, count) in other.outcome.servers {
            *self.outcome.servers.entry(server).or_default() += count;
        }
        self.connects += other.connects;
    }
}

fn connect_until_done(options: &Options, started: &AtomicU64) -> Tally {
    let mut tally = Tally::new();
    let timeout = Duration::from_millis(options.timeout);
    loop {
        let number = started.fetch_add(1, Ordering::Relaxed);
        if number >= options.connections || STOP.load(Ordering::Relaxed) {
            return tally;
        }
        tally.outcome.connections += 1;
        match converse(options.target, number, timeout, &mut tally.connects) {
            Ok(server) => *tally.outcome.servers.entry(server).or_default() += 1,
            Err(why) => {
                tally.outcome.failed += 1;
                *tally.outcome.reasons.entry(why).or_default() += 1;
            }
        }
    }
}

/// Returns who answered.
fn converse(
    target: SocketAddr,
    number: u64,
    timeout: Duration,
    connects: &mut Histogram<u64>,
) -> Result<String, String> {
    let start = Instant::now();
    let mut stream =
        TcpStream::connect_timeout(&target, timeout).map_err(|error| format!("connect: {}", reason(&error)))?;
    connects.saturating_record(start.elapsed().as_micros() as u64);
    let mut talk = || -> io::Result<String> {
        stream.set_read_timeout(Some(timeout))?;
        stream.write_all(format!("bye {number}\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = talk().map_err(|error| format!("talk: {}", reason(&error)))?;
    match answer.split_once(' ') {
        Some((server, rest)) if rest.trim_start_matches("stopping ").trim_end() == format!("bye {number}") => {
            Ok(server.to_owned())
        }
        _ => Err(format!("wrong answer {:?}", answer.trim_end_matches(char::is_numeric))),
    }
}
