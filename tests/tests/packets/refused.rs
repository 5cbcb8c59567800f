//! A connect that is refused, or not answered, ends on another backend.

use std::{io::ErrorKind, net::UdpSocket, os::fd::AsRawFd as _, time::Duration};

use dataplane_ebpf::abi::{SERVICE_PINNED, Service, Stat};
use dataplane_user::registry::change::Change;
use hitless_tests::lab::{
    Topology,
    net::{Family, ip},
};

use crate::bench::{Bench, HOST, Server, connect_from, exchange, hear, service_id, timed};
use dataplane_user::registry::change::Netns;

const ROUTINGS: [Topology; 2] = [Topology::Bridge, Topology::Routed];

#[test]
fn a_refused_connect_ends_on_another_backend_without_the_application_noticing() {
    for topology in [Topology::Bridge, Topology::Routed, Topology::Vxlan] {
        let bench = Bench::new(topology, &[1, 2]);
        let _live = Server::start(&bench.backends[1], b'b');
        for family in Family::BOTH {
            let mut stream = bench.connect(family).expect("connects");
            assert_eq!(hear(&mut stream), b'b', "{topology:?} {family:?}");
            exchange(&stream, 8);
        }
        assert_eq!(bench.stat(Stat::ReboundRst), 2, "{topology:?}");
        assert_eq!(bench.stat(Stat::RebindFailed), 0, "{topology:?}");
    }
}

/// veth hands checksums over unfinished and unchecked. A device that finishes them, or a sender that did,
/// shows whether what is left in the packet is right.
#[test]
fn checksums_are_right_whoever_finishes_them() {
    for (client_finishes, peers_finish) in [(true, false), (false, true), (true, true)] {
        let bench = Bench::new(Topology::Bridge, &[1, 1]);
        let _live = Server::start(&bench.backends[1], b'b');
        let finishing = [&bench.client].into_iter().filter(|_| client_finishes);
        for pod in finishing.chain(bench.backends.iter().filter(|_| peers_finish)) {
            pod.place.netns.enter(finish_checksums).expect("enter");
        }
        for family in Family::BOTH {
            let mut stream = bench.connect(family).expect("connects");
            assert_eq!(hear(&mut stream), b'b', "{family:?}");
            exchange(&stream, 2);
        }
        assert_eq!(bench.stat(Stat::ReboundRst), 2);
        // No SYN was thrown away and sent again: nobody is left that it could be moved to.
        assert_eq!(bench.stat(Stat::Exhausted), 0, "client finishes: {client_finishes}, peers: {peers_finish}");
    }
}

/// `ethtool -K eth0 tx off`: the device no longer takes packets whose checksum is unfinished.
fn finish_checksums() {
    /// linux/sockios.h, linux/ethtool.h
    const SIOCETHTOOL: u32 = 0x8946;
    const ETHTOOL_GTXCSUM: u32 = 0x16;
    const ETHTOOL_STXCSUM: u32 = 0x17;
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    let ask = |command: u32| {
        let mut value = [command, 0];
        // SAFETY: integers and a null pointer all over.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(*b"eth0") {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
        // SAFETY: the request names a `struct ethtool_value` that outlives the call.
        let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        value[1]
    };
    assert_eq!(ask(ETHTOOL_GTXCSUM), 1, "veth leaves them unfinished");
    ask(ETHTOOL_STXCSUM);
    assert_eq!(ask(ETHTOOL_GTXCSUM), 0);
}

#[test]
fn thousands_of_connects_at_a_dead_backend_all_succeed() {
    let bench = Bench::new(Topology::Bridge, &[1, 1]);
    let _live = Server::start(&bench.backends[1], b'b');
    for family in Family::BOTH {
        let before = bench.stat(Stat::ReboundRst);
        for n in 0..2000 {
            let mut stream = bench.connect(family).unwrap_or_else(|error| panic!("connect {n}: {error}"));
            assert_eq!(hear(&mut stream), b'b');
        }
        let moved = bench.stat(Stat::ReboundRst) - before;
        assert!(moved >= 1990, "nearly every connect met the dead backend first: {moved}");
    }
}

#[test]
fn a_silent_backend_is_left_within_300_ms() {
    for topology in ROUTINGS {
        let bench = Bench::new(topology, &[2, 2]);
        let _live = Server::start(&bench.backends[1], b'b');
        // Makes the client's sockets come from somewhere before the clock runs.
        bench.connect(Family::V4).expect("connects");
        bench.backends[0].cut_cable().expect("cut");
        for family in Family::BOTH {
            let (mut stream, took) = timed(|| bench.connect(family).expect("connects"));
            assert_eq!(hear(&mut stream), b'b', "{topology:?} {family:?}");
            assert!(took < Duration::from_millis(300), "{topology:?} {family:?}: {took:?}");
            exchange(&stream, 1);
        }
        assert_eq!(bench.stat(Stat::ReboundSilent), 2);
    }
}

