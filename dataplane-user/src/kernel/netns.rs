//! Enters network namespaces and asks netlink there: interfaces, listeners, tc filters.
//!
//! Everything here acts on the calling thread's network namespace. Threads that enter one are made
//! for it and end with it: never the agent's.

use std::{
    fs::File,
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::Path,
    time::Duration,
};

use dataplane_ebpf::abi::{Addr, ListenerKey};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP},
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags, nlas::Nla as SocketNla},
};
use netlink_sys::{SocketAddr, protocols};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout},
    sched::{CloneFlags, setns},
};
use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkDeserializable,
        NetlinkMessage, NetlinkPayload, NetlinkSerializable,
    },
    packet_route::{
        RouteNetlinkMessage,
        link::{LinkAttribute, LinkFlags, LinkMessage},
        tc::{TcAttribute, TcBpfFlags, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
    },
};

/// Runs `work` in the network namespace behind `path`, on a thread of its own.
pub fn within<T: Send>(path: &Path, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let netns = File::open(path)?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || {
            setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
            // Holding it open would keep a deleted pod's namespace alive for as long as this takes.
            drop(netns);
            work()
        })?;
        thread.join().map_err(|_| io::Error::other("the thread in the network namespace panicked"))?
    })
}

/// The cookie of the calling thread's network namespace: `SO_NETNS_COOKIE` (5.14).
pub fn cookie() -> io::Result<u64> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    cookie_of(socket.as_fd())
}

/// The cookie of a socket's network namespace.
pub fn cookie_of(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let (mut cookie, mut length) = (0_u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: the buffer is a u64 and its length is passed.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub index: u32,
    pub name: String,
    pub up: bool,
    pub loopback: bool,
    /// It belongs to a bridge or bond, which is where its packets are looked at.
    pub enslaved: bool,
}

/// The interfaces of the calling thread's network namespace.
pub fn interfaces() -> io::Result<Vec<Interface>> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let answers = ask(protocols::NETLINK_ROUTE, request, NLM_F_DUMP)?;
    let mut interfaces = Vec::new();
    for answer in answers {
        let RouteNetlinkMessage::NewLink(link) = answer else { continue };
        let name = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
        interfaces.push(Interface {
            index: link.header.index,
            name: name.unwrap_or_default(),
            up: link.header.flags.contains(LinkFlags::Up),
            loopback: link.header.flags.contains(LinkFlags::Loopback),
            enslaved: link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::Controller(_))),
        });
    }
    Ok(interfaces)
}

/// The listening TCP sockets of the calling thread's network namespace: once per key that a
/// listener is counted under.
pub fn listeners(netns_cookie: u64) -> io::Result<Vec<ListenerKey>> {
    let mut keys = Vec::new();
    for (family, id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        let request = SockDiagMessage::InetRequest(InetRequest {
            family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::LISTEN,
            socket_id: id,
        });
        for answer in ask(protocols::NETLINK_SOCK_DIAG, request, NLM_F_DUMP)? {
            let SockDiagMessage::InetResponse(socket) = answer else { continue };
            let v6_only = socket.nlas.iter().any(|nla| matches!(nla, SocketNla::SkV6Only(true)));
            let address = socket.header.socket_id.source_address;
            // Nobody outside the pod connects there, and the program does not count them either.
            if address.is_loopback() {
                continue;
            }
            let port_be = socket.header.socket_id.source_port.to_be();
            let key = |addr| ListenerKey { netns_cookie, addr, port_be, _pad: [0; 6] };
            keys.push(key(abi_addr(address)));
            // A dual-stack wildcard listener serves IPv4 too.
            if address == IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED) && !v6_only {
                keys.push(key(Addr::v4(0)));
            }
        }
    }
    Ok(keys)
}

fn abi_addr(address: IpAddr) -> Addr {
    match address {
        IpAddr::V4(v4) => Addr::v4(u32::from_ne_bytes(v4.octets())),
        IpAddr::V6(v6) => {
            let bytes = v6.octets();
            let word = |n: usize| u32::from_ne_bytes([bytes[n], bytes[n + 1], bytes[n + 2], bytes[n + 3]]);
            Addr([word(0), word(4), word(8), word(12)])
        }
    }
}

/// Which way packets go past a tc program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    pub const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];

    const fn parent(self) -> TcHandle {
        let minor = match self {
            Self::Ingress => TcHandle::MIN_INGRESS,
            Self::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle { major: TcHandle::CLSACT.major, minor }
    }
}

/// Our filter's place: fixed, so that an upgrade replaces it and nobody else's.
const PRIORITY: u32 = 0x4817;
const HANDLE: u32 = 0x0001;

/// `ETH_P_ALL`, in network order, in the lower half; the priority in the upper.
const fn filter_info() -> u32 {
    PRIORITY << 16 | (0x0003_u16.to_be() as u32)
}

