//! A flow that was moved: what it shares the client's ports with, and what the network says of it.

use std::{
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use dataplane_ebpf::abi::Stat;
use dataplane_user::registry::change::Netns;
use hitless_tests::lab::{
    Pod, PodOptions, Topology,
    net::{Family, connect, ip},
};
use nix::sys::socket::{SockaddrStorage, bind, setsockopt, sockopt};

use crate::bench::{Bench, PORT, Server, exchange, hear, kind};

/// A client socket on a port of our choice. The same port may be used towards different peers.
fn socket_on(pod: &Pod, family: Family, port: u16) -> OwnedFd {
    let at = SocketAddr::new(pod.addresses()[family as usize], port);
    let socket = pod.place.socket(kind(at)).expect("a socket");
    setsockopt(&socket, sockopt::ReuseAddr, &true).expect("an option");
    bind(socket.as_raw_fd(), &SockaddrStorage::from(at)).expect("bind");
    socket
}

fn connect_on(bench: &Bench, family: Family, port: u16) -> TcpStream {
    connect(socket_on(&bench.client, family, port), Bench::service(family)).expect("connects")
}

fn backend(bench: &Bench, n: usize, family: Family) -> SocketAddr {
    SocketAddr::new(bench.backends[n].addresses()[family as usize], PORT)
}

#[test]
fn two_pods_move_flows_of_the_same_source_port_at_the_same_time() {
    let mut bench = Bench::new(Topology::Bridge, &[1, 2]);
    let _live = Server::start(&bench.backends[1], b'b');
    let other = bench.lab.node(1).add_pod("other").expect("a pod");
    bench.enroll(Netns::Path(other.netns_path().to_owned()), 0);
    for family in Family::BOTH {
        let to = Bench::service(family);
        let mut one = connect(socket_on(&bench.client, family, 40_000), to).expect("connects");
        let mut two = connect(socket_on(&other, family, 40_000), to).expect("connects");
        assert_eq!((hear(&mut one), hear(&mut two)), (b'b', b'b'));
        std::thread::scope(|scope| {
            scope.spawn(|| exchange(&one, 4));
            scope.spawn(|| exchange(&two, 4));
        });
    }
    assert_eq!(bench.stat(Stat::ReboundRst), 4);
}

/// The client reuses a port at once: what was known of the flow before must not touch the next one.
#[test]
fn a_port_that_is_reused_starts_with_nothing() {
    let bench = Bench::new(Topology::Bridge, &[1, 2]);
    let live = Server::start(&bench.backends[1], b'b');
    for family in Family::BOTH {
        for round in 0..20 {
            let mut stream = connect_on(&bench, family, 40_001);
            assert_eq!(hear(&mut stream), b'b', "round {round}");
            exchange(&stream, 1);
            // Reset instead of TIME-WAIT: the tuple is free at once.
            setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).expect("an option");
        }
    }
    drop(live);
    // The first backend is alive again: the same tuple is its own now.
    let _first = Server::start(&bench.backends[0], b'a');
    for family in Family::BOTH {
        let moved = bench.stat(Stat::ReboundRst);
        let mut stream = connect_on(&bench, family, 40_001);
        assert_eq!(hear(&mut stream), b'a', "entries of the flow before must be forgotten");
        exchange(&stream, 1);
        assert_eq!(bench.stat(Stat::ReboundRst), moved);
    }
}

