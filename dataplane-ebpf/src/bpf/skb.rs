//! A packet at a tc hook: reading its headers, rewriting one peer, turning it into a SYN, sending it.

use aya_ebpf::{
    bindings::{
        __sk_buff, BPF_F_INVALIDATE_HASH, BPF_F_PSEUDO_HDR, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_SUCCESS, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_fib_lookup as FibParams, bpf_sock,
    },
    helpers::{
        bpf_csum_update, bpf_fib_lookup, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect_neigh,
        bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
    },
};
use dataplane_ebpf::{
    abi::{Addr, Endpoint, FlowKey, MAX_TCP_OPTIONS, PROTO_TCP, Socket},
    flow::Way,
    packet::{self, Checksum, ETH_LEN, IPV4_LEN, IPV6_LEN, Syn, TCP_LEN, TCP_QUOTED},
};

use crate::cell;

/// Leave the packet to whatever else is attached here.
pub const PASS: i32 = TC_ACT_UNSPEC;
pub const DROP: i32 = TC_ACT_SHOT as i32;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// `EINVAL` as helpers return it.
const EINVAL: i64 = -22;

/// Where the transport header begins: no IPv4 options, no IPv6 extension headers.
#[inline(always)]
pub const fn l4(v4: bool) -> usize {
    ETH_LEN + if v4 { IPV4_LEN } else { IPV6_LEN }
}

#[derive(Clone, Copy)]
pub struct Skb(pub *mut __sk_buff);

impl Skb {
    #[inline(always)]
    pub fn mark(self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.0).mark }
    }

    #[inline(always)]
    pub fn set_mark(self, mark: u32) {
        // SAFETY: as in `mark`; the field is writable.
        unsafe { (*self.0).mark = mark };
    }

    /// The ethertype, in network order.
    #[inline(always)]
    pub fn protocol(self) -> u16 {
        // SAFETY: as in `mark`.
        unsafe { (*self.0).protocol as u16 }
    }

    /// The socket that sent it, or null.
    #[inline(always)]
    pub fn socket(self) -> *mut bpf_sock {
        // SAFETY: as in `mark`.
        unsafe { (*self.0).__bindgen_anon_2.sk }
    }

    /// The first `len` bytes for direct access, pulled together if need be.
    #[inline(always)]
    fn linear(self, len: usize) -> Option<*const u8> {
        if let Some(data) = self.window(len) {
            return Some(data);
        }
        // SAFETY: a helper on the context.
        if unsafe { bpf_skb_pull_data(self.0, len as u32) } != 0 {
            return None;
        }
        self.window(len)
    }

    /// Direct access to `len` bytes, as far as they are in one piece. The bounds are read anew each time: the
    /// verifier believes a comparison only for the very pointer that was compared.
    #[inline(always)]
    fn window(self, len: usize) -> Option<*const u8> {
        // SAFETY: as in `mark`.
        let (data, end) = unsafe {
            (cell::read(&raw const (*self.0).data) as usize, cell::read(&raw const (*self.0).data_end) as usize)
        };
        if data + len <= end { Some(data as *const u8) } else { None }
    }

    /// Writes `value` at `offset`.
    #[inline(always)]
    fn store<T>(self, offset: usize, value: &T) -> bool {
        // SAFETY: a helper on the context; the source is initialised and as long as said.
        unsafe {
            bpf_skb_store_bytes(
                self.0,
                offset as u32,
                core::ptr::from_ref(value).cast(),
                size_of::<T>() as u32,
                u64::from(BPF_F_INVALIDATE_HASH),
            ) == 0
        }
    }

    /// Copies what is at `offset`.
    #[inline(always)]
    fn load<const N: usize>(self, offset: usize) -> Option<[u32; N]> {
        let mut words = [0_u32; N];
        // SAFETY: a helper on the context; the target is as long as said.
        let got = unsafe {
            bpf_skb_load_bytes(self.0.cast(), offset as u32, words.as_mut_ptr().cast(), (N * size_of::<u32>()) as u32)
        };
        if got == 0 { Some(words) } else { None }
    }
}

