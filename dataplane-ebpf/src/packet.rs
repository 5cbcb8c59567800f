//! TCP/IP headers as words: what a SYN looks like, and the sums that hold a packet together.
//!
//! Headers are arrays of 32-bit words in memory order, each built from its bytes, so that the same
//! code writes them in the kernel and checks them on the host. The Internet checksum (RFC 1071) does
//! not mind the byte order: a sum of words in memory order folds to a checksum in memory order.

use crate::abi::{Addr, FlowKey, MAX_TCP_OPTIONS, PROTO_TCP, Socket};

pub const ETH_LEN: usize = 14;
pub const IPV4_LEN: usize = 20;
pub const IPV6_LEN: usize = 40;
pub const TCP_LEN: usize = 20;
/// The part of a TCP header that an ICMP error quotes at least (RFC 792): ports and sequence number.
pub const TCP_QUOTED: usize = 8;

/// `ETH_P_*` as they are in the packet.
pub const ETHERTYPE_IPV4_BE: u16 = 0x0800_u16.to_be();
pub const ETHERTYPE_IPV6_BE: u16 = 0x86dd_u16.to_be();

pub const PROTO_ICMP: u8 = 1;
pub const PROTO_ICMPV6: u8 = 58;

pub const TCP_FIN: u8 = 1 << 0;
pub const TCP_SYN: u8 = 1 << 1;
pub const TCP_RST: u8 = 1 << 2;
pub const TCP_ACK: u8 = 1 << 4;

pub const ICMP_UNREACHABLE: u8 = 3;
/// "Fragmentation needed" is an unreachable that is not one (RFC 1191).
pub const ICMP_FRAG_NEEDED: u8 = 4;
pub const ICMP_TIME_EXCEEDED: u8 = 11;
pub const ICMP_PARAMETER_PROBLEM: u8 = 12;
pub const ICMPV6_UNREACHABLE: u8 = 1;
pub const ICMPV6_PARAMETER_PROBLEM: u8 = 4;

/// What an ICMP message says of the packet that it quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quote {
    /// Not an error message.
    None,
    /// The packet found nobody.
    Unreachable,
    /// Another error: path MTU, time exceeded, parameter problem.
    Other,
}

/// Sorts an ICMP message (RFC 792) or ICMPv6 message (RFC 4443).
#[inline(always)]
pub const fn quotes(v4: bool, kind: u8, code: u8) -> Quote {
    if v4 {
        match kind {
            ICMP_UNREACHABLE if code == ICMP_FRAG_NEEDED => Quote::Other,
            ICMP_UNREACHABLE => Quote::Unreachable,
            ICMP_TIME_EXCEEDED | ICMP_PARAMETER_PROBLEM => Quote::Other,
            _ => Quote::None,
        }
    } else {
        match kind {
            ICMPV6_UNREACHABLE => Quote::Unreachable,
            2..=ICMPV6_PARAMETER_PROBLEM => Quote::Other,
            _ => Quote::None,
        }
    }
}

/// Four bytes of a header.
#[inline(always)]
const fn word(a: u8, b: u8, c: u8, d: u8) -> u32 {
    u32::from_ne_bytes([a, b, c, d])
}

/// Two 16-bit fields of a header.
#[inline(always)]
const fn halves(first_be: u16, second_be: u16) -> u32 {
    let [a, b] = first_be.to_ne_bytes();
    let [c, d] = second_be.to_ne_bytes();
    word(a, b, c, d)
}

/// The sum of words, not yet folded. 2^32 words fit.
#[inline(always)]
pub fn sum(words: &[u32]) -> u64 {
    let mut sum = 0;
    for &word in words {
        sum += word as u64;
    }
    sum
}

/// A sum folded to 32 bits, as the kernel's `__wsum`.
#[inline(always)]
pub const fn fold32(sum: u64) -> u32 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum as u32
}

