//! Keys and values of the BPF maps, exactly as the kernel and the agent lay them out in memory.
//!
//! Every struct is `#[repr(C)]`, padding is explicit and zeroed, sizes are asserted below. Fields
//! ending in `_be` are in network byte order; everything else is in host order. Identifiers start
//! at 1 so that zeroed memory never names anything.

/// An IPv6 address, or an IPv4 address as `::ffff:a.b.c.d`: four words, each in network byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Addr(pub [u32; 4]);

impl Addr {
    /// The third word of a v4-mapped address (`::ffff:0:0/96`, RFC 4291 section 2.5.5.2).
    pub const V4_MAPPED: u32 = 0x0000_ffff_u32.to_be();

    /// From the four bytes of an IPv4 address held in network order.
    #[inline(always)]
    pub const fn v4(ip_be: u32) -> Self {
        Self([0, 0, Self::V4_MAPPED, ip_be])
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == Self::V4_MAPPED
    }

    /// The unspecified address of either family: a wildcard listener's.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[3] == 0 && (self.0[2] == 0 || self.0[2] == Self::V4_MAPPED)
    }
}

/// IP protocol numbers that hitless handles.
pub const PROTO_TCP: u8 = 6;
pub const PROTO_UDP: u8 = 17;

/// One address, port and protocol: the key of `SERVICES` (a frontend) and `BACKEND_INDEX` (a backend).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    pub addr: Addr,
    pub port_be: u16,
    pub proto: u8,
    pub _pad: u8,
}

impl Endpoint {
    #[inline(always)]
    pub const fn new(addr: Addr, port_be: u16, proto: u8) -> Self {
        Self { addr, port_be, proto, _pad: 0 }
    }

    /// A word that must be found again in a [`Frontend`] read under this key. Values wider than
    /// 8 bytes can be read torn while their element is recycled; this tells.
    #[inline(always)]
    pub const fn check(&self) -> u32 {
        self.addr.0[3] ^ ((self.port_be as u32) << 8) ^ (self.proto as u32)
    }
}

/// `FRONTENDS`: which service an address and port belong to. Several frontends (cluster IP,
/// external IPs) may share one service, so that a change of its backends is written once.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frontend {
    pub service: ServiceId,
    /// [`Endpoint::check`] of the key.
    pub check: u32,
}

/// A service port of one address family (or a gateway group): index into `SERVICES`. 0 is none.
pub type ServiceId = u32;

/// `SERVICES`: a service's backends, by count; the backends themselves are in `SLOTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Its own index; 0 in an unused element.
    pub id: ServiceId,
    /// Slots `0..ready` are ready backends.
    pub ready: u32,
    /// Slots `ready..ready + terminating` serve but terminate (KEP-1669).
    pub terminating: u32,
    /// `SERVICE_*`.
    pub flags: u32,
    /// ClientIP session affinity timeout in seconds; 0 is none.
    pub affinity_s: u32,
    /// The largest weight of any slot; a draw is accepted with probability weight / `max_weight`.
    pub max_weight: u32,
}

/// Never move a connection of this service to another backend (headless, StatefulSet identity).
pub const SERVICE_PINNED: u32 = 1 << 0;

/// `SLOTS` key.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotKey {
    pub service: ServiceId,
    pub index: u32,
}

/// `SLOTS` value. `service` repeats the key and `generation` the backend's: a stale or torn read
/// is told by either.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    pub backend: u32,
    /// The backend's generation, as in `HEALTH` (16 bits used).
    pub generation: u32,
    pub service: ServiceId,
    /// 1..=65535, relative to [`Service::max_weight`].
    pub weight: u32,
}

/// `BACKENDS`: where a backend is. Index 0 is never used.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backend {
    pub at: Endpoint,
    /// `BACKEND_*`.
    pub flags: u32,
    /// The pod's identifier; 0 when it is not a pod of this node.
    pub pod: u32,
    pub generation: u32,
    /// The service whose slots are exactly the backends sharing **all** services of this one: where
    /// a gateway's connection to this address may be moved. 0: nowhere.
    pub group: ServiceId,
    /// The next backend of the same pod, 0 at the end: how a signal to a pod finds its backends.
    pub next_in_pod: u32,
}

