//! The canary's services and backends: reserved numbers, documentation addresses, and the changes
//! that make and remove them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use dataplane_ebpf::{
    abi::{self, Addr, BACKEND_LOCAL, Endpoint, Frontend, POD_ENROLLED, PROTO_TCP, PROTO_UDP, Slot, SlotKey},
    health::State,
};

use crate::registry::change::{Change, Enrollment, Netns, PodId};

/// The client's pod number. Both are above what a registry ever counts to.
pub const CLIENT_POD: PodId = PodId::MAX;
pub const SERVER_POD: PodId = PodId::MAX - 1;

/// How many numbers at the top of `SERVICES` and `BACKENDS` are the canary's: the registry leaves them alone.
pub const SERVICES: u32 = 7;
pub const BACKENDS: u32 = 9;

// RFC 5737 and RFC 3849: nobody's addresses. Ports make it unlikelier still to meet somebody's test.
const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

const fn v6(group: u16, host: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xca, group, 0, 0, 0, host))
}

const PORT: u16 = 61_801;
const SERVICE4: IpAddr = v4(198, 51, 100, 254);
const SERVICE6: IpAddr = v6(0x5e, 0xfe);
const LIVE_AT4: IpAddr = v4(192, 0, 2, 252);
const DEAD_AT4: IpAddr = v4(192, 0, 2, 253);
const SILENT_AT4: IpAddr = v4(192, 0, 2, 254);
const LIVE_AT6: IpAddr = v6(0, 0xfc);
const DEAD_AT6: IpAddr = v6(0, 0xfd);

/// Addresses of the client's end of the link.
pub const CLIENT: &[IpAddr] = &[v4(192, 0, 2, 251), v6(0, 0xfb)];
/// Addresses of the server's end.
pub const SERVER: &[IpAddr] = &[LIVE_AT4, DEAD_AT4, LIVE_AT6, DEAD_AT6];
/// On the link, and nobody's.
pub const SILENT: &[IpAddr] = &[SILENT_AT4];

/// The canary's backends, by their place in the reserved range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum B {
    Live4,
    Live6,
    Udp4,
    Udp6,
    /// Its address answers with a RST.
    Dead4,
    Dead6,
    /// Its address does not answer.
    Silent4,
    /// Its pod's init is sent a stop signal.
    Stopped,
    /// Its listener closes and opens.
    Toggled,
}

impl B {
    const ALL: [Self; BACKENDS as usize] = [
        Self::Live4,
        Self::Live6,
        Self::Udp4,
        Self::Udp6,
        Self::Dead4,
        Self::Dead6,
        Self::Silent4,
        Self::Stopped,
        Self::Toggled,
    ];

    pub const fn at(self) -> SocketAddr {
        let (ip, port) = match self {
            Self::Live4 | Self::Udp4 => (LIVE_AT4, PORT),
            Self::Live6 | Self::Udp6 => (LIVE_AT6, PORT),
            Self::Dead4 => (DEAD_AT4, PORT),
            Self::Dead6 => (DEAD_AT6, PORT),
            Self::Silent4 => (SILENT_AT4, PORT),
            Self::Stopped => (LIVE_AT4, PORT + 1),
            Self::Toggled => (LIVE_AT4, PORT + 2),
        };
        SocketAddr::new(ip, port)
    }

    const fn proto(self) -> u8 {
        match self {
            Self::Udp4 | Self::Udp6 => PROTO_UDP,
            _ => PROTO_TCP,
        }
    }
}

/// The canary's services, by their place in the reserved range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum S {
    Tcp4,
    Tcp6,
    Udp4,
    Udp6,
    /// Refuses first, as good as always.
    Refused4,
    Refused6,
    /// Does not answer first, as good as always.
    Silent4,
}

/// Chosen 65,535 times of 65,536, whatever layers are on: a choice that is proved wrong by the network.
const NEARLY_ALWAYS: u32 = 65_535;

impl S {
    const ALL: [Self; SERVICES as usize] =
        [Self::Tcp4, Self::Tcp6, Self::Udp4, Self::Udp6, Self::Refused4, Self::Refused6, Self::Silent4];

