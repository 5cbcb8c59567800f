//! Envoy, the packaged real one, as HBONE client of our server and as HBONE server of our client, on loopback.

#[path = "../../dataplane-user/tests/hbone/support.rs"]
mod support;

use std::{
    fs,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    rc::Rc,
    time::Duration,
};

use dataplane_user::{
    hbone::{
        Timeouts,
        client::ConnectError,
        headers::Authority,
        tls::{HandshakeError, TlsError},
    },
    identity::SpiffeId,
};
use hitless_tests::cluster::parts;
use serde_json::{Value, json};
use support::{Ca, Client, DOMAIN, Server, echo, id, until, worker};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::sleep,
};

struct Envoy {
    process: Child,
    dir: TempDir,
}

impl Envoy {
    /// Ready when it listens on the address that its configuration names.
    async fn start(address: SocketAddr, resources: Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("envoy.json");
        fs::write(&config, json!({"static_resources": resources}).to_string()).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let process = Command::new(parts::envoy().unwrap())
            .arg("-c")
            .arg(config)
            .args(["--concurrency", "1", "--disable-hot-restart", "-l", "warn"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut envoy = Self { process, dir };
        for _ in 0..200 {
            if TcpStream::connect(address).await.is_ok() {
                return envoy;
            }
            assert!(envoy.process.try_wait().unwrap().is_none(), "Envoy ended:\n{}", envoy.log());
            sleep(Duration::from_millis(50)).await;
        }
        panic!("Envoy does not listen on {address}:\n{}", envoy.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

async fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

fn at(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

/// A workload's certificate, whom it trusts and which peer it wants: as Istio configures its gateways and waypoints.
fn tls(ca: &Ca, own: &SpiffeId, peer: &SpiffeId) -> Value {
    let (chain, key) = ca.pem(own);
    json!({
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key}}],
        "alpn_protocols": ["h2"],
        "validation_context": {
            "trusted_ca": {"inline_string": ca.root_pem()},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer.as_str()}}],
        },
    })
}

fn clusters(to: SocketAddr, extra: &[(&str, Value)]) -> Value {
    let mut cluster = json!({
        "name": "next", "type": "STATIC", "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": "next",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": at(to)}}]}],
        },
    });
    for (key, value) in extra {
        cluster[key] = value.clone();
    }
    json!([cluster])
}

/// TCP in; CONNECT to `application` over mutual TLS to `server` out.
async fn envoy_as_client(ca: &Ca, own: &SpiffeId, server: SocketAddr, application: SocketAddr) -> (SocketAddr, Envoy) {
    let entry = free_address().await;
    let resources = json!({
        "listeners": [{"address": at(entry), "filter_chains": [{"filters": [{"name": "tcp", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "tunnel", "cluster": "next",
            "tunneling_config": {
                "hostname": application.to_string(),
                "headers_to_add": [{"header": {"key": "baggage", "value": "k8s.namespace.name=edge,service.name=gateway"}}],
            },
        }}]}]}],
        "clusters": clusters(server, &[
            ("typed_extension_protocol_options", json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {"allow_connect": true}},
            }})),
            ("transport_socket", json!({"name": "tls", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "common_tls_context": tls(ca, own, &id("web")),
            }})),
        ]),
    });
    (entry, Envoy::start(entry, resources).await)
}

/// CONNECT over mutual TLS in; TCP to `application` out, whatever the authority.
async fn envoy_as_server(ca: &Ca, client: &SpiffeId, application: SocketAddr) -> (SocketAddr, Envoy) {
    let address = free_address().await;
    let upgrade = |config| json!([{"upgrade_type": "CONNECT", "connect_config": config}]);
    let resources = json!({
        "listeners": [{"address": at(address), "filter_chains": [{
            "transport_socket": {"name": "tls", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "require_client_certificate": true,
                "common_tls_context": tls(ca, &id("waypoint"), client),
            }},
            "filters": [{"name": "http", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": "terminate", "codec_type": "HTTP2",
                "http2_protocol_options": {"allow_connect": true},
                "upgrade_configs": [{"upgrade_type": "CONNECT"}],
                "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{
                    "match": {"connect_matcher": {}},
                    "route": {"cluster": "next", "timeout": "0s", "upgrade_configs": upgrade(json!({}))},
                }]}]},
                "http_filters": [{"name": "router", "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
            }}],
        }]}],
        "clusters": clusters(application, &[]),
    });
    (address, Envoy::start(address, resources).await)
}

/// Sends, closes its direction, and takes what comes until the end.
async fn round_trip(to: SocketAddr, sent: &[u8]) -> std::io::Result<Vec<u8>> {
    let (mut read, mut write) = TcpStream::connect(to).await?.into_split();
    let mut got = Vec::new();
    let send = async {
        write.write_all(sent).await?;
        write.shutdown().await
    };
    tokio::try_join!(send, read.read_to_end(&mut got))?;
    Ok(got)
}

