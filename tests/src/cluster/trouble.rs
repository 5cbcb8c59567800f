//! What befalls the pods of a cluster, under load, and what clients and kernel counted meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpStream},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{
    Node,
    agent::Agent,
    load::Outcome,
    scene::{NAMESPACE, PATH, Scene, WEB},
};

const PATIENCE: Duration = Duration::from_secs(60);
/// How connects fail, as the application sees it.
const FAILURES: [&str; 4] = ["connects_refused", "connects_timed_out", "connects_unreachable", "connects_no_backend"];

/// What a load went through.
#[derive(Debug)]
pub struct Suffered {
    pub outcome: Outcome,
    /// The kernel's counters of the client's node: by how much they grew.
    pub counted: BTreeMap<String, u64>,
}

impl Suffered {
    /// Servers that were told to stop are avoided before they do. What they, or the kernel for them, had accepted by
    /// then they may still throw away: at 100 requests a second one each at the most, and none where there is CPU to
    /// spare.
    pub fn assert_nothing_lost_but_accepted(&self, deaths: u32) {
        self.assert_every_connect_made();
        assert!(self.outcome.failed <= u64::from(deaths), "{deaths} deaths: {self:?}");
    }

    /// Servers that died unannounced may take along what they had accepted, and nothing else: of so many clients each
    /// can have one request in the hands of each.
    pub fn assert_only_accepted_requests_lost(&self, deaths: u32) {
        self.assert_every_connect_made();
        assert!(self.outcome.failed <= u64::from(deaths * super::scene::CLIENTS), "{deaths} deaths: {self:?}");
    }

    fn assert_every_connect_made(&self) {
        assert!(self.outcome.requests > 100, "hardly any load: {self:?}");
        for counter in FAILURES {
            assert_eq!(self.counted[counter], 0, "{counter}: {self:?}");
        }
    }
}

/// A pod of the deployment.
#[derive(Clone, Debug)]
pub struct Server {
    pub name: String,
    pub address: Ipv4Addr,
    /// Index of its node.
    pub node: usize,
    pub container: String,
    pub restarts: u64,
}

impl Server {
    fn of(pod: &Value) -> Option<Self> {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let status = &pod["status"]["containerStatuses"][0];
        Some(Self {
            name: text(&pod["metadata"]["name"])?,
            address: pod["status"]["podIP"].as_str()?.parse().ok()?,
            node: pod["spec"]["nodeName"].as_str()?.strip_prefix("node-")?.parse().ok()?,
            container: text(&status["containerID"])?,
            restarts: status["restartCount"].as_u64()?,
        })
    }
}