    pub const fn at(self) -> SocketAddr {
        let ip = match self {
            Self::Tcp4 | Self::Udp4 | Self::Refused4 | Self::Silent4 => SERVICE4,
            Self::Tcp6 | Self::Udp6 | Self::Refused6 => SERVICE6,
        };
        SocketAddr::new(ip, PORT + self as u16)
    }

    /// Its backends with their weights.
    const fn backends(self) -> &'static [(B, u32)] {
        match self {
            Self::Tcp4 => &[(B::Live4, 1)],
            Self::Tcp6 => &[(B::Live6, 1)],
            Self::Udp4 => &[(B::Udp4, 1)],
            Self::Udp6 => &[(B::Udp6, 1)],
            Self::Refused4 => &[(B::Dead4, NEARLY_ALWAYS), (B::Live4, 1)],
            Self::Refused6 => &[(B::Dead6, NEARLY_ALWAYS), (B::Live6, 1)],
            Self::Silent4 => &[(B::Silent4, NEARLY_ALWAYS), (B::Live4, 1)],
        }
    }

    const fn proto(self) -> u8 {
        match self {
            Self::Udp4 | Self::Udp6 => PROTO_UDP,
            _ => PROTO_TCP,
        }
    }
}

/// Where the reserved numbers begin, and the generations of this canary's backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct World {
    pub first_service: u32,
    pub first_backend: u32,
    generations: [u32; BACKENDS as usize],
}

impl World {
    /// For maps of these sizes. `None`: they are too small for a canary.
    pub fn new(services: u32, backends: u32) -> Option<Self> {
        let first = |size: u32, reserved: u32| size.checked_sub(reserved).filter(|first| *first > 0);
        Some(Self {
            first_service: first(services, SERVICES)?,
            first_backend: first(backends, BACKENDS)?,
            generations: [0; BACKENDS as usize],
        })
    }

    /// The generation after the one that each number had last, which `before` knows.
    pub fn next_generation(mut self, before: impl Fn(u32) -> u32) -> Self {
        for backend in B::ALL {
            self.generations[backend as usize] = (before(self.backend(backend)) + 1) & 0xffff;
        }
        self
    }

    pub const fn backend(&self, backend: B) -> u32 {
        self.first_backend + backend as u32
    }

    pub const fn generation(&self, backend: B) -> u32 {
        self.generations[backend as usize]
    }

    const fn service(&self, service: S) -> u32 {
        self.first_service + service as u32
    }

    /// Makes everything; the pods' namespaces are found at these paths.
    pub fn make(&self, client: Netns, server: Netns) -> Vec<Change> {
        let enroll = |pod, name: &str, netns, first_backend| {
            Change::Enroll(Arc::new(Enrollment {
                pod,
                name: name.into(),
                netns,
                flags: POD_ENROLLED,
                stop_signals: 1 << nix::libc::SIGTERM,
                first_backend,
            }))
        };
        let mut changes = vec![
            enroll(CLIENT_POD, "hitless/canary-client", client, 0),
            enroll(SERVER_POD, "hitless/canary-server", server, self.backend(B::Toggled)),
        ];
        changes.extend(B::ALL.map(|backend| self.add(backend)));
        for service in S::ALL {
            let id = self.service(service);
            let backends = service.backends();
            for (index, (backend, weight)) in (0..).zip(backends) {
                let generation = self.generation(*backend);
                let slot = Slot { backend: self.backend(*backend), generation, service: id, weight: *weight };
                changes.push(Change::PutSlot(SlotKey { service: id, index }, slot));
            }
            changes.push(Change::PutService(abi::Service {
                id,
                ready: backends.len() as u32,
                max_weight: backends.iter().map(|(_, weight)| *weight).max().unwrap_or(1),
                ..abi::Service::default()
            }));
            let at = endpoint(service.at(), service.proto());
            changes.push(Change::PutFrontend(at, Frontend { service: id, check: at.check() }));
        }
        changes
    }

    fn add(&self, backend: B) -> Change {
        // Only these two are told by what happens in the server's namespace.
        let (pod, next_in_pod) = match backend {
            B::Toggled => (SERVER_POD, self.backend(B::Stopped)),
            B::Stopped => (SERVER_POD, 0),
            _ => (0, 0),
        };
        Change::AddBackend {
            id: self.backend(backend),
            backend: abi::Backend {
                at: endpoint(backend.at(), backend.proto()),
                flags: BACKEND_LOCAL,
                pod,
                generation: self.generation(backend),
                group: 0,
                next_in_pod,
            },
            state: State::Ready,
        }
    }

