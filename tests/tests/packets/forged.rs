//! What an attacker off the path can send, and what comes of it: nothing. Packets run through the
//! programs by PROG_TEST_RUN, in the network namespace of a real socket that is connecting.

use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
};

use aya::{
    TestRun as _, TestRunOptions,
    maps::{HashMap, Map, MapData, SkStorage},
    programs::SchedClassifier,
};
use dataplane_ebpf::{
    abi::{
        Addr, FlowKey, REBIND_ESTABLISHED, REBIND_FIN_PEER, REBIND_RST, ROLE_FORWARD, ROLE_REVERSE, Rebind, SOCKET_SYN,
        Socket, Stat,
    },
    packet::{PROTO_ICMP, PROTO_ICMPV6, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN},
};
use dataplane_user::kernel::Tcx;
use hitless_tests::lab::{
    Topology,
    net::{Family, Netns},
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::SockaddrStorage,
};

use crate::bench::{Bench, kind};

const PASS: i32 = -1;
const DROP: i32 = 2;
const REDIRECT: i32 = 7;

/// A socket that connects to a backend that says nothing, and the programs around it.
pub struct Stage {
    pub bench: Bench,
    netns: Netns,
    ifindex: u32,
    pub ingress: SchedClassifier,
    pub egress: SchedClassifier,
    sockets: SkStorage<MapData, Socket>,
    rebinds: HashMap<MapData, FlowKey, Rebind>,
}

impl Stage {
    fn new() -> Self {
        Self::with(true)
    }

    /// Whether the first backend is silent, or refuses.
    pub fn with(silent: bool) -> Self {
        // clsact, because the agent then pins the programs: `tcq` the ingress one, `tcf` the egress one.
        let mut bench = Bench::with(Topology::Bridge, &[2, 2], Tcx::Off);
        // Retransmissions must not move the flow in the middle of a test.
        bench.settings(|settings| settings.syn_limit = 0);
        if silent {
            bench.backends[0].cut_cable().expect("cut");
        }
        let netns = bench.client.place.netns.clone();
        let ifindex = netns.enter(|| nix::net::if_::if_nametoindex("eth0")).expect("enter").expect("eth0");
        let root = bench.lab.dir().join("bpf/hitless");
        let pinned = |kind: &str| root.join(format!("links/{kind}-{:x}-{ifindex}", bench.client.cookie));
        let program = |kind: &str| SchedClassifier::from_pin(pinned(kind)).expect("pinned");
        let flows: PathBuf = std::fs::read_dir(&root)
            .expect("installed")
            .map(|entry| entry.expect("listed").path())
            .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("flows-")))
            .expect("flow maps");
        let map = |name: &str| MapData::from_pin(flows.join(name)).expect("pinned");
        let sockets = SkStorage::try_from(Map::SkStorage(map("SOCKETS"))).expect("a socket storage");
        let rebinds = HashMap::try_from(Map::LruHashMap(map("REBINDS"))).expect("a hash map");
        let (ingress, egress) = (program("tcq"), program("tcf"));
        Self { netns, ifindex, ingress, egress, sockets, rebinds, bench }
    }

    /// A flow of the client that nothing is known of.
    pub fn known_flow(&self, family: Family) -> FlowKey {
        let client = crate::bench::endpoint(self.bench.client.addresses()[family as usize], 50_000);
        let peer = crate::bench::endpoint(self.bench.backends[1].addresses()[family as usize], 8080);
        FlowKey { client: client.addr, peer: peer.addr, client_port_be: client.port_be, peer_port_be: peer.port_be }
    }

    /// Begins a connect; its SYN has left when this returns.
    fn connect(&self, family: Family) -> Connecting {
        let to = Bench::service(family);
        let socket = self.bench.client.place.socket(kind(to)).expect("a socket");
        fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a socket");
        let begun = nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(to));
        assert_eq!(begun, Err(Errno::EINPROGRESS));
        let known = self.known(&socket);
        assert_ne!(known.flags & SOCKET_SYN, 0, "the SYN was seen leaving");
        let own: nix::sys::socket::SockaddrStorage =
            nix::sys::socket::getsockname(socket.as_raw_fd()).expect("a socket");
        let port = own.as_sockaddr_in().map(|a| a.port()).or(own.as_sockaddr_in6().map(|a| a.port())).expect("IP");
        let client = crate::bench::endpoint(self.bench.client.addresses()[family as usize], port);
        let flow = FlowKey {
            client: client.addr,
            peer: known.peer.addr,
            client_port_be: client.port_be,
            peer_port_be: known.peer.port_be,
        };
        Connecting { socket, known, flow }
    }

    fn known(&self, socket: &OwnedFd) -> Socket {
        self.sockets.get(&socket.as_raw_fd(), 0).expect("the connect hook left its storage")
    }

    fn entry(&self, flow: &FlowKey) -> Option<Rebind> {
        self.rebinds.get(flow, 0).ok()
    }

    /// Runs a packet through a program; returns its verdict, the packet after it, and the mark after it.
    fn run(&self, program: &SchedClassifier, packet: &[u8], mark: u32) -> (i32, Vec<u8>, u32) {
        // struct __sk_buff: mark is its third word, ifindex its eleventh.
        let mut context = [0_u8; 192];
        context[8..12].copy_from_slice(&mark.to_ne_bytes());
        context[40..44].copy_from_slice(&self.ifindex.to_ne_bytes());
        let (mut out, mut context_out) = (vec![0; 4096], [0_u8; 192]);
        let mut options = TestRunOptions::new();
        options.data_in = Some(packet);
        options.data_out = Some(&mut out);
        options.ctx_in = Some(&context);
        options.ctx_out = Some(&mut context_out);
        let result = self.netns.enter(move || program.test_run(options)).expect("enter").expect("runs");
        let mark = u32::from_ne_bytes(context_out[8..12].try_into().expect("four bytes"));
        out.truncate(result.data_size_out as usize);
        (result.return_value as i32, out, mark)
    }

    fn comes(&self, packet: &[u8]) -> (i32, Vec<u8>) {
        let (verdict, after, _) = self.run(&self.ingress, packet, 0);
        (verdict, after)
    }

    /// Passes, as it came.
    fn ignores(&self, packet: &[u8], why: &str) {
        let (verdict, after) = self.comes(packet);
        assert_eq!(verdict, PASS, "{why}");
        assert!(after == packet, "{why}: it was changed");
    }
}