/// Adds the clsact qdisc; false if there was one.
pub fn add_clsact(interface: u32) -> io::Result<bool> {
    let mut message = TcMessage::with_index(interface as i32);
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    message.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
    let request = RouteNetlinkMessage::NewQueueDiscipline(message);
    match ask(protocols::NETLINK_ROUTE, request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

pub fn remove_clsact(interface: u32) -> io::Result<()> {
    let mut message = TcMessage::with_index(interface as i32);
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    message.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
    ask(protocols::NETLINK_ROUTE, RouteNetlinkMessage::DelQueueDiscipline(message), NLM_F_ACK).map(drop)
}

fn filter(interface: u32, direction: Direction) -> TcMessage {
    let mut message = TcMessage::with_index(interface as i32);
    message.header.parent = direction.parent();
    message.header.handle = TcHandle::from(HANDLE);
    message.header.info = filter_info();
    message.attributes = vec![TcAttribute::Kind("bpf".to_owned())];
    message
}

/// Puts the program on the interface; replaces ours if there is one.
pub fn put_filter(interface: u32, direction: Direction, name: &str, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut message = filter(interface, direction);
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32)),
        TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
        TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ]));
    let request = RouteNetlinkMessage::NewTrafficFilter(message);
    ask(protocols::NETLINK_ROUTE, request, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE).map(drop)
}

pub fn remove_filter(interface: u32, direction: Direction) -> io::Result<()> {
    let request = RouteNetlinkMessage::DelTrafficFilter(filter(interface, direction));
    match ask(protocols::NETLINK_ROUTE, request, NLM_F_ACK) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
        result => result.map(drop),
    }
}

/// The filters of one direction: (priority and protocol, handle) of each.
fn filters(interface: u32, direction: Direction) -> io::Result<Vec<(u32, u32)>> {
    let mut message = TcMessage::with_index(interface as i32);
    message.header.parent = direction.parent();
    match ask(protocols::NETLINK_ROUTE, RouteNetlinkMessage::GetTrafficFilter(message), NLM_F_DUMP) {
        Ok(answers) => Ok(answers
            .into_iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewTrafficFilter(found) => Some((found.header.info, found.header.handle.into())),
                _ => None,
            })
            .filter(|(_, handle)| *handle != 0)
            .collect()),
        // No clsact: no filters.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

pub fn has_filter(interface: u32, direction: Direction) -> io::Result<bool> {
    Ok(filters(interface, direction)?.contains(&(filter_info(), HANDLE)))
}

/// No filter is left in either direction.
pub fn clsact_unused(interface: u32) -> io::Result<bool> {
    Ok(filters(interface, Direction::Ingress)?.is_empty() && filters(interface, Direction::Egress)?.is_empty())
}

/// One netlink request in the calling thread's network namespace, and every answer to it.
fn ask<T>(protocol: isize, request: T, flags: u16) -> io::Result<Vec<T>>
where
    T: NetlinkSerializable + NetlinkDeserializable + Into<NetlinkPayload<T>> + std::fmt::Debug,
{
    let mut socket = netlink_sys::Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut message = NetlinkMessage::from(request);
    message.header.flags = NLM_F_REQUEST | flags;
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    socket.send(&buffer, 0)?;
    let mut answers = Vec::new();
    loop {
        let (received, _) = socket.recv_from_full()?;
        let mut rest = &received[..];
        while !rest.is_empty() {
            let answer = NetlinkMessage::<T>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            let length = (answer.header.length as usize).next_multiple_of(4);
            match answer.payload {
                NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                NetlinkPayload::Error(error) => {
                    return match error.code {
                        None => Ok(answers),
                        Some(_) => Err(error.to_io()),
                    };
                }
                NetlinkPayload::Done(_) => return Ok(answers),
                _ => {}
            }
            if length == 0 || length >= rest.len() {
                break;
            }
            rest = &rest[length..];
        }
    }
}

/// Wakes when an interface of the agent's network namespace changes.
pub fn link_monitor() -> io::Result<netlink_sys::Socket> {
    const RTNLGRP_LINK: u32 = 1;
    let mut socket = netlink_sys::Socket::new(protocols::NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.add_membership(RTNLGRP_LINK)?;
    Ok(socket)
}

/// Whether something was told within that time.
pub fn wait_for_links(socket: &mut netlink_sys::Socket, timeout: Duration) -> bool {
    // SAFETY: the socket is open for as long as it is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
    let mut waited = [PollFd::new(fd, PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    nix::poll::poll(&mut waited, timeout).is_ok_and(|ready| ready > 0)
}

/// Reads what was told and forgets it: the listing that follows is the truth.
pub fn drain(socket: &mut netlink_sys::Socket) {
    let mut buffer = Vec::with_capacity(65_536);
    while wait_for_links(socket, Duration::ZERO) {
        buffer.clear();
        // An error (ENOBUFS: more came than fits) says the same: something changed.
        drop(socket.recv(&mut buffer, 0));
    }
}
