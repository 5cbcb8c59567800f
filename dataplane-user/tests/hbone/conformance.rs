//! What Istio ambient's proxies put on the wire and expect there, point by point, against a hand-made peer: neither
//! side's library is trusted to check the other.

use std::{sync::Arc, time::Duration};

use dataplane_user::hbone::{
    PORT, Timeouts,
    client::{Connect, ConnectError},
    headers::{Authority, Baggage, Forwarded, Metadata},
    server::{Answer, Phase, Refusal, Request},
};
use rustls::{CipherSuite, ProtocolVersion};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::spawn_local,
    time::timeout,
};
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor};

use crate::{
    support::{Ca, Client, DOMAIN, Server, dial_and_relay, echo, id, worker},
    wire,
};

/// RFC 9113 section 6.5.2.
const MAX_CONCURRENT_STREAMS: u16 = 3;
const INITIAL_WINDOW_SIZE: u16 = 4;
const MAX_FRAME_SIZE: u16 = 5;
const MAX_HEADER_LIST_SIZE: u16 = 6;

#[test]
fn the_port_is_15008() {
    assert_eq!(PORT, 15008);
}

#[test]
fn the_clients_hello_offers_tls_1_3_with_aes_gcm_and_h2_and_names_nobody() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = Client::new(ca.context(&id("shopper")), &[id("web")], Timeouts::default());
        let opening = spawn_local(async move { client.open(address, address).await.err().unwrap() });
        let (tcp, _) = listener.accept().await.unwrap();
        let start = LazyConfigAcceptor::new(rustls::server::Acceptor::default(), tcp).await.unwrap();
        let hello = start.client_hello();
        assert_eq!(hello.server_name(), None);
        assert_eq!(hello.alpn().unwrap().collect::<Vec<_>>(), [b"h2"]);
        let suites = hello.cipher_suites();
        // The last is a mark (RFC 5746 section 3.3), no suite.
        assert!(suites.starts_with(&[CipherSuite::TLS13_AES_256_GCM_SHA384, CipherSuite::TLS13_AES_128_GCM_SHA256]));
        assert!(suites[2..].iter().all(|s| *s == CipherSuite::TLS_EMPTY_RENEGOTIATION_INFO_SCSV), "{suites:?}");
        drop(start);
        assert!(matches!(opening.await.unwrap(), ConnectError::Tls(_)));
    });
}

#[test]
fn a_session_is_never_resumed() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let server = Server::start(&ca.context(&id("web")), Timeouts::default()).await;
        let mut config = rustls::ClientConfig::clone(&ca.context(&id("shopper")).client_for(&[id("web")].into()));
        config.resumption = rustls::client::Resumption::in_memory_sessions(8);
        let config = Arc::new(config);
        for _ in 0..3 {
            let mut tls = wire::h2(server.address, config.clone()).await;
            wire::next(&mut tls, wire::SETTINGS).await.unwrap();
            assert_eq!(tls.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
        }
    });
}

#[test]
fn the_server_speaks_tls_1_3_with_windows_and_limits_as_istios() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let server = Server::start(&ca.context(&id("web")), Timeouts::default()).await;
        let mut tls = wire::h2(server.address, ca.context(&id("shopper")).client_for(&[id("web")].into())).await;
        {
            let connection = tls.get_ref().1;
            assert_eq!(connection.protocol_version(), Some(ProtocolVersion::TLSv1_3));
            assert_eq!(connection.alpn_protocol(), Some(&b"h2"[..]));
            let suite = connection.negotiated_cipher_suite().unwrap().suite();
            assert_eq!(suite, CipherSuite::TLS13_AES_256_GCM_SHA384);
        }
        let settings = wire::next(&mut tls, wire::SETTINGS).await.unwrap();
        assert_eq!(setting(&settings, INITIAL_WINDOW_SIZE), Some(4 << 20));
        assert_eq!(setting(&settings, MAX_FRAME_SIZE), Some(1 << 20));
        assert_eq!(setting(&settings, MAX_HEADER_LIST_SIZE), Some(16 << 10));
        assert_eq!(setting(&settings, MAX_CONCURRENT_STREAMS), Some(200));
        assert_eq!(connection_window(&mut tls).await, 16 << 20);
    });
}