/// The backend runs on this node.
pub const BACKEND_LOCAL: u32 = 1 << 0;

/// How many backends of one pod a signal reaches in the kernel; the agent does the rest.
pub const MAX_BACKENDS_PER_POD: u32 = 32;

/// `PODS`: a network namespace of this node, keyed by its cookie (u64).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    pub pod: u32,
    /// `POD_*`.
    pub flags: u32,
    /// Bit n set: signal n to the pod's init process means it is stopping.
    pub stop_signals: u64,
    /// Head of the chain through [`Backend::next_in_pod`].
    pub first_backend: u32,
    /// Where the agent listens on the pod's loopback for what goes to the mesh; 0: it does not.
    pub outbound_port_be: u16,
    pub _pad: u16,
}

/// The pod's connections are hitless's business.
pub const POD_ENROLLED: u32 = 1 << 0;
/// The pod is an L7 gateway: its connections to pod addresses may be moved too.
pub const POD_GATEWAY: u32 = 1 << 1;
/// The node's own network namespace.
pub const POD_HOST: u32 = 1 << 2;
/// The pod is in the mesh: its connections to the mesh are tunnelled, those into it are decided on.
pub const POD_MESH: u32 = 1 << 3;

/// `LISTENERS` key: who listens where, one entry per wildcard or specific address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    pub netns_cookie: u64,
    /// Unspecified (of the family that is served) for a wildcard listener.
    pub addr: Addr,
    pub port_be: u16,
    pub _pad: [u8; 6],
}

/// `AFFINITY` key.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AffinityKey {
    pub netns_cookie: u64,
    pub service: ServiceId,
    pub _pad: u32,
}

/// `AFFINITY` value.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Affinity {
    pub backend: u32,
    pub generation: u32,
    /// Its slot then: where to look first whether it still is one of the service's.
    pub slot: u32,
    pub _pad: u32,
    /// `CLOCK_MONOTONIC`, ns.
    pub last_used_ns: u64,
}

/// `SUSPECTS` key: on whose word.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SuspectKey {
    pub netns_cookie: u64,
    pub service: ServiceId,
    pub _pad: u32,
}

/// `SUSPECTS` value: how many backends that client made suspect since `since_ns`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Suspects {
    pub since_ns: u64,
    pub marked: u32,
    pub _pad: u32,
}

/// How long a client's suspicions count against its share.
pub const SUSPECT_WINDOW_NS: u64 = 10_000_000_000;

/// The most backends one TCP connect may be tried on: the first and three replays.
pub const MAX_TRIES: usize = 4;
/// The longest TCP option list (RFC 9293 section 3.1).
pub const MAX_TCP_OPTIONS: usize = 40;

/// `SOCKETS`: SK_STORAGE of a connecting socket; overwritten by every connect of the same socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// When `connect()` entered the hook, `CLOCK_MONOTONIC` ns.
    pub connect_ns: u64,
    pub netns_cookie: u64,
    /// When the last SYN left, `CLOCK_MONOTONIC` ns; the tc program's.
    pub syn_ns: u64,
    /// What the application asked for.
    pub original: Endpoint,
    /// 0: not a connection of ours. For a gateway's connection, [`Backend::group`].
    pub service: ServiceId,
    /// The backend the connection is (now) going to.
    pub backend: u32,
    pub generation: u32,
    /// `SOCKET_*`.
    pub flags: u32,
    /// Where `connect()` was pointed: the peer that the socket believes in.
    pub peer: Endpoint,
    /// The SYN's sequence number, host order; valid with [`SOCKET_SYN`].
    pub isn: u32,
    /// SYNs that left for the current backend.
    pub syns: u32,
    /// How often the SYN was replayed to another backend.
    pub replays: u32,
    /// Backends already tried, in order; 0 is none.
    pub tried: [u32; MAX_TRIES],
    pub window_be: u16,
    /// Length of `options`, a multiple of 4.
    pub options_len: u8,
    /// IPv4 TOS or IPv6 traffic class of the SYN.
    pub traffic_class: u8,
    /// TCP flags octet of the SYN (SYN, and ECE|CWR when ECN is asked for, RFC 3168).
    pub tcp_flags: u8,
    pub ttl: u8,
    pub _pad: [u8; 2],
    /// [`Settings::maps`]: whose numbers `service`, `backend`, `generation` and `tried` are.
    pub maps: u32,
    pub options: [u8; MAX_TCP_OPTIONS],
}

