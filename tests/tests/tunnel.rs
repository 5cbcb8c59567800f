//! The mesh: connections between enrolled pods are carried in mutual TLS, and a dead application is never noticed.

use std::{
    io::{Read, Write},
    net::SocketAddr,
};

use anyhow::Result;
use hitless_tests::lab::{
    AgentOptions,
    control::Terms,
    mesh::{Mesh, STRICT},
    net::Family,
    scene::{PORT, Scene, Web, connect_from, eventually, who},
};

/// A counter of the tunnel, over the agents.
fn tunnel(scene: &Scene, name: &str) -> u64 {
    scene.tunnel(name).expect("a status")
}

fn kill(web: &Web) {
    web.server.sigkill().expect("kill");
    web.server.wait().expect("wait");
}

/// Lines both ways, more than any buffer on the way holds, and the half-close.
fn echoes(scene: &Scene, to: SocketAddr, name: &str) -> Result<()> {
    const LINES: usize = 4096;
    let mut stream = connect_from(&scene.client.place, to)?;
    let line = |n: usize| format!("{n:01000}\n");
    let mut half = stream.try_clone()?;
    let writer = std::thread::spawn(move || -> Result<()> {
        for n in 0..LINES {
            half.write_all(line(n).as_bytes())?;
        }
        half.shutdown(std::net::Shutdown::Write)?;
        Ok(())
    });
    let mut received = String::new();
    stream.read_to_string(&mut received)?;
    writer.join().expect("the writer")?;
    let expected: String = (0..LINES).map(|n| format!("{name} {}", line(n))).collect();
    assert!(received == expected, "{} bytes came back of {}", received.len(), expected.len());
    Ok(())
}

#[test]
fn a_service_of_another_node_is_reached_through_the_tunnel() -> Result<()> {
    let (scene, _mesh) = Mesh::scene(&[2], &[])?;
    for family in Family::BOTH {
        let before = (tunnel(&scene, "outbound_tunnelled"), tunnel(&scene, "inbound_tunnelled"));
        let mut stream = scene.connect(family)?;
        assert_eq!(stream.peer_addr()?, scene.vip(family), "the application sees the service");
        assert_eq!(who(&mut stream)?, scene.webs[0].name);
        drop(stream);
        echoes(&scene, scene.vip(family), &scene.webs[0].name)?;
        assert_eq!(tunnel(&scene, "outbound_tunnelled"), before.0 + 2, "{family:?}");
        assert_eq!(tunnel(&scene, "inbound_tunnelled"), before.1 + 2, "{family:?}");
    }
    Ok(())
}

#[test]
fn a_pod_of_the_same_node_is_reached_without_a_second_tls() -> Result<()> {
    let (scene, _mesh) = Mesh::scene(&[1], &[])?;
    for family in Family::BOTH {
        let before = tunnel(&scene, "outbound_local");
        let mut stream = scene.connect(family)?;
        assert_eq!(who(&mut stream)?, scene.webs[0].name);
        drop(stream);
        echoes(&scene, scene.vip(family), &scene.webs[0].name)?;
        assert_eq!(tunnel(&scene, "outbound_local"), before + 2, "{family:?}");
    }
    assert_eq!(tunnel(&scene, "outbound_tunnelled"), 0);
    Ok(())
}

#[test]
fn with_local_tls_also_the_same_node_is_tunnelled() -> Result<()> {
    let (scene, _mesh) = Mesh::scene(&[1], &["--local-tls", "on"])?;
    assert_eq!(who(&mut scene.connect(Family::V4)?)?, scene.webs[0].name);
    assert_eq!((tunnel(&scene, "outbound_local"), tunnel(&scene, "inbound_tunnelled")), (0, 1));
    Ok(())
}

#[test]
fn a_dead_application_is_never_noticed() -> Result<()> {
    for webs in [[1, 2], [2, 2]] {
        let (scene, _mesh) = Mesh::scene(&webs, &["--layers", "none"])?;
        kill(&scene.webs[0]);
        for family in Family::BOTH {
            for n in 0..40 {
                let mut stream = scene.connect(family)?;
                let name = who(&mut stream).unwrap_or_else(|error| panic!("{family:?} {n}: {error}"));
                assert_eq!(name, scene.webs[1].name);
            }
        }
        assert!(tunnel(&scene, "outbound_repicked") > 0, "nobody met the dead one");
        assert_eq!(tunnel(&scene, "outbound_failed"), 0);
    }
    Ok(())
}

