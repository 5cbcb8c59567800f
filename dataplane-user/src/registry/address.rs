//! Addresses between the model's types and the maps'.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use dataplane_ebpf::abi::{Addr, Endpoint, PROTO_TCP, PROTO_UDP};

use crate::model::Protocol;

/// IPv4 and IPv6 of one service port are two services in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    V4 = 0,
    V6 = 1,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub fn of(addr: &Addr) -> Self {
        if addr.is_v4() { Self::V4 } else { Self::V6 }
    }
}

/// A v4-mapped IPv6 address is the IPv4 address.
pub fn addr(ip: IpAddr) -> Addr {
    match ip.to_canonical() {
        IpAddr::V4(v4) => Addr::v4(u32::from_ne_bytes(v4.octets())),
        IpAddr::V6(v6) => {
            let octets = v6.octets();
            Addr(std::array::from_fn(|i| u32::from_ne_bytes(std::array::from_fn(|j| octets[4 * i + j]))))
        }
    }
}

pub fn ip(addr: &Addr) -> IpAddr {
    if addr.is_v4() {
        return Ipv4Addr::from(addr.0[3].to_ne_bytes()).into();
    }
    let mut octets = [0; 16];
    for (chunk, word) in octets.chunks_exact_mut(4).zip(addr.0) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    Ipv6Addr::from(octets).into()
}

pub fn endpoint(ip: IpAddr, port: u16, protocol: Protocol) -> Endpoint {
    Endpoint::new(addr(ip), port.to_be(), number(protocol))
}

pub fn socket(at: &Endpoint) -> SocketAddr {
    SocketAddr::new(ip(&at.addr), u16::from_be(at.port_be))
}

pub fn protocol(at: &Endpoint) -> Protocol {
    if at.proto == PROTO_UDP { Protocol::Udp } else { Protocol::Tcp }
}

fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => PROTO_TCP,
        Protocol::Udp => PROTO_UDP,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_way_to_the_maps_and_back() {
        for text in ["10.1.2.3", "0.0.0.0", "fd00::1:2", "::1", "2001:db8:1:2:3:4:5:6"] {
            let there: IpAddr = text.parse().unwrap();
            assert_eq!(ip(&addr(there)), there);
        }
        assert_eq!(addr("::ffff:10.1.2.3".parse().unwrap()), addr("10.1.2.3".parse().unwrap()));
        assert_eq!(addr("10.1.2.3".parse().unwrap()), Addr::v4(0x0a01_0203_u32.to_be()));
    }
}
