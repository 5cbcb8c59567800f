//! Peers that are wrong or mean: each is refused or bounded, and the server goes on serving others.

use std::{rc::Rc, sync::Arc, time::Duration};

use dataplane_user::{
    hbone::{
        Timeouts,
        client::{Connect, ConnectError},
        headers::{Authority, Baggage, Metadata},
        server::ServeError,
        tls::{Context, HandshakeError, TlsError},
    },
    identity::{Credential, SpiffeId},
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rcgen::ExtendedKeyUsagePurpose;
use rustls::ClientConfig;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use crate::{
    support::{Ca, Client, DOMAIN, Leaf, Server, dial_and_relay, echo, id, until, worker},
    wire,
};

/// Short enough to wait for in a test.
fn quick() -> Timeouts {
    Timeouts { handshake: Duration::from_millis(500), ..Timeouts::default() }
}

/// A server that must survive, a client that proves it has, and how an attacker with a good certificate connects.
struct Target {
    server: Server,
    honest: Client,
    attacker: Arc<ClientConfig>,
    echo: std::net::SocketAddr,
}

impl Target {
    async fn new(timeouts: Timeouts) -> Self {
        let ca = Ca::new(DOMAIN);
        let server = Server::start(&ca.context(&id("web")), timeouts).await;
        let honest = Client::new(ca.context(&id("shopper")), &[id("web")], Timeouts::default());
        let attacker = ca.context(&id("mallory")).client_for(&[id("web")].into());
        Self { server, honest, attacker, echo: echo().await }
    }

    async fn h2(&self) -> tokio_rustls::client::TlsStream<TcpStream> {
        wire::h2(self.server.address, self.attacker.clone()).await
    }

    /// Others are served as if nothing had happened.
    async fn serves(&self) {
        self.honest.open(self.server.address, self.echo).await.expect("an honest client is not served any more");
    }

    async fn cut_off(&self) -> String {
        until("the attacker is cut off", || !self.server.ended.borrow().is_empty()).await;
        let result = self.server.ended.borrow_mut().remove(0);
        result.expect_err("the attacker's connection ended well").to_string()
    }
}

/// What is wrong, the certificate, and whether an error says so.
type Case = (&'static str, Leaf, fn(&TlsError) -> bool);

fn wrong_leaves(id: &SpiffeId) -> Vec<Case> {
    let good = Leaf::of(id);
    let named = |names: &[&str]| Leaf { names: names.iter().map(ToString::to_string).collect(), ..good.clone() };
    let mut none = good.clone();
    none.usages = vec![ExtendedKeyUsagePurpose::EmailProtection];
    vec![
        ("expired", Leaf { valid: (-7200, -3600), ..good.clone() }, |e| matches!(e, TlsError::Expired(_))),
        ("not yet valid", Leaf { valid: (3600, 7200), ..good.clone() }, |e| matches!(e, TlsError::NotYetValid(_))),
        ("self-signed", Leaf { self_signed: true, ..good.clone() }, |e| matches!(e, TlsError::UnknownRoot(_))),
        ("wrong purpose", none, |e| matches!(e, TlsError::WrongPurpose)),
        ("no identity", named(&[]), |e| matches!(e, TlsError::NotOneIdentity(0))),
        ("two identities", named(&[id.as_str(), "spiffe://cluster.local/ns/a/sa/b"]), |e| {
            matches!(e, TlsError::NotOneIdentity(2))
        }),
        ("an identity that is none", named(&["https://cluster.local/ns/a/sa/b"]), |e| {
            matches!(e, TlsError::BadIdentity(_))
        }),
    ]
}

#[test]
fn a_client_sends_nothing_to_a_server_with_a_wrong_certificate() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let client = Client::new(ca.context(&id("shopper")), &[id("web")], quick());
        let mut cases = wrong_leaves(&id("web"));
        cases.push(("another workload", Leaf::of(&id("other")), |e| matches!(e, TlsError::WrongIdentity { .. })));
        for (what, leaf, expected) in cases {
            let context = Context::new(&ca.credential_like(&id("web"), &leaf)).unwrap();
            let server = Server::start(&context, quick()).await;
            let error = client.open(server.address, server.address).await.err().unwrap();
            assert!(error.elsewhere_is_safe());
            match error {
                ConnectError::Tls(HandshakeError { reason, peer }) => {
                    assert!(expected(&reason), "{what}: {reason:?}");
                    assert_eq!(peer, server.address);
                }
                error => panic!("{what}: {error}"),
            }
            until("the server has seen the refusal", || !server.ended.borrow().is_empty()).await;
            assert!(server.ended.borrow()[0].is_err(), "{what}: the handshake was finished");
            assert!(server.requests.borrow().is_empty());
        }
        assert_eq!(client.pool.size(), Default::default());
    });
}