#[test]
fn what_was_named_by_address_is_never_another() -> Result<()> {
    let (scene, _mesh) = Mesh::scene(&[2, 2], &[])?;
    kill(&scene.webs[0]);
    for addr in scene.webs[0].pod.addresses() {
        let mut stream = connect_from(&scene.client.place, SocketAddr::new(addr, PORT))?;
        assert!(who(&mut stream).is_err(), "a dead pod answered");
    }
    for addr in scene.webs[1].pod.addresses() {
        let mut stream = connect_from(&scene.client.place, SocketAddr::new(addr, PORT))?;
        assert_eq!(who(&mut stream)?, scene.webs[1].name);
    }
    assert_eq!(tunnel(&scene, "outbound_repicked"), 0);
    assert!(tunnel(&scene, "outbound_tunnelled") >= 2, "pod addresses are tunnelled too");
    Ok(())
}

/// A client that closes first leaves the agent's port in TIME-WAIT, in the pod that all clients share.
#[test]
fn a_pod_takes_more_connections_in_a_minute_than_it_has_ports() -> Result<()> {
    let (scene, _mesh) = Mesh::scene(&[1, 2], &[])?;
    for web in &scene.webs {
        web.pod.place.netns.sysctl(&[("ipv4/ip_local_port_range", "40000 40019")])?;
    }
    for web in &scene.webs {
        for addr in web.pod.addresses() {
            for _ in 0..50 {
                let mut stream = connect_from(&scene.client.place, SocketAddr::new(addr, PORT))?;
                assert_eq!(who(&mut stream)?, web.name);
            }
        }
    }
    assert_eq!((tunnel(&scene, "outbound_failed"), tunnel(&scene, "inbound_failed")), (0, 0));
    Ok(())
}

#[test]
fn a_strict_pod_takes_nothing_but_mutual_tls() -> Result<()> {
    let (mut scene, mesh) = Mesh::scene(&[1, 2], &[])?;
    let outsider = scene.lab.node(1).add_pod("outsider")?;
    scene.control.add_pod(&outsider, &Terms { not_enrolled: true, ..Terms::default() })?;
    let reaches = |scene: &Scene| -> Vec<bool> {
        let addresses = scene.webs.iter().flat_map(|web| web.pod.addresses());
        let asked = addresses.map(|addr| connect_from(&outsider.place, SocketAddr::new(addr, PORT)));
        asked.map(|stream| stream.and_then(|mut stream| who(&mut stream)).is_ok()).collect()
    };
    assert_eq!(reaches(&scene), [true; 4], "permissive is the default");
    mesh.set_policies(STRICT)?;
    eventually(|| reaches(&scene) == [false; 4], "plaintext is refused");
    for family in Family::BOTH {
        for _ in 0..20 {
            who(&mut scene.connect(family)?)?;
        }
    }
    // One that comes later is strict from its first packet on.
    let late = scene.add_web(2)?;
    scene.webs.push(late);
    assert_eq!(reaches(&scene), [false; 6]);
    assert!(scene.counter("plaintext_refused")? > 0);
    mesh.set_policies("")?;
    eventually(|| reaches(&scene) == [true; 6], "plaintext is taken again");
    Ok(())
}

/// Which port a connection is to is nothing that the kernel decides by: it leads plaintext to the agent, who knows.
#[test]
fn a_port_with_a_mode_of_its_own_is_the_agents_to_guard_and_closed_without_it() -> Result<()> {
    let (mut scene, mesh) = Mesh::scene(&[2], &[])?;
    let outsider = scene.lab.node(1).add_pod("outsider")?;
    scene.control.add_pod(&outsider, &Terms { not_enrolled: true, ..Terms::default() })?;
    let reaches = |scene: &Scene| {
        let ask =
            |addr| connect_from(&outsider.place, SocketAddr::new(addr, PORT)).and_then(|mut stream| who(&mut stream));
        scene.webs[0].pod.addresses().map(|addr| ask(addr).is_ok())
    };
    let modes = |pod: &str, port: u16, of_port: &str| {
        format!(
            "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: ports, namespace: lab}}
spec: {{selector: {{matchLabels: {{lab: pod}}}}, mtls: {{mode: {pod}}}, portLevelMtls: {{{port}: {{mode: {of_port}}}}}}}
"
        )
    };
    mesh.set_policies(&modes("PERMISSIVE", PORT, "STRICT"))?;
    eventually(|| reaches(&scene) == [false; 2], "the port takes no plaintext");
    who(&mut scene.connect(Family::V4)?)?;
    mesh.set_policies(&modes("STRICT", PORT, "PERMISSIVE"))?;
    eventually(|| reaches(&scene) == [true; 2], "the one port takes plaintext");
    assert!(scene.counter("plaintext_captured")? > 0, "the agent was asked");
    let refused = || scene.agent(2).counters().map(|counters| counters["plaintext_refused"]);
    let before = refused()?;
    scene.kill_agent(2)?;
    // Nobody is there who could tell the ports apart: all of them are closed.
    assert_eq!(reaches(&scene), [false; 2]);
    scene.start_agent(2, AgentOptions { args: mesh.args(), ..AgentOptions::default() })?;
    eventually(|| reaches(&scene) == [true; 2], "the next agent is asked");
    assert!(scene.agent(2).counters()?["plaintext_refused"] >= before + 2, "the kernel refused them");
    Ok(())
}