    /// Removes everything, made or not, also what an agent before left behind.
    pub fn remove(&self) -> Vec<Change> {
        let mut changes = vec![Change::Release(CLIENT_POD), Change::Release(SERVER_POD)];
        for service in S::ALL {
            let id = self.service(service);
            changes.push(Change::DeleteFrontend(endpoint(service.at(), service.proto())));
            changes.push(Change::DeleteService(id));
            let slots = (0..).zip(service.backends()).map(|(index, _)| SlotKey { service: id, index });
            changes.extend(slots.map(Change::DeleteSlot));
        }
        let gone = |backend: B| Change::RemoveBackend {
            id: self.backend(backend),
            at: endpoint(backend.at(), backend.proto()),
        };
        changes.extend(B::ALL.map(gone));
        changes
    }
}

fn endpoint(at: SocketAddr, proto: u8) -> Endpoint {
    let addr = match at.ip() {
        IpAddr::V4(ip) => Addr::v4(u32::from_ne_bytes(ip.octets())),
        IpAddr::V6(ip) => {
            let octets = ip.octets();
            let word = |n: usize| u32::from_ne_bytes([octets[n], octets[n + 1], octets[n + 2], octets[n + 3]]);
            Addr([word(0), word(4), word(8), word(12)])
        }
    };
    Endpoint::new(addr, at.port().to_be(), proto)
}

/// An IPv4 address as an IPv6 socket names it.
pub fn mapped(at: SocketAddr) -> SocketAddr {
    match at.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), at.port()),
        IpAddr::V6(_) => at,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn what_is_made_is_removed_and_nothing_else() {
        let world = World::new(100, 200).expect("large enough").next_generation(|_| 0xffff);
        let netns = || Netns::Path("/proc/1/ns/net".into());
        let name = |change: &Change| match change {
            Change::PutFrontend(at, _) | Change::DeleteFrontend(at) => format!("frontend {at:?}"),
            Change::PutService(service) => format!("service {}", service.id),
            Change::DeleteService(id) => format!("service {id}"),
            Change::PutSlot(key, _) | Change::DeleteSlot(key) => format!("slot {key:?}"),
            Change::AddBackend { id, backend, .. } => format!("backend {id} {:?}", backend.at),
            Change::RemoveBackend { id, at } => format!("backend {id} {at:?}"),
            Change::Enroll(enrollment) => format!("pod {}", enrollment.pod),
            Change::Release(pod) => format!("pod {pod}"),
            other => panic!("the canary does not do {other:?}"),
        };
        let made: BTreeSet<_> = world.make(netns(), netns()).iter().map(name).collect();
        let removed: BTreeSet<_> = world.remove().iter().map(name).collect();
        assert_eq!(made, removed);
        assert_eq!(made.len(), 2 + 9 + 7 * 2 + 10, "pods, backends, services with frontends, slots");
        assert_eq!(world.generation(B::Live4), 0, "16 bits");
    }

    #[test]
    fn maps_without_room_for_a_canary_are_told() {
        assert_eq!(World::new(SERVICES, 100), None, "number 0 is nobody's");
        let world = World::new(SERVICES + 1, BACKENDS + 1).expect("just enough");
        assert_eq!((world.first_service, world.first_backend), (1, 1));
    }

    #[test]
    fn endpoints_are_in_network_order() {
        let at = endpoint("192.0.2.1:258".parse().expect("valid"), PROTO_TCP);
        assert_eq!(at.addr.0[3].to_ne_bytes(), [192, 0, 2, 1]);
        assert_eq!(at.port_be.to_ne_bytes(), [1, 2]);
        let at = endpoint("[2001:db8::1]:1".parse().expect("valid"), PROTO_TCP);
        assert_eq!(at.addr.0[0].to_ne_bytes(), [0x20, 0x01, 0x0d, 0xb8]);
        assert_eq!(mapped("192.0.2.1:5".parse().expect("valid")).to_string(), "[::ffff:192.0.2.1]:5");
    }
}