struct Connecting {
    socket: OwnedFd,
    known: Socket,
    flow: FlowKey,
}

impl Connecting {
    fn v4(&self) -> bool {
        self.flow.client.is_v4()
    }

    /// From the peer to the client.
    fn back(&self) -> FlowKey {
        self.flow.reversed()
    }

    /// The SYN as it left, to whichever peer.
    fn syn(&self) -> Vec<u8> {
        let options = &self.known.options[..usize::from(self.known.options_len)];
        tcp(&self.flow, self.known.tcp_flags, self.known.isn, 0, self.known.window_be, options, &[])
    }

    fn reset(&self, flags: u8, ack: u32) -> Vec<u8> {
        ip(&self.back(), 6, &tcp(&self.back(), flags, 0, ack, 0, &[], &[]))
    }

    /// An ICMP "unreachable" that quotes the SYN with this sequence number.
    fn unreachable(&self, from: &Addr, quoted: &FlowKey, seq: u32) -> Vec<u8> {
        let syn = tcp(quoted, TCP_SYN, seq, 0, self.known.window_be, &[], &[]);
        let inner = ip(quoted, 6, &syn)[14..].to_vec();
        icmp(from, &self.flow.client, if self.v4() { (3, 1) } else { (1, 3) }, &inner)
    }
}

