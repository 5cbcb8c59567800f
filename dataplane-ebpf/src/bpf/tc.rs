//! The tc programs: what leaves and what comes in on the client's own interface.

use aya_ebpf::{btf_maps::PerCpuArray, helpers::bpf_ktime_get_coarse_ns, macros::btf_map};
use dataplane_ebpf::{
    abi::{
        CAUSE_COLLISION, CAUSE_ICMP, CAUSE_RST, CAUSE_SILENT, Endpoint, FlowKey, LAYER_REBIND, PROTO_TCP, ROLE_FORWARD,
        ROLE_REVERSE, SOCKET_REBOUND, SOCKET_SYN, Settings, Socket, Stat,
    },
    flow::{SynKnown, SynLaw, SynSeen, Verdict, Way, syn_seen, verdict},
    packet::{
        ETHERTYPE_IPV4_BE, ETHERTYPE_IPV6_BE, PROTO_ICMP, PROTO_ICMPV6, Quote, TCP_ACK, TCP_LEN, TCP_RST, is_syn,
        quotes, refuses,
    },
};

use crate::{
    cell,
    maps::{count, settings},
    rebind::{
        Target, any_rebound, describe, entry, hitless_alive, hitless_forget, is_ours, move_flow, moved, sender,
        socket_of, touch, touch_time,
    },
    skb::{
        DROP, Head, PASS, Segment, Skb, hitless_become_syn, hitless_rewrite, hitless_rewrite_quote, hitless_send,
        read_quote, save_options,
    },
};

/// What is known of the packet in hand. Not on the stack, of which the verifier allows 512 bytes to a whole chain
/// of calls. Each CPU has one packet in hand: the hooks run with softirqs off, and a redirect is done after them.
#[repr(C)]
pub struct Work {
    segment: Segment,
    /// The segment's flow, with the peer that the socket believes in.
    believed: FlowKey,
    /// The other half of the flow's entry.
    to: Endpoint,
    target: Target,
}

#[btf_map]
static WORK: PerCpuArray<Work, 1> = PerCpuArray::new();

#[inline(always)]
fn work() -> Option<&'static mut Work> {
    // SAFETY: checked by the verifier; see `Work` for why nobody else has it.
    unsafe { WORK.get_ptr_mut(0)?.as_mut() }
}

/// A packet leaves the client. `NODE`: the interface is the node's own, and pods' packets pass it too.
#[inline(always)]
pub fn egress<const NODE: bool>(skb: Skb) -> i32 {
    let mark = skb.mark();
    if mark != 0
        && let Some(settings) = settings()
        && settings.mark != 0
        && mark & settings.mark == settings.mark
    {
        // Our own, on its second way out.
        skb.set_mark(mark & !settings.mark);
        return PASS;
    }
    match skb.protocol() {
        ETHERTYPE_IPV4_BE => egress_ip::<true, NODE>(skb),
        ETHERTYPE_IPV6_BE => egress_ip::<false, NODE>(skb),
        _ => PASS,
    }
}

#[inline(always)]
fn egress_ip<const V4: bool, const NODE: bool>(skb: Skb) -> i32 {
    let Some((_, PROTO_TCP)) = Head::<V4>::of(skb) else { return PASS };
    let Some(head) = Head::<V4>::with(skb, TCP_LEN) else { return PASS };
    let syn = is_syn(head.tcp_flags());
    if !syn && !any_rebound() {
        return PASS;
    }
    let Some(work) = work() else { return PASS };
    head.segment(Way::Out, &mut work.segment);
    if syn {
        return egress_syn::<NODE>(skb, work);
    }
    let Some(found) = entry(&work.segment.flow, NODE) else { return PASS };
    let (role, _) = describe(Some(found), &mut work.to);
    if !matches!(verdict(role, Way::Out), Verdict::ToPresent) {
        return PASS;
    }
    touch(found, Way::Out, &work.segment, &work.to);
    forward(skb, work)
}