/// Asks again until there is an answer.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if Instant::now() > deadline {
            bail!("{what}: not within {PATIENCE:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

impl Scene {
    /// Requests to the service's address before, during and after.
    pub fn under_load(&mut self, qps: u32, trouble: impl FnOnce(&mut Self, &str) -> Result<()>) -> Result<Suffered> {
        self.under_load_of(PATH, qps, trouble)
    }

    /// The trouble is told the name of the pod that asks.
    pub fn under_load_of(
        &mut self,
        path: &str,
        qps: u32,
        trouble: impl FnOnce(&mut Self, &str) -> Result<()>,
    ) -> Result<Suffered> {
        static LOADS: AtomicU32 = AtomicU32::new(1);
        let name = format!("load-{}", LOADS.fetch_add(1, Ordering::Relaxed));
        let load = self.load(&name, &format!("http://{}{path}", self.vip), qps)?;
        let before = self.counters()?;
        std::thread::sleep(Duration::from_secs(1));
        let started = Instant::now();
        trouble(self, &name)?;
        let took = started.elapsed();
        std::thread::sleep(Duration::from_secs(1));
        let after = self.counters()?;
        let outcome = load.stop(&self.cluster)?;
        // Maps of another layout begin at zero.
        let same = before.0 == after.0;
        let grew = |(name, count)| {
            let old = if same { before.1.get(&name).copied().unwrap_or_default() } else { 0 };
            (name, count - old)
        };
        let suffered = Suffered { outcome, counted: after.1.into_iter().map(grew).collect() };
        eprintln!("{took:.1?} of trouble: {:?}", suffered.outcome);
        self.kubectl(&["delete", "pod", &name, "--wait=false"])?;
        Ok(suffered)
    }

    /// With the layout of the maps that they are in.
    fn counters(&self) -> Result<(String, BTreeMap<String, u64>)> {
        let status = self.client_agent()?.admin(&["status"])?;
        let layout = status["kernel"]["layout"].as_str().context("no layout in hitless status")?;
        Ok((layout.to_owned(), serde_json::from_value(status["counters"].clone())?))
    }

    /// The agent of the node where load comes from.
    pub fn client_agent(&self) -> Result<&Agent> {
        self.agents.first().context("a scene with hitless")
    }

    /// The deployment's pods that are not being deleted.
    pub fn servers(&self) -> Result<Vec<Server>> {
        self.servers_of("web")
    }

    pub fn servers_of(&self, app: &str) -> Result<Vec<Server>> {
        let list = self.get(&["pods", "-l", &format!("app={app}")])?;
        let pods = list["items"].as_array().into_iter().flatten();
        Ok(pods.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).filter_map(Server::of).collect())
    }

    pub fn node_of(&self, server: &Server) -> &Node {
        self.cluster.node(server.node)
    }

    pub fn scale(&self, replicas: usize) -> Result<()> {
        self.kubectl(&["scale", WEB, &format!("--replicas={replicas}")])?;
        self.wait_pods(replicas)
    }

    /// Sees to it that each node has pods of the deployment, which is what most troubles are about.
    pub fn spread(&self) -> Result<()> {
        for _ in 0..5 {
            let nodes: BTreeSet<_> = self.servers()?.iter().map(|server| server.node).collect();
            if nodes.len() == self.cluster.nodes().len() {
                return Ok(());
            }
            self.roll(1)?;
            self.wait_pods(self.servers()?.len())?;
        }
        bail!("five rollouts, and still a node has no pod of {WEB}")
    }

    /// Sets fields of the deployment's container, or removes them where the value is null, and rolls that out.
    pub fn change_server(&self, fields: &Value) -> Result<()> {
        let fields = fields.as_object().context("fields of a container")?;
        let patch = fields.iter().map(|(field, value)| {
            let op = if value.is_null() { "remove" } else { "add" };
            json!({"op": op, "path": format!("/spec/template/spec/containers/0/{field}"), "value": value})
        });
        let patch = Value::from_iter(patch).to_string();
        self.kubectl(&["patch", WEB, "--type=json", "-p", &patch])?;
        self.wait_rollout(WEB)?;
        self.wait_pods(self.servers()?.len())
    }

    /// Gives nginx more than its memory limit allows to keep in mind. Returns when its connection breaks over that.
    pub fn overfeed(&self, server: &Server) -> Result<()> {
        static MORSEL: [u8; 1 << 20] = [b'x'; 1 << 20];
        let feed = |morsels: usize| {
            let mut stream = TcpStream::connect((server.address, 8080))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            write!(
                stream,
                "POST /swallow HTTP/1.1\r\nHost: web\r\nContent-Length: {}\r\n\r\n",
                morsels * MORSEL.len()
            )?;
            (0..morsels).try_for_each(|_| stream.write_all(&MORSEL))?;
            let mut answer = [0; 64];
            stream.read(&mut answer).map(|length| String::from_utf8_lossy(&answer[..length]).into_owned())
        };
        match self.node_of(server).netns.enter(|| feed(256))? {
            Ok(answer) if !answer.is_empty() => bail!("{} swallowed 256 MiB and answered {answer:?}", server.name),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// By the API's own means, as a drain or the descheduler does it.
    pub fn evict(&self, pod: &str) -> Result<()> {
        let file = self.cluster.control.site.file("eviction.json");
        let meta = format!(r#""metadata":{{"name":"{pod}","namespace":"{NAMESPACE}"}}"#);
        fs::write(&file, format!(r#"{{"apiVersion":"policy/v1","kind":"Eviction",{meta}}}"#))?;
        let url = format!("/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction");
        self.kubectl(&["create", "--raw", &url, "-f", &file.to_string_lossy()]).map(drop)
    }

    /// Waits until a pod's container was started again and serves. Why it ended, as the kubelet says.
    pub fn wait_restarted(&self, server: &Server) -> Result<String> {
        wait_for(&format!("a restart of {}", server.name), || {
            let pod = self.get(&["pod", &server.name])?;
            let restarted = Server::of(&pod).is_some_and(|now| now.restarts > server.restarts);
            let ended = &pod["status"]["containerStatuses"][0]["lastState"]["terminated"]["reason"];
            Ok((restarted && super::is_ready(&pod)).then(|| ended.as_str().unwrap_or_default().to_owned()))
        })
    }

    /// The addresses that EndpointSlices call ready.
    pub fn slices(&self) -> Result<BTreeSet<Ipv4Addr>> {
        let list = self.get(&["endpointslices", "-l", "kubernetes.io/service-name=web"])?;
        let slices = list["items"].as_array().into_iter().flatten();
        let endpoints = slices.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        let ready = endpoints.filter(|endpoint| endpoint["conditions"]["ready"] != false);
        Ok(ready.filter_map(|endpoint| endpoint["addresses"][0].as_str()?.parse().ok()).collect())
    }

    /// The addresses that an agent's kernel maps offer for the service.
    pub fn offered(&self, agent: usize) -> Result<BTreeSet<Ipv4Addr>> {
        let rows = self.agents[agent].admin(&["endpoints", &format!("{NAMESPACE}/web")])?;
        let rows = rows.as_array().into_iter().flatten();
        let backends = rows.map(|row| &row["backend"]);
        let ready = backends.filter(|backend| backend["section"] == "ready" && backend["kernel"] == "ready");
        Ok(ready.filter_map(|backend| backend["address"].as_str()?.split(':').next()?.parse().ok()).collect())
    }

    /// Waits until every node offers exactly the pods that there are.
    pub fn wait_exact(&self) -> Result<()> {
        let mut last = String::new();
        let exact = wait_for("the exact state on every node", || {
            let there: BTreeSet<_> = self.servers()?.into_iter().map(|server| server.address).collect();
            for agent in 0..self.agents.len() {
                let offered = self.offered(agent)?;
                if offered != there {
                    last = format!("node-{} offers {offered:?}, there are {there:?}", self.agents[agent].node);
                    return Ok(None);
                }
            }
            Ok(Some(()))
        });
        exact.with_context(|| last)
    }

    /// Sets or (`-` at the end) removes the label that enrols.
    pub fn label(&self, what: &[&str], mode: &str) -> Result<()> {
        let label =
            if mode == "-" { "istio.io/dataplane-mode-".into() } else { format!("istio.io/dataplane-mode={mode}") };
        self.kubectl(&[&["label", "--overwrite"], what, &[&label]].concat()).map(drop)
    }

    /// Waits until hitless serves the connects of the load, or none of them, and goes on so.
    pub fn wait_served(&self, served: bool) -> Result<()> {
        let in_a_second = || {
            let connects = || Ok::<_, anyhow::Error>(self.client_agent()?.counters()?["connects_translated"]);
            let before = connects()?;
            std::thread::sleep(Duration::from_secs(1));
            Ok::<_, anyhow::Error>(connects()? - before)
        };
        wait_for(&format!("connects served: {served}"), || Ok(((in_a_second()? > 0) == served).then_some(())))?;
        let count = in_a_second()?;
        if (count > 0) != served {
            bail!("{count} connects served, after it had been otherwise");
        }
        Ok(())
    }

    /// Ends a node's agent; the kernel goes on.
    pub fn end_agent(&self, node: usize, signal: Signal) -> Result<()> {
        let agent = self.agents.iter().find(|agent| agent.node == node).context("the node has an agent")?;
        agent.process().signal(signal)?;
        agent.process().wait().map(drop)
    }

    /// Starts it again, perhaps another version.
    pub fn start_agent(&mut self, node: usize, args: &[&str]) -> Result<()> {
        let agent = Agent::start(self.cluster.node(node), args)?;
        let place = self.agents.iter().position(|agent| agent.node == node).context("the node had an agent")?;
        self.agents[place] = agent;
        Ok(())
    }

    /// How many connections of a client a server has, established.
    pub fn connections(&self, server: &Server, port: u16, client: Ipv4Addr) -> Result<usize> {
        let pid = self.node_of(server).pid(&server.container)?;
        let (client, port) = (format!("{:08X}:", u32::from_le_bytes(client.octets())), format!(":{port:04X}"));
        let table = |file: &str| fs::read_to_string(format!("/proc/{pid}/net/{file}")).context("a server's sockets");
        let sockets = [table("tcp")?, table("tcp6")?].concat();
        // number, local address, remote address, state: 01 is established
        let ours = |line: &&str| {
            let fields: Vec<_> = line.split_whitespace().take(4).collect();
            matches!(fields[..], [_, local, remote, "01"] if local.ends_with(&port) && remote.contains(&client))
        };
        Ok(sockets.lines().filter(ours).count())
    }
}
