//! Streams: what goes in comes out, ends are told apart, and a lost peer is noticed.

use std::{cell::Cell, rc::Rc, time::Duration};

use dataplane_user::hbone::{
    Timeouts,
    client::{Connect, ConnectError},
    headers::{Authority, Baggage, Forwarded, Metadata},
    local,
    relay::Counts,
    server::{Phase, Refusal},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, sleep},
};

use crate::support::{Ca, Client, DOMAIN, Server, application, dial_and_relay, echo, id, until, worker};

struct World {
    server: Server,
    client: Rc<Client>,
}

impl World {
    async fn new(timeouts: Timeouts) -> Self {
        let ca = Ca::new(DOMAIN);
        let server = Server::start(&ca.context(&id("web")), timeouts).await;
        let client = Client::new(ca.context(&id("shopper")), &[id("web")], timeouts);
        Self { server, client: client.into() }
    }
}

#[test]
fn bytes_come_back_whole_in_order_and_the_end_comes_after_them() {
    worker(async {
        let world = World::new(Timeouts::default()).await;
        let to = echo().await;
        let entry = world.client.listen(world.server.address, to).await;
        let (mut read, mut write) = TcpStream::connect(entry).await.unwrap().into_split();
        let sent: Vec<u8> = (0..20_000_000u32).map(|i| (i ^ (i >> 8)) as u8).collect();
        let copy = sent.clone();
        let writer = tokio::task::spawn_local(async move {
            write.write_all(&copy).await.unwrap();
            // Half-close: the echo ends only when it has seen this.
            write.shutdown().await.unwrap();
        });
        let mut got = Vec::new();
        read.read_to_end(&mut got).await.unwrap();
        writer.await.unwrap();
        assert_eq!(got.len(), sent.len());
        assert!(got == sent, "bytes were changed");
        until("the stream is counted out", || world.client.pool.size().streams == 0).await;
        assert_eq!(world.client.pool.size().connections, 1);
    });
}

#[test]
fn many_streams_share_one_dial_and_the_101st_takes_another_connection() {
    worker(async {
        let world = World::new(Timeouts::default()).await;
        let to = echo().await;
        let opening = (0..101).map(|_| world.client.open(world.server.address, to));
        let tunnels = futures_util::future::join_all(opening).await;
        let tunnels: Vec<_> = tunnels.into_iter().map(Result::unwrap).collect();
        assert_eq!(world.server.accepted.get(), 2);
        let size = world.client.pool.size();
        assert_eq!((size.connections, size.streams, size.dials), (2, 101, 0));
        drop(tunnels);
        assert_eq!(world.client.pool.size().streams, 0);
    });
}

#[test]
fn a_failed_dial_fails_everybody_who_waits_for_it_and_only_one_is_made() {
    worker(async {
        let world = World::new(Timeouts::default()).await;
        let dials = Cell::new(0);
        let dial = || {
            dials.set(dials.get() + 1);
            async {
                sleep(Duration::from_millis(50)).await;
                Err(std::io::ErrorKind::ConnectionRefused.into())
            }
        };
        let key = world.client.key(world.server.address);
        let connect = Connect::new(Authority::Address(world.server.address), Metadata::default());
        let opening = (0..50).map(|_| world.client.pool.connect(&key, &world.client.context, &connect, dial));
        let results = futures_util::future::join_all(opening).await;
        assert_eq!(dials.get(), 1);
        for result in results {
            let error = result.err().unwrap();
            assert!(matches!(error, ConnectError::Dial { .. }) && error.elsewhere_is_safe(), "{error}");
        }
        assert_eq!(world.client.pool.size(), Default::default());
    });
}

#[test]
fn an_application_that_is_not_there_is_a_503_and_may_be_asked_elsewhere() {
    worker(async {
        let world = World::new(Timeouts::default()).await;
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = world.client.open(world.server.address, gone).await.err().unwrap();
        assert!(matches!(&error, ConnectError::Refused { status, .. } if status.as_u16() == 503), "{error}");
        assert!(error.elsewhere_is_safe());
    });
}

