//! The maps as the tunnel's threads use them: what a connection that they accept is about, whom they deliver for, and
//! which other backends a service has.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd},
    sync::{Arc, atomic::Ordering},
};

use dataplane_ebpf::{
    abi::{
        Addr, Endpoint, Frontend, LAYER_CHOOSE, LocalConnection, MeshAddress, PROTO_TCP, SOCKET_DELIVERY,
        SOCKET_DIRECT, SUSPECT_WINDOW_NS, Service, Slot, SlotKey, Socket, SuspectKey, Suspects, Tunnelled,
    },
    choose::{self, Best, SCAN},
    health::{self, Class, Health, Input, State},
};

use super::{error::Error, maps::Maps, monotonic_ns, writer};
use crate::registry::address;

/// A backend that the tunnel may connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// 0: no backend, just an address.
    pub backend: u32,
    pub generation: u32,
    pub at: SocketAddr,
}

/// A copy is a reference.
#[derive(Clone, Debug)]
pub struct TunnelMaps(Arc<Maps>);

impl TunnelMaps {
    pub(super) fn new(maps: Arc<Maps>) -> Self {
        Self(maps)
    }

    /// The bits of `SO_MARK` that tell the agent's own sockets.
    pub fn mark(&self) -> u32 {
        self.0.settings.get(0).map_or(0, |settings| settings.mark)
    }

    /// What a connection that was accepted on a pod's loopback is about; told once. `None`: nobody led it here.
    pub fn take(&self, netns_cookie: u64, client: SocketAddr, listener_port: u16) -> Result<Option<Tunnelled>, Error> {
        let key = LocalConnection {
            netns_cookie,
            addr: address::addr(client.ip()),
            port_be: client.port().to_be(),
            listener_port_be: listener_port.to_be(),
            _pad: 0,
        };
        let Some(found) = self.0.tunnelled.take::<_, Tunnelled>(&key)? else { return Ok(None) };
        if found.maps == self.0.number { Ok(Some(found)) } else { self.adopt(found).map(Some) }
    }

    /// A connection that was led here under other maps, whose numbers mean nothing in these: an upgrade came between.
    fn adopt(&self, found: Tunnelled) -> Result<Tunnelled, Error> {
        let service = if found.service == 0 {
            0
        } else if found.flags & SOCKET_DIRECT != 0 {
            self.group_of(address::socket(&found.original))?.map_or(0, |(_, group)| group)
        } else {
            self.0.frontends.get::<_, Frontend>(&found.original)?.map_or(0, |frontend| frontend.service)
        };
        Ok(Tunnelled { service, backend: 0, generation: 0, maps: self.0.number, ..found })
    }

    /// Before it connects to an application: the socket does so for that client.
    pub fn deliver_for(&self, socket: BorrowedFd<'_>, client: SocketAddr) -> Result<(), Error> {
        let original = Endpoint::new(address::addr(client.ip()), client.port().to_be(), PROTO_TCP);
        let value = Socket { original, flags: SOCKET_DELIVERY, ..Socket::NONE };
        self.0.sockets.put(&socket.as_raw_fd(), &value)
    }

    /// Has `hitless_inbound` give connections into the pod of that address to the listener, for as long as it is open.
    pub fn take_inbound(&self, addr: IpAddr, listener: BorrowedFd<'_>) -> Result<(), Error> {
        self.0.inbound.put(&address::addr(addr), &(listener.as_raw_fd() as u32))
    }

    pub fn put_address(&self, addr: IpAddr, value: MeshAddress) -> Result<(), Error> {
        self.0.mesh.put(&address::addr(addr), &value)
    }

    pub fn delete_address(&self, addr: IpAddr) -> Result<bool, Error> {
        self.0.mesh.delete(&address::addr(addr))
    }

    /// Every address that is written, such as by an agent before.
    pub fn addresses(&self) -> Result<Vec<(IpAddr, MeshAddress)>, Error> {
        let entries = self.0.mesh.entries::<Addr, MeshAddress>()?;
        Ok(entries.into_iter().map(|(addr, value)| (address::ip(&addr), value)).collect())
    }

    /// The backend of that number, if it is still of that generation.
    pub fn backend(&self, backend: u32, generation: u32) -> Option<Target> {
        let found = self.0.backends.get(backend)?;
        let same = |generation: u32, other: u32| (generation ^ other) & 0xffff == 0;
        let current = same(found.generation, generation) && same(self.health(backend).generation(), generation);
        (current && backend != 0).then(|| Target { backend, generation, at: address::socket(&found.at) })
    }

