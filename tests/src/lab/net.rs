//! Network namespaces, links and addresses, by iproute2: its batches read like what one would type.

use std::{
    fs::File,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use super::cleanup::LabId;

pub const NETNS_DIR: &str = "/run/netns";

/// A named network namespace of the lab.
#[derive(Clone, Debug)]
pub struct Netns {
    pub name: String,
    pub path: PathBuf,
}

impl Netns {
    pub(crate) fn create(lab: &LabId, name: &str) -> Result<Self> {
        let name = lab.netns(name);
        ip(None, &format!("netns add {name}\n"))?;
        let netns = Self { path: Path::new(NETNS_DIR).join(&name), name };
        // An IPv6 address must serve at once, and a route over a cut cable must stay a route.
        netns.sysctl(&[
            ("ipv6/conf/all/accept_dad", "0"),
            ("ipv6/conf/default/accept_dad", "0"),
            ("ipv6/conf/default/accept_ra", "0"),
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
        ])?;
        Ok(netns)
    }

    /// Run `f` on a thread inside the namespace.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        let file = File::open(&self.path).with_context(|| format!("open {}", self.path.display()))?;
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| -> Result<T> {
                setns(file.as_fd(), CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", self.name))?;
                Ok(f())
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Write settings below /proc/sys/net.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            for (key, value) in settings {
                let path = Path::new("/proc/sys/net").join(key);
                std::fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))?;
            }
            Ok(())
        })?
    }

    /// The kernel's number for the namespace, which programs key pods by.
    pub fn cookie(&self) -> Result<u64> {
        self.enter(|| {
            let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            let mut cookie = 0u64;
            let mut len = size_of::<u64>() as libc::socklen_t;
            // SAFETY: the option value is a u64 and `len` says so.
            let result = unsafe {
                libc::getsockopt(
                    socket.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_NETNS_COOKIE,
                    std::ptr::from_mut(&mut cookie).cast(),
                    &mut len,
                )
            };
            nix::errno::Errno::result(result).context("getsockopt SO_NETNS_COOKIE")?;
            Ok(cookie)
        })?
    }
}

pub(super) fn delete_netns(name: &str) -> Result<()> {
    ip(None, &format!("netns del {name}\n"))
}

/// Run a batch of `ip` commands, in a namespace.
pub fn ip(netns: Option<&Netns>, batch: &str) -> Result<()> {
    batched("ip", netns, batch)
}

/// Run a batch of `bridge` commands, in a namespace.
pub fn bridge(netns: &Netns, batch: &str) -> Result<()> {
    batched("bridge", Some(netns), batch)
}

fn batched(program: &str, netns: Option<&Netns>, batch: &str) -> Result<()> {
    let mut command = Command::new(program);
    if let Some(netns) = netns {
        command.args(["-n", &netns.name]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("run {program} (install iproute2)"))?;
    let mut stdin = child.stdin.take().context("a piped stdin")?;
    stdin.write_all(batch.as_bytes()).with_context(|| format!("write to {program}"))?;
    drop(stdin);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let place = netns.map_or("the host", |netns| &netns.name);
        bail!("{program} failed in {place}: {}\nbatch:\n{batch}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// Length of an address's prefix that is this host alone.
    pub fn host_prefix(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

/// A node's address on the segment that joins them.
pub fn underlay(family: Family, node: usize) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 168, 100, node as u8).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0, node as u16).into(),
    }
}

/// Pod number 0 of a node names its subnet, 1 is the gateway.
pub fn pod_address(family: Family, node: usize, pod: u16) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 244, node as u8, pod as u8).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x244, node as u16, 0, 0, 0, 0, pod).into(),
    }
}

/// The pods of a node, as `address/prefix`.
pub fn pod_subnet(family: Family, node: usize) -> String {
    format!("{}/{}", pod_address(family, node, 0), pod_prefix(family))
}

pub fn pod_prefix(family: Family) -> u8 {
    match family {
        Family::V4 => 24,
        Family::V6 => 64,
    }
}

/// Virtual address of the n-th service of a lab.
pub fn service_address(family: Family, n: u16) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 96, (n >> 8) as u8, n as u8).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, n).into(),
    }
}

/// Give `netns` an `eth0` on the segment; the other end is the fabric's port `port`.
pub(crate) fn join_segment(fabric: &Netns, netns: &Netns, port: &str, host: usize) -> Result<()> {
    ip(
        Some(fabric),
        &format!(
            "link add {port} type veth peer name eth0 netns {netns}\nlink set {port} master br0 up\n",
            netns = netns.name
        ),
    )?;
    let (v4, v6) = (underlay(Family::V4, host), underlay(Family::V6, host));
    ip(
        Some(netns),
        &format!("link set lo up\naddr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n"),
    )
}

/// Connect a socket that was made elsewhere.
pub fn connect(socket: OwnedFd, to: SocketAddr) -> io::Result<TcpStream> {
    let to = nix::sys::socket::SockaddrStorage::from(to);
    nix::sys::socket::connect(socket.as_raw_fd(), &to)?;
    Ok(TcpStream::from(socket))
}
