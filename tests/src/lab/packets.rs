//! Packets made by hand, for what no honest kernel would send; and a look at those that pass.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, sendto, setsockopt, socket,
    sockopt::{RcvBufForce, ReceiveTimeout},
};

use super::net::Netns;

pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// A TCP segment without data or options, with its IP header (RFC 9293 section 3.1).
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub flags: u8,
    pub seq: u32,
    pub ack: u32,
}

impl Segment {
    pub fn packet(&self) -> Vec<u8> {
        let mut tcp = Vec::with_capacity(20);
        tcp.extend_from_slice(&self.from.port().to_be_bytes());
        tcp.extend_from_slice(&self.to.port().to_be_bytes());
        tcp.extend_from_slice(&self.seq.to_be_bytes());
        tcp.extend_from_slice(&self.ack.to_be_bytes());
        tcp.extend_from_slice(&[5 << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
        let sum = checksum(&[&pseudo_header(self.from.ip(), self.to.ip(), TCP, tcp.len()), &tcp]);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        with_ip_header(self.from.ip(), self.to.ip(), TCP, &tcp)
    }
}

/// "Host unreachable" from `router` about `quoted`, as much of it as RFC 792 asks for: 8 bytes past the IP header.
pub fn unreachable(router: IpAddr, quoted: &Segment) -> Vec<u8> {
    let packet = quoted.packet();
    let to = quoted.from.ip();
    let (protocol, head, quote) = match to {
        IpAddr::V4(_) => (ICMP, [3, 1, 0, 0, 0, 0, 0, 0], &packet[..28]),
        // RFC 4443 section 3.1: address unreachable.
        IpAddr::V6(_) => (ICMPV6, [1, 3, 0, 0, 0, 0, 0, 0], &packet[..]),
    };
    let mut icmp = [&head[..], quote].concat();
    let sum = match to {
        IpAddr::V4(_) => checksum(&[&icmp]),
        IpAddr::V6(_) => checksum(&[&pseudo_header(router, to, protocol, icmp.len()), &icmp]),
    };
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    with_ip_header(router, to, protocol, &icmp)
}

fn with_ip_header(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let len = (20 + payload.len()) as u16;
            packet.extend_from_slice(&[0x45, 0]);
            packet.extend_from_slice(&len.to_be_bytes());
            packet.extend_from_slice(&[0, 0, 0x40, 0, 64, protocol, 0, 0]);
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
            let sum = checksum(&[&packet]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            packet.extend_from_slice(&[0x60, 0, 0, 0]);
            packet.extend_from_slice(&(payload.len() as u16).to_be_bytes());
            packet.extend_from_slice(&[protocol, 64]);
            packet.extend_from_slice(&from.octets());
            packet.extend_from_slice(&to.octets());
        }
        _ => panic!("{from} and {to} are of different families"),
    }
    packet.extend_from_slice(payload);
    packet
}

fn pseudo_header(from: IpAddr, to: IpAddr, protocol: u8, len: usize) -> Vec<u8> {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let mut header = [octets(from), octets(to)].concat();
    header.extend_from_slice(&(len as u32).to_be_bytes());
    header.extend_from_slice(&u32::from(protocol).to_be_bytes());
    header
}

/// RFC 1071.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Send a whole packet through a raw socket.
pub fn send(raw: &OwnedFd, to: IpAddr, packet: &[u8]) -> Result<()> {
    let to = SockaddrStorage::from(SocketAddr::new(to, 0));
    sendto(raw.as_raw_fd(), packet, &to, MsgFlags::empty()).context("send a packet")?;
    Ok(())
}

/// Sees every packet of a network namespace, from its IP header on.
pub struct Sniffer(OwnedFd);

/// Bytes that a sniffer holds until it is asked.
const AMPLE: usize = 64 << 20;

impl Sniffer {
    pub fn new(netns: &Netns) -> Result<Self> {
        let socket = netns.enter(|| {
            socket(AddressFamily::Packet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        })??;
        setsockopt(&socket, ReceiveTimeout, &nix::sys::time::TimeVal::new(0, 200_000))?;
        setsockopt(&socket, RcvBufForce, &AMPLE)?;
        Ok(Self(socket))
    }

    /// All that passed and was not yet read. An error when something of it was lost.
    pub fn seen(&self) -> Result<Vec<Vec<u8>>> {
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut packets = Vec::new();
        // As large as the kernel makes them on devices that would split them (GSO).
        let mut buffer = vec![0; 1 << 18];
        while Instant::now() < deadline {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(len) => packets.push(buffer[..len].to_vec()),
                Err(nix::errno::Errno::EAGAIN) => break,
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        match self.dropped()? {
            0 => Ok(packets),
            dropped => bail!("{dropped} packets passed unseen beside {}", packets.len()),
        }
    }

    fn dropped(&self) -> Result<u32> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut stats: libc::tpacket_stats = unsafe { std::mem::zeroed() };
        let mut len = size_of_val(&stats) as libc::socklen_t;
        // SAFETY: the option's value is such a structure, and `len` says how long it is.
        let result = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                std::ptr::from_mut(&mut stats).cast(),
                &mut len,
            )
        };
        nix::errno::Errno::result(result).context("getsockopt PACKET_STATISTICS")?;
        Ok(stats.tp_drops)
    }

    /// The sequence number of the next SYN from that port.
    pub fn syn_from(&self, port: u16) -> Result<u32> {
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut buffer = [0; 2048];
        while Instant::now() < deadline {
            let len = match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(len) => len,
                Err(nix::errno::Errno::EAGAIN) => continue,
                Err(error) => return Err(io::Error::from(error).into()),
            };
            if let Some(seq) = syn_sequence(&buffer[..len], port) {
                return Ok(seq);
            }
        }
        bail!("no SYN from port {port} was seen")
    }
}

fn syn_sequence(packet: &[u8], port: u16) -> Option<u32> {
    let tcp = match packet.first()? >> 4 {
        4 if packet[9] == TCP => packet.get(usize::from(packet[0] & 0xf) * 4..)?,
        6 if packet[6] == TCP => packet.get(40..)?,
        _ => return None,
    };
    let from = u16::from_be_bytes(tcp.get(..2)?.try_into().ok()?);
    let flags = *tcp.get(13)?;
    (from == port && flags & (SYN | ACK) == SYN).then(|| tcp[4..8].try_into().ok().map(u32::from_be_bytes)).flatten()
}
