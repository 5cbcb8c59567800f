//! What is proved of each hook, and how: told apart so that one missing link fails one proof.

use std::{
    net::SocketAddr,
    thread::sleep,
    time::{Duration, Instant},
};

use dataplane_ebpf::{
    abi::{LAYER_CHOOSE, LAYER_KNOW, LAYER_REBIND, Settings, Stat},
    health::{Health, Input, State, ticks},
};

use super::{
    Agent, Error, HookProof, Outcome,
    process::Process,
    protocol::{Reply, Request},
    world::{B, S, World, mapped},
};
use crate::{kernel::monotonic_ns, registry::change::Change};

/// Longer than any local exchange, shorter than a SYN's second second.
const CONNECT_MS: u64 = 900;
const DATAGRAM_MS: u64 = 500;
/// For what a hook writes within the system call that was just made.
const SOON: Duration = Duration::from_millis(200);
/// The odds that the live backend is chosen at once are 1 to 65,535.
const ATTEMPTS: usize = 3;

/// A probe's outcome: what was seen, good or bad.
type Seen = Result<String, String>;

pub struct Proofs<'a> {
    pub agent: &'a Agent,
    pub process: &'a mut Process,
    pub world: World,
    pub settings: Settings,
    pub no_ipv6: Option<String>,
    pub proofs: Vec<HookProof>,
}