#[test]
fn a_denial_is_a_401_and_is_not_taken_elsewhere() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let deny = |_, answer: dataplane_user::hbone::server::Answer| async move { answer.refuse(Refusal::Denied) };
        let server = Server::with(&ca.context(&id("web")), Timeouts::default(), deny).await;
        let client = Client::new(ca.context(&id("shopper")), &[id("web")], Timeouts::default());
        let error = client.open(server.address, server.address).await.err().unwrap();
        assert!(matches!(&error, ConnectError::Refused { status, .. } if status.as_u16() == 401), "{error}");
        assert!(!error.elsewhere_is_safe());
    });
}

#[test]
fn both_sides_learn_who_the_other_is_and_what_it_says() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let server = Server::with(&ca.context(&id("web")), Timeouts::default(), |_, answer| async move {
            let baggage = Baggage { workload: Some("web-1".into()), ..Baggage::default() };
            let stream = answer.accept(Some(&baggage)).unwrap();
            sleep(Duration::from_secs(1)).await;
            drop(stream);
        })
        .await;
        let client = Client::new(ca.context(&id("shopper")), &[id("other"), id("web")], Timeouts::default());
        let metadata = Metadata {
            baggage: Some(Baggage { service: Some("cart".into()), ..Baggage::default() }),
            forwarded: Some(Forwarded::new("10.0.0.9:4711".parse().unwrap(), Some("web.shop.svc.cluster.local"))),
            traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().ok(),
            tries_elsewhere: true,
        };
        let to = Authority::Host("web.shop.svc.cluster.local".into(), 80);
        let tunnel = client.connect(server.address, &Connect::new(to.clone(), metadata.clone())).await.unwrap();
        assert_eq!(tunnel.peer, id("web"));
        assert_eq!(tunnel.baggage.unwrap().workload.as_deref(), Some("web-1"));
        let request = server.requests.borrow()[0].clone();
        assert_eq!((request.client, request.authority, request.metadata), (id("shopper"), to, metadata));
    });
}

#[test]
fn a_reset_of_one_side_is_a_reset_on_the_other() {
    worker(async {
        let world = World::new(Timeouts::default()).await;
        let to = application(|tcp| async move {
            sleep(Duration::from_millis(50)).await;
            tcp.set_zero_linger()
        })
        .await;
        let entry = world.client.listen(world.server.address, to).await;
        let mut tcp = TcpStream::connect(entry).await.unwrap();
        let error = tcp.read(&mut [0]).await.expect_err("the application's reset became an orderly end");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

        let (saw, seen) = tokio::sync::oneshot::channel();
        let saw = Rc::new(Cell::new(Some(saw)));
        let to = application(move |mut tcp| {
            let saw = saw.take();
            async move {
                let result = tcp.read(&mut [0]).await;
                let _ = saw.unwrap().send(result.map_err(|e| e.kind()));
                Ok(())
            }
        })
        .await;
        let entry = world.client.listen(world.server.address, to).await;
        let tcp = TcpStream::connect(entry).await.unwrap();
        sleep(Duration::from_millis(50)).await;
        tcp.set_zero_linger().unwrap();
        drop(tcp);
        assert_eq!(seen.await.unwrap(), Err(std::io::ErrorKind::ConnectionReset));
    });
}

#[test]
fn a_draining_pod_tells_its_peers_and_running_streams_finish() {
    worker(async {
        let world = World::new(Timeouts::default()).await;
        let to = echo().await;
        let entry = world.client.listen(world.server.address, to).await;
        let mut running = TcpStream::connect(entry).await.unwrap();
        running.write_all(b"a").await.unwrap();
        running.read_exact(&mut [0]).await.unwrap();
        world.server.phase.send(Phase::Draining).unwrap();
        sleep(Duration::from_millis(50)).await;
        // A new stream goes over a connection of its own; here the server still takes it, with GOAWAY at once.
        let _ = world.client.open(world.server.address, to).await;
        assert_eq!(world.server.accepted.get(), 2, "a connection was used after its GOAWAY");
        running.write_all(b"b").await.unwrap();
        let mut got = [0];
        running.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"b");
        drop(running);
        until("the drained connection ends", || !world.server.ended.borrow().is_empty()).await;
        assert!(world.server.ended.borrow()[0].is_ok());
    });
}