    fn health(&self, backend: u32) -> Health {
        Health(self.0.health.word(backend).map_or(0, |word| word.load(Ordering::SeqCst)))
    }

    /// Chooses another backend of the service than those tried, as `hitless_choose` does, only from the slots'
    /// beginning: it is asked when one was refused, not for every connection.
    pub fn pick(&self, service: u32, tried: &[u32], random: &mut impl FnMut() -> u32) -> Result<Option<Target>, Error> {
        let settings = self.0.settings.get(0).unwrap_or_default();
        let Some(Service { id, ready, terminating, .. }) = self.0.services.get(service) else { return Ok(None) };
        let total = ready + terminating;
        if id != service || total == 0 {
            return Ok(None);
        }
        let now = health::ticks(monotonic_ns());
        let start = choose::pick(random(), total);
        let mut best = Best::NONE;
        let mut chosen = None;
        for step in 0..total.min(SCAN) {
            let index = (start + step) % total;
            let slot = self.0.slots.get::<_, Slot>(&SlotKey { service, index })?;
            let Some(slot) = slot.filter(|slot| slot.service == service && !tried.contains(&slot.backend)) else {
                continue;
            };
            let class = self.health(slot.backend).seen(slot.generation, now, settings.layers, index >= ready);
            let Some(target) = self.backend(slot.backend, slot.generation) else { continue };
            if matches!(class, Class::Stale | Class::Refusing) {
                continue;
            }
            if best.offer(class, slot.weight, random()) {
                chosen = Some(target);
            }
        }
        Ok(chosen)
    }

    /// The backend at `at`, and the service whose backends all share its services: where a connection that was meant
    /// for it may go instead. `None`: nowhere.
    pub fn group_of(&self, at: SocketAddr) -> Result<Option<(Target, u32)>, Error> {
        let key = Endpoint::new(address::addr(at.ip()), at.port().to_be(), PROTO_TCP);
        let Some(id) = self.0.backend_index.get::<_, u32>(&key)? else { return Ok(None) };
        let Some(backend) = self.0.backends.get(id).filter(|backend| backend.at == key && backend.group != 0) else {
            return Ok(None);
        };
        Ok(Some((Target { backend: id, generation: backend.generation, at }, backend.group)))
    }

    /// A backend of the service refused, or did not answer: nobody else is to run into it. As in the kernel, a
    /// client's word makes no more than a share of a service suspect.
    pub fn failed(&self, netns_cookie: u64, service: u32, target: &Target) -> Result<(), Error> {
        let settings = self.0.settings.get(0).unwrap_or_default();
        let health = self.health(target.backend);
        if target.backend == 0 || settings.layers & LAYER_CHOOSE == 0 || health.state() == State::Refusing {
            return Ok(());
        }
        let now_ns = monotonic_ns();
        let (first, max_level) = (settings.suspect_ticks, settings.suspect_max_level);
        let input = Input::Failed { now: health::ticks(now_ns), first, max_level };
        if health.after(input) == health {
            return Ok(());
        }
        if health.level() == 0 {
            let key = SuspectKey { netns_cookie, service, _pad: 0 };
            let known = self.0.suspects.get::<_, Suspects>(&key)?;
            let fresh = known.is_none_or(|known| now_ns.saturating_sub(known.since_ns) > SUSPECT_WINDOW_NS);
            let mut share = known.unwrap_or_default();
            if fresh {
                share = Suspects { since_ns: now_ns, marked: 0, _pad: 0 };
            }
            let ready = self.0.services.get(service).map_or(0, |service| service.ready);
            if !choose::may_suspect(share.marked, ready, settings.suspect_percent) {
                return Ok(());
            }
            share.marked += 1;
            self.0.suspects.put(&key, &share)?;
        }
        writer::apply(&self.0, target.backend, Some(target.generation), input).map(drop)
    }

    /// It answered: the end of a suspicion.
    pub fn answered(&self, target: &Target) -> Result<(), Error> {
        if target.backend == 0 || self.health(target.backend).level() == 0 {
            return Ok(());
        }
        writer::apply(&self.0, target.backend, Some(target.generation), Input::Answered).map(drop)
    }
}
