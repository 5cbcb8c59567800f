//! `FRONTENDS`: which service answers for an address and port when several claim it.

use std::collections::HashSet;

use dataplane_ebpf::abi::{Endpoint, Frontend, ServiceId};

use super::{change::Change, hash::HashMap};

/// A service port's claim on an address. The least one wins, by service name and port name:
/// which of two conflicting services answers must not depend on who came first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claim {
    /// Service and port name.
    pub by: (std::sync::Arc<str>, std::sync::Arc<str>),
    pub service: ServiceId,
}

#[derive(Debug)]
pub struct Frontends {
    claims: HashMap<Endpoint, Vec<Claim>>,
    contested: HashSet<Endpoint>,
    max: usize,
}

/// What became of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claimed {
    Alone,
    /// Somebody else has the address too; the least claim is in force.
    Contested,
    /// `FRONTENDS` is full.
    Full,
}

impl Frontends {
    pub fn new(max: u32) -> Self {
        Self { claims: HashMap::default(), contested: HashSet::new(), max: max as usize }
    }

    pub fn claim(&mut self, at: Endpoint, claim: Claim, out: &mut Vec<Change>) -> Claimed {
        if self.claims.len() >= self.max && !self.claims.contains_key(&at) {
            return Claimed::Full;
        }
        let claims = self.claims.entry(at).or_default();
        // Nearly always the only one.
        claims.reserve_exact(1);
        let place = claims.partition_point(|other| *other < claim);
        if place == 0 {
            out.push(put(at, claim.service));
        }
        claims.insert(place, claim);
        if claims.len() == 1 {
            return Claimed::Alone;
        }
        self.contested.insert(at);
        Claimed::Contested
    }

    pub fn release(&mut self, at: Endpoint, service: ServiceId, out: &mut Vec<Change>) {
        let Some(claims) = self.claims.get_mut(&at) else { return };
        let Some(place) = claims.iter().position(|claim| claim.service == service) else { return };
        claims.remove(place);
        match claims.first() {
            None => {
                self.claims.remove(&at);
                out.push(Change::DeleteFrontend(at));
            }
            Some(heir) if place == 0 => out.push(put(at, heir.service)),
            Some(_) => {}
        }
        if self.claims.get(&at).is_none_or(|claims| claims.len() < 2) {
            self.contested.remove(&at);
        }
    }

    /// The claims on an address, the one in force first.
    pub fn claims(&self, at: &Endpoint) -> &[Claim] {
        self.claims.get(at).map_or(&[], Vec::as_slice)
    }

    pub fn contested(&self) -> impl Iterator<Item = &Endpoint> {
        self.contested.iter()
    }

    /// Every address with the service in force.
    pub fn iter(&self) -> impl Iterator<Item = (Endpoint, Frontend)> {
        self.claims.iter().map(|(&at, claims)| (at, frontend(&at, claims[0].service)))
    }

    pub fn total(&self) -> usize {
        self.claims.len()
    }
}

fn frontend(at: &Endpoint, service: ServiceId) -> Frontend {
    Frontend { service, check: at.check() }
}

fn put(at: Endpoint, service: ServiceId) -> Change {
    Change::PutFrontend(at, frontend(&at, service))
}