fn bytes(addr: &Addr) -> Vec<u8> {
    let words = if addr.is_v4() { &addr.0[3..] } else { &addr.0[..] };
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|b| u32::from(u16::from_be_bytes([b[0], b.get(1).copied().unwrap_or(0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn pseudo(from: &Addr, to: &Addr, protocol: u8, length: usize) -> Vec<u8> {
    [bytes(from), bytes(to), (length as u32).to_be_bytes().to_vec(), vec![0, 0, 0, protocol]].concat()
}

/// A TCP segment of `flow` (client to peer), checksum included.
pub fn tcp(flow: &FlowKey, flags: u8, seq: u32, ack: u32, window_be: u16, options: &[u8], data: &[u8]) -> Vec<u8> {
    let mut segment = [flow.client_port_be.to_ne_bytes(), flow.peer_port_be.to_ne_bytes()].concat();
    segment.extend(seq.to_be_bytes());
    segment.extend(ack.to_be_bytes());
    segment.extend([(20 + options.len() as u8) << 2, flags]);
    segment.extend(window_be.to_ne_bytes());
    segment.extend([0; 4]);
    segment.extend(options);
    segment.extend(data);
    let sum = checksum(&[pseudo(&flow.client, &flow.peer, 6, segment.len()), segment.clone()].concat());
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

/// An Ethernet frame with an IP packet of `flow`'s addresses.
pub fn ip(flow: &FlowKey, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let v4 = flow.client.is_v4();
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let mut header = if v4 {
        let [high, low] = (20 + payload.len() as u16).to_be_bytes();
        vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, protocol, 0, 0]
    } else {
        let [high, low] = (payload.len() as u16).to_be_bytes();
        vec![0x60, 0, 0, 0, high, low, protocol, 64]
    };
    frame.extend(if v4 { [8, 0] } else { [0x86, 0xdd] });
    header.extend(bytes(&flow.client));
    header.extend(bytes(&flow.peer));
    if v4 {
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
    }
    [frame, header, payload.to_vec()].concat()
}

fn icmp(from: &Addr, to: &Addr, (kind, code): (u8, u8), quoted: &[u8]) -> Vec<u8> {
    let mut message = [vec![kind, code, 0, 0, 0, 0, 0, 0], quoted.to_vec()].concat();
    let protocol = if to.is_v4() { PROTO_ICMP } else { PROTO_ICMPV6 };
    let covered = match to.is_v4() {
        true => message.clone(),
        false => [pseudo(from, to, PROTO_ICMPV6, message.len()), message.clone()].concat(),
    };
    message[2..4].copy_from_slice(&checksum(&covered).to_be_bytes());
    ip(&FlowKey { client: *from, peer: *to, ..FlowKey::default() }, protocol, &message)
}

/// The TCP segment in a frame that must be whole: addresses, checksums and all.
fn segment_of<'a>(frame: &'a [u8], flow: &FlowKey) -> &'a [u8] {
    let header = if flow.client.is_v4() { 20 } else { 40 };
    let (ip, segment) = frame[14..].split_at(header);
    if header == 20 {
        assert_eq!(checksum(ip), 0, "IPv4 header checksum");
        assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), frame.len() - 14);
    } else {
        assert_eq!(usize::from(u16::from_be_bytes([ip[4], ip[5]])), segment.len());
    }
    let addresses = &ip[if header == 20 { 12 } else { 8 }..];
    assert_eq!(addresses, [bytes(&flow.client), bytes(&flow.peer)].concat());
    let covered = [pseudo(&flow.client, &flow.peer, 6, segment.len()), segment.to_vec()].concat();
    assert_eq!(checksum(&covered), 0, "TCP checksum");
    segment
}

#[test]
fn only_a_reset_that_acknowledges_the_syn_moves_the_connect() {
    let stage = Stage::new();
    for family in Family::BOTH {
        let c = stage.connect(family);
        let isn = c.known.isn;
        let refusal = TCP_RST | TCP_ACK;
        let forged = stage.bench.stat(Stat::Forged);
        // The sequence number is what someone off the path does not know: any other acknowledgement is a guess.
        stage.ignores(&c.reset(refusal, isn), "acknowledges less than the SYN");
        stage.ignores(&c.reset(refusal, isn.wrapping_add(2)), "acknowledges more than the SYN");
        stage.ignores(&c.reset(refusal, 0), "acknowledges nothing");
        assert_eq!(stage.bench.stat(Stat::Forged) - forged, 3, "each is counted");
        // RFC 9293: without ACK a RST says nothing to a socket in SYN-SENT.
        stage.ignores(&c.reset(TCP_RST, isn.wrapping_add(1)), "a RST without an acknowledgement");
        // The right number, but another socket's ports, or from another host.
        let mut other = Connecting { flow: c.flow, known: c.known, socket: c.socket.try_clone().expect("a socket") };
        other.flow.client_port_be ^= 0x0100;
        stage.ignores(&other.reset(refusal, isn.wrapping_add(1)), "another port");
        other.flow = c.flow;
        other.flow.peer.0[3] ^= 0x0300_0000;
        stage.ignores(&other.reset(refusal, isn.wrapping_add(1)), "another host");
        assert_eq!((stage.known(&c.socket).replays, stage.bench.stat(Stat::ReboundRst)), (0, family as u64));

        // What the peer itself would say: the same packet goes on as the SYN, to the other backend.
        let refused = c.reset(refusal, isn.wrapping_add(1));
        let (verdict, frame) = stage.comes(&refused);
        assert_eq!(verdict, REDIRECT);
        let known = stage.known(&c.socket);
        assert_eq!((known.replays, known.tried[1]), (1, known.backend));
        let present = crate::bench::endpoint(
            stage.bench.backends[1].addresses()[family as usize],
            u16::from_be(c.flow.peer_port_be),
        );
        let there = FlowKey { peer: present.addr, peer_port_be: present.port_be, ..c.flow };
        let mut expected = c.syn();
        // But for the checksum, which is of the new address.
        let segment = segment_of(&frame, &there);
        expected[16..18].copy_from_slice(&segment[16..18]);
        assert_eq!(segment, expected, "options and all");
        assert_eq!(stage.entry(&c.flow).map(|e| (e.role, e.to, e.isn)), Some((ROLE_FORWARD, present.addr, isn)));
        assert_eq!(stage.entry(&there.reversed()).map(|e| (e.role, e.to)), Some((ROLE_REVERSE, c.flow.peer)));

        // Said twice: the flow has left this peer, whatever it says.
        assert_eq!(stage.comes(&refused).0, DROP);
        assert_eq!(stage.known(&c.socket).replays, 1);
    }
}

#[test]
fn only_an_unreachable_that_quotes_the_syn_moves_the_connect() {
    let stage = Stage::new();
    for family in Family::BOTH {
        let c = stage.connect(family);
        let isn = c.known.isn;
        let mut router = c.flow.client;
        router.0[3] ^= 0x0500_0000;
        let before = stage.bench.stat(Stat::Forged);
        // Whoever did not see the SYN can only guess its number.
        stage.ignores(&c.unreachable(&router, &c.flow, isn.wrapping_add(1)), "another sequence number");
        assert_eq!(stage.bench.stat(Stat::Forged) - before, 1);
        // A quote of somebody else's packet is told to the wrong one.
        let mut strange = c.flow;
        strange.client.0[3] ^= 0x0700_0000;
        stage.ignores(&c.unreachable(&router, &strange, isn), "quotes another host's packet");
        // Of a fragment the ports may be anything.
        if c.v4() {
            let mut fragment = c.unreachable(&router, &c.flow, isn);
            fragment[14 + 20 + 8 + 7] = 1;
            stage.ignores(&fragment, "quotes a fragment");
        }
        // Too short to quote the sequence number.
        let whole = c.unreachable(&router, &c.flow, isn);
        let ports = 14 + if c.v4() { 20 + 8 + 20 } else { 40 + 8 + 40 } + 4;
        stage.ignores(&whole[..ports], "quotes the ports only");
        // "Too big" says that the path works.
        let inner = &whole[14 + if c.v4() { 28 } else { 48 }..];
        stage.ignores(&icmp(&router, &c.flow.client, if c.v4() { (3, 4) } else { (2, 0) }, inner), "path MTU");
        assert_eq!(stage.known(&c.socket).replays, 0);

        let (verdict, frame) = stage.comes(&whole);
        assert_eq!(verdict, REDIRECT);
        let known = stage.known(&c.socket);
        assert_eq!(known.replays, 1);
        let peer = crate::bench::endpoint(stage.bench.backends[1].addresses()[family as usize], 8080);
        let there = FlowKey { peer: peer.addr, ..c.flow };
        let segment = segment_of(&frame, &there);
        assert_eq!(segment[4..8], isn.to_be_bytes());
        assert_eq!(segment.len(), 20 + usize::from(c.known.options_len));

        // The first peer was alive after all: its answer comes too late, and must not be taken for the other's.
        let late = ip(&c.back(), 6, &tcp(&c.back(), TCP_SYN | TCP_ACK, 5, isn.wrapping_add(1), 9, &[], &[]));
        assert_eq!(stage.comes(&late).0, DROP);
    }
    assert_eq!(stage.bench.stat(Stat::ReboundIcmp), 2);
}

#[test]
fn nothing_that_comes_from_outside_ends_a_moved_flow() {
    let stage = Stage::new();
    for family in Family::BOTH {
        let c = stage.connect(family);
        assert_eq!(stage.comes(&c.reset(TCP_RST | TCP_ACK, c.known.isn.wrapping_add(1))).0, REDIRECT);
        let present = crate::bench::endpoint(stage.bench.backends[1].addresses()[family as usize], 8080);
        let there = FlowKey { peer: present.addr, ..c.flow };
        let says = |flags: u8, ack: u32, data: &[u8]| {
            let back = there.reversed();
            let (verdict, frame) = stage.comes(&ip(&back, 6, &tcp(&back, flags, 77, ack, 0, &[], data)));
            assert_eq!(verdict, PASS);
            // To the socket it all comes from the peer that it believes in, and it judges for itself.
            segment_of(&frame, &c.flow.reversed());
            stage.entry(&there.reversed()).expect("still there")
        };
        let entry = says(TCP_SYN | TCP_ACK, 1, &[]);
        assert_eq!((entry.role, entry.closing), (ROLE_REVERSE, 0), "a forged SYN-ACK establishes nothing");
        let entry = says(TCP_RST | TCP_ACK, 1, &[]);
        assert_eq!((entry.role, entry.closing), (ROLE_REVERSE, 0), "a RST that refuses nothing");
        let entry = says(TCP_RST, 0, &[]);
        assert_eq!(entry.closing, REBIND_RST, "may be true: the flow lingers");
        let entry = says(TCP_ACK | TCP_FIN, 1, b"x");
        assert_eq!(entry.closing, REBIND_FIN_PEER, "it was not: somebody talks");
        let entry = says(TCP_ACK, 1, b"y");
        assert_eq!(entry.closing & (REBIND_FIN_PEER | REBIND_ESTABLISHED), 0);
        assert_eq!(stage.known(&c.socket).replays, 1);
        assert_eq!(stage.entry(&c.flow).map(|entry| entry.role), Some(ROLE_FORWARD));

        // A SYN that no socket sent cannot take the entries away either.
        let syn = ip(&c.flow, 6, &tcp(&c.flow, TCP_SYN, c.known.isn ^ 1, 0, 0, &[], &[]));
        assert_eq!(stage.run(&stage.egress, &syn, 0).0, PASS);
        let syn = ip(&there, 6, &tcp(&there, TCP_SYN, c.known.isn ^ 1, 0, 0, &[], &[]));
        assert_eq!(stage.run(&stage.egress, &syn, 0).0, PASS);
        assert_eq!(stage.entry(&there.reversed()).map(|entry| entry.role), Some(ROLE_REVERSE));
        assert_eq!(stage.entry(&c.flow).map(|entry| entry.role), Some(ROLE_FORWARD));
    }
}

#[test]
fn a_packet_of_our_own_passes_without_its_mark() {
    let stage = Stage::new();
    let mark = stage.bench.opened.kernel.settings().mark;
    for family in Family::BOTH {
        let c = stage.connect(family);
        assert_eq!(stage.comes(&c.reset(TCP_RST | TCP_ACK, c.known.isn.wrapping_add(1))).0, REDIRECT);
        let frame = ip(&c.flow, 6, &tcp(&c.flow, TCP_ACK, 1, 1, 0, &[], b"data"));
        // With the mark it was here before; other people's bits stay.
        assert_eq!(stage.run(&stage.egress, &frame, mark | 1), (PASS, frame.clone(), 1));
        // Half of the mark is not the mark, and the flow's packet goes to the present peer.
        let half = mark & mark.wrapping_neg();
        let (verdict, out, marked) = stage.run(&stage.egress, &frame, half);
        assert_eq!((verdict, marked), (REDIRECT, mark));
        let peer = crate::bench::endpoint(stage.bench.backends[1].addresses()[family as usize], 8080);
        segment_of(&out, &FlowKey { peer: peer.addr, ..c.flow });
    }
}