impl Socket {
    /// A connection that is none of ours.
    pub const NONE: Self = Self {
        connect_ns: 0,
        netns_cookie: 0,
        syn_ns: 0,
        original: Endpoint::new(Addr([0; 4]), 0, 0),
        service: 0,
        backend: 0,
        generation: 0,
        flags: 0,
        peer: Endpoint::new(Addr([0; 4]), 0, 0),
        isn: 0,
        syns: 0,
        replays: 0,
        tried: [0; MAX_TRIES],
        window_be: 0,
        options_len: 0,
        traffic_class: 0,
        tcp_flags: 0,
        ttl: 0,
        _pad: [0; 2],
        maps: 0,
        options: [0; MAX_TCP_OPTIONS],
    };
}

/// The SYN was seen leaving and its header fields are saved.
pub const SOCKET_SYN: u32 = 1 << 0;
/// The handshake completed.
pub const SOCKET_ESTABLISHED: u32 = 1 << 1;
/// The application named a pod's address (a gateway's connection).
pub const SOCKET_DIRECT: u32 = 1 << 2;
/// The connection lives on another backend than `peer`.
pub const SOCKET_REBOUND: u32 = 1 << 3;
/// This connect probes a suspect backend (half open).
pub const SOCKET_PROBE: u32 = 1 << 4;
/// The connection goes to the agent's listener in the pod, which carries it on.
pub const SOCKET_TUNNELLED: u32 = 1 << 5;
/// The agent's own, to an application: `original` is the client that it does that for.
pub const SOCKET_DELIVERY: u32 = 1 << 6;

/// `MESH`, keyed by [`Addr`]: what is known of an address beyond services and backends.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MeshAddress {
    /// `MESH_*`.
    pub flags: u32,
    /// The pod's identifier; 0 when it is not a pod of this node.
    pub pod: u32,
}

/// It takes HBONE: an enrolled pod's connections to it are tunnelled.
pub const MESH_HBONE: u32 = 1 << 0;
/// Its pod takes nothing else from outside, save from [`MESH_NODE`].
pub const MESH_STRICT: u32 = 1 << 1;
/// Plaintext to its pod goes to the agent's listener, which asks the policies.
pub const MESH_CAPTURE: u32 = 1 << 2;
/// An address of this node, from which the kubelet probes.
pub const MESH_NODE: u32 = 1 << 3;

/// The port that HBONE is spoken on (Istio's `HBONE_PORT`).
pub const HBONE_PORT: u16 = 15_008;

/// `TUNNELLED` and `DELIVERIES` key: a connection on a pod's loopback, by who connects.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct LocalConnection {
    pub netns_cookie: u64,
    pub addr: Addr,
    pub port_be: u16,
    /// Where it connects to.
    pub listener_port_be: u16,
    pub _pad: u32,
}

/// `TUNNELLED` value: what a connection that arrives at the agent's listener is about.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tunnelled {
    /// What the application asked for.
    pub original: Endpoint,
    /// As in [`Socket`]; 0: the application named the address.
    pub service: ServiceId,
    pub backend: u32,
    pub generation: u32,
    /// `SOCKET_*`.
    pub flags: u32,
    /// As in [`Socket`].
    pub maps: u32,
}