#[test]
fn the_client_sends_windows_and_limits_as_istios_and_a_connect_with_its_headers() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = Client::new(ca.context(&id("shopper")), &[id("web")], Timeouts::default());
        let metadata = Metadata {
            baggage: "k8s.namespace.name=shop,service.name=cart".parse::<Baggage>().ok(),
            forwarded: Some(Forwarded::new("10.0.0.9:4711".parse().unwrap(), Some("web.shop.svc"))),
            traceparent: None,
            tries_elsewhere: false,
        };
        let opening = spawn_local(async move {
            let connect = Connect::new(Authority::Address("[fd00::1]:80".parse().unwrap()), metadata);
            client.connect(address, &connect).await.map(|tunnel| tunnel.baggage)
        });
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tls = TlsAcceptor::from(ca.context(&id("web")).server()).accept(tcp).await.unwrap();
        let mut preface = [0; 24];
        tls.read_exact(&mut preface).await.unwrap();
        assert_eq!(preface, wire::PREFACE);
        let settings = wire::next(&mut tls, wire::SETTINGS).await.unwrap();
        assert_eq!(setting(&settings, INITIAL_WINDOW_SIZE), Some(4 << 20));
        assert_eq!(setting(&settings, MAX_FRAME_SIZE), Some(1 << 20));
        assert_eq!(setting(&settings, MAX_HEADER_LIST_SIZE), Some(16 << 10));
        assert_eq!(connection_window(&mut tls).await, 16 << 20);
        tls.write_all(&wire::frame(wire::SETTINGS, 0, 0, &[])).await.unwrap();
        let headers = wire::next(&mut tls, wire::HEADERS).await.unwrap();
        assert_eq!(headers.flags & wire::END_STREAM, 0, "a tunnel that is closed from the start");
        // `:status: 200` of the static table, and baggage.
        let answer = [&[0x88][..], &wire::field("baggage", "k8s.pod.name=web-1")].concat();
        tls.write_all(&wire::frame(wire::HEADERS, wire::END_HEADERS, headers.stream, &answer)).await.unwrap();
        let baggage = opening.await.unwrap().unwrap().unwrap();
        assert_eq!(baggage.workload.as_deref(), Some("web-1"));
    });
}

#[test]
fn answers_are_200_400_401_and_503() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let server =
            Server::with(&ca.context(&id("web")), Timeouts::default(), |request: Request, answer: Answer| async move {
                match &request.authority {
                    Authority::Host(host, _) if **host == *"denied.shop" => answer.refuse(Refusal::Denied),
                    Authority::Host(host, _) if **host == *"forgotten.shop" => drop(answer),
                    _ => dial_and_relay(request, answer).await,
                }
            })
            .await;
        let mut tls = wire::h2(server.address, ca.context(&id("shopper")).client_for(&[id("web")].into())).await;
        let echo = echo().await.to_string();
        let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
        let mut stream = 1;
        for (method, authority, status) in [
            ("CONNECT", &*echo, 200),
            ("CONNECT", &gone, 503),
            ("CONNECT", "denied.shop:80", 401),
            ("CONNECT", "forgotten.shop:80", 503),
            ("CONNECT", "no-port.shop", 400),
            ("CONNECT", "10.0.0.1:0", 400),
            ("CONNECT", "10.0.0.256:80", 400),
        ] {
            let headers = wire::request(method, authority);
            tls.write_all(&wire::frame(wire::HEADERS, wire::END_HEADERS, stream, &headers)).await.unwrap();
            let answer = wire::next(&mut tls, wire::HEADERS).await.unwrap();
            assert_eq!((answer.stream, wire::status(&answer)), (stream, Some(status)), "{method} {authority}");
            stream += 2;
        }
        let get = [wire::field(":method", "GET"), wire::field(":scheme", "https"), wire::field(":path", "/")].concat();
        let get = [get, wire::field(":authority", &echo)].concat();
        tls.write_all(&wire::frame(wire::HEADERS, wire::END_HEADERS, stream, &get)).await.unwrap();
        assert_eq!(wire::status(&wire::next(&mut tls, wire::HEADERS).await.unwrap()), Some(400));
    });
}