#[test]
fn a_server_refuses_a_client_with_a_wrong_certificate_and_tells_it_so() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let server = Server::start(&ca.context(&id("web")), quick()).await;
        let foreign: SpiffeId = "spiffe://elsewhere.example/ns/shop/sa/shopper".parse().unwrap();
        let mut cases = wrong_leaves(&id("shopper"));
        cases.push(("another trust domain", Leaf::of(&foreign), |e| matches!(e, TlsError::WrongTrustDomain { .. })));
        for (what, leaf, expected) in cases {
            let context = Context::new(&ca.credential_like(&id("shopper"), &leaf)).unwrap();
            let client = Client::new(context.into(), &[id("web")], quick());
            let error = client.open(server.address, server.address).await.err().unwrap();
            assert!(
                matches!(&error, ConnectError::Tls(HandshakeError { reason: TlsError::RefusedUs(_), .. })),
                "{what}: {error}"
            );
            until("the server has refused", || !server.ended.borrow().is_empty()).await;
            match server.ended.borrow_mut().pop().unwrap() {
                Err(ServeError::Handshake(HandshakeError { reason, .. })) => {
                    assert!(expected(&reason), "{what}: {reason:?}");
                }
                end => panic!("{what}: {end:?}"),
            }
        }
        assert!(server.requests.borrow().is_empty());
    });
}

#[test]
fn another_authority_of_the_same_trust_domain_is_unknown_to_both_sides() {
    worker(async {
        let (ours, theirs) = (Ca::new(DOMAIN), Ca::new(DOMAIN));
        let server = Server::start(&theirs.context(&id("web")), quick()).await;
        let client = Client::new(ours.context(&id("shopper")), &[id("web")], quick());
        let error = client.open(server.address, server.address).await.err().unwrap();
        assert!(
            matches!(&error, ConnectError::Tls(HandshakeError { reason: TlsError::UnknownRoot(d), .. }) if **d == *DOMAIN),
            "{error}"
        );
        // A client that trusts them, but is not trusted.
        let mut credential: Credential = ours.credential(&id("shopper"));
        credential.trust = theirs.trust.clone();
        let client = Client::new(Rc::new(Context::new(&credential).unwrap()), &[id("web")], quick());
        let error = client.open(server.address, server.address).await.err().unwrap();
        assert!(matches!(&error, ConnectError::Tls(HandshakeError { reason: TlsError::RefusedUs(_), .. })), "{error}");
    });
}

