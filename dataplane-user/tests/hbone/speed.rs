//! How fast the tunnel is, as ratios to direct connections in the same run. Not a test: it prints.
//!
//! `cargo test --release -p dataplane-user --test hbone -- --ignored --nocapture speed`

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    rc::Rc,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use dataplane_user::hbone::{Timeouts, local, memory, relay::Counts};
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeVal,
};
use tokio::task::LocalSet;

use crate::support::{Ca, Client, DOMAIN, Server, id};

/// Per figure; long enough for a stable rate, short enough to run them all twice.
fn length() -> Duration {
    Duration::from_millis(std::env::var("SPEED_MS").ok().and_then(|ms| ms.parse().ok()).unwrap_or(2000))
}

#[test]
#[ignore = "a benchmark, for an idle machine and a release build"]
fn speed() {
    memory::keep_what_is_freed();
    let (sink, echo) = (listen(swallow), listen(send_back));
    let tunnel = Tunnel::start();
    let (tunnelled_sink, tunnelled_echo) = (tunnel.to(sink), tunnel.to(echo));
    let copied_sink = copier(sink);

    println!("{:<46}{:>11}{:>11}{:>8}", "", "direct", "tunnel", "ratio");
    for streams in [1, 4] {
        let direct = throughput(sink, streams);
        let through = throughput(tunnelled_sink, streams);
        let copied = throughput(copied_sink, streams);
        row(&format!("throughput, {streams} streams, Gb/s"), direct.0, through.0);
        row(&format!("throughput, {streams} streams, CPU ms per GB"), direct.1, through.1);
        row(&format!("same-node copy, {streams} streams, Gb/s"), direct.0, copied.0);
        row(&format!("same-node copy, {streams} streams, CPU ms per GB"), direct.1, copied.1);
    }
    let (direct, through) = (chat(echo), chat(tunnelled_echo));
    row("1-byte request/response p50, us", direct.0, through.0);
    row("1-byte request/response p99, us", direct.1, through.1);
    row("1-byte request/response, CPU us", direct.2, through.2);
    for clients in [1, 8] {
        let (direct, through) = (connect(echo, clients), connect(tunnelled_echo, clients));
        row(&format!("new connection + 1 byte, {clients} clients, per s"), direct.0, through.0);
        row(&format!("new connection + 1 byte, {clients} clients, p50 us"), direct.1, through.1);
        row(&format!("new connection + 1 byte, {clients} clients, p99 us"), direct.2, through.2);
        row(&format!("new connection + 1 byte, {clients} clients, CPU us"), direct.3, through.3);
    }
}

fn row(what: &str, direct: f64, through: f64) {
    println!("{what:<46}{direct:>11.2}{through:>11.2}{:>8.2}", through / direct);
}

/// Of the whole process, clients and applications too: on a busy machine it says more than the clock.
fn cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let seconds = |t: TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

/// Two workers as two nodes have them, in threads of their own.
struct Tunnel(tokio::sync::mpsc::UnboundedSender<(SocketAddr, mpsc::Sender<SocketAddr>)>);

impl Tunnel {
    fn start() -> Self {
        let ca = Arc::new(Ca::new(DOMAIN));
        let (ready, address) = mpsc::channel();
        let server_ca = ca.clone();
        named("tunnel-server", move || {
            on_worker(async move {
                let server = Server::start(&server_ca.context(&id("web")), Timeouts::default()).await;
                ready.send(server.address).unwrap();
                std::future::pending::<()>().await;
            });
        });
        let server = address.recv().unwrap();
        let (ask, mut asked) = tokio::sync::mpsc::unbounded_channel::<(SocketAddr, mpsc::Sender<SocketAddr>)>();
        named("tunnel-client", move || {
            on_worker(async move {
                let context = ca.context(&id("shopper"));
                let client = Rc::new(Client::new(context, &[id("web")], Timeouts::default()));
                while let Some((to, answer)) = asked.recv().await {
                    answer.send(client.listen(server, to).await).unwrap();
                }
            });
        });
        Self(ask)
    }

    fn to(&self, address: SocketAddr) -> SocketAddr {
        let (answer, entry) = mpsc::channel();
        self.0.send((address, answer)).unwrap();
        entry.recv().unwrap()
    }
}

