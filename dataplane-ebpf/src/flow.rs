//! What becomes of a packet of a moved flow, and of a SYN: the decisions of the tc programs.

use crate::{
    abi::{
        REBIND_ESTABLISHED, REBIND_FIN_CLIENT, REBIND_FIN_PEER, REBIND_RST, ROLE_FORWARD, ROLE_REVERSE, ROLE_STALE,
        SOCKET_SYN,
    },
    packet::{TCP_FIN, TCP_RST},
};

/// Which way a packet crosses the client's interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the client.
    Out,
    /// To the client.
    In,
}

/// What to do with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is nobody's business here.
    Pass,
    /// Rewrite its destination to the present peer.
    ToPresent,
    /// Rewrite its source to the peer that the socket believes in.
    FromFirst,
    /// It comes from a peer that the flow has left.
    Drop,
}

/// The verdict on a packet (other than a SYN) whose key has an entry of `role`; 0 is no entry. A pod that is
/// client and backend at once meets keys of others' flows the wrong way round: nothing to it.
#[inline(always)]
pub const fn verdict(role: u8, way: Way) -> Verdict {
    match (way, role) {
        (Way::Out, ROLE_FORWARD) => Verdict::ToPresent,
        (Way::In, ROLE_REVERSE) => Verdict::FromFirst,
        (Way::In, ROLE_STALE) => Verdict::Drop,
        _ => Verdict::Pass,
    }
}

/// `Rebind::closing` after another packet. Bits set on the word of an incoming packet are taken back by
/// a later one that contradicts them: anybody may forge a RST or a FIN, but the true peer goes on talking.
#[inline(always)]
pub const fn closing(before: u8, way: Way, tcp_flags: u8, payload: bool) -> u8 {
    let rst = tcp_flags & TCP_RST != 0;
    let fin = tcp_flags & TCP_FIN != 0;
    let after = if rst { before | REBIND_RST } else { before & !REBIND_RST };
    match way {
        // The client's own words are final, and only after the handshake it sends anything but a SYN.
        Way::Out if rst => after,
        Way::Out if fin => after | REBIND_ESTABLISHED | REBIND_FIN_CLIENT,
        Way::Out => after | REBIND_ESTABLISHED,
        Way::In if fin => after | REBIND_FIN_PEER,
        Way::In if payload => after & !REBIND_FIN_PEER,
        Way::In => after,
    }
}

/// What a SYN that leaves is to its socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SynSeen {
    /// The first of this connect: save it.
    First,
    /// The n-th to the present peer.
    Again(u32),
    /// The same SYN, met again on another device; a retransmission whose timer began before the last replay; or
    /// one that answers an answer (a peer in TIME-WAIT acknowledges what it remembers, the client resets that and
    /// sends its SYN again after two ticks: `tcp_rcv_synsent_state_process()`): not counted.
    Echo,
    /// The limit is reached: the peer is silent.
    Silent,
}

/// What the socket's storage knows of its SYN.
#[derive(Clone, Copy, Debug)]
pub struct SynKnown {
    /// `SOCKET_*`.
    pub flags: u32,
    pub isn: u32,
    pub syns: u32,
    pub last_ns: u64,
}

/// How SYNs are counted: `Settings::syn_limit` and `Settings::syn_spacing_ns`.
#[derive(Clone, Copy, Debug)]
pub struct SynLaw {
    /// 0 is none.
    pub limit: u32,
    /// SYNs closer than this are one.
    pub spacing_ns: u32,
}

/// Sorts a SYN with sequence number `isn`.
#[inline(always)]
pub const fn syn_seen(known: SynKnown, isn: u32, now_ns: u64, law: SynLaw) -> SynSeen {
    if known.flags & SOCKET_SYN == 0 || known.isn != isn {
        return SynSeen::First;
    }
    if now_ns.saturating_sub(known.last_ns) < law.spacing_ns as u64 {
        return SynSeen::Echo;
    }
    let syns = known.syns.saturating_add(1);
    if law.limit != 0 && syns >= law.limit { SynSeen::Silent } else { SynSeen::Again(syns) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{TCP_ACK, TCP_SYN};
    use proptest::prelude::*;

    #[test]
    fn each_role_has_one_verdict_either_way() {
        for (role, out, back) in [
            (0, Verdict::Pass, Verdict::Pass),
            (ROLE_FORWARD, Verdict::ToPresent, Verdict::Pass),
            (ROLE_REVERSE, Verdict::Pass, Verdict::FromFirst),
            (ROLE_STALE, Verdict::Pass, Verdict::Drop),
        ] {
            assert_eq!(verdict(role, Way::Out), out, "role {role}");
            assert_eq!(verdict(role, Way::In), back, "role {role}");
        }
    }

    const fn known(isn: u32, syns: u32, last_ns: u64) -> SynKnown {
        SynKnown { flags: SOCKET_SYN, isn, syns, last_ns }
    }

    const fn law(limit: u32) -> SynLaw {
        SynLaw { limit, spacing_ns: 100_000_000 }
    }

    #[test]
    fn the_first_retransmission_to_a_silent_peer_moves() {
        let first = SynKnown { flags: 0, isn: 0, syns: 0, last_ns: 0 };
        assert_eq!(syn_seen(first, 7, 1, law(2)), SynSeen::First);
        assert_eq!(syn_seen(known(7, 1, 0), 7, 200_000_000, law(2)), SynSeen::Silent);
        assert_eq!(syn_seen(known(7, 1, 0), 7, 200_000_000, law(3)), SynSeen::Again(2));
        assert_eq!(syn_seen(known(7, 9, 0), 7, 200_000_000, law(0)), SynSeen::Again(10));
    }

    #[test]
    fn a_syn_seen_on_two_devices_counts_once() {
        assert_eq!(syn_seen(known(7, 1, 1_000), 7, 3_000, law(2)), SynSeen::Echo);
    }

    #[test]
    fn a_syn_sent_again_after_an_answer_from_time_wait_is_no_silence() {
        assert_eq!(syn_seen(known(7, 1, 0), 7, 8_000_000, law(2)), SynSeen::Echo);
    }

    #[test]
    fn another_isn_is_another_connect() {
        assert_eq!(syn_seen(known(7, 3, 0), 8, 200_000_000, law(2)), SynSeen::First);
    }

    proptest! {
        #[test]
        fn a_forged_end_is_taken_back_by_the_true_peer(before: u8, flags: u8) {
            let forged = closing(before, Way::In, flags, false);
            let after = closing(forged, Way::In, TCP_ACK, true);
            prop_assert_eq!(after & (REBIND_RST | REBIND_FIN_PEER), 0);
            prop_assert_eq!(after & (REBIND_FIN_CLIENT | REBIND_ESTABLISHED), before & (REBIND_FIN_CLIENT | REBIND_ESTABLISHED));
        }

        #[test]
        fn no_packet_from_outside_establishes(before: u8, flags: u8, payload: bool) {
            let after = closing(before & !(REBIND_ESTABLISHED | REBIND_FIN_CLIENT), Way::In, flags | TCP_SYN, payload);
            prop_assert_eq!(after & (REBIND_ESTABLISHED | REBIND_FIN_CLIENT), 0);
        }
    }
}