#[test]
fn no_certificate_no_alpn_or_another_alpn_is_refused() {
    worker(async {
        let target = Target::new(quick()).await;
        let with_alpn = |protocols: &[&[u8]]| {
            let mut config = ClientConfig::clone(&target.attacker);
            config.alpn_protocols = protocols.iter().map(|p| p.to_vec()).collect();
            config.check_selected_alpn = false;
            Arc::new(config)
        };
        let mut anonymous = ClientConfig::clone(&target.attacker);
        anonymous.client_auth_cert_resolver = Arc::new(NoKey);
        for (config, expected) in [
            (Arc::new(anonymous), "it showed no certificate"),
            (with_alpn(&[]), "no ALPN h2"),
            (with_alpn(&[b"http/1.1"]), "no ALPN h2"),
            (with_alpn(&[b"istio"]), "no ALPN h2"),
        ] {
            if let Ok(mut tls) = wire::tls(target.server.address, config).await {
                // TLS 1.3 lets the client finish first.
                let _ = tls.write_all(&[wire::PREFACE, &wire::frame(wire::SETTINGS, 0, 0, &[])].concat()).await;
                let _ = tls.read_to_end(&mut Vec::new()).await;
            }
            let reason = target.cut_off().await;
            assert!(reason.contains(expected), "{reason}");
        }
        target.serves().await;
    });
}

#[derive(Debug)]
struct NoKey;

