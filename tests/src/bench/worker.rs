//! The process inside a pod: it connects, sends and answers as it is told, and times it.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use dataplane_ebpf::abi::{SOCKET_REBOUND, SOCKET_SYN, Socket};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, socket, sockopt};
use serde::Serialize;

use super::{
    bpf::{Pins, Sockets, Words},
    load, race,
    wire::{Connected, Moved, Request, Target},
};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where it is told what to do
    #[arg(long)]
    socket: PathBuf,
    /// The pins of the node's agent
    #[arg(long)]
    pins: Option<PathBuf>,
    /// Stay on the first CPU: a client, whose servers' flows stay on the second
    #[arg(long)]
    pinned: bool,
}

/// What the worker sees of the node's agent.
pub struct Kernel {
    pub health: Words,
    pub sockets: Sockets,
}

struct Worker {
    kernel: Option<Kernel>,
    flows: Vec<TcpStream>,
    sets: load::Sets,
}

pub fn main(args: &Args) -> Result<()> {
    let kernel = args.pins.as_ref().map(|root| open(root)).transpose()?;
    let mut worker = Worker { kernel, flows: Vec::new(), sets: load::Sets::default() };
    if let (Ok([cpu, _]), true) = (race::two_cpus(), args.pinned) {
        race::pin(cpu)?;
    }
    let (stream, _) = UnixListener::bind(&args.socket)?.accept()?;
    let mut answers = stream.try_clone()?;
    for line in BufReader::new(stream).lines() {
        let answer = serde_json::from_str(&line?).map_err(Into::into).and_then(|request| worker.answer(request));
        let answer = answer.map_err(|error| format!("{error:#}"));
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        answers.write_all(&line)?;
    }
    Ok(())
}

/// The init of a container that takes its SIGTERM and stays.
pub fn pause() -> Result<()> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    extern "C" fn ignore(_: libc::c_int) {}
    let action = SigAction::new(SigHandler::Handler(ignore), SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGTERM, &action) }?;
    loop {
        nix::unistd::pause();
    }
}

fn open(root: &Path) -> Result<Kernel> {
    let pins = Pins::new(root);
    Ok(Kernel { health: pins.health()?, sockets: pins.sockets()? })
}

impl Worker {
    fn answer(&mut self, request: Request) -> Result<serde_json::Value> {
        fn json<T: Serialize>(value: T) -> Result<serde_json::Value> {
            Ok(serde_json::to_value(value)?)
        }
        match request {
            Request::Serve { ports } => json(ports.into_iter().try_for_each(serve)?),
            Request::Connects { targets, rounds } => json(self.connects(&targets, rounds)?),
            Request::Open { target, rebound } => json(self.open(&target, rebound)?),
            Request::Bulk { flow, ms } => json(self.flow(flow).and_then(|flow| bulk(flow, Duration::from_millis(ms)))?),
            Request::Ping { flow, count } => json(self.flow(flow).and_then(|flow| ping(flow, count))?),
            Request::Bounce { to, count, fresh } => json(bounce(to, count, fresh)?),
            Request::FlipRace { to, backend, flips } => {
                json(race::run(self.kernel.as_ref().context("no pins were given")?, to, backend, flips)?)
            }
            Request::Load(load) => self.sets.answer(&load),
            Request::Dials { target, count } => json(self.dials(&target, count)?),
        }
    }

    fn prepare(&self, target: &Target) -> Result<()> {
        for (backend, word) in &target.words {
            let kernel = self.kernel.as_ref().context("no pins were given: no health words to set")?;
            kernel.health.word(*backend).store(*word, Ordering::SeqCst);
        }
        Ok(())
    }

    fn state(&self, socket: &OwnedFd) -> Option<Socket> {
        self.kernel.as_ref()?.sockets.of(socket.as_fd())
    }