/// A worker that copies between two plain connections.
fn copier(to: SocketAddr) -> SocketAddr {
    let (ready, address) = mpsc::channel();
    named("copier", move || {
        on_worker(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            ready.send(listener.local_addr().unwrap()).unwrap();
            while let Ok((near, _)) = listener.accept().await {
                tokio::task::spawn_local(async move {
                    let far = tokio::net::TcpStream::connect(to).await.unwrap();
                    let _ = local::relay(near, far, &Counts::default()).await;
                });
            }
        });
    });
    address.recv().unwrap()
}

/// So that a profile tells them apart.
fn named(name: &str, work: impl FnOnce() + Send + 'static) {
    thread::Builder::new().name(name.to_owned()).spawn(work).unwrap();
}

fn on_worker<F: Future>(work: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, work)
}

fn listen(serve: fn(TcpStream)) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for tcp in listener.incoming() {
            let tcp = tcp.unwrap();
            tcp.set_nodelay(true).unwrap();
            thread::spawn(move || serve(tcp));
        }
    });
    address
}

fn swallow(mut tcp: TcpStream) {
    let mut buffer = vec![0; 128 << 10];
    while tcp.read(&mut buffer).is_ok_and(|n| n > 0) {}
}

fn send_back(mut tcp: TcpStream) {
    let mut buffer = [0; 16];
    while let Ok(n @ 1..) = tcp.read(&mut buffer) {
        if tcp.write_all(&buffer[..n]).is_err() {
            return;
        }
    }
}

/// Gb/s until the application has read it all, and ms of CPU per GB.
fn throughput(to: SocketAddr, streams: usize) -> (f64, f64) {
    let used = cpu();
    let bytes = AtomicU64::new(0);
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..streams {
            scope.spawn(|| {
                let mut tcp = TcpStream::connect(to).unwrap();
                let block = vec![7; 128 << 10];
                let end = Instant::now() + length();
                while Instant::now() < end {
                    tcp.write_all(&block).unwrap();
                    bytes.fetch_add(block.len() as u64, Ordering::Relaxed);
                }
                tcp.shutdown(std::net::Shutdown::Write).unwrap();
                assert_eq!(tcp.read(&mut [0]).unwrap(), 0);
            });
        }
    });
    let gigabytes = bytes.into_inner() as f64 / 1e9;
    (gigabytes * 8.0 / begun.elapsed().as_secs_f64(), (cpu() - used) * 1e3 / gigabytes)
}

/// Median and 99th percentile of a byte there and back, and its CPU, in µs.
fn chat(to: SocketAddr) -> (f64, f64, f64) {
    let used = cpu();
    let mut tcp = TcpStream::connect(to).unwrap();
    tcp.set_nodelay(true).unwrap();
    let mut times = Vec::new();
    let end = Instant::now() + length();
    while Instant::now() < end {
        let begun = Instant::now();
        tcp.write_all(&[1]).unwrap();
        tcp.read_exact(&mut [0]).unwrap();
        times.push(begun.elapsed());
    }
    let each = (cpu() - used) * 1e6 / times.len() as f64;
    let (p50, p99) = percentiles(times);
    (p50, p99, each)
}

/// Rate, median, 99th percentile and CPU of new connections that each carry a byte there and back.
fn connect(to: SocketAddr, clients: usize) -> (f64, f64, f64, f64) {
    let used = cpu();
    let times = Mutex::new(Vec::new());
    let begun = Instant::now();
    thread::scope(|scope| {
        for _ in 0..clients {
            scope.spawn(|| {
                let mut mine = Vec::new();
                let end = Instant::now() + length();
                while Instant::now() < end {
                    let begun = Instant::now();
                    let mut tcp = TcpStream::connect(to).unwrap();
                    tcp.set_nodelay(true).unwrap();
                    tcp.write_all(&[1]).unwrap();
                    tcp.read_exact(&mut [0]).unwrap();
                    mine.push(begun.elapsed());
                }
                times.lock().unwrap().extend(mine);
            });
        }
    });
    let times = times.into_inner().unwrap();
    let rate = times.len() as f64 / begun.elapsed().as_secs_f64();
    let each = (cpu() - used) * 1e6 / times.len() as f64;
    let (p50, p99) = percentiles(times);
    (rate, p50, p99, each)
}

fn percentiles(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort_unstable();
    let at = |share: usize| times[times.len() * share / 100].as_nanos() as f64 / 1000.0;
    (at(50), at(99))
}
