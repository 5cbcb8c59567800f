//! Sockets in pods' network namespaces: listeners of the workers, and connections from there.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    ops::RangeInclusive,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns},
    sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, connect as start_connecting, getsockname,
        listen as start_listening, setsockopt, socket, sockopt,
    },
};
use tokio::{net::TcpStream, time::timeout};

use super::{LocalPod, Shared};

/// Connections that wait for accept(), as far as the system allows.
const BACKLOG: i32 = 4096;
/// How often a port is looked for that is free in both families.
const TRIES: usize = 16;

/// One worker's listeners in a pod: on its loopback, where nobody outside reaches them but by `hitless_inbound`.
#[derive(Debug)]
pub struct Listeners {
    pub v4: TcpListener,
    /// None: the pod has no IPv6.
    pub v6: Option<TcpListener>,
}

impl Listeners {
    /// The same sockets, by descriptors of their own.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { v4: self.v4.try_clone()?, v6: self.v6.as_ref().map(TcpListener::try_clone).transpose()? })
    }

    /// That which takes connections to an address of the pod.
    pub fn of(&self, addr: &IpAddr) -> Option<BorrowedFd<'_>> {
        match addr.to_canonical() {
            IpAddr::V4(_) => Some(self.v4.as_fd()),
            IpAddr::V6(_) => self.v6.as_ref().map(AsFd::as_fd),
        }
    }
}

/// A pod's listeners: one pair per worker.
pub struct Listening {
    /// Of the network namespace.
    pub cookie: u64,
    pub port: u16,
    pub listeners: Vec<Listeners>,
}

/// Listeners for that many workers on one port of the pod's loopback. Another agent's have another one, unless it hands
/// them over: nobody's queue is thrown away.
pub fn listen(netns: &File, workers: usize) -> io::Result<Listening> {
    within(netns.as_fd(), || {
        let mut last = None;
        for _ in 0..TRIES {
            match listen_at(0, workers) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => last = Some(error),
                result => return result,
            }
        }
        Err(last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()))
    })
}

/// More of them on a port that has some already.
pub fn join(netns: &File, port: u16, workers: usize) -> io::Result<Vec<Listeners>> {
    within(netns.as_fd(), || Ok(listen_at(port, workers)?.listeners))
}

/// In this thread's network namespace. Port 0: one that is free.
fn listen_at(mut port: u16, workers: usize) -> io::Result<Listening> {
    let cookie = crate::kernel::netns_cookie()?;
    let mut listeners = Vec::with_capacity(workers);
    for _ in 0..workers {
        let v4 = listener(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port))?;
        if port == 0 {
            let at: SockaddrStorage = getsockname(v4.as_raw_fd())?;
            port = at.as_sockaddr_in().map_or(0, |at| at.port());
        }
        let v6 = match listener(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), port)) {
            Ok(v6) => Some(v6),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Err(error),
            // No IPv6 in this pod, or none at all.
            Err(_) => None,
        };
        listeners.push(Listeners { v4: v4.into(), v6: v6.map(Into::into) });
    }
    Ok(Listening { cookie, port, listeners })
}

fn listener(at: SocketAddr) -> io::Result<OwnedFd> {
    let socket = new_socket(&at)?;
    setsockopt(&socket, sockopt::ReusePort, &true)?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(at))?;
    start_listening(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

fn new_socket(to: &SocketAddr) -> io::Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    Ok(socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?)
}

/// Ports of connections to a pod's application: beyond those that the kernel gives of itself (`ip_local_port_range`), so
/// that the pod's own connections keep theirs.
pub(super) const DELIVERY_PORTS: RangeInclusive<u16> = 61_000..=65_535;
/// Of these, so many are tried; then the kernel may choose.
const PORT_TRIES: usize = 8;

/// Connects from the pod's network namespace. With `client`, the application that answers sees that address as its
/// peer's.
pub async fn connect(
    shared: &Shared,
    pod: &LocalPod,
    to: SocketAddr,
    client: Option<SocketAddr>,
) -> io::Result<TcpStream> {
    let to = SocketAddr::new(to.ip().to_canonical(), to.port());
    if client.is_some() {
        for _ in 0..PORT_TRIES {
            match connect_from(shared, pod, to, client, Some(pod.delivery_port())).await {
                Err(error) if is_taken(&error) => {}
                done => return done,
            }
        }
    }
    connect_from(shared, pod, to, client, None).await
}

/// The port, or the port together with the other end.
fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

/// With `port`, from the address that it goes to. A port in TIME-WAIT is free for whoever asks for it by number
/// (`tcp_twsk_unique`, Linux); the kernel's own choice avoids it for a minute, and 28,000 connections in that time, from
/// all clients together, would be all that a pod takes.
async fn connect_from(
    shared: &Shared,
    pod: &LocalPod,
    to: SocketAddr,
    client: Option<SocketAddr>,
    port: Option<u16>,
) -> io::Result<TcpStream> {
    let socket = within(pod.netns.as_fd(), || new_socket(&to))?;
    // The connect hook lets it pass by that.
    setsockopt(&socket, sockopt::Mark, &shared.maps.mark())?;
    if let Some(client) = client {
        shared.maps.deliver_for(socket.as_fd(), client).map_err(io::Error::other)?;
    }
    if let Some(port) = port {
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(to.ip(), port)))?;
    }
    setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
    let under_way = match start_connecting(socket.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => false,
        // To an application of this node it is done by now, or refused: then nothing has to be waited for.
        Err(Errno::EINPROGRESS) => {
            poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO)? == 0
        }
        Err(error) => return Err(error.into()),
    };
    let socket = TcpStream::from_std(std::net::TcpStream::from(socket))?;
    if under_way {
        socket.writable().await?;
    }
    match socket.take_error()? {
        None => Ok(socket),
        Some(error) => Err(error),
    }
}

/// [`connect`], and no longer than that.
pub async fn connect_within(
    shared: &Shared,
    pod: &LocalPod,
    to: SocketAddr,
    client: Option<SocketAddr>,
    within: Duration,
) -> io::Result<TcpStream> {
    timeout(within, connect(shared, pod, to, client)).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

thread_local! {
    /// The network namespace that this thread belongs to.
    static HOME: io::Result<File> = File::open("/proc/thread-self/ns/net");
}

/// Does something short in a network namespace: a socket stays where it was made, the thread comes back.
fn within<T>(netns: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    HOME.with(|home| {
        let home = home.as_ref().map_err(|error| io::Error::from(error.kind()))?;
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        let result = work();
        setns(home, CloneFlags::CLONE_NEWNET).expect("a thread may return to the namespace that it came from");
        result
    })
}
