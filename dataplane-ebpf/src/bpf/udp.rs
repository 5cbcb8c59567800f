//! UDP: each datagram to a service goes to the socket's backend of that service, and replies come from the service.

use aya_ebpf::programs::SockAddrContext;
use dataplane_ebpf::abi::{Endpoint, PROTO_UDP, Stat, UDP_PEERS, UdpPeer, UdpSocket};

use crate::{
    address::{Family, endpoint, fits, set_endpoint, socket},
    connect::client,
    maps::{UDP_SOCKETS, count, stored, stored_or_new},
    route::{Present, Route, frontend, present_at, route},
};

/// sendmsg() with an address.
#[inline(always)]
pub fn send(ctx: &SockAddrContext, family: Family) {
    let Some(client) = client(ctx) else { return };
    let Some(original) = endpoint(ctx, family) else { return };
    let Some(service) = frontend(&original) else { return };
    // SAFETY: the context's own socket.
    let known = unsafe { stored(&UDP_SOCKETS, socket(ctx)) };
    let present = known.as_deref().map_or(Present::default(), |sock| present(sock, &original, client.settings.maps));
    match route(&client, &service, present, false).filter(|route| fits(&route.at, family)) {
        Some(route) => {
            set_endpoint(ctx, family, &route.at);
            if route.backend != present.backend || route.generation != present.generation {
                remember(ctx, &original, &route, client.settings.maps);
            }
            count(Stat::Translated);
        }
        None => count(Stat::NoBackend),
    }
}

/// recvmsg(): a datagram from a backend is the service's.
#[inline(always)]
pub fn receive(ctx: &SockAddrContext, family: Family) {
    // SAFETY: the context's own socket.
    let Some(sock) = (unsafe { stored(&UDP_SOCKETS, socket(ctx)) }) else { return };
    let Some(from) = endpoint(ctx, family) else { return };
    for peer in &sock.peers {
        if peer.backend_at == from {
            set_endpoint(ctx, family, &peer.service_at);
            return;
        }
    }
}

/// The backend that the socket uses for the service at `to`.
#[inline(always)]
fn present(sock: &UdpSocket, to: &Endpoint, maps: u32) -> Present {
    for peer in &sock.peers {
        if peer.service_at == *to && peer.stale == 0 && peer.backend != 0 {
            if peer.maps != maps {
                // Numbers in other maps: an upgrade came in between.
                return present_at(&peer.backend_at);
            }
            return Present { backend: peer.backend, generation: peer.generation, slot: peer.slot };
        }
    }
    Present::default()
}

/// Notes that the socket uses another backend for the service at `original` from now on. The one
/// before it stays on as stale: its replies under way still find their service.
#[inline(always)]
pub fn remember(ctx: &SockAddrContext, original: &Endpoint, route: &Route, maps: u32) {
    debug_assert!(original.proto == PROTO_UDP);
    // SAFETY: the context's own socket.
    let Some(sock) = (unsafe { stored_or_new(&UDP_SOCKETS, socket(ctx)) }) else {
        #[cfg(feature = "log")]
        aya_log_ebpf::warn!(ctx, "no storage for a UDP socket: replies keep the backend's address");
        return;
    };
    for peer in &mut sock.peers {
        if peer.service_at == *original {
            peer.stale = 1;
        }
        // One backend address names one service: the one that was used last.
        if peer.backend_at == route.at {
            peer.backend_at = Endpoint::default();
        }
    }
    let at = sock.next as usize % UDP_PEERS;
    sock.next = sock.next.wrapping_add(1);
    sock.peers[at] = UdpPeer {
        service_at: *original,
        backend_at: route.at,
        maps,
        backend: route.backend,
        generation: route.generation,
        slot: route.slot,
        stale: 0,
    };
}