/// Sends a packet of a moved flow to the present peer, `work.to`.
#[inline(always)]
fn forward(skb: Skb, work: &mut Work) -> i32 {
    let Some(settings) = settings() else { return PASS };
    if hitless_rewrite(skb.0, &raw const work.segment.flow, &raw const work.to, 1) != 0 {
        count(Stat::RebindFailed);
        return DROP;
    }
    work.segment.flow.peer = work.to.addr;
    work.segment.flow.peer_port_be = work.to.port_be;
    hitless_send(skb.0, &raw const work.segment.flow, settings.mark)
}

/// A SYN leaves: saved, counted, moved when its peer is silent.
#[inline(always)]
fn egress_syn<const NODE: bool>(skb: Skb, work: &mut Work) -> i32 {
    let Some(settings) = settings() else { return PASS };
    let from = sender(skb.socket());
    let (mut role, isn) = describe(entry(&work.segment.flow, NODE), &mut work.to);
    if role != ROLE_FORWARD {
        role = 0;
    }
    let back = if any_rebound() { taken::<NODE>(work) } else { 0 };
    let ours = !from.storage.is_null() && is_ours(settings, from.storage);
    if role == 0 && back == 0 && !ours {
        return PASS;
    }
    let real = from.connecting();
    // A packet keeps its socket across network namespaces: on a node's interface it may be a pod's.
    if NODE && real && !socket_of(skb.0, &work.segment.flow).connecting() {
        return PASS;
    }
    if role == ROLE_FORWARD && isn != work.segment.seq {
        // Another connect on the same ports: what was known is history. Not on the word of a forged SYN.
        if !real {
            return PASS;
        }
        hitless_forget(&raw const work.segment.flow, 0);
        role = 0;
    }
    let mut collides = false;
    if role == 0 && back != 0 {
        if !real {
            return PASS;
        }
        // What is moved to this peer, or has left it, is another flow of this client's port. (A flow that
        // has left may live on elsewhere; this one needs to hear the peer.)
        collides = back == ROLE_REVERSE && hitless_alive(skb.0, &raw const work.believed) != 0;
        if !collides {
            hitless_forget(&raw const work.segment.flow, 1);
        }
    }
    if ours {
        let cause = match track(skb, &work.segment, from.storage, settings) {
            Some(_) if collides => CAUSE_COLLISION,
            Some(SynSeen::Silent) => CAUSE_SILENT,
            _ => 0,
        };
        if cause != 0
            && move_flow::<NODE>(skb.0, from.storage, &work.segment.flow, cause, &mut work.target) == moved::YES
        {
            role = ROLE_FORWARD;
            work.to.addr = work.target.flow.peer;
            work.to.port_be = work.target.flow.peer_port_be;
        }
    }
    match role {
        ROLE_FORWARD => forward(skb, work),
        // The ports belong to a moved connection with this peer: an answer would find that one.
        _ if collides => DROP,
        _ => PASS,
    }
}

/// The role of what comes back on the tuple of a SYN; the flow it belongs to is put into `work.believed`.
#[inline(always)]
fn taken<const NODE: bool>(work: &mut Work) -> u8 {
    let mut owner = Endpoint::default();
    let (role, _) = describe(entry(&work.segment.flow.reversed(), NODE), &mut owner);
    work.believed = work.segment.flow;
    work.believed.peer = owner.addr;
    work.believed.peer_port_be = owner.port_be;
    role
}