#[test]
fn a_router_that_says_unreachable_is_believed() {
    // What `ip route` can answer: host unreachable, administratively prohibited.
    for (topology, kind) in [(Topology::Bridge, "unreachable"), (Topology::Routed, "prohibit")] {
        let bench = Bench::new(topology, &[2, 2]);
        let _live = Server::start(&bench.backends[1], b'b');
        for address in bench.backends[0].addresses() {
            ip(Some(&bench.lab.node(1).host.netns), &format!("route add {kind} {address}\n")).expect("a route");
        }
        for family in Family::BOTH {
            let mut stream = bench.connect(family).expect("connects");
            assert_eq!(hear(&mut stream), b'b', "{kind} {family:?}");
            exchange(&stream, 1);
        }
        assert_eq!(bench.stat(Stat::ReboundIcmp), 2, "{kind}");
        assert_eq!(bench.stat(Stat::Forged), 0, "{kind}");
    }
}

#[test]
fn three_dead_backends_are_left_one_after_the_other_for_the_fourth() {
    let bench = Bench::new(Topology::Bridge, &[1, 2, 1, 2]);
    let _live = Server::start(&bench.backends[3], b'd');
    let mut furthest = 0;
    for family in Family::BOTH {
        for _ in 0..30 {
            let before = bench.stat(Stat::ReboundRst);
            let mut stream = bench.connect(family).expect("connects");
            assert_eq!(hear(&mut stream), b'd');
            furthest = furthest.max(bench.stat(Stat::ReboundRst) - before);
        }
    }
    assert_eq!(furthest, 3, "at least one of 60 connects met all three");
}

#[test]
fn when_no_backend_is_left_the_application_hears_the_refusal() {
    let bench = Bench::new(Topology::Bridge, &[1, 2]);
    for family in Family::BOTH {
        let (error, took) = timed(|| bench.connect(family).expect_err("nobody is there"));
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{family:?}: {:?}", bench.counted());
        assert!(took < Duration::from_millis(500), "{family:?}: {took:?}");
    }
    assert_eq!(bench.stat(Stat::ReboundRst), 2);
    assert_eq!(bench.stat(Stat::Exhausted), 2);
}

#[test]
fn a_limit_of_replays_is_kept() {
    let mut bench = Bench::new(Topology::Bridge, &[1, 2, 1, 2]);
    bench.settings(|settings| settings.max_replays = 1);
    let error = bench.connect(Family::V4).expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert_eq!((bench.stat(Stat::ReboundRst), bench.stat(Stat::Exhausted)), (1, 1));
}

#[test]
fn a_pinned_service_and_a_layer_that_is_off_move_nothing() {
    let mut bench = Bench::new(Topology::Bridge, &[1, 2]);
    let _live = Server::start(&bench.backends[1], b'b');
    let service = Service { id: service_id(Family::V4), ready: 2, max_weight: 65535, ..Service::default() };
    bench.write(&[Change::PutService(Service { flags: SERVICE_PINNED, ..service })]);
    assert_eq!(bench.connect(Family::V4).expect_err("stays").kind(), ErrorKind::ConnectionRefused);
    bench.write(&[Change::PutService(service)]);
    bench.connect(Family::V4).expect("moves");
    bench.settings(|settings| settings.layers = 0);
    assert_eq!(bench.connect(Family::V4).expect_err("stays").kind(), ErrorKind::ConnectionRefused);
    assert_eq!(bench.stat(Stat::ReboundRst), 1);
}

#[test]
fn a_client_in_the_nodes_own_namespace_is_moved_to_wherever_the_backend_is() {
    // The second backend is behind another device of the node than the first. (Not across nodes in the routed
    // lab: there the node takes the address of the device as its source, which is good on that node only.)
    for (topology, backends) in [(Topology::Bridge, [1, 2]), (Topology::Routed, [1, 1])] {
        let mut bench = Bench::new(topology, &backends);
        let _live = Server::start(&bench.backends[1], b'b');
        let netns = bench.lab.node(1).host.netns.path.clone();
        bench.enroll(Netns::Path(netns), HOST);
        for family in Family::BOTH {
            let host = &bench.lab.node(1).host;
            let mut stream = connect_from(host, Bench::service(family)).unwrap_or_else(|e| {
                panic!(
                    "{topology:?} {family:?} {e} {:?}",
                    bench.opened.kernel.stats().iter().filter(|s| s.1 != 0).collect::<Vec<_>>()
                )
            });
            assert_eq!(hear(&mut stream), b'b', "{topology:?} {family:?}");
            exchange(&stream, 4);
            // Once per packet, though a pod's packets pass the node's interfaces as well.
            let mut stream = bench.connect(family).expect("connects");
            assert_eq!(hear(&mut stream), b'b', "{topology:?} {family:?}");
            exchange(&stream, 4);
        }
        assert_eq!(bench.stat(Stat::ReboundRst), 4);
        assert_eq!(bench.stat(Stat::ReboundSilent), 0);
    }
}
