//! EndpointSlices: which backends a service has, seen from this node.

use std::{
    collections::{BTreeSet, HashMap},
    hash::{Hash, Hasher},
    net::IpAddr,
    sync::Arc,
};

use super::{Name, World, port_number, services::protocol};
use crate::{
    few::Few,
    model::{self, Backend, Event, Key},
    source::kube::object::{self, Conditions, Hints, Object as _},
};

/// A pod's uid, small: six bytes of a hash, that only has to tell the lives of one name apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Uid([u8; 6]);

impl Uid {
    pub(super) fn of(text: &str) -> Self {
        let mut hasher = std::hash::DefaultHasher::new();
        text.hash(&mut hasher);
        let [a, b, c, d, e, f, ..] = hasher.finish().to_ne_bytes();
        Self([a, b, c, d, e, f])
    }
}

/// A service's endpoints, as far as they concern all of them.
#[derive(Debug, Default)]
pub(super) struct Fleet {
    slices: Few<Name>,
    topology: Topology,
}

/// Which endpoints a node prefers (KEP-2433, KEP-3015): those hinted for it, where every ready one has such a hint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Topology {
    #[default]
    Any,
    Zone,
    Node,
}

#[derive(Debug, Default)]
pub(super) struct Slice {
    service: Option<Name>,
    ports: Vec<Port>,
    endpoints: Vec<Endpoint>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Port {
    name: Name,
    number: u16,
}

#[derive(Clone, Debug, PartialEq)]
struct Endpoint {
    address: IpAddr,
    pod: Option<(Name, Uid)>,
    ready: bool,
    serving: bool,
    terminating: bool,
    here: bool,
    /// Zones and nodes; few endpoints have any.
    hints: Option<Box<(Vec<String>, Vec<String>)>>,
}

/// A backend within its service.
type Place = (Port, IpAddr);

impl World {
    pub fn slice(&mut self, object: &object::EndpointSlice) {
        let name = object.meta().full_name();
        let new = self.read_slice(object, &name);
        let known = self.slices.get(&name);
        if known.is_some_and(|known| known.service != new.service) {
            self.slice_gone(&name);
        }
        let Some(service) = new.service.clone() else { return };
        let name = self.slices.get_key_value(&name).map_or(name, |(known, _)| known.clone());
        let fleet = self.fleets.entry(service.clone()).or_default();
        if !fleet.slices.contains(&name) {
            fleet.slices.push(name.clone());
            // Which of two slices speaks first must not depend on who came first.
            fleet.slices.sort_unstable();
        }
        self.put_slice(&name, &service, Some(new));
    }

    pub fn slice_gone(&mut self, name: &str) {
        let Some((name, slice)) = self.slices.get_key_value(name) else { return };
        let (name, service) = (name.clone(), slice.service.clone());
        let Some(service) = service else { return };
        self.put_slice(&name, &service, None);
        if let Some(fleet) = self.fleets.get_mut(&service) {
            fleet.slices.retain(|other| *other != name);
            if fleet.slices.is_empty() {
                self.fleets.remove(&service);
            }
        }
    }

    /// Exchanges a slice and tells what that changes.
    fn put_slice(&mut self, name: &Name, service: &Name, new: Option<Slice>) {
        let old = self.slices.remove(name).unwrap_or_default();
        let empty = Slice::default();
        let changed = changed(&old, new.as_ref().unwrap_or(&empty));
        let gone: BTreeSet<Place> = changed.iter().filter(|place| old.has(place)).cloned().collect();
        self.name_in_pods(name, &old, new.as_ref());
        if let Some(new) = new {
            self.slices.insert(name.clone(), new);
        }
        if !self.retopologise(service) {
            self.retell(service, changed, |place| gone.contains(place));
        } else {
            // The whole service was told anew, but for what no slice has any more.
            let left: Vec<_> = gone.into_iter().filter(|place| self.want(service, place).is_none()).collect();
            self.retell(service, left, |_| true);
        }
    }

    /// Decides anew which endpoints of a service are preferred here; true when that changed, and was told.
    pub(super) fn retopologise(&mut self, service: &Name) -> bool {
        let Some(fleet) = self.fleets.get(service) else { return false };
        let now = self.topology(fleet);
        if now == fleet.topology {
            return false;
        }
        if let Some(fleet) = self.fleets.get_mut(service) {
            fleet.topology = now;
        }
        self.retell_service(service);
        true
    }

