//! Many connections at once: the clients and the server of the group `tunnel`, as threads and tasks of one worker.

use std::{
    cell::RefCell,
    io::{Read, Write},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;

use super::{wire::Moved, worker::now_ns};

/// What a worker is asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Load {
    /// Answer on this port, on every address: any number of connections on as many threads as there are CPUs.
    Echo { port: u16 },
    /// New connections for so long, one after the other by each of so many clients: connect, a byte there and back, close.
    Dial { to: SocketAddr, clients: usize, ms: u64 },
    /// Open so many connections, have a byte come back on each, and keep them as a set. Answers the set's number.
    Hold { to: SocketAddr, connections: usize },
    /// On every connection of a set at once, for so long: a request, its answer, the next.
    Exchange { set: usize, size: Size, ms: u64 },
    /// On every connection of a set at once, for so long: all that it takes.
    Send { set: usize, ms: u64 },
    /// Close a set.
    Release { set: usize },
}

/// Of a request and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Size {
    /// One byte each.
    Byte,
    /// What a small request over HTTP and its answer take: 128 and 256 bytes.
    Http,
}

/// Things that were done one after the other by some clients.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Timed {
    /// Each of them.
    pub ns: Vec<u64>,
    /// All of them.
    pub elapsed_ns: u64,
}

impl Timed {
    pub fn per_second(&self) -> f64 {
        self.ns.len() as f64 * 1e9 / self.elapsed_ns as f64
    }
}

const BLOCK: usize = 1 << 20;
const REQUEST: usize = 128;
const ANSWER: usize = 256;
/// Comes back.
const OP_BYTE: u8 = b'p';
/// The rest of a request follows; an answer comes back.
const OP_HTTP: u8 = b'r';
/// A block follows.
const OP_BLOCK: u8 = b'b';
/// Comes back when all blocks are there.
const OP_FLUSH: u8 = b'f';
/// Nothing takes longer, unless something is broken.
const PATIENCE: Duration = Duration::from_secs(20);

/// The sets of connections that a worker keeps.
#[derive(Default)]
pub struct Sets(Vec<Vec<TcpStream>>);

impl Sets {
    pub fn answer(&mut self, load: &Load) -> Result<serde_json::Value> {
        fn json<T: Serialize>(value: T) -> Result<serde_json::Value> {
            Ok(serde_json::to_value(value)?)
        }
        match *load {
            Load::Echo { port } => json(echo(port)?),
            Load::Dial { to, clients, ms } => json(dial_for(to, clients, Duration::from_millis(ms))?),
            Load::Hold { to, connections } => {
                let set = (0..connections).map(|_| open(to)).collect::<Result<_>>()?;
                self.0.push(set);
                json(self.0.len() - 1)
            }
            Load::Exchange { set, size, ms } => json(exchange(self.set(set)?, size, Duration::from_millis(ms))?),
            Load::Send { set, ms } => json(send(self.set(set)?, Duration::from_millis(ms))?),
            Load::Release { set } => {
                self.set(set)?.clear();
                json(())
            }
        }
    }

    fn set(&mut self, set: usize) -> Result<&mut Vec<TcpStream>> {
        self.0.get_mut(set).with_context(|| format!("no set {set} of connections"))
    }
}