#[test]
fn the_application_sees_who_the_client_is() -> Result<()> {
    let (scene, _mesh) = Mesh::scene(&[1, 2], &[])?;
    for family in Family::BOTH {
        for web in &scene.webs {
            let addr = web.pod.addresses()[family as usize];
            let mut stream = connect_from(&scene.client.place, SocketAddr::new(addr, PORT))?;
            stream.write_all(b"peer\n")?;
            let mut answer = [0; 128];
            let length = stream.read(&mut answer)?;
            let answer = String::from_utf8_lossy(&answer[..length]).into_owned();
            let client = SocketAddr::new(scene.client.addresses()[family as usize], stream.local_addr()?.port());
            assert_eq!(answer, format!("{} {client}\n", web.name));
        }
    }
    Ok(())
}

#[test]
fn a_pod_that_joins_under_load_loses_no_connection() -> Result<()> {
    let (mut scene, _mesh) = Mesh::scene(&[2], &[])?;
    for round in 0..3 {
        let web = scene.add_web(1 + round % 2)?;
        for family in Family::BOTH {
            for _ in 0..50 {
                who(&mut scene.connect(family)?)?;
            }
        }
        scene.webs.push(web);
    }
    Ok(())
}

/// An ALLOW policy for one principal, and what is denied by name.
fn only(account: &str) -> String {
    format!(
        "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: only-{account}, namespace: lab}}
spec:
  action: ALLOW
  rules: [{{from: [{{source: {{principals: [cluster.local/ns/lab/sa/{account}]}}}}]}}]
"
    )
}

#[test]
fn policies_decide_by_identity_and_open_connections_are_asked_again() -> Result<()> {
    let (scene, mesh) = Mesh::scene(&[1, 2], &[])?;
    let outsider = scene.lab.node(2).add_pod("outsider")?;
    scene.control.add_pod(&outsider, &Terms { not_enrolled: true, ..Terms::default() })?;
    let addresses = || scene.webs.iter().flat_map(|web| web.pod.addresses()).map(|addr| SocketAddr::new(addr, PORT));
    let ask = |from: &hitless_tests::lab::Pod| -> Vec<bool> {
        let asked = addresses().map(|to| connect_from(&from.place, to).and_then(|mut stream| who(&mut stream)));
        asked.map(|answer| answer.is_ok()).collect()
    };
    mesh.set_policies(&only("default"))?;
    eventually(|| ask(&outsider) == [false; 4], "plaintext has no principal");
    assert_eq!(ask(&scene.client), [true; 4], "the client is who it has to be");
    let mut open: Vec<_> = addresses().map(|to| connect_from(&scene.client.place, to)).collect::<Result<_, _>>()?;
    for stream in &mut open {
        who(stream)?;
    }
    mesh.set_policies(&only("somebody-else"))?;
    eventually(|| ask(&scene.client) == [false; 4], "it is somebody else's");
    for stream in &mut open {
        assert!(who(stream).is_err(), "a connection outlived its permission");
    }
    assert!(tunnel(&scene, "revoked") >= 4 && tunnel(&scene, "inbound_denied") > 0);
    mesh.set_policies("")?;
    eventually(|| ask(&scene.client) == [true; 4] && ask(&outsider) == [true; 4], "all may again");
    Ok(())
}