/// The Ethernet and IP header and the first bytes behind them, in the packet.
pub struct Head<const V4: bool>(*const u8);

impl<const V4: bool> Head<V4> {
    const L4: usize = l4(V4);

    /// The head of a whole IP packet, if its transport is plainly behind the IP header and at least
    /// `min(proto)` bytes long; `None` for everything else.
    #[inline(always)]
    pub fn of(skb: Skb) -> Option<(Self, u8)> {
        let head = Self(skb.linear(Self::L4)?);
        // L3 devices have no Ethernet header: their packets do not look like this.
        let ethertype = if V4 { packet::ETHERTYPE_IPV4_BE } else { packet::ETHERTYPE_IPV6_BE };
        if head.at::<u16>(ETH_LEN - 2) != ethertype {
            return None;
        }
        if !V4 {
            return Some((Self(head.0), head.at::<u8>(ETH_LEN + 6)));
        }
        // A fragment other than the first has no transport header, the first not all of its packet.
        if head.at::<u8>(ETH_LEN) != 0x45 || head.at::<u16>(ETH_LEN + 6) & 0x3fff_u16.to_be() != 0 {
            return None;
        }
        let protocol = head.at::<u8>(ETH_LEN + 9);
        Some((head, protocol))
    }

    /// The head again, with `more` bytes of transport.
    #[inline(always)]
    pub fn with(skb: Skb, more: usize) -> Option<Self> {
        Some(Self(skb.linear(Self::L4 + more)?))
    }

    /// A field. Headers are aligned to 4 bytes where that matters (NET_IP_ALIGN).
    #[inline(always)]
    fn at<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: all callers stay within the bytes that `linear` was asked for, as the verifier checks.
        unsafe { self.0.add(offset).cast::<T>().read() }
    }

    #[inline(always)]
    fn addr(&self, offset: usize) -> Addr {
        if V4 {
            Addr::v4(self.at(offset))
        } else {
            Addr([self.at(offset), self.at(offset + 4), self.at(offset + 8), self.at(offset + 12)])
        }
    }

    #[inline(always)]
    pub fn source(&self) -> Addr {
        self.addr(if V4 { ETH_LEN + 12 } else { ETH_LEN + 8 })
    }

    #[inline(always)]
    pub fn destination(&self) -> Addr {
        self.addr(if V4 { ETH_LEN + 16 } else { ETH_LEN + 24 })
    }

    /// The flags octet of the TCP header.
    #[inline(always)]
    pub fn tcp_flags(&self) -> u8 {
        self.at(Self::L4 + 13)
    }

    /// Type and code of an ICMP message.
    #[inline(always)]
    pub fn icmp(&self) -> (u8, u8) {
        (self.at(Self::L4), self.at(Self::L4 + 1))
    }

    /// Reads the segment, as seen from the client.
    #[inline(always)]
    pub fn segment(&self, way: Way, segment: &mut Segment) {
        let (client, peer, client_port, peer_port) = match way {
            Way::Out => (self.source(), self.destination(), 0, 2),
            Way::In => (self.destination(), self.source(), 2, 0),
        };
        segment.flow = FlowKey {
            client,
            peer,
            client_port_be: self.at(Self::L4 + client_port),
            peer_port_be: self.at(Self::L4 + peer_port),
        };
        segment.seq = u32::from_be(self.at(Self::L4 + 4));
        segment.ack = u32::from_be(self.at(Self::L4 + 8));
        segment.window_be = self.at(Self::L4 + 14);
        segment.flags = self.tcp_flags();
        segment.header_len = (self.at::<u8>(Self::L4 + 12) >> 4) * 4;
        let tcp_len = if V4 {
            segment.traffic_class = self.at(ETH_LEN + 1);
            segment.ttl = self.at(ETH_LEN + 8);
            u16::from_be(self.at(ETH_LEN + 2)).wrapping_sub(IPV4_LEN as u16)
        } else {
            let (high, low) = (self.at::<u8>(ETH_LEN), self.at::<u8>(ETH_LEN + 1));
            segment.traffic_class = high << 4 | low >> 4;
            segment.ttl = self.at(ETH_LEN + 7);
            u16::from_be(self.at(ETH_LEN + 4))
        };
        // The length of a GSO packet beyond 64 KiB is said to be 0 (BIG TCP): it wraps, or is 0.
        segment.payload = u8::from(tcp_len != u16::from(segment.header_len));
    }
}