/// How many services one unconnected UDP socket can talk to at a time.
pub const UDP_PEERS: usize = 8;

/// One service that a UDP socket talks to.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UdpPeer {
    pub service_at: Endpoint,
    pub backend_at: Endpoint,
    /// As in [`Socket`].
    pub maps: u32,
    pub backend: u32,
    pub generation: u32,
    /// As in [`Affinity`].
    pub slot: u32,
    /// Kept when the backend was replaced: replies under way still find their service.
    pub stale: u32,
}

/// `UDP_SOCKETS`: SK_STORAGE of a UDP socket, a ring of the peers last used.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UdpSocket {
    pub next: u32,
    pub _pad: u32,
    pub peers: [UdpPeer; UDP_PEERS],
}

/// `REBINDS` key: a TCP flow as the client's packets name it, from the client to a peer. What comes
/// back is looked up by [`FlowKey::reversed`]: on the way out a key is what the socket says, on
/// the way in what is on the wire, and one peer may be both, of two flows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    pub client: Addr,
    pub peer: Addr,
    pub client_port_be: u16,
    pub peer_port_be: u16,
}

impl FlowKey {
    /// The key of the packets that come back.
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self {
            client: self.peer,
            peer: self.client,
            client_port_be: self.peer_port_be,
            peer_port_be: self.client_port_be,
        }
    }
}

/// `REBINDS` value. A flow that was moved from D1 to D2 has two entries: client → D1 is
/// [`ROLE_FORWARD`] to D2 and D2 → client is [`ROLE_REVERSE`] to D1. A peer that was left and may
/// still answer has a third: D1 → client is [`ROLE_STALE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rebind {
    /// `CLOCK_MONOTONIC` ns of the last packet.
    pub last_seen_ns: u64,
    /// Where the other half of the entry points.
    pub to: Addr,
    pub to_port_be: u16,
    /// `ROLE_*`.
    pub role: u8,
    /// `REBIND_*`: FINs and RSTs seen.
    pub closing: u8,
    /// The SYN's sequence number: another ISN on the same ports is another connection.
    pub isn: u32,
    pub service: ServiceId,
    pub backend: u32,
}

/// Client → first peer: rewrite the destination.
pub const ROLE_FORWARD: u8 = 1;
/// Present peer → client: rewrite the source.
pub const ROLE_REVERSE: u8 = 2;
/// From a peer that was tried and left: dropped.
pub const ROLE_STALE: u8 = 3;

pub const REBIND_FIN_CLIENT: u8 = 1 << 0;
pub const REBIND_FIN_PEER: u8 = 1 << 1;
pub const REBIND_RST: u8 = 1 << 2;
/// The handshake completed.
pub const REBIND_ESTABLISHED: u8 = 1 << 3;
/// A flow of the node's own network namespace. Pods' packets pass the node's interfaces too, and all
/// find the same `REBINDS`: the programs there act on these flows only, the pods' on the others.
pub const REBIND_NODE: u8 = 1 << 7;

/// `SETTINGS[0]`: what the agent may change while the programs run.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `LAYER_*`.
    pub layers: u32,
    /// First SYN timeout of a service connection in jiffies; 0 leaves the system's.
    pub syn_timeout_jiffies: u32,
    /// The n-th SYN to the same backend without an answer goes elsewhere; 2 = the first
    /// retransmission, 0 = never.
    pub syn_limit: u32,
    /// Replays per connect, at most [`MAX_TRIES`] - 1.
    pub max_replays: u32,
    /// First suspicion's length, in [`health`](crate::health) ticks; doubled by each further one.
    pub suspect_ticks: u32,
    /// How often it may double.
    pub suspect_max_level: u32,
    /// A client's word makes at most this percentage of a service's backends suspect.
    pub suspect_percent: u32,
    /// The bit(s) of skb->mark that tell hitless's own packets.
    pub mark: u32,
    /// The kernel's identifier of this very map. What sockets remember of services and backends are numbers in the
    /// maps that this one belongs to, and sockets outlive them.
    pub maps: u32,
    /// SYNs closer than this are one: half of the SYN timeout.
    pub syn_spacing_ns: u32,
}