#[test]
fn a_200_comes_only_after_the_application_was_reached() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let (go, gone) = tokio::sync::watch::channel(false);
        let server = Server::with(&ca.context(&id("web")), Timeouts::default(), move |request, answer| {
            let mut gone = gone.clone();
            async move {
                gone.wait_for(|go| *go).await.unwrap();
                dial_and_relay(request, answer).await;
            }
        })
        .await;
        let mut tls = wire::h2(server.address, ca.context(&id("shopper")).client_for(&[id("web")].into())).await;
        tls.write_all(&wire::connect(1, &echo().await.to_string())).await.unwrap();
        let early = timeout(Duration::from_millis(300), wire::next(&mut tls, wire::HEADERS)).await;
        assert!(early.is_err(), "answered before the dial: {early:?}");
        go.send(true).unwrap();
        assert_eq!(wire::status(&wire::next(&mut tls, wire::HEADERS).await.unwrap()), Some(200));
    });
}

#[test]
fn data_goes_both_ways_and_each_end_of_stream_closes_its_own_direction() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let server = Server::start(&ca.context(&id("web")), Timeouts::default()).await;
        let mut tls = wire::h2(server.address, ca.context(&id("shopper")).client_for(&[id("web")].into())).await;
        tls.write_all(&wire::connect(1, &echo().await.to_string())).await.unwrap();
        tls.write_all(&wire::frame(wire::DATA, 0, 1, b"hello")).await.unwrap();
        let data = wire::next(&mut tls, wire::DATA).await.unwrap();
        assert_eq!((&*data.payload, data.flags & wire::END_STREAM), (&b"hello"[..], 0));
        tls.write_all(&wire::frame(wire::DATA, wire::END_STREAM, 1, b"!")).await.unwrap();
        let data = wire::next(&mut tls, wire::DATA).await.unwrap();
        assert_eq!(&*data.payload, b"!");
        let end = wire::next(&mut tls, wire::DATA).await.unwrap();
        assert!(end.payload.is_empty() && end.flags & wire::END_STREAM != 0);
    });
}

#[test]
fn a_ping_is_answered_and_one_is_sent_when_nothing_was_heard() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let timeouts = Timeouts { ping_every: Duration::from_millis(200), ..Timeouts::default() };
        assert_eq!(Timeouts::default().ping_every, Duration::from_secs(10));
        assert_eq!(Timeouts::default().pong_within, Duration::from_secs(20));
        assert_eq!(Timeouts::default().idle, Duration::from_secs(300));
        let server = Server::start(&ca.context(&id("web")), timeouts).await;
        let mut tls = wire::h2(server.address, ca.context(&id("shopper")).client_for(&[id("web")].into())).await;
        tls.write_all(&wire::frame(wire::PING, 0, 0, b"abcdefgh")).await.unwrap();
        let pong = wire::next(&mut tls, wire::PING).await.unwrap();
        assert_eq!((pong.flags & wire::ACK, &*pong.payload), (wire::ACK, &b"abcdefgh"[..]));
        let ping = wire::next(&mut tls, wire::PING).await.unwrap();
        assert_eq!(ping.flags & wire::ACK, 0);
    });
}

#[test]
fn a_drain_says_goaway_twice_so_that_no_request_on_its_way_is_lost() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let server = Server::start(&ca.context(&id("web")), Timeouts::default()).await;
        let mut tls = wire::h2(server.address, ca.context(&id("shopper")).client_for(&[id("web")].into())).await;
        let echo = echo().await.to_string();
        tls.write_all(&wire::connect(1, &echo)).await.unwrap();
        wire::next(&mut tls, wire::HEADERS).await.unwrap();
        server.phase.send(Phase::Draining).unwrap();
        let last = |frame: &wire::Frame| u32::from_be_bytes(frame.payload[..4].try_into().unwrap());
        let code = |frame: &wire::Frame| u32::from_be_bytes(frame.payload[4..8].try_into().unwrap());
        let first = wire::next(&mut tls, wire::GOAWAY).await.unwrap();
        assert_eq!((last(&first), code(&first)), (0x7fff_ffff, 0));
        let ping = wire::next(&mut tls, wire::PING).await.unwrap();
        // This one crossed the GOAWAY and is still taken.
        tls.write_all(&wire::connect(3, &echo)).await.unwrap();
        assert_eq!(wire::next(&mut tls, wire::HEADERS).await.unwrap().stream, 3);
        tls.write_all(&wire::frame(wire::PING, wire::ACK, 0, &ping.payload)).await.unwrap();
        let second = wire::next(&mut tls, wire::GOAWAY).await.unwrap();
        assert_eq!((last(&second), code(&second)), (3, 0));
    });
}