/// What a TCP segment says, seen from the client.
#[repr(C)]
pub struct Segment {
    pub flow: FlowKey,
    pub seq: u32,
    pub ack: u32,
    pub window_be: u16,
    pub flags: u8,
    pub header_len: u8,
    pub traffic_class: u8,
    pub ttl: u8,
    /// Has it any?
    pub payload: u8,
}

/// Reads the packet that an ICMP error quotes, a segment of TCP that `flow.client` sent, as far as flow and
/// sequence number. `told` is whom the error is told to. False unless it is the beginning of a TCP packet without
/// IP options or extension headers, sent by the very same.
#[inline(always)]
pub fn read_quote(skb: Skb, told: &Addr, segment: &mut Segment) -> bool {
    let inner = l4(told.is_v4()) + 8;
    let flow = &mut segment.flow;
    let tcp = if told.is_v4() {
        let Some(ip) = skb.load::<{ IPV4_LEN / 4 }>(inner) else { return false };
        let [version, _, _, _] = ip[0].to_ne_bytes();
        let [_, _, fragment_high, fragment_low] = ip[1].to_ne_bytes();
        let [_, protocol, _, _] = ip[2].to_ne_bytes();
        if version != 0x45 || protocol != PROTO_TCP || fragment_high & 0x3f != 0 || fragment_low != 0 {
            return false;
        }
        flow.client = Addr::v4(ip[3]);
        flow.peer = Addr::v4(ip[4]);
        inner + IPV4_LEN
    } else {
        let Some(ip) = skb.load::<{ IPV6_LEN / 4 }>(inner) else { return false };
        let [_, _, protocol, _] = ip[1].to_ne_bytes();
        if protocol != PROTO_TCP {
            return false;
        }
        flow.client = Addr([ip[2], ip[3], ip[4], ip[5]]);
        flow.peer = Addr([ip[6], ip[7], ip[8], ip[9]]);
        inner + IPV6_LEN
    };
    if flow.client != *told {
        return false;
    }
    let Some([ports, seq]) = skb.load::<{ TCP_QUOTED / 4 }>(tcp) else { return false };
    let [a, b, c, d] = ports.to_ne_bytes();
    flow.client_port_be = u16::from_ne_bytes([a, b]);
    flow.peer_port_be = u16::from_ne_bytes([c, d]);
    segment.seq = u32::from_be(seq);
    true
}

/// Saves the options of the SYN in `skb`. False if they are odd.
#[inline(always)]
pub fn save_options(skb: Skb, segment: &Segment, socket: *mut Socket) -> bool {
    let len = u32::from(segment.header_len).wrapping_sub(TCP_LEN as u32);
    if len > MAX_TCP_OPTIONS as u32 {
        return false;
    }
    // SAFETY: the verifier checks that the bytes lie within the storage.
    unsafe {
        (&raw mut (*socket).options).write_volatile([0; MAX_TCP_OPTIONS]);
        (&raw mut (*socket).options_len).write_volatile(len as u8);
        let Some(len) = cell::within(len, MAX_TCP_OPTIONS as u32) else { return true };
        bpf_skb_load_bytes(
            skb.0.cast(),
            (l4(segment.flow.client.is_v4()) + TCP_LEN) as u32,
            (&raw mut (*socket).options).cast(),
            len,
        ) == 0
    }
}