/// A pod is deleted while its moved flow is open; the next pod has its address, and connects from the same port.
#[test]
fn a_new_pod_with_an_old_pods_address_starts_with_nothing() {
    let mut bench = Bench::new(Topology::Bridge, &[1, 2]);
    let live = Server::start(&bench.backends[1], b'b');
    let pod = |bench: &mut Bench, name: &str| {
        let pod = bench.lab.node(1).add_pod_with(name, PodOptions { number: Some(77) }).expect("a pod");
        bench.enroll(Netns::Path(pod.netns_path().to_owned()), 0);
        pod
    };
    let old = pod(&mut bench, "old");
    let addresses = old.addresses();
    let open = Family::BOTH.map(|family| {
        let mut stream = connect(socket_on(&old, family, 40_003), Bench::service(family)).expect("connects");
        assert_eq!(hear(&mut stream), b'b');
        stream
    });
    assert_eq!(bench.stat(Stat::ReboundRst), 2);
    // Its interface goes first: nobody hears that the connections end.
    old.delete().expect("deleted");
    drop(open);
    let new = pod(&mut bench, "new");
    assert_eq!(new.addresses(), addresses);
    // The second backend still holds the old pod's connections, and its entries are there, too.
    for family in Family::BOTH {
        let mut stream = connect(socket_on(&new, family, 40_003), Bench::service(family)).expect("connects");
        assert_eq!(hear(&mut stream), b'b', "{family:?}");
        exchange(&stream, 1);
        setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).expect("an option");
    }
    assert_eq!(bench.stat(Stat::ReboundRst), 4);
    let newest = {
        new.delete().expect("deleted");
        pod(&mut bench, "newest")
    };
    // The first backend lives again, and a connection to it is what it seems to be.
    let _first = Server::start(&bench.backends[0], b'a');
    for family in Family::BOTH {
        let mut stream = connect(socket_on(&newest, family, 40_003), Bench::service(family)).expect("connects");
        assert_eq!(hear(&mut stream), b'a', "{family:?}: entries of another pod's flow must be forgotten");
        exchange(&stream, 1);
    }
    assert_eq!(bench.stat(Stat::ReboundRst), 4);
    drop(live);
}

/// A connection straight to the backend that a moved flow of the same port lives on: on the wire
/// both would be one.
#[test]
fn a_connect_that_collides_with_a_moved_flow_is_moved_itself() {
    let bench = Bench::new(Topology::Bridge, &[1, 2, 2]);
    let servers = [(1, b'b'), (2, b'c')].map(|(n, name)| Server::start(&bench.backends[n], name));
    for family in Family::BOTH {
        let mut one = connect_on(&bench, family, 40_002);
        let there = hear(&mut one);
        let n = if there == b'b' { 1 } else { 2 };
        // Named by address, so not ours to move: it must not disturb the flow that is there.
        let socket = socket_on(&bench.client, family, 40_002);
        let direct = backend(&bench, n, family);
        let refused = std::thread::scope(|scope| {
            let trying = scope.spawn(|| {
                let timeout = libc::timeval { tv_sec: 1, tv_usec: 0 };
                setsockopt(&socket, sockopt::SendTimeout, &timeout.into()).expect("an option");
                nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(direct))
            });
            exchange(&one, 4);
            trying.join().expect("no panic")
        });
        assert!(refused.is_err(), "one tuple cannot be two connections");
    }
    assert_eq!(bench.stat(Stat::ReboundRst), 2);
    drop(servers);
}

