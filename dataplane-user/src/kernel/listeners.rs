//! Who listens in a pod: sock_diag's word against what the tracepoint program counted.
//!
//! The program takes a backend for refusing when the last of its listeners closes. It counts
//! without a lock, and knows nothing of sockets older than the enrolment; the agent counts again.

use std::{collections::BTreeMap, io};

use dataplane_ebpf::{
    abi::{Addr, Endpoint, ListenerKey, PROTO_TCP},
    health::{Input, State},
};

use super::{maps::Maps, netns, writer};

/// Makes `LISTENERS` say what sock_diag says. Sockets come and go meanwhile, counted by the
/// program; so only what two dumps agree on is written.
pub fn recount(maps: &Maps, cookie: u64) -> io::Result<usize> {
    let mut dump = count(netns::listeners(cookie)?);
    for _ in 0..5 {
        let mut counted = BTreeMap::new();
        for (key, listening) in maps.listeners.entries::<ListenerKey, i32>().map_err(io::Error::other)? {
            if key.netns_cookie == cookie && listening != 0 {
                counted.insert(sortable(&key), (key, listening));
            }
        }
        if counted == dump {
            break;
        }
        let again = count(netns::listeners(cookie)?);
        if again == dump {
            for (at, (key, _)) in &counted {
                if !dump.contains_key(at) {
                    maps.listeners.delete(key).map_err(io::Error::other)?;
                }
            }
            for (at, (key, listening)) in &dump {
                if counted.get(at).map(|(_, listening)| listening) != Some(listening) {
                    maps.listeners.put(key, listening).map_err(io::Error::other)?;
                }
            }
            break;
        }
        dump = again;
    }
    Ok(dump.values().map(|(_, listening)| *listening as usize).sum())
}

/// Backends of one pod that are looked at: a chain that is being rewritten may go in circles.
const CHAIN: usize = 4096;

/// Brings back backends that were taken for refusing though somebody listens.
pub fn revive(maps: &Maps, cookie: u64, first_backend: u32) -> io::Result<()> {
    let mut refusing = Vec::new();
    let mut next = first_backend;
    for _ in 0..CHAIN {
        let Some(backend) = maps.backends.get(next).filter(|_| next != 0) else { break };
        let health = maps.health.word(next).map_or(0, |word| word.load(std::sync::atomic::Ordering::SeqCst));
        let health = dataplane_ebpf::health::Health(health);
        // What the control plane ended is not brought back by a listener.
        if backend.at.proto == PROTO_TCP && health.state() == State::Refusing && !health.terminating() {
            refusing.push((next, backend));
        }
        next = backend.next_in_pod;
    }
    if refusing.is_empty() {
        return Ok(());
    }
    let listening = count(netns::listeners(cookie)?);
    refusing.retain(|(_, backend)| served(&listening, &backend.at));
    for (id, backend) in &refusing {
        writer::apply(maps, *id, Some(backend.generation), Input::ListenerOpened).map_err(io::Error::other)?;
    }
    if refusing.is_empty() {
        return Ok(());
    }
    // One that closed since then closed while its backend was refusing already: say it again. One
    // that closes from here on is the program's business.
    let still = count(netns::listeners(cookie)?);
    for (id, backend) in refusing.iter().filter(|(_, backend)| !served(&still, &backend.at)) {
        writer::apply(maps, *id, Some(backend.generation), Input::ListenerClosed).map_err(io::Error::other)?;
    }
    Ok(())
}

fn served(listening: &Counted, at: &Endpoint) -> bool {
    let wildcard = if at.addr.is_v4() { Addr::v4(0) } else { Addr::default() };
    listening.contains_key(&(at.addr.0, at.port_be)) || listening.contains_key(&(wildcard.0, at.port_be))
}

type Counted = BTreeMap<([u32; 4], u16), (ListenerKey, i32)>;

fn sortable(key: &ListenerKey) -> ([u32; 4], u16) {
    (key.addr.0, key.port_be)
}

fn count(keys: Vec<ListenerKey>) -> Counted {
    let mut counted = Counted::new();
    for key in keys {
        counted.entry(sortable(&key)).or_insert((key, 0)).1 += 1;
    }
    counted
}