impl rustls::client::ResolvesClientCert for NoKey {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[test]
fn tls_1_2_is_refused_with_its_alert() {
    worker(async {
        let target = Target::new(quick()).await;
        let mut tcp = TcpStream::connect(target.server.address).await.unwrap();
        // A ClientHello without supported_versions (RFC 5246 section 7.4.1.2): ECDHE-ECDSA with AES-256-GCM, P-256.
        let extensions = [
            &[0x00, 0x0a, 0x00, 0x04, 0x00, 0x02, 0x00, 0x17][..],
            &[0x00, 0x0d, 0x00, 0x04, 0x00, 0x02, 0x04, 0x03],
            &[0x00, 0x10, 0x00, 0x05, 0x00, 0x03, 0x02, b'h', b'2'],
        ]
        .concat();
        let mut hello = vec![0x03, 0x03];
        hello.extend([7; 32]);
        hello.extend([0x00, 0x00, 0x02, 0xc0, 0x2c, 0x01, 0x00]);
        hello.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
        hello.extend(extensions);
        let mut message = vec![0x01, 0x00];
        message.extend(u16::try_from(hello.len()).unwrap().to_be_bytes());
        message.extend(hello);
        let mut record = vec![0x16, 0x03, 0x01];
        record.extend(u16::try_from(message.len()).unwrap().to_be_bytes());
        record.extend(message);
        tcp.write_all(&record).await.unwrap();
        let mut alert = [0; 7];
        tcp.read_exact(&mut alert).await.unwrap();
        // RFC 8446 section 6: fatal, protocol_version.
        assert_eq!((alert[0], alert[5], alert[6]), (0x15, 2, 70));
        drop(tcp);
        let reason = target.cut_off().await;
        assert!(reason.contains("does not speak TLS 1.3"), "{reason}");
        target.serves().await;
    });
}

#[test]
fn whatever_name_a_client_asks_for_it_gets_the_pods_one_certificate() {
    worker(async {
        let target = Target::new(quick()).await;
        let mut config = ClientConfig::clone(&target.attacker);
        config.enable_sni = true;
        let config = Arc::new(config);
        for name in ["other.shop.svc.cluster.local", "x", "outbound_.80_._.web.shop.svc.cluster.local"] {
            let tcp = TcpStream::connect(target.server.address).await.unwrap();
            let tls = tokio_rustls::TlsConnector::from(config.clone()).connect(name.try_into().unwrap(), tcp).await;
            // The verifier of this configuration accepts `web` and nobody else.
            tls.unwrap();
        }
        target.serves().await;
    });
}

#[test]
fn oversized_headers_are_not_sent_and_not_taken() {
    worker(async {
        let target = Target::new(quick()).await;
        let baggage = Baggage { service: Some("x".repeat(17_000).into()), ..Baggage::default() };
        let metadata = Metadata { baggage: Some(baggage), ..Metadata::default() };
        let connect = Connect::new(Authority::Address(target.echo), metadata);
        let error = target.honest.connect(target.server.address, &connect).await.err().unwrap();
        assert!(matches!(error, ConnectError::TooLong(17_001..)) && !error.elsewhere_is_safe(), "{error}");

        let mut tls = target.h2().await;
        let block = [wire::request("CONNECT", "10.0.0.1:80"), wire::field("baggage", &"x".repeat(20_000))].concat();
        let (first, rest) = block.split_at(16_000);
        let frames =
            [wire::frame(wire::HEADERS, 0, 1, first), wire::frame(wire::CONTINUATION, wire::END_HEADERS, 1, rest)];
        tls.write_all(&frames.concat()).await.unwrap();
        // 431 from h2 itself.
        let answer = wire::next(&mut tls, wire::HEADERS).await.unwrap();
        assert_eq!(answer.stream, 1);
        assert_ne!(wire::status(&answer), Some(200));
        assert!(target.server.requests.borrow().is_empty(), "the service was bothered with it");
        target.serves().await;
    });
}

#[test]
fn endless_continuations_are_cut_off() {
    worker(async {
        let target = Target::new(quick()).await;
        let mut tls = target.h2().await;
        tls.write_all(&wire::frame(wire::HEADERS, 0, 1, &wire::request("CONNECT", "10.0.0.1:80"))).await.unwrap();
        let (mut read, mut write) = tokio::io::split(tls);
        let flood = wire::frame(wire::CONTINUATION, 0, 1, &wire::field("x-flood", "1")).repeat(100);
        let sent = tokio::task::spawn_local(async move {
            let mut sent = 0;
            while write.write_all(&flood).await.is_ok() && sent < 100_000 {
                sent += 100;
            }
            sent
        });
        wire::go_away(&mut read).await;
        let _ = tokio::io::copy(&mut read, &mut tokio::io::sink()).await;
        assert!(sent.await.unwrap() < 100_000, "the flood was taken to its end");
        target.cut_off().await;
        target.serves().await;
    });
}

#[test]
fn rapid_resets_are_cut_off_before_they_make_many_dials() {
    worker(async {
        let target = Target::new(quick()).await;
        let tls = target.h2().await;
        let (mut read, mut write) = tokio::io::split(tls);
        let authority = target.echo.to_string();
        let flood = tokio::task::spawn_local(async move {
            for stream in (1..100_000).step_by(2) {
                let pair = [wire::connect(stream, &authority), wire::frame(wire::RST_STREAM, 0, stream, &[0, 0, 0, 8])];
                if write.write_all(&pair.concat()).await.is_err() {
                    return;
                }
            }
            panic!("50,000 resets were taken");
        });
        assert_eq!(wire::go_away(&mut read).await, Some(wire::ENHANCE_YOUR_CALM));
        let _ = tokio::io::copy(&mut read, &mut tokio::io::sink()).await;
        flood.await.unwrap();
        assert!(target.server.requests.borrow().len() < 1000, "{} dials", target.server.requests.borrow().len());
        target.cut_off().await;
        target.serves().await;
    });
}

#[test]
fn slow_resets_of_what_was_asked_for_are_cut_off_too() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        // Every dial takes a while: each reset finds it under way.
        let server = Server::with(&ca.context(&id("web")), quick(), |request, answer| async move {
            sleep(Duration::from_secs(5)).await;
            dial_and_relay(request, answer).await;
        })
        .await;
        let mut tls = wire::h2(server.address, ca.context(&id("mallory")).client_for(&[id("web")].into())).await;
        let mut stream = 1;
        let mut asked = 0;
        while asked < 2000 {
            let mut frames = Vec::new();
            for _ in 0..10 {
                frames.extend(wire::connect(stream, "10.0.0.1:80"));
                stream += 2;
            }
            if tls.write_all(&frames).await.is_err() {
                break;
            }
            asked += 10;
            // Long enough for the service to have begun.
            sleep(Duration::from_millis(2)).await;
            let resets = (0..10).flat_map(|i| wire::frame(wire::RST_STREAM, 0, stream - 2 - 2 * i, &[0, 0, 0, 8]));
            if tls.write_all(&resets.collect::<Vec<_>>()).await.is_err() {
                break;
            }
        }
        until("the attacker is cut off", || !server.ended.borrow().is_empty()).await;
        assert!(server.requests.borrow().len() < 500, "{} dials", server.requests.borrow().len());
    });
}