/// Rewrites the peer of a TCP packet, `flow.peer`, to `to`: its destination on the way out, its source
/// on the way in. Right for any kind of checksum offload and for GSO packets. Returns 0, or not.
///
/// This and the functions like it are global (of BTF linkage): the verifier checks each once by itself. Hence the
/// raw pointers, which it makes us compare with null.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_rewrite(skb: *mut __sk_buff, flow: *const FlowKey, to: *const Endpoint, out: u32) -> i32 {
    // SAFETY: the verifier checks what callers pass.
    let (Some(flow), Some(to)) = (unsafe { (flow.as_ref(), to.as_ref()) }) else { return -1 };
    let skb = Skb(skb);
    let v4 = flow.client.is_v4();
    let out = out != 0;
    let change = packet::difference(&flow.peer, &to.addr);
    let check = l4(v4) + 16;
    // SAFETY: helpers on the context.
    let mut failed = unsafe {
        bpf_l4_csum_replace(skb.0, check as u32, 0, u64::from(change), u64::from(BPF_F_PSEUDO_HDR))
            | bpf_l4_csum_replace(skb.0, check as u32, u64::from(flow.peer_port_be), u64::from(to.port_be), 2)
    };
    let address = if v4 { to.addr.0[3] } else { 0 };
    let stored = if v4 {
        // SAFETY: a helper on the context.
        failed |= unsafe { bpf_l3_csum_replace(skb.0, (ETH_LEN + 10) as u32, 0, u64::from(change), 0) };
        skb.store(ETH_LEN + if out { 16 } else { 12 }, &address)
    } else {
        // IPv6 has no header checksum that would make up for the address in a device's sum over the whole
        // packet (CHECKSUM_COMPLETE), yet the helper above assumes one. BPF_F_IPV6 (6.16) says the same.
        // SAFETY: a helper on the context; it fails where there is no such sum.
        unsafe { bpf_csum_update(skb.0, change) };
        skb.store(ETH_LEN + if out { 24 } else { 8 }, &to.addr)
    };
    let port_at = l4(v4) + if out { 2 } else { 0 };
    if failed == 0 && stored && skb.store(port_at, &to.port_be) { 0 } else { -1 }
}

/// Rewrites the peer inside an ICMP error, so that it speaks of the peer that the socket believes in.
/// Returns 0, or not.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_rewrite_quote(skb: *mut __sk_buff, flow: *const FlowKey, to: *const Endpoint) -> i32 {
    // SAFETY: the verifier checks what callers pass.
    let (Some(flow), Some(to)) = (unsafe { (flow.as_ref(), to.as_ref()) }) else { return -1 };
    let skb = Skb(skb);
    let v4 = flow.client.is_v4();
    let change = packet::difference(&flow.peer, &to.addr);
    let icmp = l4(v4);
    let inner = icmp + 8;
    let mut failed = 0;
    let stored = if v4 {
        let address = to.addr.0[3];
        // SAFETY: a helper on the context.
        failed |= unsafe { bpf_l3_csum_replace(skb.0, (inner + 10) as u32, 0, u64::from(change), 0) };
        skb.store(inner + 16, &address)
    } else {
        // No inner header checksum makes up for the address: the message's own sum must.
        // SAFETY: a helper on the context.
        failed |= unsafe { bpf_l4_csum_replace(skb.0, (icmp + 2) as u32, 0, u64::from(change), 0) };
        skb.store(inner + 24, &to.addr)
    };
    // SAFETY: a helper on the context.
    failed |= unsafe {
        bpf_l4_csum_replace(skb.0, (icmp + 2) as u32, u64::from(flow.peer_port_be), u64::from(to.port_be), 2)
    };
    let port_at = inner + if v4 { IPV4_LEN } else { IPV6_LEN } + 2;
    if failed == 0 && stored && skb.store(port_at, &to.port_be) { 0 } else { -1 }
}