    fn topology(&self, fleet: &Fleet) -> Topology {
        let mut zones = Some(false);
        let mut nodes = Some(false);
        for endpoint in fleet.slices.iter().filter_map(|name| self.slices.get(name)).flat_map(|slice| &slice.endpoints)
        {
            if !endpoint.ready {
                continue;
            }
            let (of_zones, of_nodes) = endpoint.hints.as_deref().map_or((&[][..], &[][..]), |(z, n)| (z, n));
            zones = zones.filter(|_| !of_zones.is_empty()).map(|any| any || self.in_zone(of_zones));
            nodes = nodes.filter(|_| !of_nodes.is_empty()).map(|any| any || self.on_node(of_nodes));
            if (zones, nodes) == (None, None) {
                break;
            }
        }
        match (nodes, zones) {
            (Some(true), _) => Topology::Node,
            (_, Some(true)) => Topology::Zone,
            _ => Topology::Any,
        }
    }

    fn in_zone(&self, zones: &[String]) -> bool {
        self.zone.as_ref().is_some_and(|zone| zones.contains(zone))
    }

    fn on_node(&self, nodes: &[String]) -> bool {
        nodes.iter().any(|node| **node == *self.node)
    }

    /// The preference stays, but is for others now: this node's zone changed.
    pub(super) fn retell_hinted(&mut self, service: &Name) {
        if self.fleets.get(service).is_some_and(|fleet| fleet.topology != Topology::Any) {
            self.retell_service(service);
        }
    }

    /// Tells every backend of a service anew.
    pub(super) fn retell_service(&mut self, service: &Name) {
        let Some(fleet) = self.fleets.get(service) else { return };
        let slices = fleet.slices.iter().filter_map(|name| self.slices.get(name));
        let places: BTreeSet<Place> = slices.flat_map(Slice::places).collect();
        self.retell(service, places, |_| true);
    }

    /// Tells the endpoints of a pod that came, or went.
    pub(super) fn retell_endpoints_of(&mut self, pod: &Name) {
        let Some(known) = self.pods.get(pod) else { return };
        let slices = known.slices.to_vec();
        for name in slices {
            let Some(slice) = self.slices.get(&name) else { continue };
            let Some(service) = slice.service.clone() else { continue };
            let of_pod = |endpoint: &&Endpoint| endpoint.pod.as_ref().is_some_and(|(name, _)| name == pod);
            let addresses: Vec<_> = slice.endpoints.iter().filter(of_pod).map(|endpoint| endpoint.address).collect();
            let places =
                addresses.iter().flat_map(|&address| slice.ports.iter().map(move |port| (port.clone(), address)));
            let places: Vec<Place> = places.collect();
            // The registry forgets a pod's backends with it: only what comes, or stays by another slice, is told.
            self.retell(&service, places, |_| false);
        }
    }

    /// Deletions first. `told`: may the registry know it?
    fn retell(&mut self, service: &Name, places: impl IntoIterator<Item = Place>, told: impl Fn(&Place) -> bool) {
        let (mut come, mut gone) = (Vec::new(), Vec::new());
        for place in places {
            match self.want(service, &place) {
                Some(backend) => come.push(Event::Upsert { object: model::Object::Backend(backend) }),
                None if told(&place) => {
                    let (port, address) = place;
                    let service = service.clone();
                    let object = Key::Backend { service, port: port.name, address, target_port: port.number };
                    gone.push(Event::Delete { object });
                }
                None => {}
            }
        }
        self.taken.events.append(&mut gone);
        self.taken.events.append(&mut come);
    }

    /// What all slices of a service say of a place together: ready if any does, ending only if all do.
    fn want(&self, service: &Name, (port, address): &Place) -> Option<Backend> {
        let fleet = self.fleets.get(service)?;
        let local_only = self.services.get(service)?.local_only;
        let slices = fleet.slices.iter().filter_map(|name| self.slices.get(name));
        let mut want: Option<Backend> = None;
        for slice in slices.filter(|slice| slice.ports.contains(port)) {
            for endpoint in slice.endpoints.iter().filter(|endpoint| endpoint.address == *address) {
                if self.counts(endpoint, fleet.topology, local_only) {
                    merge(&mut want, endpoint, service, port);
                }
            }
        }
        want
    }

