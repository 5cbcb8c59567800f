//! The canary's process: does as it is told on standard input, one thread, and vanishes with its namespaces.
//!
//! It is a process because sockets belong to the cgroup of the process that makes them, and the
//! agent's own must not move. It ends when its input does.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd},
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns},
};

use super::{
    network::Network,
    protocol::{Reply, Request},
};

/// How long a local exchange may take: it takes microseconds, machines may be busy.
const PATIENCE: Duration = Duration::from_millis(500);

/// The whole life of `hitless canary`, the hidden subcommand.
pub fn serve() -> io::Result<()> {
    // Without the agent there is nothing to prove.
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    let mut canary = Canary::default();
    for line in io::stdin().lock().lines() {
        let request: Request = serde_json::from_str(&line?)?;
        let reply = canary.perform(&request).unwrap_or_else(|error| Reply::Failed { seen: error.to_string() });
        let mut line = serde_json::to_vec(&reply)?;
        line.push(b'\n');
        io::stdout().lock().write_all(&line)?;
    }
    Ok(())
}

#[derive(Default)]
struct Canary {
    network: Option<Network>,
    listeners: Vec<TcpListener>,
    echoes: Vec<UdpSocket>,
}

impl Canary {
    fn perform(&mut self, request: &Request) -> io::Result<Reply> {
        match request {
            Request::Prepare { cgroup } => self.prepare(cgroup),
            Request::Listen { at } => {
                self.listeners.push(self.network()?.in_server(|| TcpListener::bind(at))?);
                Ok(Reply::Done)
            }
            Request::Close { at } => {
                self.listeners.retain(|listener| listener.local_addr().ok() != Some(*at));
                Ok(Reply::Done)
            }
            Request::Echo { at } => {
                self.echoes.push(self.network()?.in_server(|| UdpSocket::bind(at))?);
                Ok(Reply::Done)
            }
            Request::Connect { to, within_ms } => self.connect(to, Duration::from_millis(*within_ms)),
            Request::Datagram { to, connected, within_ms } => {
                self.datagram(to, *connected, Duration::from_millis(*within_ms))
            }
            Request::Stop => {
                self.network()?.in_server(stop)?;
                Ok(Reply::Done)
            }
        }
    }

    fn network(&self) -> io::Result<&Network> {
        self.network.as_ref().ok_or_else(|| io::Error::other("not prepared"))
    }

    fn prepare(&mut self, cgroup: &Path) -> io::Result<Reply> {
        join(cgroup)?;
        let network = self.network.insert(Network::make()?);
        let pid = std::process::id();
        Ok(Reply::Ready {
            client: format!("/proc/{pid}/ns/net").into(),
            server: format!("/proc/{pid}/fd/{}", network.server.as_raw_fd()).into(),
            no_ipv6: network.no_ipv6.clone(),
        })
    }

    /// The kernel completes the handshake with the listener's backlog: one thread can be both ends.
    fn connect(&self, to: &SocketAddr, within: Duration) -> io::Result<Reply> {
        let began = Instant::now();
        let mut client = TcpStream::connect_timeout(to, within).map_err(|error| doing("connect()", &error))?;
        let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let peer = client.peer_addr().map_err(|error| doing("getpeername()", &error))?;
        let at = readable(&self.listeners)?;
        let (mut server, _) = self.listeners[at].accept()?;
        exchange(&mut client, &mut server).map_err(|error| doing("data from client to server", &error))?;
        exchange(&mut server, &mut client).map_err(|error| doing("data from server to client", &error))?;
        Ok(Reply::Connected { peer, accepted_at: server.local_addr()?, took_ms })
    }

    fn datagram(&self, to: &SocketAddr, connected: bool, within: Duration) -> io::Result<Reply> {
        let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let client = UdpSocket::bind((any, 0))?;
        client.set_read_timeout(Some(within))?;
        let question = b"hitless canary";
        if connected {
            client.connect(to).map_err(|error| doing("connect()", &error))?;
            client.send(question).map_err(|error| doing("send()", &error))?;
        } else {
            client.send_to(question, to).map_err(|error| doing("sendmsg()", &error))?;
        }
        let at = readable(&self.echoes)?;
        let echo = &self.echoes[at];
        let mut buffer = [0; 64];
        let (length, from) = echo.recv_from(&mut buffer)?;
        echo.send_to(&buffer[..length], from)?;
        let answered_at = echo.local_addr()?;
        let (length, from) = client.recv_from(&mut buffer).map_err(|error| doing("recvmsg()", &error))?;
        if &buffer[..length] != question {
            return Err(io::Error::other(format!("another answer than what was sent: {} bytes", length)));
        }
        // A connected socket tells its peer by getpeername(); recvmsg() tells the sender.
        let from = if connected { client.peer_addr()? } else { from };
        Ok(Reply::Answered { from, answered_at })
    }
}

fn doing(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// Which of the sockets has something; an error if none has for long.
fn readable<T: AsFd>(sockets: &[T]) -> io::Result<usize> {
    let mut waited: Vec<_> = sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
    poll(&mut waited, PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX))?;
    waited
        .iter()
        .position(|socket| socket.any().unwrap_or(false))
        .ok_or_else(|| io::Error::new(io::ErrorKind::TimedOut, "nothing reached any of the canary's servers"))
}

fn exchange(from: &mut TcpStream, to: &mut TcpStream) -> io::Result<()> {
    to.set_read_timeout(Some(PATIENCE))?;
    from.write_all(b"c")?;
    to.read_exact(&mut [0])
}

/// Moves this process into the cgroup, out of the agent's cgroup namespace if that is in the way
/// (cgroup namespaces(7): with nsdelegate both ends of a move must be visible).
fn join(cgroup: &Path) -> io::Result<()> {
    let procs = cgroup.join("cgroup.procs");
    let failed = |error: &io::Error| doing(&format!("joining {}", procs.display()), error);
    match fs::write(&procs, "0") {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) && cgroup.exists() => {
            setns(File::open("/proc/1/ns/cgroup")?.as_fd(), CloneFlags::CLONE_NEWCGROUP).map_err(|error| {
                io::Error::other(format!("leaving the agent's cgroup namespace ({error}); it needs the host's pids"))
            })?;
            fs::write(&procs, "0").map_err(|error| failed(&error))
        }
        joined => joined.map_err(|error| failed(&error)),
    }
}

/// Starts the init of a pid namespace, as a container runtime does, and tells it to stop.
fn stop() -> io::Result<()> {
    use nix::sys::{
        signal::{SigSet, Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    };
    // Blocked, so that the signal waits instead of being ignored: an init has no default action.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    let before = signals.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK)?;
    // SAFETY: fork() with a new pid namespace (a null stack shares ours copy-on-write). This process
    // has one thread, so the child may do whatever the parent may; it only makes system calls.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone, libc::CLONE_NEWPID | libc::SIGCHLD, 0_usize, 0_usize, 0_usize, 0_usize)
    };
    if pid == 0 {
        let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
        let _ = signals.wait();
        // SAFETY: ends the process at once, without the parent's exit handlers.
        unsafe { libc::_exit(0) };
    }
    let error = io::Error::last_os_error();
    before.thread_set_mask()?;
    if pid < 0 {
        return Err(doing("starting the init of a pid namespace", &error));
    }
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    let sent = kill(pid, Signal::SIGTERM);
    let began = Instant::now();
    while waitpid(pid, Some(WaitPidFlag::WNOHANG))? == WaitStatus::StillAlive {
        if began.elapsed() > PATIENCE {
            kill(pid, Signal::SIGKILL)?;
            waitpid(pid, None)?;
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(sent?)
}