#[test]
fn the_running_agent_tells_its_certificates_policies_and_decisions() -> Result<()> {
    let (scene, mesh) = Mesh::scene(&[2], &[])?;
    let agent = scene.agent(2);
    assert_eq!(agent.admin(&["policies"])?, serde_json::json!([]));
    mesh.set_policies(&only("default"))?;
    let in_force = || agent.admin(&["policies"]).is_ok_and(|policies| policies[0]["inForce"] == true);
    eventually(in_force, "the policy is in force");
    who(&mut scene.connect(Family::V4)?)?;
    let policies = agent.admin(&["policies"])?;
    assert_eq!((&policies[0]["origin"], &policies[0]["counts"]["denied"]), (&"file".into(), &0.into()), "{policies}");
    assert_eq!(policies[0]["counts"]["allowed"], 1, "{policies}");

    let certificates = agent.admin(&["certificates"])?;
    let identity = "spiffe://cluster.local/ns/lab/sa/default";
    assert_eq!((&certificates[0]["identity"], &certificates[0]["state"]), (&identity.into(), &"valid".into()));
    assert!(agent.run(&["certificates"])?.contains(identity));

    let mut stream = scene.connect(Family::V4)?;
    who(&mut stream)?;
    let at = SocketAddr::new(scene.webs[0].pod.v4(), PORT).to_string();
    let carried = |node: usize| -> Result<serde_json::Value> {
        let rows = scene.agent(node).admin(&["connections"])?;
        let found =
            rows.as_array().into_iter().flatten().find(|row| row["carried"].is_object() && row["backend"] == *at);
        found.cloned().ok_or_else(|| anyhow::anyhow!("no carried connection to {at} in {rows}"))
    };
    for (node, direction) in [(1, "outbound"), (2, "inbound")] {
        let row = carried(node)?;
        assert_eq!((&row["state"], &row["carried"]["direction"]), (&"hbone".into(), &direction.into()), "{row}");
        assert!(row["peer"].as_str().is_some_and(|peer| peer.ends_with(":15008")), "{row}");
        for end in ["sourceIdentity", "destinationIdentity"] {
            assert_eq!(row["carried"][end], identity, "{row}");
        }
        assert!(row["carried"]["bytesSent"].as_u64() > Some(0), "{row}");
        assert!(scene.agent(node).run(&["connections"])?.contains(identity));
    }
    drop(stream);
    eventually(|| carried(1).is_err() && carried(2).is_err(), "an ended connection is not shown");

    let dump: serde_json::Value = serde_json::from_str(&agent.run(&["config", "dump", "--ztunnel"])?)?;
    let web = dump["workloads"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|one| one["workloadIps"][0] == *scene.webs[0].pod.v4().to_string());
    let web = web.unwrap_or_else(|| panic!("no workload of the pod in {dump}"));
    assert_eq!((&web["serviceAccount"], &web["protocol"]), (&"default".into(), &"HBONE".into()), "{web}");
    assert_eq!(
        (&dump["certificates"][0]["identity"], &dump["certificates"][0]["state"]),
        (&identity.into(), &"Available".into())
    );
    assert_eq!(dump["policies"][0]["name"], "only-default", "{dump}");
    assert!(dump["services"][0]["endpoints"].as_object().is_some_and(|endpoints| !endpoints.is_empty()), "{dump}");
    assert!(!dump.to_string().contains("PRIVATE"));
    let state = agent.run(&["config", "dump", "--state"])?;
    assert!(state.contains("serviceAccount: default"), "{state}");

    let to = format!("{}:{PORT}", scene.webs[0].pod.name);
    let explain = |from: &str| agent.admin(&["policy", "explain", "--from", from, "--to", &to]);
    assert_eq!(explain("lab/default")?["reason"], "allowed");
    assert_eq!(explain("lab/somebody-else")?["reason"], "notAllowed");
    assert_eq!(explain("10.0.0.1")?["allow"], false);
    let elsewhere = format!("{}:{PORT}", scene.client.name);
    let refused = agent.run(&["policy", "explain", "--from", "lab/default", "--to", &elsewhere]);
    let why = refused.expect_err("its agent has to be asked").to_string();
    assert!(why.contains("runs on another node"), "{why}");

    let status = agent.status()?;
    assert_eq!((&status["mesh"]["joined"], &status["mesh"]["certificates"]["valid"]), (&1.into(), &1.into()));
    assert!(agent.run(&["status"])?.contains("mesh      1 pods joined, 1 policies in force"));
    Ok(())
}