/// Turns the packet, a RST or an ICMP error, into the saved SYN of `flow`. Returns 0, or not: then
/// it is no packet any more.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_become_syn(
    skb: *mut __sk_buff,
    flow: *const FlowKey,
    socket: *const Socket,
    tcp: u32,
) -> i32 {
    // SAFETY: the verifier checks what callers pass.
    let (Some(flow), Some(_)) = (unsafe { (flow.as_ref(), socket.as_ref()) }) else { return -1 };
    let skb = Skb(skb);
    let v4 = flow.client.is_v4();
    let l4 = l4(v4);
    // SAFETY: the storage is checked by the verifier.
    let (syn, options, traffic_class, ttl) = unsafe {
        let options = (&raw const (*socket).options).cast::<[u32; MAX_TCP_OPTIONS / 4]>();
        (
            Syn::of(&*socket),
            options,
            cell::read(&raw const (*socket).traffic_class),
            cell::read(&raw const (*socket).ttl),
        )
    };
    let options_len = u32::from(syn.options_len) & 0x3c;
    if options_len > MAX_TCP_OPTIONS as u32 {
        return -1;
    }
    // Trimming into the checksum field is refused if and only if a device has yet to fill it in: the only
    // way for BPF to learn of CHECKSUM_PARTIAL. (__bpf_skb_min_len; kernels leave RSTs of IPv6 like that.)
    let probe = if tcp != 0 { l4 + 17 } else { l4 + 3 };
    // SAFETY: a helper on the context.
    let checksum = match unsafe { bpf_skb_change_tail(skb.0, probe as u32, 0) } {
        0 => Checksum::Full,
        EINVAL if tcp != 0 => Checksum::Partial,
        _ => return -1,
    };
    // Growing drops a device's sum over the whole packet (CHECKSUM_COMPLETE), too.
    // SAFETY: a helper on the context.
    if unsafe { bpf_skb_change_tail(skb.0, (l4 + TCP_LEN) as u32 + options_len, 0) } != 0 {
        return -1;
    }
    let ip = if v4 {
        skb.store(ETH_LEN, &packet::ipv4_header(flow, traffic_class, ttl, syn.len()))
    } else {
        skb.store(ETH_LEN, &packet::ipv6_header(flow, traffic_class, ttl, syn.len()))
    };
    // SAFETY: `options` are ten words of the storage, aligned to 4.
    let header = syn.header(flow, unsafe { &*options }, checksum);
    if !ip || !skb.store(l4, &header) {
        return -1;
    }
    let Some(options_len) = cell::within(options_len, MAX_TCP_OPTIONS as u32) else { return 0 };
    // SAFETY: a helper on the context; the source is the storage's options.
    unsafe { bpf_skb_store_bytes(skb.0, (l4 + TCP_LEN) as u32, options.cast(), options_len, 0) as i32 }
}

/// Sends the packet, now of `flow`, out towards its peer with `mark`, so that the egress program lets it
/// pass. The next hop is not the one that the packet was meant for or came from.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_send(skb: *mut __sk_buff, flow: *const FlowKey, mark: u32) -> i32 {
    // SAFETY: the verifier checks what callers pass.
    let Some(flow) = (unsafe { flow.as_ref() }) else { return DROP };
    let skb = Skb(skb);
    skb.set_mark(skb.mark() | mark);
    // SAFETY: as in `mark`.
    let here = unsafe { (*skb.0).ifindex };
    // SAFETY: integers all over.
    let mut fib: FibParams = unsafe { core::mem::zeroed() };
    fib.l4_protocol = PROTO_TCP;
    fib.sport = flow.client_port_be;
    fib.dport = flow.peer_port_be;
    fib.ifindex = here;
    if flow.client.is_v4() {
        fib.family = AF_INET;
        fib.__bindgen_anon_3.ipv4_src = flow.client.0[3];
        fib.__bindgen_anon_4.ipv4_dst = flow.peer.0[3];
    } else {
        fib.family = AF_INET6;
        fib.__bindgen_anon_3.ipv6_src = flow.client.0;
        fib.__bindgen_anon_4.ipv6_dst = flow.peer.0;
    }
    // On a node the way to the new peer may leave by another device. In a pod forwarding is off, the lookup says
    // so at once, and there is one way only.
    // SAFETY: a helper on the context.
    let found = unsafe { bpf_fib_lookup(skb.0.cast(), &raw mut fib, size_of::<FibParams>() as i32, 0) } as u32;
    let ifindex = match found {
        BPF_FIB_LKUP_RET_SUCCESS | BPF_FIB_LKUP_RET_NO_NEIGH | BPF_FIB_LKUP_RET_FRAG_NEEDED => fib.ifindex,
        _ => here,
    };
    // SAFETY: a helper.
    unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
}
