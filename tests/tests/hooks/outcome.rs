//! What connects, signals and listeners do to health words.

use std::{
    io::ErrorKind,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command},
    time::{Duration, Instant},
};

use dataplane_ebpf::{
    abi::{
        EVENT_LISTENER_CLOSED, EVENT_LISTENER_OPENED, EVENT_RECOVERED, EVENT_REFUSED, EVENT_STOP_SIGNAL,
        EVENT_SUSPECTED, EVENT_TIMED_OUT, LAYER_CHOOSE, LAYER_KNOW, Stat,
    },
    health::{Class, Input},
};
use dataplane_user::registry::change::Change;
use nix::{
    sched::{CloneFlags, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    node::{Node, POD, TCP, eventually},
    translate::greeter,
};

const A: &str = "10.99.0.1:8080";
const B: &str = "10.99.0.2:8080";

/// Connects until one is refused (the choice may take another backend first).
fn until_refused(to: SocketAddr) {
    for _ in 0..200 {
        if let Err(error) = TcpStream::connect(to) {
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
            return;
        }
    }
    panic!("200 connects in a row missed the dead backend");
}

#[test]
fn a_refused_backend_is_suspect_then_probed_by_one_connect_and_recovers() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve("10.96.0.1:80", TCP, &[A, B]);
    node.inside(|| {
        greeter(B);
        until_refused(service.at);
    });
    assert_eq!(node.class(&service.backends[0]), Class::Suspect);
    let told: Vec<u32> = node.told().iter().map(|event| event.kind).collect();
    assert!(told.contains(&EVENT_REFUSED) && told.contains(&EVENT_SUSPECTED), "{told:?}");
    node.inside(|| {
        for _ in 0..50 {
            TcpStream::connect(service.at).expect("the other backend answers");
        }
    });
    assert_eq!((node.counter(Stat::Refused), node.counter(Stat::Suspected)), (1, 1));
    // The term is over while it is still dead: one connect pays for the probe, and the term doubles.
    eventually("the suspicion runs out", || node.class(&service.backends[0]) == Class::Probe);
    node.inside(|| until_refused(service.at));
    assert_eq!(node.health(service.backends[0].0).level(), 2);
    assert_eq!(node.class(&service.backends[0]), Class::Suspect);
    // It comes back (its listener's opening is not what tells it here).
    let mut settings = node.kernel.settings();
    settings.layers = LAYER_CHOOSE;
    node.kernel.set_settings(settings);
    node.inside(|| greeter(A));
    assert_eq!(node.class(&service.backends[0]), Class::Suspect);
    eventually("the second suspicion runs out", || node.class(&service.backends[0]) == Class::Probe);
    node.inside(|| {
        for _ in 0..50 {
            TcpStream::connect(service.at).expect("both answer");
        }
    });
    assert_eq!(node.class(&service.backends[0]), Class::Live);
    assert_eq!(node.counter(Stat::Recovered), 1);
    assert!(node.told().iter().any(|event| event.kind == EVENT_RECOVERED));
}

#[test]
fn one_client_makes_at_most_half_of_a_service_suspect() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve("10.96.0.1:80", TCP, &[A, B, "10.99.0.3:8080", "10.99.0.4:8080"]);
    // Nobody listens at all: the client sees each of them refuse.
    node.inside(|| {
        for _ in 0..100 {
            TcpStream::connect(service.at).expect_err("nobody listens");
        }
    });
    let suspect = service.backends.iter().filter(|backend| node.health(backend.0).level() > 0).count();
    assert_eq!(suspect, 2);
    assert!(node.counter(Stat::SuspectFloor) > 0);
}

#[test]
fn without_the_layer_nothing_becomes_suspect() {
    let mut node = Node::new(0, |settings| settings.layers = LAYER_KNOW);
    let service = node.serve("10.96.0.1:80", TCP, &[A, B]);
    node.inside(|| TcpStream::connect(service.at).expect_err("nobody listens"));
    assert_eq!((node.counter(Stat::Refused), node.counter(Stat::Suspected)), (1, 0));
}

#[test]
fn a_silent_backend_is_asked_again_after_200_ms_and_only_for_services() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve("10.96.0.1:80", TCP, &[A, B]);
    let silent: [TcpListener; 2] = node.inside(|| [A, B].map(full));
    let elsewhere: SocketAddr = A.parse().expect("an address");
    // SYNs until a timeout of 700 ms: at 0, 200, 400 and 600 ms instead of at 0 (and 1,000) only.
    let (of_service, of_others) = node.inside(|| {
        let before = retransmitted();
        TcpStream::connect_timeout(&service.at, Duration::from_millis(700)).expect_err("silence");
        let between = retransmitted();
        TcpStream::connect_timeout(&elsewhere, Duration::from_millis(700)).expect_err("silence");
        (between - before, retransmitted() - between)
    });
    assert!((2..=3).contains(&of_service), "{of_service} retransmissions within 700 ms");
    assert_eq!(of_others, 0, "a connection that names no service keeps the system's timeout");
    assert_eq!(node.counter(Stat::Abandoned), 1, "the application gave up itself");
    assert_eq!(node.counter(Stat::Suspected), 0, "for which nobody is to blame");
    drop(silent);
}

