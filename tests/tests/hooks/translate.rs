//! Addresses: a service's becomes a backend's on the way out, and the service's again on the way back.

use std::{
    collections::BTreeMap,
    io::Read,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    time::Duration,
};

use dataplane_ebpf::{
    abi::{PROTO_UDP, SERVICE_PINNED, Service, Slot, SlotKey, Stat},
    health::Input,
};
use dataplane_user::registry::change::Change;

use crate::node::{Node, TCP};

/// Accepts and greets with its own address, for as long as the process lives.
pub fn greeter(at: &str) {
    let listener = TcpListener::bind(at).expect("listen");
    let greeting = at.to_owned();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = std::io::Write::write_all(&mut stream.expect("accept"), greeting.as_bytes());
        }
    });
}

pub fn greeting(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(to)?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// Answers each datagram with its own address.
fn echo(at: &'static str) {
    let socket = UdpSocket::bind(at).expect("bind");
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(at.as_bytes(), from);
        }
    });
}

#[test]
fn a_connect_to_a_service_reaches_a_backend_and_keeps_the_services_name() {
    let mut node = Node::new(0, |_| {});
    for (at, backend) in [("10.96.0.1:80", "10.99.0.1:8080"), ("[fd96::1]:80", "[fd99::1]:8080")] {
        let service = node.serve(at, TCP, &[backend]);
        node.inside(|| {
            greeter(backend);
            assert_eq!(greeting(service.at).expect("connect to the service"), backend);
            let stream = TcpStream::connect(service.at).expect("connect again");
            assert_eq!(stream.peer_addr().expect("a peer"), service.at, "getpeername tells the service");
        });
    }
    assert_eq!(node.counter(Stat::Translated), 4);
    assert_eq!(node.counter(Stat::Established), 4);
}

#[test]
fn a_v4_mapped_destination_is_the_ipv4_service() {
    let mut node = Node::new(0, |_| {});
    node.serve("10.96.0.1:80", TCP, &["10.99.0.1:8080"]);
    node.inside(|| {
        greeter("10.99.0.1:8080");
        let mapped: SocketAddr = "[::ffff:10.96.0.1]:80".parse().expect("an address");
        // A socket of the IPv6 family, as dual-stack runtimes make it for any destination.
        assert_eq!(greeting(mapped).expect("connect"), "10.99.0.1:8080");
        assert_eq!(TcpStream::connect(mapped).expect("connect").peer_addr().expect("a peer"), mapped);
    });
}

#[test]
fn what_is_no_service_is_left_alone() {
    let mut node = Node::new(0, |_| {});
    node.serve("10.96.0.1:80", TCP, &["10.99.0.1:8080"]);
    node.inside(|| {
        greeter("10.99.0.2:9090");
        let direct: SocketAddr = "10.99.0.2:9090".parse().expect("an address");
        assert_eq!(greeting(direct).expect("connect"), "10.99.0.2:9090");
        assert_eq!(TcpStream::connect(direct).expect("connect").peer_addr().expect("a peer"), direct);
    });
    assert_eq!(node.counter(Stat::Translated), 0);
}

#[test]
fn another_network_namespace_is_left_alone() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve("127.0.0.1:1", TCP, &["10.99.0.1:8080"]);
    // This thread is in the cgroup, but in a namespace that is not enrolled.
    let error = TcpStream::connect(service.at).expect_err("nobody listens there");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(node.counter(Stat::Translated), 0);
}

#[test]
fn a_service_without_backends_is_left_to_others() {
    let mut node = Node::new(0, |_| {});
    // Somebody else on the node (kube-proxy) may know more: the address stays what it was.
    let service = node.serve("10.99.0.3:80", TCP, &[]);
    node.inside(|| {
        greeter("10.99.0.3:80");
        assert_eq!(greeting(service.at).expect("connect"), "10.99.0.3:80");
    });
    assert_eq!(node.counter(Stat::NoBackend), 1);
}

#[test]
fn a_pinned_service_is_translated_and_watched_by_nobody() {
    let mut node = Node::new(0, |_| {});
    let service =
        node.serve_with("10.96.0.1:80", TCP, &["10.99.0.1:8080"], |service, _| service.flags = SERVICE_PINNED);
    node.inside(|| {
        greeter("10.99.0.1:8080");
        assert_eq!(greeting(service.at).expect("connect"), "10.99.0.1:8080");
    });
    assert_eq!((node.counter(Stat::Translated), node.counter(Stat::Established)), (1, 0));
}