/// A sum folded to 16 bits, as the kernel's `csum_fold` without its complement. A fixed number of steps: the
/// verifier cannot follow a loop on the value.
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = fold32(sum);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// What replacing `old` by `new` adds to a sum over them.
#[inline(always)]
pub fn difference(old: &Addr, new: &Addr) -> u32 {
    let mut total = 0;
    for i in 0..4 {
        total += (new.0[i] as u64) + (!old.0[i] as u64);
    }
    fold32(total)
}

/// The sum of the pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1) of `length` bytes of TCP.
#[inline(always)]
pub fn pseudo_sum(source: &Addr, destination: &Addr, length: u32) -> u64 {
    let constant = (length.to_be() as u64) + ((PROTO_TCP as u32).to_be() as u64);
    if source.is_v4() {
        source.0[3] as u64 + destination.0[3] as u64 + constant
    } else {
        sum(&source.0) + sum(&destination.0) + constant
    }
}

/// How the TCP checksum of a packet is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// Complete in the header.
    Full,
    /// The header holds the pseudo-header's folded sum, a device adds the rest (`CHECKSUM_PARTIAL`).
    Partial,
}

/// The IPv4 header of a TCP packet with `length` bytes of TCP. An atomic datagram's
/// identification may be anything (RFC 6864 section 4.1).
#[inline(always)]
pub fn ipv4_header(flow: &FlowKey, traffic_class: u8, ttl: u8, length: u32) -> [u32; IPV4_LEN / 4] {
    let [high, low] = ((IPV4_LEN as u32 + length) as u16).to_be_bytes();
    let mut header = [
        word(0x45, traffic_class, high, low),
        // Don't fragment.
        word(0, 0, 0x40, 0),
        word(ttl, PROTO_TCP, 0, 0),
        flow.client.0[3],
        flow.peer.0[3],
    ];
    let check = !fold(sum(&header));
    header[2] = halves(halves_of(header[2]).0, check);
    header
}

/// The IPv6 header of a TCP packet with `length` bytes of TCP. The flow label is 0: the one of
/// the first SYN was a hash that named the first peer.
#[inline(always)]
pub fn ipv6_header(flow: &FlowKey, traffic_class: u8, ttl: u8, length: u32) -> [u32; IPV6_LEN / 4] {
    let [high, low] = (length as u16).to_be_bytes();
    let Addr([s0, s1, s2, s3]) = flow.client;
    let Addr([d0, d1, d2, d3]) = flow.peer;
    [
        word(0x60 | traffic_class >> 4, traffic_class << 4, 0, 0),
        word(high, low, PROTO_TCP, ttl),
        s0,
        s1,
        s2,
        s3,
        d0,
        d1,
        d2,
        d3,
    ]
}

/// The fields of a SYN that a replay repeats; its addresses and ports are the flow's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syn {
    pub isn: u32,
    pub window_be: u16,
    pub flags: u8,
    /// A multiple of 4, at most [`MAX_TCP_OPTIONS`].
    pub options_len: u8,
}

impl Syn {
    #[inline(always)]
    pub const fn of(socket: &Socket) -> Self {
        Self { isn: socket.isn, window_be: socket.window_be, flags: socket.tcp_flags, options_len: socket.options_len }
    }

    /// Bytes of TCP.
    #[inline(always)]
    pub const fn len(&self) -> u32 {
        TCP_LEN as u32 + self.options_len as u32
    }

    /// Never: a header has 20 bytes at least.
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// The TCP header of the SYN from `flow.client` to `flow.peer`. `options` beyond
    /// `options_len` are zero, so that all of them may be summed.
    #[inline(always)]
    pub fn header(
        &self,
        flow: &FlowKey,
        options: &[u32; MAX_TCP_OPTIONS / 4],
        checksum: Checksum,
    ) -> [u32; TCP_LEN / 4] {
        let mut header = [
            halves(flow.client_port_be, flow.peer_port_be),
            self.isn.to_be(),
            0,
            halves(u16::from_ne_bytes([(self.len() as u8 / 4) << 4, self.flags]), self.window_be),
            0,
        ];
        let pseudo = pseudo_sum(&flow.client, &flow.peer, self.len());
        let check = match checksum {
            Checksum::Full => !fold(pseudo + sum(&header) + sum(options)),
            Checksum::Partial => fold(pseudo),
        };
        header[4] = halves(check, 0);
        header
    }
}