    /// Every backend of a service, by place.
    pub(super) fn backends_of(&self, service: &Name, into: &mut Vec<Backend>) {
        let (Some(fleet), Some(declared)) = (self.fleets.get(service), self.services.get(service)) else { return };
        let mut places: HashMap<Place, Option<Backend>> = HashMap::new();
        for slice in fleet.slices.iter().filter_map(|name| self.slices.get(name)) {
            let endpoints = slice.endpoints.iter();
            for endpoint in endpoints.filter(|endpoint| self.counts(endpoint, fleet.topology, declared.local_only)) {
                for port in &slice.ports {
                    let place = places.entry((port.clone(), endpoint.address)).or_default();
                    merge(place, endpoint, service, port);
                }
            }
        }
        let start = into.len();
        into.extend(places.into_values().flatten());
        into[start..]
            .sort_unstable_by(|a, b| (&a.port, a.address, a.target_port).cmp(&(&b.port, b.address, b.target_port)));
    }

    fn counts(&self, endpoint: &Endpoint, topology: Topology, local_only: bool) -> bool {
        if local_only && !endpoint.here {
            return false;
        }
        // The slice may speak of a pod long after it is gone, or of a former one of its name.
        let lives = |(name, uid): &(Name, Uid)| {
            self.pods.get(name).and_then(|known| known.pod.as_ref()).is_some_and(|pod| pod.uid == *uid)
        };
        if !endpoint.pod.as_ref().is_none_or(lives) {
            return false;
        }
        match (topology, endpoint.hints.as_deref()) {
            (Topology::Any, _) => true,
            // KEP-1669: what terminates is hinted for nobody, and is a last resort for all.
            (_, None) => !endpoint.ready,
            (Topology::Zone, Some((zones, _))) => self.in_zone(zones),
            (Topology::Node, Some((_, nodes))) => self.on_node(nodes),
        }
    }

    fn name_in_pods(&mut self, slice: &Name, old: &Slice, new: Option<&Slice>) {
        let pods = |slice: &Slice| -> BTreeSet<Name> {
            slice.endpoints.iter().filter_map(|endpoint| Some(endpoint.pod.as_ref()?.0.clone())).collect()
        };
        let (old, new) = (pods(old), new.map(pods).unwrap_or_default());
        for pod in old.difference(&new) {
            if let Some(known) = self.pods.get_mut(pod) {
                known.slices.retain(|other| other != slice);
                if known.slices.is_empty() && known.pod.is_none() {
                    self.pods.remove(pod);
                }
            }
        }
        for pod in new.difference(&old) {
            let known = self.pods.entry(pod.clone()).or_default();
            known.slices.push(slice.clone());
            known.slices.sort_unstable();
        }
    }

    fn read_slice(&mut self, object: &object::EndpointSlice, name: &Name) -> Slice {
        let Some(service) = object.metadata.labels.service.as_deref().filter(|service| !service.is_empty()) else {
            return Slice::default();
        };
        let namespace = &object.metadata.namespace;
        let service: Name = format!("{namespace}/{service}").into();
        let service = self.fleets.get_key_value(&service).map_or(service, |(known, _)| known.clone());
        if !matches!(object.address_type.as_str(), "IPv4" | "IPv6") {
            // Names, which DNS answers for.
            return Slice { service: Some(service), ..Slice::default() };
        }
        let mut ports = Vec::new();
        for port in object.ports.iter().filter(|port| protocol(port.protocol.as_deref()).is_some()) {
            match port.port.map(port_number) {
                None => {}
                Some(Some(number)) => ports.push(Port { name: port.name.as_str().into(), number }),
                Some(None) => {
                    let number = port.port.unwrap_or_default();
                    self.problem(
                        "endpointslice",
                        name,
                        format!("port {:?} is {number}; ports are 1..=65535", port.name),
                    );
                }
            }
        }
        ports.sort_unstable();
        ports.dedup();
        ports.shrink_to_fit();
        let mut endpoints = Vec::with_capacity(object.endpoints.len());
        for endpoint in &object.endpoints {
            // One address: the others "may" be used (API reference), and are not.
            let text = endpoint.addresses.first().map_or("", String::as_str);
            match text.parse::<IpAddr>() {
                Ok(address) if address.is_ipv4() == (object.address_type == "IPv4") => {
                    endpoints.push(self.read_endpoint(endpoint, address, namespace));
                }
                Ok(_) => {
                    let kind = &object.address_type;
                    self.problem("endpointslice", name, format!("{text} is no {kind} address: skipped"));
                }
                Err(_) => self.problem("endpointslice", name, format!("{text:?} is no address: skipped")),
            }
        }
        Slice { service: Some(service), ports, endpoints }
    }