#[test]
fn floods_of_cheap_frames_are_cut_off() {
    worker(async {
        let target = Target::new(quick()).await;
        let unknown = 0x77;
        for (kind, flags, payload) in [
            (wire::PING, 0, &[0; 8][..]),
            (wire::PING, wire::ACK, &[0; 8]),
            (wire::SETTINGS, 0, &[0, 4, 0, 1, 0, 0]),
            (wire::PRIORITY, 0, &[0, 0, 0, 0, 1]),
            (unknown, 0, &[1]),
        ] {
            let mut tls = target.h2().await;
            let stream = u32::from(kind == wire::PRIORITY);
            let flood = wire::frame(kind, flags, stream, payload).repeat(100);
            let mut sent = 0;
            while sent < 1_000_000 && tls.write_all(&flood).await.is_ok() {
                sent += 100;
                // What it answers is not left to fill the wire.
                let _ = timeout(Duration::from_micros(100), tls.read(&mut [0; 65_536])).await;
            }
            assert!(sent < 1_000_000, "a million frames of type {kind} were taken");
            target.cut_off().await;
            target.serves().await;
        }
    });
}

#[test]
fn a_peer_that_does_not_read_its_answers_holds_up_only_itself() {
    worker(async {
        let timeouts =
            Timeouts { ping_every: Duration::from_millis(300), pong_within: Duration::from_millis(300), ..quick() };
        let target = Target::new(timeouts).await;
        let mut tls = target.h2().await;
        // A stream whose answer is long and never read.
        tls.write_all(&wire::connect(1, &target.echo.to_string())).await.unwrap();
        let block = wire::frame(wire::DATA, 0, 1, &[7; 16_384]);
        let mut sent = 0;
        while let Ok(Ok(())) = timeout(Duration::from_millis(300), tls.write_all(&block)).await {
            sent += block.len();
            assert!(sent < 64 << 20, "64 MiB were taken for a peer that reads nothing");
        }
        target.serves().await;
        // It does not answer PINGs either, so it does not stay.
        target.cut_off().await;
    });
}