/// The two halves of a word, in memory order.
#[inline(always)]
const fn halves_of(word: u32) -> (u16, u16) {
    let [a, b, c, d] = word.to_ne_bytes();
    (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]))
}

/// Does this answer prove that its sender saw the SYN? A RST must acknowledge exactly
/// that SYN (RFC 9293 section 3.10.7.3); nothing weaker may move a flow.
#[inline(always)]
pub const fn refuses(isn: u32, flags: u8, ack: u32) -> bool {
    flags & (TCP_RST | TCP_ACK) == TCP_RST | TCP_ACK && flags & TCP_SYN == 0 && ack == isn.wrapping_add(1)
}

/// A connection request, and nothing else.
#[inline(always)]
pub const fn is_syn(flags: u8) -> bool {
    flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN) == TCP_SYN
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 as it is written: 16-bit big-endian words, carry added as it appears.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum: u32 = 0;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            if sum > 0xffff {
                sum -= 0xffff;
            }
        }
        sum as u16
    }

    fn bytes(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_ne_bytes()).collect()
    }

    fn v6(bytes: [u8; 16]) -> Addr {
        let mut addr = Addr::default();
        for (word, chunk) in addr.0.iter_mut().zip(bytes.chunks(4)) {
            *word = u32::from_ne_bytes(chunk.try_into().unwrap());
        }
        addr
    }

    fn any_addr(v4: bool) -> impl Strategy<Value = Addr> {
        any::<[u8; 16]>().prop_map(move |b| {
            if v4 {
                Addr::v4(u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
            } else {
                v6({
                    let mut b = b;
                    b[0] = 0x20;
                    b
                })
            }
        })
    }

    fn any_flow() -> impl Strategy<Value = FlowKey> {
        any::<bool>().prop_flat_map(|v4| {
            (any_addr(v4), any_addr(v4), any::<u16>(), any::<u16>()).prop_map(
                |(client, peer, client_port_be, peer_port_be)| FlowKey { client, peer, client_port_be, peer_port_be },
            )
        })
    }

    fn address(addr: &Addr) -> Vec<u8> {
        if addr.is_v4() { bytes(&addr.0[3..]) } else { bytes(&addr.0) }
    }

    fn pseudo_header(flow: &FlowKey, length: u32) -> Vec<u8> {
        let mut out = [address(&flow.client), address(&flow.peer)].concat();
        out.extend(length.to_be_bytes());
        out.extend([0, 0, 0, PROTO_TCP]);
        out
    }

    proptest! {
        #[test]
        fn folding_agrees_with_the_rfc(words in proptest::collection::vec(any::<u32>(), 0..64)) {
            // 0 and 0xffff are the same number to the checksum.
            prop_assert_eq!(fold(sum(&words)).to_be() % 0xffff, naive(&bytes(&words)) % 0xffff);
        }

        #[test]
        fn a_difference_takes_one_sum_to_the_other(old in any_addr(false), new in any_addr(false), rest in any::<u32>()) {
            let before = u64::from(fold32(sum(&old.0) + u64::from(rest)));
            let after = fold(before + u64::from(difference(&old, &new)));
            prop_assert_eq!(after % 0xffff, fold(sum(&new.0) + u64::from(rest)) % 0xffff);
        }

        #[test]
        fn a_synthesised_syn_verifies_and_says_what_was_asked(
            flow in any_flow(), isn: u32, window_be: u16, ecn: bool, words in 0_usize..=10,
            options in any::<[u32; 10]>(), traffic_class: u8, ttl in 1_u8..,
        ) {
            let mut padded = [0; 10];
            padded[..words].copy_from_slice(&options[..words]);
            let flags = if ecn { TCP_SYN | 0xc0 } else { TCP_SYN };
            let syn = Syn { isn, window_be, flags, options_len: words as u8 * 4 };
            let tcp = [bytes(&syn.header(&flow, &padded, Checksum::Full)), bytes(&padded[..words])].concat();
            prop_assert_eq!(tcp.len() as u32, syn.len());
            let whole = [pseudo_header(&flow, syn.len()), tcp.clone()].concat();
            prop_assert_eq!(naive(&whole), 0xffff);
            prop_assert_eq!(&tcp[0..2], &flow.client_port_be.to_ne_bytes());
            prop_assert_eq!(&tcp[2..4], &flow.peer_port_be.to_ne_bytes());
            prop_assert_eq!(&tcp[4..8], &isn.to_be_bytes());
            prop_assert_eq!(usize::from(tcp[12] >> 4) * 4, tcp.len());
            prop_assert_eq!(tcp[13], flags);
            prop_assert_eq!(&tcp[14..16], &window_be.to_ne_bytes());

            let partial = bytes(&syn.header(&flow, &padded, Checksum::Partial));
            prop_assert_eq!(
                u16::from_be_bytes([partial[16], partial[17]]) % 0xffff,
                naive(&pseudo_header(&flow, syn.len())) % 0xffff
            );

            if flow.client.is_v4() {
                let ip = bytes(&ipv4_header(&flow, traffic_class, ttl, syn.len()));
                prop_assert_eq!(naive(&ip), 0xffff);
                prop_assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), 20 + tcp.len());
                prop_assert_eq!((ip[0], ip[1], ip[8], ip[9]), (0x45, traffic_class, ttl, PROTO_TCP));
            } else {
                let ip = bytes(&ipv6_header(&flow, traffic_class, ttl, syn.len()));
                prop_assert_eq!(ip[0], 0x60 | traffic_class >> 4);
                prop_assert_eq!(ip[1], traffic_class << 4);
                prop_assert_eq!(usize::from(u16::from_be_bytes([ip[4], ip[5]])), tcp.len());
                prop_assert_eq!((ip[6], ip[7]), (PROTO_TCP, ttl));
                prop_assert_eq!(&ip[8..24], &address(&flow.client)[..]);
                prop_assert_eq!(&ip[24..40], &address(&flow.peer)[..]);
            }
        }

        #[test]
        fn only_the_exact_acknowledgement_refuses(isn: u32, off in 1_u32..) {
            let reset = TCP_RST | TCP_ACK;
            prop_assert!(refuses(isn, reset, isn.wrapping_add(1)));
            prop_assert!(!refuses(isn, reset, isn.wrapping_add(1).wrapping_add(off)));
            prop_assert!(!refuses(isn, TCP_RST, isn.wrapping_add(1)));
            prop_assert!(!refuses(isn, TCP_ACK, isn.wrapping_add(1)));
            prop_assert!(!refuses(isn, reset | TCP_SYN, isn.wrapping_add(1)));
        }
    }

    #[test]
    fn the_acknowledgement_of_the_last_sequence_number_is_zero() {
        assert!(refuses(u32::MAX, TCP_RST | TCP_ACK, 0));
    }

    #[test]
    fn a_path_mtu_report_is_not_an_unreachable() {
        assert_eq!(quotes(true, 3, 4), Quote::Other);
        assert_eq!(quotes(false, 2, 0), Quote::Other);
        for code in [0, 1, 2, 3, 5, 9, 10, 13] {
            assert_eq!(quotes(true, 3, code), Quote::Unreachable, "RFC 792, RFC 1812: code {code}");
        }
        assert_eq!(quotes(false, 1, 4), Quote::Unreachable);
        assert_eq!(quotes(true, 8, 0), Quote::None, "an echo request");
        assert_eq!(quotes(false, 135, 0), Quote::None, "a neighbour solicitation");
    }
}