/// Saves or counts a SYN. `None`: it cannot be replayed.
#[inline(always)]
fn track(skb: Skb, segment: &Segment, socket: *mut Socket, settings: &Settings) -> Option<SynSeen> {
    if settings.layers & LAYER_REBIND == 0 {
        return None;
    }
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    // SAFETY: the verifier checks the storage; a socket sends one SYN at a time.
    unsafe {
        let flags = cell::read(&raw const (*socket).flags);
        if segment.payload != 0 {
            // TCP Fast Open: the data went to the first peer.
            (&raw mut (*socket).flags).write_volatile(flags & !SOCKET_SYN);
            return None;
        }
        let known = SynKnown {
            flags,
            isn: cell::read(&raw const (*socket).isn),
            syns: cell::read(&raw const (*socket).syns),
            last_ns: cell::read(&raw const (*socket).syn_ns),
        };
        let law = SynLaw { limit: settings.syn_limit, spacing_ns: settings.syn_spacing_ns };
        let seen = syn_seen(known, segment.seq, now, law);
        match seen {
            SynSeen::Echo => return Some(seen),
            SynSeen::First => {
                // Not to be believed while it changes.
                (&raw mut (*socket).flags).write_volatile(flags & !SOCKET_SYN);
                if !save_options(skb, segment, socket) {
                    count(Stat::RebindFailed);
                    return None;
                }
                (&raw mut (*socket).isn).write_volatile(segment.seq);
                (&raw mut (*socket).window_be).write_volatile(segment.window_be);
                (&raw mut (*socket).traffic_class).write_volatile(segment.traffic_class);
                (&raw mut (*socket).ttl).write_volatile(segment.ttl);
                (&raw mut (*socket).tcp_flags).write_volatile(segment.flags);
                (&raw mut (*socket).syns).write_volatile(1);
                (&raw mut (*socket).flags).write_volatile(flags | SOCKET_SYN);
            }
            SynSeen::Again(n) => (&raw mut (*socket).syns).write_volatile(n),
            SynSeen::Silent => (&raw mut (*socket).syns).write_volatile(known.syns.saturating_add(1)),
        }
        (&raw mut (*socket).syn_ns).write_volatile(now);
        Some(seen)
    }
}

/// A packet comes to the client, `NODE` as in [`egress`].
#[inline(always)]
pub fn ingress<const NODE: bool>(skb: Skb) -> i32 {
    match skb.protocol() {
        ETHERTYPE_IPV4_BE => ingress_ip::<true, NODE>(skb),
        ETHERTYPE_IPV6_BE => ingress_ip::<false, NODE>(skb),
        _ => PASS,
    }
}

#[inline(always)]
fn ingress_ip<const V4: bool, const NODE: bool>(skb: Skb) -> i32 {
    match Head::<V4>::of(skb) {
        Some((_, PROTO_TCP)) => {
            let Some(head) = Head::<V4>::with(skb, TCP_LEN) else { return PASS };
            if head.tcp_flags() & TCP_RST == 0 && !any_rebound() {
                return PASS;
            }
            let Some(work) = work() else { return PASS };
            head.segment(Way::In, &mut work.segment);
            ingress_tcp::<NODE>(skb, work)
        }
        Some((_, protocol)) if protocol == if V4 { PROTO_ICMP } else { PROTO_ICMPV6 } => {
            let Some(head) = Head::<V4>::with(skb, 8) else { return PASS };
            let (kind, code) = head.icmp();
            let quote = quotes(V4, kind, code);
            if quote == Quote::None || quote == Quote::Other && !any_rebound() {
                return PASS;
            }
            let told = head.destination();
            let Some(work) = work() else { return PASS };
            if !read_quote(skb, &told, &mut work.segment) {
                return PASS;
            }
            ingress_icmp::<NODE>(skb, work, quote)
        }
        _ => PASS,
    }
}

#[inline(always)]
fn ingress_tcp<const NODE: bool>(skb: Skb, work: &mut Work) -> i32 {
    let found = entry(&work.segment.flow.reversed(), NODE);
    let (role, _) = describe(found, &mut work.to);
    let verdict = verdict(role, Way::In);
    if let (Verdict::Drop, Some(found)) = (verdict, found) {
        touch_time(found);
        count(Stat::StalePacket);
        return DROP;
    }
    if work.segment.flags & (TCP_RST | TCP_ACK) == TCP_RST | TCP_ACK {
        match replay::<NODE>(skb, work, role, CAUSE_RST) {
            Replay::Done(action) => return action,
            // The kernel knows it for a forgery by the same means.
            Replay::Forged if verdict == Verdict::FromFirst => return back(skb, work),
            Replay::Forged | Replay::No => {}
        }
    }
    match (verdict, found) {
        (Verdict::FromFirst, Some(found)) => {
            touch(found, Way::In, &work.segment, &work.to);
            back(skb, work)
        }
        _ => PASS,
    }
}