#[test]
fn datagrams_reach_a_backend_and_replies_come_from_the_service() {
    let mut node = Node::new(0, |_| {});
    let cases = [
        ("10.96.0.2:53", ["10.99.0.1:5353", "10.99.0.2:5353"], "0.0.0.0:0"),
        ("[fd96::2]:53", ["[fd99::1]:5353", "[fd99::2]:5353"], "[::]:0"),
    ];
    for (at, backends, any) in cases {
        let service = node.serve(at, PROTO_UDP, &backends);
        node.inside(|| {
            backends.into_iter().for_each(echo);
            let socket = UdpSocket::bind(any).expect("bind");
            socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
            let ask = || {
                let mut buffer = [0; 64];
                socket.send_to(b"?", service.at).expect("send");
                let (n, from) = socket.recv_from(&mut buffer).expect("a reply");
                assert_eq!(from, service.at, "the reply is the service's");
                String::from_utf8_lossy(&buffer[..n]).into_owned()
            };
            let first = ask();
            assert!(backends.contains(&first.as_str()));
            for _ in 0..20 {
                assert_eq!(ask(), first, "one socket stays with its backend");
            }
        });
    }
}

#[test]
fn a_udp_socket_leaves_a_backend_that_refuses_and_still_hears_its_late_replies() {
    let mut node = Node::new(0, |_| {});
    let ats = ["10.99.0.1:5353", "10.99.0.2:5353"];
    let service = node.serve("10.96.0.2:53", PROTO_UDP, &ats);
    let (socket, backends) = node.inside(|| {
        let backends = ats.map(|at| (at, UdpSocket::bind(at).expect("bind")));
        let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
        for socket in backends.iter().map(|(_, socket)| socket).chain([&socket]) {
            socket.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout");
        }
        socket.send_to(b"one", service.at).expect("send");
        (socket, BTreeMap::from(backends))
    });
    let mut buffer = [0; 64];
    let (left, client) = ats
        .iter()
        .find_map(|at| Some((*at, backends[at].recv_from(&mut buffer).ok()?.1)))
        .expect("one of the backends has the datagram");
    let index = ats.iter().position(|at| *at == left).expect("its index");
    let (id, backend) = service.backends[index];
    node.write(&[Change::Health { id, generation: backend.generation, input: Input::ListenerClosed }]);
    node.inside(|| socket.send_to(b"two", service.at).expect("send"));
    let other = ats[1 - index];
    let (n, _) = backends[other].recv_from(&mut buffer).expect("the other backend has it");
    assert_eq!(&buffer[..n], b"two");
    // The reply that was under way.
    backends[left].send_to(b"late", client).expect("send");
    let (n, from) = socket.recv_from(&mut buffer).expect("the late reply");
    assert_eq!((&buffer[..n], from), (&b"late"[..], service.at));
}

#[test]
fn a_udp_socket_leaves_a_backend_that_has_left_the_service() {
    let mut node = Node::new(0, |_| {});
    let ats = ["10.99.0.1:5353", "10.99.0.2:5353"];
    let service = node.serve("10.96.0.2:53", PROTO_UDP, &ats);
    let socket = node.inside(|| {
        ats.into_iter().for_each(echo);
        UdpSocket::bind("0.0.0.0:0").expect("bind")
    });
    socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
    let ask = || {
        let mut buffer = [0; 64];
        socket.send_to(b"?", service.at).expect("send");
        let (n, _) = socket.recv_from(&mut buffer).expect("a reply");
        String::from_utf8_lossy(&buffer[..n]).into_owned()
    };
    let first = ask();
    let stays = service.backends[usize::from(first == ats[0])];
    let slot = Slot { backend: stays.0, generation: stays.1.generation, service: service.service.id, weight: 1 };
    node.write(&[
        Change::PutSlot(SlotKey { service: service.service.id, index: 0 }, slot),
        Change::PutService(Service { ready: 1, ..service.service }),
    ]);
    assert_ne!(ask(), first);
}

#[test]
fn a_connected_udp_socket_talks_to_the_service() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve("10.96.0.2:53", PROTO_UDP, &["10.99.0.1:5353"]);
    node.inside(|| {
        echo("10.99.0.1:5353");
        let socket = UdpSocket::bind("0.0.0.0:0").expect("bind");
        socket.set_read_timeout(Some(Duration::from_secs(5))).expect("a timeout");
        socket.connect(service.at).expect("connect");
        assert_eq!(socket.peer_addr().expect("a peer"), service.at);
        socket.send(b"?").expect("send");
        let mut buffer = [0; 64];
        let (_, from) = socket.recv_from(&mut buffer).expect("a reply");
        assert_eq!(from, service.at);
    });
}