/// L1: signals on the node (SIGTERM, listener close) flip `HEALTH`.
pub const LAYER_KNOW: u32 = 1 << 0;
/// L2: the choice avoids backends known as draining, refusing or suspect.
pub const LAYER_CHOOSE: u32 = 1 << 1;
/// L3: refused and unanswered SYNs are replayed to another backend.
pub const LAYER_REBIND: u32 = 1 << 2;

/// What happened, as told through the `EVENTS` ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// `CLOCK_MONOTONIC` ns.
    pub at_ns: u64,
    /// `EVENT_*`.
    pub kind: u32,
    pub pod: u32,
    pub netns_cookie: u64,
    pub service: ServiceId,
    /// The backend it is about (for [`EVENT_REBOUND`]: the one that was left).
    pub backend: u32,
    pub generation: u32,
    /// [`EVENT_REBOUND`]: the backend now used. [`EVENT_STOP_SIGNAL`]: the signal. Connect
    /// outcomes: the errno. Else 0.
    pub detail: u32,
    /// [`EVENT_REBOUND`]: `CAUSE_*`. Connect outcomes: ns since connect, saturated.
    pub extra: u32,
    /// Listener events: the port.
    pub port_be: u16,
    pub _pad: u16,
    /// Listener events: the listener's address.
    pub addr: Addr,
}

pub const EVENT_REFUSED: u32 = 1;
pub const EVENT_TIMED_OUT: u32 = 2;
pub const EVENT_UNREACHABLE: u32 = 3;
pub const EVENT_REBOUND: u32 = 4;
pub const EVENT_EXHAUSTED: u32 = 5;
pub const EVENT_LISTENER_OPENED: u32 = 6;
pub const EVENT_LISTENER_CLOSED: u32 = 7;
pub const EVENT_STOP_SIGNAL: u32 = 8;
pub const EVENT_SUSPECTED: u32 = 9;
pub const EVENT_RECOVERED: u32 = 10;

pub const CAUSE_RST: u32 = 1;
pub const CAUSE_ICMP: u32 = 2;
pub const CAUSE_SILENT: u32 = 3;
/// The tuple was taken by another rebound flow of the same client.
pub const CAUSE_COLLISION: u32 = 4;

macro_rules! stats {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// Index into `STATS`; the name is the counter's in `hitless status` and in metrics.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Stat { $($(#[$doc])* $variant,)* }

        impl Stat {
            pub const ALL: &'static [Stat] = &[$(Stat::$variant,)*];
            pub const COUNT: u32 = Self::ALL.len() as u32;
            pub const fn name(self) -> &'static str {
                match self { $(Stat::$variant => $name,)* }
            }
        }
    };
}