fn bytes() -> Vec<u8> {
    (0..3_000_000u32).map(|i| (i ^ (i >> 8)) as u8).collect()
}

#[test]
fn envoys_tunnels_end_in_our_server() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let server = Server::start(&ca.context(&id("web")), Timeouts::default()).await;
        let to = echo().await;
        let (entry, envoy) = envoy_as_client(&ca, &id("gateway"), server.address, to).await;
        let sent = bytes();
        for _ in 0..10 {
            let got = round_trip(entry, &sent).await.unwrap_or_else(|e| panic!("{e}\n{}", envoy.log()));
            assert!(got == sent, "{} of {} bytes came back\n{}", got.len(), sent.len(), envoy.log());
        }
        let requests = server.requests.borrow();
        let request = requests.last().unwrap();
        assert_eq!((&request.client, &request.authority), (&id("gateway"), &Authority::Address(to)));
        assert_eq!(request.metadata.baggage.as_ref().unwrap().service.as_deref(), Some("gateway"));
        assert_eq!(server.accepted.get(), 1, "Envoy did not keep its connection");
    });
}

#[test]
fn envoy_sees_a_closed_connection_when_the_application_is_not_there() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let server = Server::start(&ca.context(&id("web")), Timeouts::default()).await;
        let (entry, envoy) = envoy_as_client(&ca, &id("gateway"), server.address, free_address().await).await;
        let got = round_trip(entry, b"hello").await;
        assert!(got.as_ref().map_or(true, Vec::is_empty), "{got:?}\n{}", envoy.log());
        until("our server was asked", || !server.requests.borrow().is_empty()).await;
    });
}

#[test]
fn an_envoy_of_another_trust_domain_is_refused_by_our_server() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let server = Server::start(&ca.context(&id("web")), Timeouts::default()).await;
        let foreign = "spiffe://elsewhere.example/ns/shop/sa/gateway".parse().unwrap();
        let (entry, envoy) = envoy_as_client(&ca, &foreign, server.address, echo().await).await;
        let got = round_trip(entry, b"hello").await;
        assert!(got.as_ref().map_or(true, Vec::is_empty), "{got:?}\n{}", envoy.log());
        let wrong = |e: &dataplane_user::hbone::server::ServeError| e.to_string().contains("another trust domain");
        until("our server refused", || server.ended.borrow().iter().any(|e| e.as_ref().is_err_and(wrong))).await;
        assert!(server.requests.borrow().is_empty());
    });
}

#[test]
fn our_tunnels_end_in_envoy() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let to = echo().await;
        let (address, envoy) = envoy_as_server(&ca, &id("shopper"), to).await;
        let client = Rc::new(Client::new(ca.context(&id("shopper")), &[id("waypoint")], Timeouts::default()));
        let entry = client.listen(address, to).await;
        let sent = bytes();
        for _ in 0..10 {
            let got = round_trip(entry, &sent).await.unwrap_or_else(|e| panic!("{e}\n{}", envoy.log()));
            assert!(got == sent, "{} of {} bytes came back\n{}", got.len(), sent.len(), envoy.log());
        }
        assert_eq!(client.pool.size().connections, 1);
    });
}

#[test]
fn an_envoy_with_another_identity_gets_no_byte_of_ours_and_may_refuse_us_too() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let to = echo().await;
        let (address, _envoy) = envoy_as_server(&ca, &id("somebody"), to).await;
        let reason = |error| match error {
            ConnectError::Tls(HandshakeError { reason, .. }) => reason,
            error => panic!("{error}"),
        };
        let client = Client::new(ca.context(&id("shopper")), &[id("web")], Timeouts::default());
        let error = client.open(address, to).await.err().unwrap();
        assert!(matches!(reason(error), TlsError::WrongIdentity { .. }));
        // In TLS 1.3 it refuses us after our side is done: its alert may come after the connection's end was met by
        // writing, and then nobody can say why it ended.
        for attempt in 0.. {
            let client = Client::new(ca.context(&id("shopper")), &[id("waypoint")], Timeouts::default());
            match client.open(address, to).await.err().unwrap() {
                ConnectError::Closed { .. } if attempt < 20 => {}
                error => return assert!(matches!(reason(error), TlsError::RefusedUs(_))),
            }
        }
    });
}

#[test]
fn an_envoy_whose_application_is_gone_answers_503_and_may_be_replaced() {
    worker(async {
        let ca = Ca::new(DOMAIN);
        let gone = free_address().await;
        let (address, _envoy) = envoy_as_server(&ca, &id("shopper"), gone).await;
        let client = Client::new(ca.context(&id("shopper")), &[id("waypoint")], Timeouts::default());
        let error = client.open(address, gone).await.err().unwrap();
        assert!(matches!(&error, ConnectError::Refused { status, .. } if status.as_u16() == 503), "{error}");
        assert!(error.elsewhere_is_safe());
    });
}