impl Proofs<'_> {
    /// Every hook, in the order in which one's failure explains the next's.
    pub fn all(&mut self) -> Result<(), Error> {
        for at in [B::Live4, B::Live6, B::Toggled] {
            self.serve(Request::Listen { at: at.at() })?;
        }
        for at in [B::Udp4, B::Udp6] {
            self.serve(Request::Echo { at: at.at() })?;
        }
        let tcp4 = self.connects("hitless_connect4", Some("hitless_getpeername4"), S::Tcp4.at(), B::Live4)?;
        let tcp6 = self.connects("hitless_connect6", Some("hitless_getpeername6"), S::Tcp6.at(), B::Live6)?;
        self.connects("hitless_connect6 (v4-mapped)", None, mapped(S::Tcp4.at()), B::Live4)?;
        self.datagrams("hitless_sendmsg4", "hitless_recvmsg4", "hitless_connect4 (UDP)", S::Udp4.at(), B::Udp4, tcp4)?;
        self.datagrams("hitless_sendmsg6", "hitless_recvmsg6", "hitless_connect6 (UDP)", S::Udp6.at(), B::Udp6, tcp6)?;
        let sockops = self.after(tcp4, "hitless_connect4", "hitless_sockops", Self::sockops)?;
        self.sock_state()?;
        self.signal()?;
        let rebind = self.rebinding();
        let silent = match (self.settings.syn_limit, self.settings.syn_timeout_jiffies) {
            (0, _) => rebind.and(Err("unanswered SYNs are not moved (synLimit 0)")),
            (_, 0) => rebind.and(Err("the SYN timeout is the system's (synTimeoutMs 0)")),
            _ => rebind,
        };
        let egress = self.silence(sockops, silent)?;
        self.moves(tcp4 && egress, "hitless_tc_ingress (IPv4)", rebind, &Move::REFUSED4)?;
        self.moves(tcp6 && egress, "hitless_tc_ingress (IPv6)", rebind, &Move::REFUSED6)
    }

    fn serve(&mut self, request: Request) -> Result<(), Error> {
        let (Request::Listen { at } | Request::Echo { at }) = &request else { return Ok(()) };
        if at.is_ipv6() && self.no_ipv6.is_some() {
            return Ok(());
        }
        match self.process.ask(&request)? {
            Reply::Failed { seen } => Err(Error::Prepare { doing: "opening its servers", seen }),
            _ => Ok(()),
        }
    }

    fn record(&mut self, hook: &'static str, seen: Seen) -> bool {
        let (outcome, seen) = match seen {
            Ok(seen) => (Outcome::Proved, seen),
            Err(seen) => (Outcome::Failed, seen),
        };
        self.proofs.push(HookProof { hook, outcome, seen });
        outcome == Outcome::Proved
    }

    fn skip(&mut self, hook: &'static str, reason: impl Into<String>) {
        self.proofs.push(HookProof { hook, outcome: Outcome::Skipped, seen: reason.into() });
    }

    /// Makes a proof that needs another hook, or says that it can't be made without.
    fn after(
        &mut self,
        proved: bool,
        needed: &str,
        hook: &'static str,
        prove: impl FnOnce(&mut Self) -> Result<Seen, Error>,
    ) -> Result<bool, Error> {
        if !proved {
            self.skip(hook, format!("not without {needed}"));
            return Ok(false);
        }
        let seen = prove(self)?;
        Ok(self.record(hook, seen))
    }

    /// A connect to a service's address, which leads nowhere without the hook.
    fn connects(
        &mut self,
        hook: &'static str,
        peer_name: Option<&'static str>,
        to: SocketAddr,
        backend: B,
    ) -> Result<bool, Error> {
        if let (true, Some(reason)) = (to.is_ipv6(), self.no_ipv6.clone()) {
            for hook in [Some(hook), peer_name].into_iter().flatten() {
                self.skip(hook, format!("no IPv6: {reason}"));
            }
            return Ok(false);
        }
        match self.process.ask(&Request::Connect { to, within_ms: CONNECT_MS })? {
            Reply::Connected { peer, accepted_at, .. } => {
                let proved =
                    self.record(hook, expect("a connect to", to, "was accepted at", accepted_at, backend.at()));
                if let Some(peer_name) = peer_name {
                    self.record(peer_name, expect("the peer of a connect to", to, "is named", peer, to));
                }
                Ok(proved)
            }
            reply => {
                self.record(hook, Err(format!("a connect to {to}: {}", failure(reply))));
                if let Some(peer_name) = peer_name {
                    self.skip(peer_name, format!("not without {hook}"));
                }
                Ok(false)
            }
        }
    }

    fn datagrams(
        &mut self,
        send: &'static str,
        receive: &'static str,
        connected: &'static str,
        to: SocketAddr,
        backend: B,
        connects: bool,
    ) -> Result<(), Error> {
        if let (true, Some(reason)) = (to.is_ipv6(), self.no_ipv6.clone()) {
            for hook in [send, receive, connected] {
                self.skip(hook, format!("no IPv6: {reason}"));
            }
            return Ok(());
        }
        match self.process.ask(&Request::Datagram { to, connected: false, within_ms: DATAGRAM_MS })? {
            Reply::Answered { from, answered_at } => {
                self.record(send, expect("a datagram to", to, "was answered at", answered_at, backend.at()));
                self.record(receive, expect("the answer from", to, "came from", from, to));
            }
            reply => {
                self.record(send, Err(format!("a datagram to {to}: {}", failure(reply))));
                self.skip(receive, format!("not without {send}"));
            }
        }
        self.after(connects, "the TCP connect", connected, |proofs| {
            Ok(match proofs.process.ask(&Request::Datagram { to, connected: true, within_ms: DATAGRAM_MS })? {
                Reply::Answered { answered_at, .. } => {
                    expect("a datagram by a socket connected to", to, "was answered at", answered_at, backend.at())
                }
                reply => Err(format!("a datagram by a socket connected to {to}: {}", failure(reply))),
            })
        })?;
        Ok(())
    }

    /// A suspicion ends with an answered connect: sockops says that it was answered.
    fn sockops(&mut self) -> Result<Seen, Error> {
        let Settings { suspect_ticks, .. } = self.settings;
        let input = Input::Failed { now: ticks(monotonic_ns()), first: suspect_ticks.max(1), max_level: 1 };
        self.tell(B::Live4, input)?;
        let established = self.count(Stat::Established)?;
        if let Reply::Failed { seen } =
            self.process.ask(&Request::Connect { to: S::Tcp4.at(), within_ms: CONNECT_MS })?
        {
            return Ok(Err(format!("a connect to the suspect {}: {seen}", B::Live4.at())));
        }
        let cleared = self.becomes(B::Live4, |health| health.level() == 0)?;
        let counted = self.count(Stat::Established)? > established;
        self.tell(B::Live4, Input::Answered)?;
        Ok(match (cleared, counted) {
            (Ok(_), _) => Ok("an answered connect ended a suspicion".to_owned()),
            (Err(_), true) if self.settings.layers & LAYER_CHOOSE == 0 => {
                Ok("an answered connect was counted (layer l2 is off)".to_owned())
            }
            (Err(health), _) => Err(format!("an answered connect did not end a suspicion ({health:?})")),
        })
    }

    fn sock_state(&mut self) -> Result<(), Error> {
        const HOOK: &str = "hitless_sock_state";
        if self.settings.layers & LAYER_KNOW == 0 {
            self.skip(HOOK, "layer l1 is off");
            return Ok(());
        }
        let at = B::Toggled.at();
        self.process.ask(&Request::Close { at })?;
        if let Err(health) = self.becomes(B::Toggled, |health| health.state() == State::Refusing)? {
            self.record(HOOK, Err(format!("the listener at {at} closed, its backend is {:?}", health.state())));
            return Ok(());
        }
        self.process.ask(&Request::Listen { at })?;
        let seen = match self.becomes(B::Toggled, |health| health.state() == State::Ready)? {
            Ok(_) => Ok("a listener closed and opened, its backend refused and was ready".to_owned()),
            Err(health) => Err(format!("the listener at {at} opened again, its backend is {:?}", health.state())),
        };
        self.record(HOOK, seen);
        Ok(())
    }

    fn signal(&mut self) -> Result<(), Error> {
        const HOOK: &str = "hitless_signal";
        if self.settings.layers & LAYER_KNOW == 0 {
            self.skip(HOOK, "layer l1 is off");
            return Ok(());
        }
        if let Reply::Failed { seen } = self.process.ask(&Request::Stop)? {
            self.record(HOOK, Err(seen));
            return Ok(());
        }
        let seen = match self.becomes(B::Stopped, |health| health.state() == State::Draining)? {
            Ok(_) => Ok("SIGTERM to a pod's init made its backend drain".to_owned()),
            Err(health) => Err(format!("a pod's init got SIGTERM, its backend is {:?}", health.state())),
        };
        self.record(HOOK, seen);
        Ok(())
    }

    /// Whether connects are moved at all, or why not.
    fn rebinding(&self) -> Result<(), &'static str> {
        if self.settings.layers & LAYER_REBIND == 0 {
            return Err("layer l3 is off");
        }
        if self.settings.max_replays == 0 {
            return Err("connects are not moved (maxReplays 0)");
        }
        Ok(())
    }

    /// An unanswered SYN is sent elsewhere by the egress program alone; the answer needs the ingress
    /// program. False: the egress program does not work.
    fn silence(&mut self, sockops: bool, possible: Result<(), &'static str>) -> Result<bool, Error> {
        const HOOK: &str = "hitless_tc_egress";
        if let Err(reason) = possible {
            self.skip(HOOK, reason);
            return Ok(true);
        }
        if !sockops {
            self.skip(HOOK, "not without hitless_sockops: it sets the SYN timeout");
            return Ok(true);
        }
        let before = self.count(Move::SILENT4.counted)?;
        let seen = self.moved(&Move::SILENT4)?;
        if seen.is_ok() || self.count(Move::SILENT4.counted)? == before {
            return Ok(self.record(HOOK, seen));
        }
        self.record(HOOK, Ok(format!("an unanswered SYN to {} was sent elsewhere", B::Silent4.at())));
        self.record("hitless_tc_ingress (silence)", seen);
        Ok(true)
    }

    /// A connect whose first backend refuses succeeds on the other.
    fn moves(
        &mut self,
        proved: bool,
        hook: &'static str,
        possible: Result<(), &'static str>,
        case: &Move,
    ) -> Result<(), Error> {
        if let Err(reason) = possible {
            self.skip(hook, reason);
            return Ok(());
        }
        if let (true, Some(reason)) = (case.to.at().is_ipv6(), self.no_ipv6.clone()) {
            self.skip(hook, format!("no IPv6: {reason}"));
            return Ok(());
        }
        self.after(proved, "the connect hook and hitless_tc_egress", hook, |proofs| proofs.moved(case))?;
        Ok(())
    }

    fn moved(&mut self, case: &Move) -> Result<Seen, Error> {
        let to = case.to.at();
        for _ in 0..ATTEMPTS {
            self.tell(case.dead, Input::Answered)?;
            let before = self.count(case.counted)?;
            match self.process.ask(&Request::Connect { to, within_ms: CONNECT_MS })? {
                Reply::Connected { accepted_at, took_ms, .. } if self.count(case.counted)? > before => {
                    let dead = case.dead.at();
                    let seen = expect("a connect by way of", dead, "was accepted at", accepted_at, case.live.at());
                    return Ok(seen.map(|seen| format!("{seen}, after {took_ms} ms")));
                }
                // It may have chosen the live one at once.
                Reply::Connected { .. } => {}
                reply => return Ok(Err(format!("a connect by way of {}: {}", case.dead.at(), failure(reply)))),
            }
        }
        Ok(Err(format!("{ATTEMPTS} connects to {to} came to none that was moved ({})", case.counted.name())))
    }

    fn tell(&self, backend: B, input: Input) -> Result<(), Error> {
        let (id, generation) = (self.world.backend(backend), self.world.generation(backend));
        self.agent.write(vec![Change::Health { id, generation, input }])
    }

    fn count(&self, stat: Stat) -> Result<u64, Error> {
        self.agent.ask(move |kernel| kernel.stats().into_iter().find(|(s, _)| *s == stat).map_or(0, |(_, n)| n))
    }

    /// Waits for a health word; the last one seen, good or bad.
    fn becomes(&self, backend: B, wanted: impl Fn(Health) -> bool) -> Result<Result<Health, Health>, Error> {
        let id = self.world.backend(backend);
        let began = Instant::now();
        loop {
            let health = self.agent.ask(move |kernel| kernel.health(id))?;
            if wanted(health) {
                return Ok(Ok(health));
            }
            if began.elapsed() > SOON {
                return Ok(Err(health));
            }
            sleep(Duration::from_millis(1));
        }
    }
}