#[test]
fn whoever_does_not_finish_a_handshake_in_time_is_cut_off() {
    worker(async {
        let target = Target::new(quick()).await;
        let silent = TcpStream::connect(target.server.address).await.unwrap();
        assert!(target.cut_off().await.contains("no handshake within"));
        drop(silent);

        // A byte now and then.
        let mut dripping = TcpStream::connect(target.server.address).await.unwrap();
        let begun = Instant::now();
        let hello = [0x16, 0x03, 0x01, 0x01, 0x00, 0x01, 0x00, 0x00, 0xfc, 0x03, 0x03, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for byte in hello {
            if dripping.write_all(&[byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_millis(50)).await;
        }
        assert!(target.cut_off().await.contains("no handshake within"));
        assert!(begun.elapsed() < Duration::from_secs(3));

        // TLS, and then nothing.
        let quiet = wire::tls(target.server.address, target.attacker.clone()).await.unwrap();
        assert!(target.cut_off().await.contains("no handshake within"));
        drop(quiet);
        target.serves().await;
    });
}

#[test]
fn a_header_that_never_ends_does_not_keep_a_connection_for_ever() {
    worker(async {
        let timeouts = Timeouts { idle: Duration::from_millis(500), linger: Duration::from_millis(200), ..quick() };
        let target = Target::new(timeouts).await;
        let mut tls = target.h2().await;
        tls.write_all(&wire::frame(wire::HEADERS, 0, 1, &wire::field(":method", "CONNECT"))).await.unwrap();
        until("the connection is closed", || !target.server.ended.borrow().is_empty()).await;
        target.serves().await;
    });
}

#[test]
fn garbage_is_cut_off_at_each_layer() {
    worker(async {
        let target = Target::new(quick()).await;
        for garbage in [&b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..], &[0xff; 4096]] {
            let mut tcp = TcpStream::connect(target.server.address).await.unwrap();
            let _ = tcp.write_all(garbage).await;
            target.cut_off().await;
        }
        for garbage in [
            &b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"[..],
            // After the preface: a frame longer than was allowed, DATA on no stream, HEADERS that are no HPACK.
            &[wire::PREFACE, &wire::frame(wire::SETTINGS, 0, 0, &[]), &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]].concat(),
            &[wire::PREFACE, &wire::frame(wire::SETTINGS, 0, 0, &[]), &wire::frame(wire::DATA, 0, 0, b"x")].concat(),
            &[wire::PREFACE, &wire::frame(wire::SETTINGS, 0, 0, &[]), &wire::frame(wire::HEADERS, 4, 1, &[0xff; 99])]
                .concat(),
        ] {
            let mut tls = wire::tls(target.server.address, target.attacker.clone()).await.unwrap();
            let _ = tls.write_all(garbage).await;
            let _ = tls.read_to_end(&mut Vec::new()).await;
            target.cut_off().await;
        }
        target.serves().await;
    });
}

#[test]
fn a_thousand_idle_connections_cost_little_and_go_after_a_while() {
    idle(1_000, Duration::from_secs(10));
}

/// Both ends are in this process, with two descriptors: fewer where it may not have as many.
#[test]
#[ignore = "ten thousand handshakes: a minute and a half"]
fn ten_thousand_idle_connections_cost_little_and_go_after_a_while() {
    let (connections, others) = (10_000, 500);
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let enough = 2 * connections + others;
    let most = match setrlimit(Resource::RLIMIT_NOFILE, enough.max(soft), hard.max(enough)) {
        Ok(()) => enough,
        // Without the capability: as many as it has.
        Err(_) => soft,
    };
    let connections = connections.min(most.saturating_sub(others) / 2);
    assert!(connections >= 9_000, "{most} descriptors are too few: raise `ulimit -n` to {enough}, or run it as root");
    idle(connections as usize, Duration::from_secs(60));
}

fn idle(connections: usize, idle: Duration) {
    worker(async move {
        let timeouts = Timeouts {
            idle,
            linger: Duration::from_secs(1),
            handshake: Duration::from_secs(30),
            ..Timeouts::default()
        };
        let target = Target::new(timeouts).await;
        let (before, began) = (resident(), Instant::now());
        let mut held = Vec::new();
        for _ in 0..connections {
            held.push(target.h2().await);
        }
        let (took, ended) = (began.elapsed(), &target.server.ended);
        // A busy machine may take so long for all handshakes that the first have been idle for their time.
        let alive = connections - ended.borrow().len();
        let each = (resident() - before) / alive.max(1);
        println!("{connections} idle connections in {took:.1?}, {alive} at once: {} KiB each, both ends", each >> 10);
        assert!(alive > connections / 4, "they were to be idle together: {took:?} for their handshakes");
        assert!(each < 100 << 10, "{each} bytes for an idle connection, both ends");
        target.serves().await;
        let deadline = Instant::now() + idle + Duration::from_secs(40);
        while ended.borrow().len() < connections && Instant::now() < deadline {
            sleep(Duration::from_millis(50)).await;
        }
        // They read nothing, so they have not even seen GOAWAY.
        assert!(ended.borrow().len() >= connections, "only {} of them were closed", ended.borrow().len());
        target.serves().await;
    });
}

/// Bytes of memory in use.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}