stats! {
    /// Connects (and UDP sends) translated from a service to a backend.
    Translated => "connects_translated",
    /// A gateway's connects to a backend's address that hitless watches over.
    Direct => "connects_direct",
    /// A first choice was passed over because of its health.
    Skipped => "choices_skipped",
    /// No ready backend: a serving, terminating one was taken (KEP-1669).
    ServingTerminating => "choices_serving_terminating",
    /// Nothing live: the choice ignored health.
    FailedOpen => "choices_failed_open",
    /// The service has no backend at all: left to whatever else is on the node.
    NoBackend => "connects_no_backend",
    /// A stale or torn slot was read and passed over.
    StaleSlot => "slots_stale",
    /// Session affinity named a usable backend.
    AffinityHit => "affinity_hits",
    Established => "connects_established",
    Refused => "connects_refused",
    TimedOut => "connects_timed_out",
    Unreachable => "connects_unreachable",
    /// The application gave up itself.
    Abandoned => "connects_abandoned",
    /// An established connection was reset: counted, nothing is taken out for it.
    Reset => "connections_reset",
    ReboundRst => "rebinds_rst",
    ReboundIcmp => "rebinds_icmp",
    ReboundSilent => "rebinds_silent",
    ReboundCollision => "rebinds_collision",
    /// No backend was left, or the limit of replays was reached: the answer went through.
    Exhausted => "rebinds_exhausted",
    /// `REBINDS` or `SOCKETS` was full or failed: the answer went through.
    RebindFailed => "rebinds_failed",
    /// A RST or ICMP error that does not prove it saw the SYN.
    Forged => "answers_rejected",
    /// Packets of a peer that a flow has left.
    StalePacket => "stale_packets",
    Suspected => "suspected",
    /// The floor forbade a suspicion.
    SuspectFloor => "suspect_floor",
    Recovered => "recovered",
    StopSignal => "stop_signals",
    ListenerOpened => "listeners_opened",
    ListenerClosed => "listeners_closed",
    /// `EVENTS` was full; what the event told is in the maps all the same.
    EventsLost => "events_lost",
    /// Connects that were led to the agent's listener in the pod.
    Tunnelled => "connects_tunnelled",
    /// There was no such listener: the connect went to its destination directly, which takes plaintext.
    TunnelAbsent => "connects_tunnel_absent",
    /// Plaintext that was kept out of a strict pod.
    PlaintextRefused => "plaintext_refused",
    /// Plaintext that was led to the agent's listener, which asks the policies.
    PlaintextCaptured => "plaintext_captured",
    /// A map other than `EVENTS` refused an entry.
    MapFull => "map_full",
}

/// Sizes of the maps that hold desired state, unless the agent's configuration says otherwise.
pub const MAX_FRONTENDS: u32 = 65_536;
pub const MAX_SERVICES: u32 = 65_536;
pub const MAX_SLOTS: u32 = 524_288;
pub const MAX_BACKENDS: u32 = 262_144;
pub const MAX_PODS: u32 = 4_096;
pub const MAX_LISTENERS: u32 = 65_536;
pub const MAX_AFFINITY: u32 = 65_536;
pub const MAX_SUSPECTS: u32 = 16_384;
pub const MAX_REBINDS: u32 = 131_072;
pub const MAX_MESH: u32 = 262_144;
/// Connections between the SYN and the agent's accept(), or the application's.
pub const MAX_LOCAL_CONNECTIONS: u32 = 65_536;
/// By the pods' addresses.
pub const MAX_INBOUND: u32 = 4 * MAX_PODS;
/// Bytes of the `EVENTS` ring.
pub const EVENTS_BYTES: u32 = 1 << 20;

macro_rules! sizes {
    ($($ty:ty = $size:literal),* $(,)?) => {
        $(const _: () = assert!(size_of::<$ty>() == $size);)*

        /// What the layout hash of the state maps is computed over: every type with its size.
        pub const LAYOUT: &str = concat!($(stringify!($ty), "=", $size, ";"),*);

        #[cfg(feature = "user")]
        mod pod {
            use super::*;
            // SAFETY: every type is #[repr(C)] integers and arrays of them, without implicit padding
            // (sizes asserted above), so any bit pattern is valid and every byte is initialised.
            $(unsafe impl aya::Pod for $ty {})*
        }
    };
}

sizes! {
    Addr = 16,
    Endpoint = 20,
    Frontend = 8,
    Service = 24,
    SlotKey = 8,
    Slot = 16,
    Backend = 40,
    Pod = 24,
    ListenerKey = 32,
    AffinityKey = 16,
    Affinity = 24,
    SuspectKey = 16,
    Suspects = 16,
    Socket = 160,
    UdpPeer = 60,
    UdpSocket = 488,
    MeshAddress = 8,
    LocalConnection = 32,
    Tunnelled = 40,
    FlowKey = 36,
    Rebind = 40,
    Settings = 40,
    Event = 64,
}