/// A proxy that is not hitless: it speaks HBONE, names a pod by address, and never tries another.
fn foreign_connect(scene: &Scene, mesh: &Mesh, from: &hitless_tests::lab::Pod, to: SocketAddr) -> Result<String> {
    use dataplane_user::{
        hbone::{
            self, Timeouts,
            client::Connect,
            headers::{Authority, Metadata},
            pool::{Key, Pool},
            relay,
            tls::Context,
        },
        identity::{SpiffeId, Store, ca::OwnCa},
    };
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};

    let peer = SocketAddr::new(to.ip(), hbone::PORT);
    let dialled = connect_from(&from.place, peer)?;
    dialled.set_nonblocking(true)?;
    let _ = scene;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(tokio::task::LocalSet::new().run_until(async {
        let id = SpiffeId::new("cluster.local", "lab", "gateway")?;
        let store = Store::new(
            std::sync::Arc::new(OwnCa::open(&mesh.ca(), std::time::Duration::from_secs(600))?),
            Default::default(),
        );
        let running = store.clone();
        tokio::task::spawn_local(async move { running.run().await });
        let credential = store.fetch(&id).await?;
        let context = std::rc::Rc::new(Context::new(&credential)?);
        let key = Key {
            source: id,
            expected: [SpiffeId::new("cluster.local", "lab", "default")?].into(),
            destination: peer,
            source_ip: from.addresses()[usize::from(to.is_ipv6())],
        };
        let dialled = std::cell::RefCell::new(Some(tokio::net::TcpStream::from_std(dialled)?));
        let dial = || std::future::ready(dialled.borrow_mut().take().ok_or(std::io::ErrorKind::NotConnected.into()));
        let connect = Connect::new(Authority::Address(to), Metadata::default());
        let pool = Pool::new(Timeouts::default());
        let tunnel = pool.connect(&key, &context, &connect, dial).await?;
        // The relay wants a TCP connection: one over loopback.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let mut near = tokio::net::TcpStream::connect(listener.local_addr()?).await?;
        let (far, _) = listener.accept().await?;
        tokio::task::spawn_local(async move {
            let _ = relay::tunnel(far, tunnel.stream, &relay::Counts::default()).await;
        });
        near.write_all(b"who\n").await?;
        let mut line = String::new();
        tokio::io::BufReader::new(near).read_line(&mut line).await?;
        Ok(line.split(' ').next().unwrap_or_default().to_owned())
    }))
}

#[test]
fn a_stream_of_a_foreign_proxy_for_a_dead_application_is_taken_by_another() -> Result<()> {
    let (scene, mesh) = Mesh::scene(&[2, 2, 1], &[])?;
    let outsider = scene.lab.node(1).add_pod("proxy")?;
    scene.control.add_pod(&outsider, &Terms { not_enrolled: true, ..Terms::default() })?;
    let [dead, alive] = [&scene.webs[0], &scene.webs[1]];
    for addr in dead.pod.addresses() {
        assert_eq!(foreign_connect(&scene, &mesh, &outsider, SocketAddr::new(addr, PORT))?, dead.name);
    }
    kill(dead);
    for addr in dead.pod.addresses() {
        // The one of the same node: to the other nobody could prove who the client is.
        assert_eq!(foreign_connect(&scene, &mesh, &outsider, SocketAddr::new(addr, PORT))?, alive.name);
    }
    assert_eq!(tunnel(&scene, "inbound_bounced"), 2);
    mesh.set_policies(&only("somebody-else"))?;
    let refused = || foreign_connect(&scene, &mesh, &outsider, SocketAddr::new(dead.pod.v4(), PORT)).is_err();
    eventually(refused, "the policy holds for the client, wherever its stream ends");
    Ok(())
}

#[test]
fn a_stopping_agent_waits_for_what_it_carries_and_says_what_it_cuts() -> Result<()> {
    let (scene, _mesh) = Mesh::scene(&[2], &["--tunnel-drain", "2s"])?;
    let mut streams: Vec<_> = Family::BOTH.iter().map(|family| scene.connect(*family)).collect::<Result<_, _>>()?;
    for stream in &mut streams {
        who(stream)?;
    }
    let agent = scene.agent(1).process();
    agent.sigterm()?;
    // New ones go without the tunnel: the pods take plaintext.
    eventually(|| agent.log().contains("waiting for the connections"), "the agent is stopping");
    for stream in &mut streams {
        who(stream)?;
    }
    drop(streams.remove(0));
    agent.wait()?;
    assert!(who(&mut streams[0]).is_err(), "it outlived the agent that carried it");
    let log = agent.log();
    assert!(log.contains("cut=1") && log.contains("of=2"), "{log}");
    for family in Family::BOTH {
        who(&mut scene.connect(family)?)?;
    }
    Ok(())
}