#[test]
fn a_connect_that_times_out_makes_its_backend_suspect() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve("10.96.0.1:80", TCP, &[A, B]);
    let silent: [TcpListener; 2] = node.inside(|| [A, B].map(full));
    node.inside(|| {
        std::fs::write("/proc/sys/net/ipv4/tcp_syn_retries", "1").expect("a setting of the namespace");
        let error = TcpStream::connect(service.at).expect_err("silence");
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    });
    assert_eq!((node.counter(Stat::TimedOut), node.counter(Stat::Suspected)), (1, 1));
    assert!(node.told().iter().any(|event| event.kind == EVENT_TIMED_OUT && event.extra > 100_000_000));
    drop(silent);
}

/// A listener whose queue is full: it answers no SYN.
fn full(at: &str) -> TcpListener {
    let listener = TcpListener::bind(at).expect("listen");
    // SAFETY: listen(2) on an open socket; it only changes the backlog.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let at: SocketAddr = at.parse().expect("an address");
    // A backlog of n takes n + 1.
    std::mem::forget(TcpStream::connect(at).expect("the one place in the queue"));
    listener
}

/// Segments retransmitted in this network namespace.
fn retransmitted() -> u64 {
    let snmp = std::fs::read_to_string("/proc/thread-self/net/snmp").expect("its counters");
    let mut lines = snmp.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let names = lines.next().expect("names").split(' ');
    let values = lines.next().expect("values").split(' ');
    let mut both = names.zip(values);
    both.find(|(name, _)| *name == "RetransSegs").expect("RetransSegs").1.parse().expect("a number")
}

#[test]
fn the_last_listeners_close_refuses_and_a_relisten_brings_back() {
    let mut node = Node::new(0, |_| {});
    let v4 = node.serve("10.96.0.1:80", TCP, &[A]).backends[0];
    let v6 = node.serve("[fd96::1]:80", TCP, &["[fd99::1]:8080"]).backends[0];
    let both = node.inside(|| reusing("[::]:8080"));
    // Two sockets on one port, as a graceful restart has them for a moment.
    let [old, new] = [(), ()].map(|()| node.inside(|| reusing(A)));
    drop(old);
    assert_eq!(node.class(&v4), Class::Live, "another listener is left");
    drop(new);
    assert_eq!(node.class(&v4), Class::Live, "[::] serves IPv4 as well");
    drop(both);
    assert_eq!((node.class(&v4), node.class(&v6)), (Class::Refusing, Class::Refusing));
    let again = node.inside(|| TcpListener::bind("[fd99::1]:8080").expect("listen"));
    assert_eq!((node.class(&v4), node.class(&v6)), (Class::Refusing, Class::Live), "it serves IPv6 only");
    drop(again);
    let loopback = node.inside(|| TcpListener::bind("127.0.0.1:8080").expect("listen"));
    assert_eq!(node.class(&v4), Class::Refusing, "a listener on the loopback address serves nobody else");
    drop(loopback);
    let other_port = node.inside(|| TcpListener::bind("0.0.0.0:8081").expect("listen"));
    assert_eq!(node.class(&v4), Class::Refusing);
    drop(other_port);
    let _wildcard = node.inside(|| TcpListener::bind("0.0.0.0:8080").expect("listen"));
    assert_eq!((node.class(&v4), node.class(&v6)), (Class::Live, Class::Refusing), "it serves IPv4 only");
    let told = node.told();
    let of = |kind| told.iter().filter(|event| event.kind == kind && event.pod == POD).count();
    assert_eq!((of(EVENT_LISTENER_OPENED), of(EVENT_LISTENER_CLOSED)), (6, 5));
    assert!(told.iter().all(|event| [8080, 8081].contains(&u16::from_be(event.port_be))));
}

#[test]
fn a_full_ring_of_events_is_counted_and_harms_nothing() {
    let mut node = Node::new(0, |_| {});
    let backend = node.serve("10.96.0.1:80", TCP, &[A]).backends[0];
    node.told();
    // Nobody reads. Each turn tells of a listener that opened, and that it closed: twice what the ring takes.
    let turns = 1000;
    node.inside(|| (0..turns).for_each(|_| drop(TcpListener::bind(A).expect("listen"))));
    assert_eq!(node.class(&backend), Class::Refusing, "the health word needs no record");
    let lost = node.counter(Stat::EventsLost);
    assert!(lost > 0, "the ring takes more than was thought");
    assert_eq!(node.told().len() as u64 + lost, 2 * turns, "each was told or is counted");
    let _again = node.inside(|| TcpListener::bind(A).expect("listen"));
    assert_eq!(node.class(&backend), Class::Live);
    let told: Vec<u32> = node.told().iter().map(|event| event.kind).collect();
    assert_eq!(told, [EVENT_LISTENER_OPENED], "there is room again");
    assert_eq!(node.counter(Stat::EventsLost), lost);
}