#[test]
fn a_peer_that_vanished_is_noticed_by_a_new_stream_in_under_300_ms_and_evicted() {
    worker(async {
        let world = World::new(Timeouts::default()).await;
        // A wire that can be cut without a word.
        let cut = Rc::new(Cell::new(false));
        let wire = wire(world.server.address, cut.clone()).await;
        let to = echo().await;
        drop(world.client.open(wire, to).await.unwrap());
        cut.set(true);
        let begun = Instant::now();
        let error = world.client.open(wire, to).await.err().unwrap();
        assert!(matches!(error, ConnectError::Silent { .. }) && error.elsewhere_is_safe(), "{error}");
        assert!(begun.elapsed() < Duration::from_millis(300), "it took {:?}", begun.elapsed());
        assert_eq!(world.client.pool.size().connections, 0);
        cut.set(false);
        world.client.open(wire, to).await.unwrap();
    });
}

#[test]
fn a_slow_application_behind_a_live_peer_is_waited_for() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let server = Server::with(&ca.context(&id("web")), Timeouts::default(), |request, answer| async move {
            sleep(Duration::from_millis(1200)).await;
            dial_and_relay(request, answer).await;
        })
        .await;
        let client = Client::new(ca.context(&id("shopper")), &[id("web")], Timeouts::default());
        let to = echo().await;
        client.open(server.address, to).await.unwrap();
        let mut hasty = Connect::new(Authority::Address(to), Metadata::default());
        hasty.within = Duration::from_millis(500);
        let error = client.connect(server.address, &hasty).await.err().unwrap();
        assert!(matches!(error, ConnectError::TimedOut { .. }), "{error}");
        assert_eq!(client.pool.size().connections, 1, "a live connection was evicted");
    });
}

#[test]
fn a_dead_connection_with_a_running_stream_is_ended_by_its_pings() {
    worker(async {
        let timeouts = Timeouts {
            ping_every: Duration::from_millis(100),
            pong_within: Duration::from_millis(200),
            ..Timeouts::default()
        };
        let world = World::new(timeouts).await;
        let cut = Rc::new(Cell::new(false));
        let wire = wire(world.server.address, cut.clone()).await;
        let to = echo().await;
        let entry = world.client.listen(wire, to).await;
        let mut tcp = TcpStream::connect(entry).await.unwrap();
        tcp.write_all(b"a").await.unwrap();
        tcp.read_exact(&mut [0]).await.unwrap();
        sleep(Duration::from_millis(500)).await;
        cut.set(true);
        assert!(tcp.read(&mut [0]).await.is_err(), "a lost peer looked like an orderly end");
        until("the server noticed too", || !world.server.ended.borrow().is_empty()).await;
        assert!(matches!(
            world.server.ended.borrow()[0],
            Err(dataplane_user::hbone::server::ServeError::Silent { .. })
        ));
    });
}

#[test]
fn an_unused_connection_is_closed_by_either_side() {
    worker(async {
        let quick = Timeouts { idle: Duration::from_millis(100), ..Timeouts::default() };
        let ca = Ca::new(DOMAIN);
        let to = echo().await;
        for (ours, theirs) in [(quick, Timeouts::default()), (Timeouts::default(), quick)] {
            let server = Server::start(&ca.context(&id("web")), theirs).await;
            let client = Client::new(ca.context(&id("shopper")), &[id("web")], ours);
            let tunnel = client.open(server.address, to).await.unwrap();
            sleep(Duration::from_millis(300)).await;
            client.pool.sweep();
            assert_eq!(client.pool.size().connections, 1, "a connection in use was closed");
            drop(tunnel);
            until("the connection is closed", || {
                client.pool.sweep();
                client.pool.size().connections == 0 && !server.ended.borrow().is_empty()
            })
            .await;
        }
    });
}