    fn read_endpoint(&self, endpoint: &object::Endpoint, address: IpAddr, namespace: &str) -> Endpoint {
        let Conditions { ready, serving, terminating } = endpoint.conditions;
        let ready = ready.unwrap_or(true);
        let pod = endpoint.target_ref.as_ref().filter(|target| target.kind == "Pod").map(|target| {
            let namespace = if target.namespace.is_empty() { namespace } else { &target.namespace };
            let name: Arc<str> = format!("{namespace}/{}", target.name).into();
            (self.intern(&name), Uid::of(&target.uid))
        });
        Endpoint {
            address: address.to_canonical(),
            pod,
            ready,
            serving: serving.unwrap_or(ready),
            terminating: terminating.unwrap_or(false),
            here: endpoint.node_name.as_deref() == Some(&*self.node),
            hints: read_hints(&endpoint.hints),
        }
    }
}

fn read_hints(hints: &Hints) -> Option<Box<(Vec<String>, Vec<String>)>> {
    let names = |hints: &[object::Hint]| hints.iter().map(|hint| hint.name.clone()).collect::<Vec<_>>();
    let (zones, nodes) = (names(&hints.for_zones), names(&hints.for_nodes));
    (!zones.is_empty() || !nodes.is_empty()).then(|| Box::new((zones, nodes)))
}

impl Slice {
    fn places(&self) -> impl Iterator<Item = Place> + '_ {
        let addresses = self.endpoints.iter().map(|endpoint| endpoint.address);
        addresses.flat_map(|address| self.ports.iter().map(move |port| (port.clone(), address)))
    }

    fn has(&self, (port, address): &Place) -> bool {
        self.ports.contains(port) && self.endpoints.iter().any(|endpoint| endpoint.address == *address)
    }
}

/// The places of which two slices say something else.
fn changed(old: &Slice, new: &Slice) -> BTreeSet<Place> {
    if old.ports != new.ports {
        return old.places().chain(new.places()).collect();
    }
    let by_address = |slice: &Slice| -> HashMap<IpAddr, Vec<Endpoint>> {
        let mut all: HashMap<IpAddr, Vec<Endpoint>> = HashMap::with_capacity(slice.endpoints.len());
        for endpoint in &slice.endpoints {
            all.entry(endpoint.address).or_default().push(endpoint.clone());
        }
        all
    };
    let (before, after) = (by_address(old), by_address(new));
    let differing =
        before.iter().filter(|(address, said)| after.get(*address) != Some(*said)).map(|(address, _)| *address);
    let new_ones = after.keys().filter(|address| !before.contains_key(*address)).copied();
    let addresses: BTreeSet<IpAddr> = differing.chain(new_ones).collect();
    let places = addresses.into_iter().flat_map(|address| new.ports.iter().map(move |port| (port.clone(), address)));
    places.collect()
}

fn merge(into: &mut Option<Backend>, endpoint: &Endpoint, service: &Name, port: &Port) {
    match into {
        None => {
            *into = Some(Backend {
                service: service.clone(),
                port: port.name.clone(),
                address: endpoint.address,
                target_port: port.number,
                pod: endpoint.pod.as_ref().map(|(name, _)| name.clone()),
                ready: endpoint.ready,
                serving: endpoint.serving,
                terminating: endpoint.terminating,
                weight: 1,
            });
        }
        Some(known) => {
            known.ready |= endpoint.ready;
            known.serving |= endpoint.serving;
            known.terminating &= endpoint.terminating;
            let pod = endpoint.pod.as_ref().map(|(name, _)| name);
            if pod.is_some() && (known.pod.is_none() || pod < known.pod.as_ref()) {
                known.pod = pod.cloned();
            }
        }
    }
}