/// The agent sweeps what has ended: either half of a flow must say so.
#[test]
fn a_flow_that_ended_leaves_nothing_for_long() {
    let mut bench = Bench::new(Topology::Bridge, &[1, 2]);
    let _live = Server::start(&bench.backends[1], b'b');
    for family in Family::BOTH {
        for _ in 0..5 {
            let mut stream = bench.connect(family).expect("connects");
            hear(&mut stream);
            exchange(&stream, 1);
        }
    }
    let mut open = bench.connect(Family::V4).expect("connects");
    hear(&mut open);
    let now = dataplane_user::kernel::monotonic_ns();
    assert_eq!(bench.opened.kernel.sweep(now).expect("walks").removed, 0, "ended flows linger");
    // Two entries each. The server may still be about to close its end of the last ones.
    let (mut removed, mut left) = (0, 22);
    let deadline = Instant::now() + Duration::from_secs(5);
    while removed < 20 && Instant::now() < deadline {
        let later = bench.opened.kernel.sweep(now + 20_000_000_000).expect("walks");
        assert_eq!(later.seen, left, "{later:?}");
        (removed, left) = (removed + later.removed, left - later.removed);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!((removed, left), (20, 2));
    exchange(&open, 1);
}

/// The same, of a connect that named a service: it has other backends to go to.
#[test]
fn a_connect_of_ours_that_collides_goes_to_another_backend() {
    let mut bench = Bench::new(Topology::Bridge, &[1, 2, 2]);
    let servers = [(1, b'b'), (2, b'c')].map(|(n, name)| Server::start(&bench.backends[n], name));
    let mut met = 0;
    for family in Family::BOTH {
        for port in 42_000..42_010 {
            let mut one = connect_on(&bench, family, port);
            let there = hear(&mut one);
            let (second, other) = if there == b'b' { (1, b'c') } else { (2, b'b') };
            // A service that has nobody but the two, and by far rather the one that the flow went to.
            let to = bench.second_service(family, second);
            let before = bench.stat(Stat::ReboundCollision);
            let mut two = connect(socket_on(&bench.client, family, port), to).expect("connects");
            met += bench.stat(Stat::ReboundCollision) - before;
            assert_eq!(hear(&mut two), other);
            exchange(&one, 1);
            exchange(&two, 1);
        }
    }
    assert_eq!(met, 20, "every second connect was aimed at the tuple of the first");
    drop(servers);
}

/// What D1 refused and D2 does not answer, D3 answers.
#[test]
fn a_connect_that_was_moved_to_a_silent_backend_is_moved_on() {
    let bench = Bench::new(Topology::Bridge, &[1, 2, 2]);
    let _live = Server::start(&bench.backends[2], b'c');
    bench.backends[1].cut_cable().expect("cut");
    for family in Family::BOTH {
        for _ in 0..8 {
            let mut stream = bench.connect(family).expect("connects");
            assert_eq!(hear(&mut stream), b'c');
            exchange(&stream, 1);
        }
    }
    assert!(bench.stat(Stat::ReboundSilent) > 0, "16 connects met the silent one: {:?}", bench.counted());
}

/// The other way round: the flow that is moved must not land on a tuple that is taken.
#[test]
fn a_flow_is_not_moved_onto_a_connection_that_the_client_has() {
    let bench = Bench::new(Topology::Bridge, &[1, 2, 2]);
    let _servers = [(1, b'b'), (2, b'c')].map(|(n, name)| Server::start(&bench.backends[n], name));
    for family in Family::BOTH {
        for round in 0..10 {
            let port = 41_000 + round;
            let to = backend(&bench, 1, family);
            let mut direct = connect(socket_on(&bench.client, family, port), to).expect("connects");
            assert_eq!(hear(&mut direct), b'b');
            let mut moved = connect_on(&bench, family, port);
            assert_eq!(hear(&mut moved), b'c', "the other backend's tuple is taken");
            exchange(&direct, 1);
            exchange(&moved, 1);
        }
    }
}

#[test]
fn the_path_mtu_of_the_new_peer_reaches_the_socket() {
    let bench = Bench::new(Topology::Routed, &[2, 2]);
    let _live = Server::start(&bench.backends[1], b'b');
    // Only the way from node 1 to the second backend is narrow: the router says so to the client.
    let node = &bench.lab.node(1).host.netns;
    for family in Family::BOTH {
        let (to, via) =
            (bench.backends[1].addresses()[family as usize], bench.lab.node(2).addresses()[family as usize]);
        let prefix = family.host_prefix();
        ip(Some(node), &format!("route add {to}/{prefix} via {via} dev eth0 mtu lock 1300\n")).expect("a route");
        let mut stream = bench.connect(family).expect("connects");
        assert_eq!(hear(&mut stream), b'b');
        exchange(&stream, 4);
    }
    assert_eq!(bench.stat(Stat::ReboundRst), 2);
}