#[test]
fn a_goaway_and_a_refused_stream_are_unprocessed_and_may_go_elsewhere() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        // GOAWAY with last stream 0, code NO_ERROR; RST_STREAM with REFUSED_STREAM.
        let go_away = wire::frame(wire::GOAWAY, 0, 0, &[0; 8]);
        let refused = wire::frame(wire::RST_STREAM, 0, 1, &[0, 0, 0, 7]);
        let reset = wire::frame(wire::RST_STREAM, 0, 1, &[0, 0, 0, 8]);
        for (bytes, unprocessed) in [(go_away, true), (refused, true), (reset, false)] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let client = Client::new(ca.context(&id("shopper")), &[id("web")], Timeouts::default());
            let opening = spawn_local(async move { client.open(address, address).await.err().unwrap() });
            let (tcp, _) = listener.accept().await.unwrap();
            let mut tls = TlsAcceptor::from(ca.context(&id("web")).server()).accept(tcp).await.unwrap();
            tls.read_exact(&mut [0; 24]).await.unwrap();
            tls.write_all(&wire::frame(wire::SETTINGS, 0, 0, &[])).await.unwrap();
            wire::next(&mut tls, wire::HEADERS).await.unwrap();
            tls.write_all(&bytes).await.unwrap();
            let error = opening.await.unwrap();
            assert_eq!(matches!(error, ConnectError::Unprocessed { .. }), unprocessed, "{error}");
            assert!(error.elsewhere_is_safe());
        }
    });
}

#[test]
fn a_peers_limit_of_streams_is_kept_by_opening_another_connection() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = ca.context(&id("web")).server();
        let (heard, mut streams) = tokio::sync::mpsc::unbounded_channel();
        spawn_local(async move {
            let mut connection = 0;
            while let Ok((tcp, _)) = listener.accept().await {
                connection += 1;
                let (config, heard) = (config.clone(), heard.clone());
                spawn_local(async move {
                    let mut tls = TlsAcceptor::from(config).accept(tcp).await.unwrap();
                    tls.read_exact(&mut [0; 24]).await.unwrap();
                    // MAX_CONCURRENT_STREAMS 2.
                    tls.write_all(&wire::frame(wire::SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 2])).await.unwrap();
                    while let Ok(headers) = wire::next(&mut tls, wire::HEADERS).await {
                        heard.send((connection, headers.stream)).unwrap();
                        let ok = wire::frame(wire::HEADERS, wire::END_HEADERS, headers.stream, &[0x88]);
                        tls.write_all(&ok).await.unwrap();
                    }
                });
            }
        });
        let client = Client::new(ca.context(&id("shopper")), &[id("web")], Timeouts::default());
        let mut tunnels = Vec::new();
        for expected in [(1, 1), (1, 3), (2, 1), (2, 3), (3, 1)] {
            tunnels.push(client.open(address, address).await.unwrap());
            assert_eq!(streams.recv().await, Some(expected));
        }
    });
}

fn setting(settings: &wire::Frame, which: u16) -> Option<u32> {
    settings.payload.chunks(6).find_map(|entry| {
        let name = u16::from_be_bytes([entry[0], entry[1]]);
        (name == which).then(|| u32::from_be_bytes([entry[2], entry[3], entry[4], entry[5]]))
    })
}

/// 65,535 and what the first update adds.
async fn connection_window(tls: &mut (impl AsyncReadExt + Unpin)) -> u32 {
    loop {
        let update = wire::next(tls, wire::WINDOW_UPDATE).await.unwrap();
        if update.stream == 0 {
            return 65_535 + u32::from_be_bytes(update.payload[..4].try_into().unwrap());
        }
    }
}