/// Gives a packet of a moved flow to the socket as if from the first peer, `work.to`.
#[inline(always)]
fn back(skb: Skb, work: &Work) -> i32 {
    if hitless_rewrite(skb.0, &raw const work.segment.flow, &raw const work.to, 0) == 0 {
        PASS
    } else {
        count(Stat::RebindFailed);
        DROP
    }
}

#[inline(always)]
fn ingress_icmp<const NODE: bool>(skb: Skb, work: &mut Work, quote: Quote) -> i32 {
    let (role, _) = describe(entry(&work.segment.flow.reversed(), NODE), &mut work.to);
    let verdict = verdict(role, Way::In);
    if verdict == Verdict::Drop {
        count(Stat::StalePacket);
        return DROP;
    }
    if quote == Quote::Unreachable {
        // The quoted sequence number proves what the acknowledgement of a RST does.
        work.segment.ack = work.segment.seq.wrapping_add(1);
        work.segment.flags = TCP_RST | TCP_ACK;
        if let Replay::Done(action) = replay::<NODE>(skb, work, role, CAUSE_ICMP) {
            return action;
        }
    }
    if verdict == Verdict::FromFirst
        && hitless_rewrite_quote(skb.0, &raw const work.segment.flow, &raw const work.to) != 0
    {
        count(Stat::RebindFailed);
        return DROP;
    }
    PASS
}

enum Replay {
    /// The packet is dealt with.
    Done(i32),
    /// It does not prove that it saw the SYN.
    Forged,
    /// Nothing to replay, or nowhere to.
    No,
}

/// Turns an answer that refuses a SYN into that SYN, towards another backend.
#[inline(always)]
fn replay<const NODE: bool>(skb: Skb, work: &mut Work, role: u8, cause: u32) -> Replay {
    let Some(settings) = settings() else { return Replay::No };
    if settings.layers & LAYER_REBIND == 0 {
        return Replay::No;
    }
    work.believed = work.segment.flow;
    if role == ROLE_REVERSE {
        work.believed.peer = work.to.addr;
        work.believed.peer_port_be = work.to.port_be;
    }
    let socket = socket_of(skb.0, &work.believed).storage;
    if socket.is_null() || !is_ours(settings, socket) {
        return Replay::No;
    }
    // SAFETY: not null.
    let (flags, isn) = unsafe { (cell::read(&raw const (*socket).flags), cell::read(&raw const (*socket).isn)) };
    if flags & SOCKET_SYN == 0 {
        return Replay::No;
    }
    if flags & SOCKET_REBOUND != 0 && role != ROLE_REVERSE {
        // Said once more by the first peer, which this connect has left.
        count(Stat::StalePacket);
        return Replay::Done(DROP);
    }
    if !refuses(isn, work.segment.flags, work.segment.ack) {
        count(Stat::Forged);
        return Replay::Forged;
    }
    match move_flow::<NODE>(skb.0, socket, &work.believed, cause, &mut work.target) {
        moved::YES => {}
        moved::BUSY => return Replay::Done(DROP),
        _ => return Replay::No,
    }
    let flow = &raw const work.target.flow;
    if hitless_become_syn(skb.0, flow, socket, u32::from(cause == CAUSE_RST)) != 0 {
        // The retransmission will find the flow moved.
        count(Stat::RebindFailed);
        return Replay::Done(DROP);
    }
    Replay::Done(hitless_send(skb.0, flow, settings.mark))
}
