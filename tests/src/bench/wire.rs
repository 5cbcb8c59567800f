//! What the bench asks of its workers, the processes inside the pods: one JSON line each way.

use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{bpf::Pins, load::Load};
use crate::lab::{Process, pod::Place};

/// A health word to be put in force.
pub type Word = (u32, u64);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// Accept on these ports, on every address.
    Serve { ports: Vec<u16> },
    /// Connect once to each target in turn, `rounds` times; before each connect its words are set.
    Connects { targets: Vec<Target>, rounds: u32 },
    /// Connect and keep the connection under its number; a rebound one if `rebound`.
    Open { target: Target, rebound: bool },
    /// Send through a kept connection for so long.
    Bulk { flow: usize, ms: u64 },
    /// Send a byte, get a byte.
    Ping { flow: usize, count: u32 },
    /// Connect to a service whose backends have no route: the hook and little else. With one socket,
    /// or a new one for each.
    Bounce { to: SocketAddr, count: u32, fresh: bool },
    /// Flip `backend`'s health there and back while another thread connects to `to` without pause.
    FlipRace { to: SocketAddr, backend: u32, flips: u32 },
    /// Many connections at once.
    Load(Load),
    /// New connections, one after the other, each with a byte there and back; before each the target's words are set.
    Dials { target: Target, count: u32 },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Target {
    pub to: SocketAddr,
    pub words: Vec<Word>,
}

impl Target {
    pub fn new(to: impl Into<SocketAddr>) -> Self {
        Self { to: to.into(), words: Vec::new() }
    }

    pub fn after_setting(mut self, words: &[Word]) -> Self {
        self.words.extend_from_slice(words);
        self
    }
}

/// Connects to one target.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Connected {
    /// `connect()` that succeeded where it was first sent, ns each.
    pub direct_ns: Vec<u64>,
    /// `connect()` that succeeded on another backend.
    pub rebound_ns: Vec<u64>,
    pub failed: u32,
    /// Connects whose SYN the program on the pod's interface saw.
    pub watched: u32,
}

impl Connected {
    pub fn count(&self) -> usize {
        self.direct_ns.len() + self.rebound_ns.len() + self.failed as usize
    }
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Moved {
    pub bytes: u64,
    pub ns: u64,
}

impl Moved {
    pub fn gbit_per_s(self) -> f64 {
        self.bytes as f64 * 8.0 / self.ns as f64
    }
}

/// One flip per element, ns.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Race {
    /// From before the flip to the entry of the last connect that still chose the backend; 0 when none did.
    pub stale_ns: Vec<u64>,
    /// From the flip to the return of the first later connect, which chose another.
    pub avoided_ns: Vec<u64>,
    /// Connects during the race.
    pub connects: u64,
}

/// A process of the bench inside a pod.
pub struct Worker {
    lines: BufReader<UnixStream>,
    process: Process,
}

impl Worker {
    pub fn start(place: &Place, pins: Option<&Pins>, pinned: bool) -> Result<Self> {
        let own = std::env::current_exe()?;
        let socket = place.file("bench.sock");
        let mut args = vec![own.to_string_lossy().into_owned(), "worker".into()];
        args.extend(["--socket".into(), socket.to_string_lossy().into_owned()]);
        if let Some(pins) = pins {
            args.extend(["--pins".into(), pins.root().to_string_lossy().into_owned()]);
        }
        if pinned {
            args.push("--pinned".into());
        }
        let process = place.spawn(&args)?;
        process.wait_for_file(&socket)?;
        let stream = connect(&socket)?;
        Ok(Self { lines: BufReader::new(stream), process })
    }

    pub fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        let gone = |worker: &Process| format!("ask {request:?}; the worker's last words:\n{}", worker.log());
        self.lines.get_mut().write_all(&line).with_context(|| gone(&self.process))?;
        let mut answer = String::new();
        self.lines.read_line(&mut answer).with_context(|| format!("the answer to {request:?}"))?;
        let answer: Result<T, String> = serde_json::from_str(&answer)
            .with_context(|| format!("{request:?} answered by {answer:?}:\n{}", self.process.log()))?;
        match answer {
            Ok(answer) => Ok(answer),
            Err(error) => bail!("{request:?}: {error}"),
        }
    }

    pub fn serve(&mut self, ports: &[u16]) -> Result<()> {
        self.ask(&Request::Serve { ports: ports.to_vec() })
    }

    pub fn connects(&mut self, targets: Vec<Target>, rounds: u32) -> Result<Vec<Connected>> {
        self.ask(&Request::Connects { targets, rounds })
    }

    /// All must succeed.
    pub fn connect_all(&mut self, target: Target, rounds: u32) -> Result<Connected> {
        let to = target.to;
        let connected = self.connects(vec![target], rounds)?.remove(0);
        if connected.failed > 0 {
            bail!("{} of {rounds} connects to {to} failed", connected.failed);
        }
        Ok(connected)
    }

    pub fn open(&mut self, target: Target, rebound: bool) -> Result<usize> {
        self.ask(&Request::Open { target, rebound })
    }

    pub fn bulk(&mut self, flow: usize, ms: u64) -> Result<Moved> {
        self.ask(&Request::Bulk { flow, ms })
    }

    pub fn load<T: DeserializeOwned>(&mut self, load: Load) -> Result<T> {
        self.ask(&Request::Load(load))
    }

    /// ns each.
    pub fn dials(&mut self, target: Target, count: u32) -> Result<Vec<u64>> {
        self.ask(&Request::Dials { target, count })
    }

    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    pub fn ping(&mut self, flow: usize, count: u32) -> Result<Vec<u64>> {
        self.ask(&Request::Ping { flow, count })
    }
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(5);
    // The socket's file is there a moment before somebody listens.
    let stream = loop {
        match UnixStream::connect(socket) {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            connected => break connected.with_context(|| format!("connect {}", socket.display()))?,
        }
    };
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    Ok(stream)
}