/// A listener that shares its port, which std's does not.
fn reusing(at: &str) -> OwnedFd {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt,
    };
    let at: SocketAddr = at.parse().expect("an address");
    let family = if at.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    setsockopt(&socket, sockopt::ReusePort, &true).expect("SO_REUSEPORT");
    bind(socket.as_raw_fd(), &SockaddrStorage::from(at)).expect("bind");
    listen(&socket, Backlog::new(8).expect("a backlog")).expect("listen");
    socket
}

/// A process that is number 1 of its own pid namespace in the pod's network namespace, as a
/// container's is, and does nothing about SIGTERM but live on.
fn container(node: &Node) -> Child {
    node.inside(|| {
        unshare(CloneFlags::CLONE_NEWPID).expect("a pid namespace for the child");
        let mut command = Command::new("sh");
        command.args(["-c", "trap : TERM USR1; echo up; while :; do sleep 0.05; done"]);
        command.stdout(std::process::Stdio::piped());
        // SAFETY: one async-signal-safe system call: no child outlives a test that panics.
        unsafe { command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(None::<Signal>)?)) };
        let mut child = command.spawn().expect("run sh");
        let mut up = [0; 3];
        std::io::Read::read_exact(child.stdout.as_mut().expect("its output"), &mut up).expect("the trap is set");
        child
    })
}

fn end(mut child: Child) {
    child.kill().expect("end it");
    child.wait().expect("reap it");
}

#[test]
fn a_stop_signal_to_a_containers_init_drains_its_backends_before_kill_returns() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve("10.96.0.1:80", TCP, &[A, B]);
    let child = container(&node);
    let pid = Pid::from_raw(child.id() as i32);
    kill(pid, Signal::SIGUSR1).expect("a signal");
    assert_eq!(node.class(&service.backends[0]), Class::Live, "not every signal is a stop signal");
    kill(pid, Signal::SIGTERM).expect("a signal");
    let classes: Vec<Class> = service.backends.iter().map(|backend| node.class(backend)).collect();
    assert_eq!(classes, [Class::Draining, Class::Draining]);
    let told = node.told();
    assert!(
        told.iter().any(|event| event.kind == EVENT_STOP_SIGNAL && event.pod == POD && event.detail == 15),
        "{told:?}"
    );
    end(child);
}

#[test]
fn a_stop_signal_from_within_the_container_counts_and_one_to_another_process_does_not() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve("10.96.0.1:80", TCP, &[A]);
    let outsider = node.inside(|| Command::new("sleep").arg("60").spawn().expect("run sleep"));
    kill(Pid::from_raw(outsider.id() as i32), Signal::SIGTERM).expect("a signal");
    assert_eq!(node.class(&service.backends[0]), Class::Live, "it is no container's init");
    end(outsider);
    let init = container(&node);
    let status = Command::new("nsenter")
        .args(["--target", &init.id().to_string(), "--pid", "sh", "-c", "sleep 60 & kill $! && kill 1"])
        .status()
        .expect("run nsenter");
    assert!(status.success());
    assert_eq!(node.class(&service.backends[0]), Class::Draining);
    assert_eq!(node.counter(Stat::StopSignal), 1, "the signal to the container's other process is not one");
    end(init);
}

#[test]
fn a_signal_that_init_ignores_and_a_layer_that_is_off_change_nothing() {
    let mut node = Node::new(0, |settings| settings.layers = LAYER_CHOOSE);
    let service = node.serve("10.96.0.1:80", TCP, &[A]);
    let child = container(&node);
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).expect("a signal");
    assert_eq!(node.class(&service.backends[0]), Class::Live, "L1 is off");
    end(child);
    let mut settings = node.kernel.settings();
    settings.layers = LAYER_KNOW;
    node.kernel.set_settings(settings);
    // The kernel drops signals to a namespace's init that has no handler for them.
    let deaf = node.inside(|| {
        unshare(CloneFlags::CLONE_NEWPID).expect("a pid namespace for the child");
        Command::new("sleep").arg("60").spawn().expect("run sleep")
    });
    let started = Instant::now();
    kill(Pid::from_raw(deaf.id() as i32), Signal::SIGTERM).expect("a signal");
    assert_eq!(node.class(&service.backends[0]), Class::Live);
    assert!(started.elapsed() < Duration::from_secs(5));
    end(deaf);
}

#[test]
fn a_late_signal_does_not_revive_a_pod_that_refuses() {
    let mut node = Node::new(0, |_| {});
    let service = node.serve("10.96.0.1:80", TCP, &[A]);
    let (id, backend) = service.backends[0];
    node.write(&[Change::Health { id, generation: backend.generation, input: Input::ListenerClosed }]);
    let child = container(&node);
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).expect("a signal");
    assert_eq!(node.class(&service.backends[0]), Class::Refusing);
    end(child);
}