#[test]
fn on_one_node_bytes_few_or_many_come_back_whole_and_ends_and_resets_are_told_apart() {
    worker(async {
        let to = echo().await;
        let entry = application(move |near| async move {
            let far = TcpStream::connect(to).await?;
            local::relay(near, far, &Counts::default()).await
        })
        .await;
        for length in [0, 1, 100_000, 30_000_000u32] {
            let sent: Vec<u8> = (0..length).map(|i| (i ^ (i >> 8)) as u8).collect();
            let (mut read, mut write) = TcpStream::connect(entry).await.unwrap().into_split();
            let mut got = Vec::new();
            let send = async {
                write.write_all(&sent).await?;
                write.shutdown().await
            };
            tokio::try_join!(send, read.read_to_end(&mut got)).unwrap();
            assert!(got == sent, "{} of {length} bytes came back", got.len());
        }
        let to = application(|mut tcp| async move {
            tcp.read_exact(&mut vec![0; 3 << 20]).await?;
            tcp.set_zero_linger()
        })
        .await;
        let entry = application(move |near| async move {
            let far = TcpStream::connect(to).await?;
            local::relay(near, far, &Counts::default()).await
        })
        .await;
        let mut tcp = TcpStream::connect(entry).await.unwrap();
        tcp.write_all(&vec![0; 3 << 20]).await.unwrap();
        let error = tcp.read(&mut [0]).await.expect_err("a reset became an orderly end");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
}

/// A forwarder of TCP bytes that stops forwarding, without closing anything, while `cut` is set.
async fn wire(to: std::net::SocketAddr, cut: Rc<Cell<bool>>) -> std::net::SocketAddr {
    application(move |tcp| {
        let cut = cut.clone();
        async move {
            let far = TcpStream::connect(to).await?;
            let (near, far) = (tcp.into_split(), far.into_split());
            let pump = |mut from: tokio::net::tcp::OwnedReadHalf, mut to: tokio::net::tcp::OwnedWriteHalf| {
                let cut = cut.clone();
                async move {
                    let mut buffer = [0; 4096];
                    loop {
                        let n = from.read(&mut buffer).await?;
                        if cut.get() {
                            std::future::pending::<()>().await;
                        }
                        if n == 0 {
                            return to.shutdown().await;
                        }
                        to.write_all(&buffer[..n]).await?;
                    }
                }
            };
            tokio::try_join!(pump(near.0, far.1), pump(far.0, near.1)).map(drop)
        }
    })
    .await
}

#[test]
fn a_peer_that_does_not_even_take_the_connection_is_given_up_as_fast_and_the_dial_goes_on() {
    worker(async {
        let world = World::new(Timeouts::default()).await;
        let to = echo().await;
        let key = world.client.key(world.server.address);
        let connect = Connect::new(Authority::Address(to), Metadata::default());
        let server = world.server.address;
        let dial = move || async move {
            sleep(Duration::from_millis(600)).await;
            TcpStream::connect(server).await
        };
        let begun = Instant::now();
        let error = world.client.pool.connect(&key, &world.client.context, &connect, dial).await.err().unwrap();
        assert!(matches!(error, ConnectError::Silent { .. }), "{error}");
        assert!(begun.elapsed() < Duration::from_millis(300), "it took {:?}", begun.elapsed());
        until("the dial ends well", || world.client.pool.size().connections == 1).await;
        let never = || async { Err(std::io::ErrorKind::Unsupported.into()) };
        world.client.pool.connect(&key, &world.client.context, &connect, never).await.unwrap();
    });
}
