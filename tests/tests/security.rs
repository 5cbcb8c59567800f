//! Who may move a flow or take a backend out: only who was asked.
//!
//! Each test first sends the forgery, which must change nothing, then what the true peer would have
//! sent: that it moves the flow shows that the forgery was well made but for the one thing.

use std::{
    net::{IpAddr, SocketAddr, TcpStream},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::Duration,
};

use anyhow::Result;
use hitless_tests::{
    lab::{
        Pod,
        control::Terms,
        net::Family,
        packets::{self, ACK, RST, SYN, Segment, Sniffer, unreachable},
        scene::{PORT, Scene, SceneSpec, who},
    },
    workload::sockets::Kind,
};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{SockaddrStorage, bind, connect, getsockopt, sockopt::SocketError},
};

/// A gateway whose connect to a silent pod is under way, and an attacker on its node.
struct Pending {
    scene: Scene,
    _gateway: Pod,
    attacker: Pod,
    raw: OwnedFd,
    connecting: OwnedFd,
    from: SocketAddr,
    to: SocketAddr,
    isn: u32,
}

const CLIENT_PORT: u16 = 41_000;

fn pending(family: Family) -> Result<Pending> {
    // Silence alone moves nothing here: only an answer may.
    let agent_args = vec!["--syn-limit".to_owned(), "0".to_owned()];
    let scene = Scene::new(&SceneSpec { layers: "l2,l3".into(), agent_args, ..SceneSpec::default() })?;
    let gateway = scene.lab.node(1).add_pod("gateway")?;
    scene.announce(&gateway, &Terms { gateway: true, ..Terms::default() })?;
    let attacker = scene.lab.node(1).add_pod("attacker")?;
    let (tcp, raw) = match family {
        Family::V4 => (Kind::Tcp4, Kind::Raw4),
        Family::V6 => (Kind::Tcp6, Kind::Raw6),
    };
    let raw = attacker.place.socket(raw)?;
    let address = |pod: &Pod| if family == Family::V4 { pod.v4() } else { pod.v6() };
    scene.webs[1].pod.cut_cable()?;
    let from = SocketAddr::new(address(&gateway), CLIENT_PORT);
    let to = SocketAddr::new(address(&scene.webs[1].pod), PORT);

    let sniffer = Sniffer::new(&gateway.place.netns)?;
    let connecting = gateway.place.socket(tcp)?;
    bind(connecting.as_raw_fd(), &SockaddrStorage::from(from))?;
    fcntl(&connecting, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    assert_eq!(connect(connecting.as_raw_fd(), &SockaddrStorage::from(to)), Err(Errno::EINPROGRESS));
    let isn = sniffer.syn_from(CLIENT_PORT)?;
    Ok(Pending { scene, _gateway: gateway, attacker, raw, connecting, from, to, isn })
}

impl Pending {
    fn send(&self, packet: &[u8]) -> Result<()> {
        packets::send(&self.raw, self.from.ip(), packet)
    }

    /// What the true peer might say.
    fn answer(&self, flags: u8, ack: u32) -> Segment {
        Segment { from: self.to, to: self.from, flags, seq: 0, ack }
    }

    /// Our SYN as somebody on the way would quote it.
    fn quoted(&self, seq: u32) -> Segment {
        Segment { from: self.from, to: self.to, flags: SYN, seq, ack: 0 }
    }

    fn finished(&self, within: Duration) -> bool {
        let mut fds = [PollFd::new(self.connecting.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::try_from(within).expect("short")).expect("poll") > 0
    }

    fn changes_nothing(&self, what: &str) -> Result<()> {
        assert!(!self.finished(Duration::from_millis(300)), "{what} ended the connect");
        assert_eq!(self.scene.rebound()?, 0, "{what} moved the flow");
        assert_eq!(self.scene.counter("suspected")?, 0, "{what} made a backend suspect");
        Ok(())
    }

    fn moves_the_flow(self) -> Result<()> {
        assert!(self.finished(Duration::from_secs(5)), "the true answer must move the flow");
        assert_eq!(getsockopt(&self.connecting, SocketError)?, 0);
        fcntl(&self.connecting, FcntlArg::F_SETFL(OFlag::empty()))?;
        let mut stream = TcpStream::from(self.connecting);
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        assert_eq!(who(&mut stream)?, "web-1");
        assert_eq!(self.scene.rebound()?, 1);
        assert_eq!(self.scene.counter("suspected")?, 1, "it takes the backend out as well");
        Ok(())
    }
}

fn a_reset_must_acknowledge_the_syn(family: Family) -> Result<()> {
    let pending = pending(family)?;
    for wrong in [pending.isn, pending.isn.wrapping_add(2), 0, pending.isn.wrapping_add(0x8000_0000)] {
        pending.send(&pending.answer(RST | ACK, wrong).packet())?;
    }
    // A RST without ACK proves nothing (RFC 9293 section 3.10.7.3).
    pending.send(&pending.answer(RST, pending.isn.wrapping_add(1)).packet())?;
    pending.changes_nothing("a reset that did not see the SYN")?;
    assert!(pending.scene.counter("answers_rejected")? > 0, "nobody looked at the forgeries");
    pending.send(&pending.answer(RST | ACK, pending.isn.wrapping_add(1)).packet())?;
    pending.moves_the_flow()
}

#[test]
fn a_reset_must_acknowledge_the_syn_over_ipv4() -> Result<()> {
    a_reset_must_acknowledge_the_syn(Family::V4)
}

#[test]
fn a_reset_must_acknowledge_the_syn_over_ipv6() -> Result<()> {
    a_reset_must_acknowledge_the_syn(Family::V6)
}

fn an_unreachable_must_quote_the_syn(family: Family) -> Result<()> {
    let pending = pending(family)?;
    let router: IpAddr = if family == Family::V4 { pending.attacker.v4() } else { pending.attacker.v6() };
    // The kernel itself takes ISN + 1 for a quote of this connection; hitless leaves that to it.
    for wrong in [pending.isn.wrapping_add(2), pending.isn.wrapping_sub(1), 0] {
        pending.send(&unreachable(router, &pending.quoted(wrong)))?;
    }
    let mut other_port = pending.quoted(pending.isn);
    other_port.to.set_port(PORT + 1);
    pending.send(&unreachable(router, &other_port))?;
    pending.changes_nothing("an ICMP error that did not see the SYN")?;
    pending.send(&unreachable(router, &pending.quoted(pending.isn)))?;
    pending.moves_the_flow()
}

#[test]
fn an_icmp_unreachable_must_quote_the_syn() -> Result<()> {
    an_unreachable_must_quote_the_syn(Family::V4)
}

#[test]
fn an_icmpv6_unreachable_must_quote_the_syn() -> Result<()> {
    an_unreachable_must_quote_the_syn(Family::V6)
}

#[test]
fn a_forged_syn_ack_neither_connects_nor_moves() -> Result<()> {
    for family in Family::BOTH {
        let pending = pending(family)?;
        pending.send(&pending.answer(SYN | ACK, pending.isn.wrapping_add(7)).packet())?;
        pending.changes_nothing("a SYN-ACK that did not see the SYN")?;
        pending.send(&pending.answer(RST | ACK, pending.isn.wrapping_add(1)).packet())?;
        pending.moves_the_flow()?;
    }
    Ok(())
}