    fn connects(&self, targets: &[Target], rounds: u32) -> Result<Vec<Connected>> {
        let mut done = vec![Connected::default(); targets.len()];
        for _ in 0..rounds {
            for (target, done) in targets.iter().zip(&mut done) {
                self.prepare(target)?;
                let (socket, ns, result) = connect(target.to)?;
                let flags = self.state(&socket).map_or(0, |state| state.flags);
                done.watched += u32::from(flags & SOCKET_SYN != 0);
                match result {
                    Ok(()) if flags & SOCKET_REBOUND != 0 => done.rebound_ns.push(ns),
                    Ok(()) => done.direct_ns.push(ns),
                    Err(_) => done.failed += 1,
                }
                // Closed by RST: no TIME-WAIT to run out of ports by.
                setsockopt(&socket, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
            }
        }
        Ok(done)
    }

    fn open(&mut self, target: &Target, rebound: bool) -> Result<usize> {
        const TRIES: u32 = 200;
        for _ in 0..TRIES {
            self.prepare(target)?;
            let (socket, _, result) = connect(target.to)?;
            result.with_context(|| format!("connect {}", target.to))?;
            let moved = self.state(&socket).is_some_and(|state| state.flags & SOCKET_REBOUND != 0);
            if moved == rebound {
                let flow = TcpStream::from(socket);
                flow.set_nodelay(true)?;
                flow.set_read_timeout(Some(Duration::from_secs(20)))?;
                self.flows.push(flow);
                return Ok(self.flows.len() - 1);
            }
        }
        bail!("none of {TRIES} connects to {} was {}", target.to, if rebound { "rebound" } else { "direct" })
    }

    fn dials(&self, target: &Target, count: u32) -> Result<Vec<u64>> {
        (0..count)
            .map(|_| {
                self.prepare(target)?;
                load::dial(target.to)
            })
            .collect()
    }

    fn flow(&mut self, flow: usize) -> Result<&mut TcpStream> {
        self.flows.get_mut(flow).with_context(|| format!("no connection {flow} is open"))
    }
}

pub fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC exists");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

pub fn tcp_socket(to: SocketAddr) -> Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    Ok(socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
}

/// A socket, how long its `connect()` took, and what it said.
fn connect(to: SocketAddr) -> Result<(OwnedFd, u64, nix::Result<()>)> {
    let socket = tcp_socket(to)?;
    let address = SockaddrStorage::from(to);
    let start = now_ns();
    let result = nix::sys::socket::connect(socket.as_raw_fd(), &address);
    Ok((socket, now_ns() - start, result))
}

fn bounce(to: SocketAddr, count: u32, fresh: bool) -> Result<()> {
    let address = SockaddrStorage::from(to);
    let mut socket = tcp_socket(to)?;
    for _ in 0..count {
        if fresh {
            socket = tcp_socket(to)?;
        }
        if nix::sys::socket::connect(socket.as_raw_fd(), &address).is_ok() {
            bail!("a connect to {to} succeeded: its backends were to have no route");
        }
    }
    Ok(())
}

const BLOCK: usize = 1 << 20;
const OP_PING: u8 = b'p';
/// A block follows.
const OP_BLOCK: u8 = b'b';
/// Say when all blocks are here.
const OP_FLUSH: u8 = b'f';

fn serve(port: u16) -> Result<()> {
    let listener =
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).with_context(|| format!("listen on port {port}"))?;
    std::thread::spawn(move || {
        // Of a connection that says nothing only the last few are kept.
        let mut kept = VecDeque::new();
        for flow in listener.incoming().flatten() {
            if port == super::rig::FLOW_PORT {
                std::thread::spawn(move || answer(flow));
                continue;
            }
            kept.push_back(flow);
            if kept.len() > 64 {
                kept.pop_front();
            }
        }
    });
    Ok(())
}

fn answer(mut flow: TcpStream) -> Result<()> {
    // Where the scheduler happens to put it would outweigh everything else.
    if let Ok([_, cpu]) = race::two_cpus() {
        race::pin(cpu)?;
    }
    flow.set_nodelay(true)?;
    let mut block = vec![0; BLOCK];
    let mut op = [0];
    while flow.read(&mut op)? == 1 {
        match op[0] {
            OP_BLOCK => flow.read_exact(&mut block)?,
            _ => flow.write_all(&op)?,
        }
    }
    Ok(())
}

fn bulk(flow: &mut TcpStream, length: Duration) -> Result<Moved> {
    let mut block = vec![0u8; BLOCK + 1];
    block[0] = OP_BLOCK;
    let start = Instant::now();
    let mut bytes = 0;
    while start.elapsed() < length {
        flow.write_all(&block)?;
        bytes += block.len() as u64;
    }
    flow.write_all(&[OP_FLUSH])?;
    flow.read_exact(&mut [0])?;
    Ok(Moved { bytes, ns: start.elapsed().as_nanos() as u64 })
}

fn ping(flow: &mut TcpStream, count: u32) -> Result<Vec<u64>> {
    (0..count)
        .map(|_| {
            let start = now_ns();
            flow.write_all(&[OP_PING])?;
            flow.read_exact(&mut [0])?;
            Ok(now_ns() - start)
        })
        .collect()
}