fn open(to: SocketAddr) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(to).with_context(|| format!("connect {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[OP_BYTE])?;
    stream.read_exact(&mut [0]).with_context(|| format!("the first byte from {to}"))?;
    Ok(stream)
}

/// How long it took until the first byte came back.
pub fn dial(to: SocketAddr) -> Result<u64> {
    let start = now_ns();
    let stream = open(to)?;
    let ns = now_ns() - start;
    drop(stream);
    Ok(ns)
}

fn dial_for(to: SocketAddr, clients: usize, length: Duration) -> Result<Timed> {
    at_once(
        (0..clients).map(|_| {
            move |until: Instant| {
                let mut ns = Vec::new();
                while Instant::now() < until {
                    ns.push(dial(to)?);
                }
                Ok(ns)
            }
        }),
        length,
    )
}

fn exchange(set: &mut [TcpStream], size: Size, length: Duration) -> Result<Timed> {
    at_once(
        set.iter_mut().map(|stream| {
            move |until: Instant| {
                let (request, answer): (&[u8], &mut [u8]) = match size {
                    Size::Byte => (&[OP_BYTE], &mut [0]),
                    Size::Http => (&[OP_HTTP; REQUEST], &mut [0; ANSWER]),
                };
                let mut ns = Vec::new();
                while Instant::now() < until {
                    let start = now_ns();
                    stream.write_all(request)?;
                    stream.read_exact(answer)?;
                    ns.push(now_ns() - start);
                }
                Ok(ns)
            }
        }),
        length,
    )
}

/// Each on a thread of its own, until the time is over.
fn at_once<F>(clients: impl Iterator<Item = F>, length: Duration) -> Result<Timed>
where
    F: FnOnce(Instant) -> Result<Vec<u64>> + Send,
{
    std::thread::scope(|scope| {
        let start = Instant::now();
        let clients: Vec<_> = clients.map(|client| scope.spawn(move || client(start + length))).collect();
        let mut timed = Timed::default();
        for client in clients {
            timed.ns.extend(client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        timed.elapsed_ns = start.elapsed().as_nanos() as u64;
        Ok(timed)
    })
}

fn send(set: &mut [TcpStream], length: Duration) -> Result<Moved> {
    std::thread::scope(|scope| {
        let start = Instant::now();
        let senders: Vec<_> = set
            .iter_mut()
            .map(|stream| {
                scope.spawn(move || -> Result<u64> {
                    let mut block = vec![0u8; BLOCK + 1];
                    block[0] = OP_BLOCK;
                    let mut bytes = 0;
                    while start.elapsed() < length {
                        stream.write_all(&block)?;
                        bytes += block.len() as u64;
                    }
                    stream.write_all(&[OP_FLUSH])?;
                    stream.read_exact(&mut [0])?;
                    Ok(bytes)
                })
            })
            .collect();
        let mut bytes = 0;
        for sender in senders {
            bytes += sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(Moved { bytes, ns: start.elapsed().as_nanos() as u64 })
    })
}

/// As servers do it: an event loop per CPU.
fn echo(port: u16) -> Result<()> {
    let listener =
        TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).with_context(|| format!("listen on port {port}"))?;
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_io().build()?;
    let accept = async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::spawn(answer(stream));
        }
    };
    std::thread::spawn(move || {
        let ended: Result<()> = runtime.block_on(accept);
        eprintln!("the server on port {port} ended: {ended:?}");
    });
    Ok(())
}

thread_local! {
    /// A connection that waits holds no buffer.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; BLOCK]);
}

async fn answer(mut stream: tokio::net::TcpStream) -> Result<()> {
    let mut answers = Answers::default();
    let mut out = Vec::new();
    loop {
        stream.readable().await?;
        let read = BUFFER.with_borrow_mut(|buffer| -> std::io::Result<usize> {
            let n = stream.try_read(buffer)?;
            answers.read(&buffer[..n], &mut out);
            Ok(n)
        });
        match read {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            Err(error) => bail!(error),
        }
        if !out.is_empty() {
            stream.write_all(&out).await?;
            out.clear();
        }
    }
}

/// What a connection's bytes are answered by.
#[derive(Default)]
struct Answers {
    /// Bytes that belong to what was begun …
    left: usize,
    /// … and whether it is a request.
    request: bool,
}

impl Answers {
    fn read(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) {
        while let Some((op, rest)) = bytes.split_first() {
            if self.left > 0 {
                let taken = self.left.min(bytes.len());
                self.left -= taken;
                bytes = &bytes[taken..];
                if self.left == 0 && std::mem::take(&mut self.request) {
                    out.extend([0; ANSWER]);
                }
                continue;
            }
            bytes = rest;
            match *op {
                OP_BLOCK => self.left = BLOCK,
                OP_HTTP => (self.left, self.request) = (REQUEST - 1, true),
                op => out.push(op),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_do_not_depend_on_how_the_bytes_are_cut() {
        let mut sent = vec![OP_BYTE, OP_BLOCK];
        sent.extend(std::iter::repeat_n(OP_HTTP, BLOCK + 2 * REQUEST));
        sent.push(OP_FLUSH);
        let wanted = [&[OP_BYTE][..], &[0; 2 * ANSWER], &[OP_FLUSH]].concat();
        for cut in [1, 7, REQUEST, BLOCK, 2 * BLOCK] {
            let (mut answers, mut out) = (Answers::default(), Vec::new());
            sent.chunks(cut).for_each(|bytes| answers.read(bytes, &mut out));
            assert!(out == wanted, "cut by {cut}");
        }
    }
}
