//! connect(): a service's address becomes a backend's, before the socket knows any.

use aya_ebpf::{EbpfContext as _, helpers::generated::bpf_get_netns_cookie, programs::SockAddrContext};
use dataplane_ebpf::abi::{Endpoint, POD_ENROLLED, PROTO_UDP, SOCKET_DIRECT, Stat};

use crate::{
    address::{Family, endpoint, fits, set_endpoint, socket},
    cell,
    maps::{PODS, SOCKETS, count, settings, stored, stored_or_new},
    route::{Client, Present, Route, frontend, gateway_target, route},
    tunnel, udp,
};

/// Every way out of the hook lets the connect proceed: where hitless has nothing to say, others may.
#[inline(always)]
pub fn connect(ctx: &SockAddrContext, family: Family) {
    let Some(client) = client(ctx) else { return };
    let Some(original) = endpoint(ctx, family) else { return };
    if tunnel::is_agents(ctx, &client) {
        return;
    }
    let found = destination(&client, &original, family);
    let at = found.map_or(original, |route| route.at);
    if let Some(listener) = tunnel::entrance(ctx, &client, &at) {
        let route = found.unwrap_or(Route { at, ..Route::NONE });
        remember(ctx, &client, &original, &route);
        tunnel::enter(ctx, family, &listener);
        return;
    }
    match found {
        Some(route) => {
            if route.at != original {
                set_endpoint(ctx, family, &route.at);
            }
            remember(ctx, &client, &original, &route);
            if original.proto == PROTO_UDP {
                udp::remember(ctx, &original, &route, client.settings.maps);
            }
            count(if route.flags & SOCKET_DIRECT != 0 { Stat::Direct } else { Stat::Translated });
        }
        None => forget(ctx),
    }
}

/// The pod that the calling process is in, if it is enrolled.
#[inline(always)]
pub fn client(ctx: &SockAddrContext) -> Option<Client<'static>> {
    let settings = settings()?;
    // SAFETY: the helper takes the context.
    let netns_cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let pod = PODS.get_ptr(netns_cookie)?;
    // SAFETY: checked by the verifier; a torn read mixes an old and a new state of the same pod.
    let pod = unsafe { cell::read(pod) };
    (pod.flags & POD_ENROLLED != 0).then_some(Client { settings, netns_cookie, pod })
}

/// `None`: not for hitless, or there is no backend.
#[inline(always)]
fn destination(client: &Client<'_>, to: &Endpoint, family: Family) -> Option<Route> {
    let (service, present, direct) = match frontend(to) {
        Some(service) => (service, Present::default(), false),
        None => {
            let (group, present) = gateway_target(client, to)?;
            (group, present, true)
        }
    };
    let found = route(client, &service, present, direct).filter(|route| fits(&route.at, family));
    if found.is_none() {
        count(Stat::NoBackend);
    }
    found
}

/// What the later hooks must know of this connect. All of it is written: the socket may have connected before.
#[inline(always)]
fn remember(ctx: &SockAddrContext, client: &Client<'_>, original: &Endpoint, route: &Route) {
    // SAFETY: the context's own socket.
    let Some(stored) = (unsafe { stored_or_new(&SOCKETS, socket(ctx)) }) else {
        #[cfg(feature = "log")]
        aya_log_ebpf::warn!(ctx, "no storage for a socket of namespace {}: unwatched", client.netns_cookie);
        return;
    };
    // Field by field: as a whole it would be cleared first, byte by byte. What describes a SYN counts only
    // with SOCKET_SYN.
    // SAFETY: a helper without arguments.
    stored.connect_ns = unsafe { aya_ebpf::helpers::bpf_ktime_get_ns() };
    stored.netns_cookie = client.netns_cookie;
    stored.syn_ns = 0;
    stored.original = *original;
    stored.service = route.service;
    stored.backend = route.backend;
    stored.generation = route.generation;
    stored.flags = route.flags;
    stored.peer = route.at;
    stored.isn = 0;
    stored.syns = 0;
    stored.replays = 0;
    stored.tried = [route.backend, 0, 0, 0];
    stored.options_len = 0;
    stored.maps = client.settings.maps;
}

/// This connect is none of ours, whatever the socket did before.
#[inline(always)]
fn forget(ctx: &SockAddrContext) {
    // SAFETY: the context's own socket.
    if let Some(stored) = unsafe { stored(&SOCKETS, socket(ctx)) } {
        stored.service = 0;
        stored.flags = 0;
        stored.peer = Endpoint::default();
    }
}

/// getpeername(): the application asked for the service, so that is whom it talks to.
#[inline(always)]
pub fn peer_name(ctx: &SockAddrContext, family: Family) {
    // SAFETY: the context's own socket.
    let Some(stored) = (unsafe { stored(&SOCKETS, socket(ctx)) }) else { return };
    let Some(peer) = endpoint(ctx, family) else { return };
    if peer == stored.peer && fits(&stored.original, family) {
        set_endpoint(ctx, family, &stored.original);
    }
}