/// A connect that must be moved.
struct Move {
    to: S,
    dead: B,
    live: B,
    counted: Stat,
}

impl Move {
    const REFUSED4: Self = Self { to: S::Refused4, dead: B::Dead4, live: B::Live4, counted: Stat::ReboundRst };
    const REFUSED6: Self = Self { to: S::Refused6, dead: B::Dead6, live: B::Live6, counted: Stat::ReboundRst };
    const SILENT4: Self = Self { to: S::Silent4, dead: B::Silent4, live: B::Live4, counted: Stat::ReboundSilent };
}

fn expect(what: &str, at: SocketAddr, verb: &str, seen: SocketAddr, wanted: SocketAddr) -> Seen {
    if seen == wanted {
        return Ok(format!("{what} {at} {verb} {seen}"));
    }
    Err(format!("{what} {at} {verb} {seen}, not {wanted}"))
}

fn failure(reply: Reply) -> String {
    match reply {
        Reply::Failed { seen } => seen,
        reply => format!("the canary's process answered {reply:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_said_with_what_was_wanted() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("valid");
        let seen =
            expect("a connect to", at("198.51.100.1:1"), "was accepted at", at("192.0.2.1:2"), at("192.0.2.1:2"));
        assert_eq!(seen, Ok("a connect to 198.51.100.1:1 was accepted at 192.0.2.1:2".to_owned()));
        let seen = expect("the peer of", at("198.51.100.1:1"), "is named", at("192.0.2.1:2"), at("198.51.100.1:1"));
        assert_eq!(seen, Err("the peer of 198.51.100.1:1 is named 192.0.2.1:2, not 198.51.100.1:1".to_owned()));
    }
}
