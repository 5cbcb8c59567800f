//! The control plane: the real etcd and kube-apiserver, and where wanted the controllers and the scheduler.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, TcpListener},
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::parts;
use crate::lab::{
    Process,
    cleanup::{self, LabId},
    net::Netns,
    process::Spawn,
};

const READY_WITHIN: Duration = Duration::from_secs(90);
/// `kubernetes.default` is the first address of the services' range.
const CERTIFIED: &str =
    "IP:127.0.0.1,IP:10.96.0.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc";
/// Static tokens: token, user, uid, groups.
const USERS: [(&str, &str, &str); 4] = [
    ("admin", "admin", "system:masters"),
    ("controllers", "system:kube-controller-manager", "system:masters"),
    ("scheduler", "system:kube-scheduler", ""),
    ("hitless", "hitless", ""),
];

/// Where the parts of a cluster run and leave their files.
#[derive(Clone, Debug)]
pub struct Site {
    pub id: LabId,
    pub dir: PathBuf,
    pub cgroup: PathBuf,
    pub kubernetes: PathBuf,
}

impl Site {
    /// Finds the parts, building them where needed, before anything is made that must be removed.
    pub(super) fn new() -> Result<Self> {
        parts::needs(&["openssl"], "openssl")?;
        let kubernetes = parts::kubernetes()?;
        cleanup::sweep()?;
        let id = cleanup::claim()?;
        let (dir, cgroup) = (id.dir(), id.cgroup()?);
        fs::create_dir_all(dir.join("logs"))?;
        fs::create_dir_all(cgroup.join("system"))?;
        Ok(Self { id, dir, cgroup, kubernetes })
    }

    /// Starts a process outside the nodes' cgroups.
    pub fn start(&self, name: &str, netns: &Netns, args: Vec<String>) -> Result<Process> {
        let (log, cgroup) = (self.dir.join(format!("logs/{name}.log")), self.cgroup.join("system"));
        Spawn { args: &args, netns, cgroup: &cgroup, container: false, log: &log }.start()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// Options of the control plane.
#[derive(Clone, Debug)]
pub struct ControlSpec {
    /// With controllers and scheduler; without, only what stores and serves objects
    pub controllers: bool,
    /// `--controllers` of the controller manager
    pub which_controllers: String,
    /// How much nicer than its starter etcd and the API server are: in a cluster they have another machine
    pub nicer: u8,
}

impl Default for ControlSpec {
    fn default() -> Self {
        Self { controllers: true, which_controllers: "*".into(), nicer: 0 }
    }
}

pub struct ControlPlane {
    pub site: Site,
    pub netns: Netns,
    pub address: IpAddr,
    pub port: u16,
    spec: ControlSpec,
    etcd_port: u16,
    etcd: Option<Process>,
    apiserver: Option<Process>,
    controllers: Option<Process>,
    scheduler: Option<Process>,
}

impl ControlPlane {
    /// etcd and the API server alone, on free ports of the loopback of this machine.
    pub fn api_only() -> Result<Self> {
        Self::api_only_with(ControlSpec::default())
    }

    /// The same; whatever else of `spec`.
    pub fn api_only_with(spec: ControlSpec) -> Result<Self> {
        let site = Site::new()?;
        let host = Netns { name: "host".into(), path: "/proc/self/ns/net".into() };
        let spec = ControlSpec { controllers: false, ..spec };
        let (port, etcd_port) = (free_port()?, free_port()?);
        Self::start(site, host, Ipv4Addr::LOCALHOST.into(), [port, etcd_port], spec)
    }

    pub(super) fn start(site: Site, netns: Netns, address: IpAddr, ports: [u16; 2], spec: ControlSpec) -> Result<Self> {
        certificates(&site, address)?;
        let [port, etcd_port] = ports;
        let mut plane = Self {
            site,
            netns,
            address,
            port,
            spec,
            etcd_port,
            etcd: None,
            apiserver: None,
            controllers: None,
            scheduler: None,
        };
        for (token, ..) in USERS {
            plane.write_kubeconfig(token)?;
        }
        plane.start_etcd()?;
        plane.start_apiserver()?;
        if plane.spec.controllers {
            plane.start_controllers()?;
            plane.start_scheduler()?;
        }
        Ok(plane)
    }

    pub fn url(&self) -> String {
        format!("https://{}:{}", self.address, self.port)
    }

    /// Where etcd listens, in the control plane's network.
    pub fn etcd_address(&self) -> (Ipv4Addr, u16) {
        (Ipv4Addr::LOCALHOST, self.etcd_port)
    }

    /// etcd and the API server, by name.
    pub fn processes(&self) -> impl Iterator<Item = (&'static str, &Process)> {
        let all = [("etcd", &self.etcd), ("API server", &self.apiserver)];
        all.into_iter().filter_map(|(name, process)| Some((name, process.as_ref()?)))
    }

    /// For the administrator; others by [`Self::write_kubeconfig`].
    pub fn kubeconfig(&self) -> PathBuf {
        self.site.file("admin.kubeconfig")
    }

    /// The name is the token as well.
    pub fn write_kubeconfig(&self, token: &str) -> Result<PathBuf> {
        let path = self.site.file(&format!("{token}.kubeconfig"));
        let (ca, url) = (self.site.file("ca.crt"), self.url());
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: it\ncontexts: [{{name: it, context: {{cluster: it, user: it}}}}]\n\
             clusters: [{{name: it, cluster: {{server: \"{url}\", certificate-authority: {}}}}}]\n\
             users: [{{name: it, user: {{token: \"{token}\"}}}}]\n",
            ca.display()
        );
        fs::write(&path, text)?;
        Ok(path)
    }

    fn component(&self, name: &str, component: &str, args: &[&str]) -> Result<Process> {
        let program = self.site.kubernetes.to_string_lossy().into_owned();
        let nice =
            ["nice".to_owned(), "-n".into(), self.spec.nicer.to_string()].into_iter().filter(|_| self.spec.nicer > 0);
        let args = nice.chain([program, component.to_owned()]).chain(args.iter().map(|arg| (*arg).to_owned()));
        self.site.start(name, &self.netns, args.collect())
    }

    fn start_etcd(&mut self) -> Result<()> {
        let url = format!("http://127.0.0.1:{}", self.etcd_port);
        let peer = format!("http://127.0.0.1:{}", if self.site_is_host() { free_port()? } else { self.etcd_port + 1 });
        let (data, cluster) = (self.site.file("etcd"), format!("default={peer}"));
        self.etcd = Some(self.component(
            "etcd",
            "etcd",
            &[
                &format!("--data-dir={}", data.display()),
                "--unsafe-no-fsync",
                "--log-level=warn",
                &format!("--listen-client-urls={url}"),
                &format!("--advertise-client-urls={url}"),
                &format!("--listen-peer-urls={peer}"),
                &format!("--initial-advertise-peer-urls={peer}"),
                &format!("--initial-cluster={cluster}"),
            ],
        )?);
        Ok(())
    }

    fn site_is_host(&self) -> bool {
        self.address.is_loopback()
    }

    pub fn start_apiserver(&mut self) -> Result<()> {
        let file = |name: &str| self.site.file(name).display().to_string();
        let bind = if self.site_is_host() { "127.0.0.1" } else { "0.0.0.0" };
        let apiserver = self.component(
            "apiserver",
            "apiserver",
            &[
                &format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
                &format!("--bind-address={bind}"),
                &format!("--advertise-address={}", self.address),
                &format!("--secure-port={}", self.port),
                &format!("--tls-cert-file={}", file("apiserver.crt")),
                &format!("--tls-private-key-file={}", file("apiserver.key")),
                &format!("--token-auth-file={}", file("tokens.csv")),
                &format!("--service-account-key-file={}", file("sa.pub")),
                &format!("--service-account-signing-key-file={}", file("sa.key")),
                "--service-account-issuer=https://kubernetes.default.svc",
                "--service-cluster-ip-range=10.96.0.0/16,fd00:96::/108",
                "--authorization-mode=Node,RBAC",
                "--allow-privileged=true",
                "--endpoint-reconciler-type=none",
                // The admission that needs a controller to make a default service account would refuse pods without it.
                if self.spec.controllers {
                    "--enable-admission-plugins=NodeRestriction"
                } else {
                    "--disable-admission-plugins=ServiceAccount"
                },
                "--kubelet-preferred-address-types=InternalIP",
                "--shutdown-delay-duration=0s",
                "--profiling=false",
            ],
        )?;
        self.apiserver = Some(apiserver);
        self.wait_ready()
    }

    fn wait_ready(&self) -> Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let result = self.kubectl(&["get", "--raw", "/readyz"]);
            let Err(error) = result else { return Ok(()) };
            let apiserver = self.apiserver.as_ref().context("the API server was not started")?;
            if !apiserver.running() || Instant::now() > deadline {
                bail!("the API server does not get ready: {error:#}\n{}", apiserver.log());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    pub fn start_controllers(&mut self) -> Result<()> {
        let file = |name: &str| self.site.file(name).display().to_string();
        self.controllers = Some(self.component(
            "controllers",
            "controllers",
            &[
                &format!("--kubeconfig={}", file("controllers.kubeconfig")),
                &format!("--root-ca-file={}", file("ca.crt")),
                &format!("--service-account-private-key-file={}", file("sa.key")),
                &format!("--controllers={}", self.spec.which_controllers),
                "--use-service-account-credentials=false",
                "--leader-elect=false",
                "--bind-address=127.0.0.1",
                "--node-monitor-grace-period=20s",
            ],
        )?);
        Ok(())
    }

    fn start_scheduler(&mut self) -> Result<()> {
        let config = format!("--kubeconfig={}", self.site.file("scheduler.kubeconfig").display());
        self.scheduler = Some(self.component(
            "scheduler",
            "scheduler",
            &[&config, "--leader-elect=false", "--bind-address=127.0.0.1"],
        )?);
        Ok(())
    }

    /// As when its machine is lost: no goodbye to watchers.
    pub fn kill_apiserver(&mut self) -> Result<()> {
        stop(&mut self.apiserver)
    }

    /// Nothing follows from anything any more: no replacements, no EndpointSlices.
    pub fn stop_controllers(&mut self) -> Result<()> {
        stop(&mut self.controllers)
    }

    /// Another choice of controllers, e.g. `*,-endpointslice-controller`.
    pub fn restart_controllers(&mut self, which: &str) -> Result<()> {
        stop(&mut self.controllers)?;
        self.spec.which_controllers = which.into();
        self.start_controllers()
    }

    /// `kubectl`, as administrator, in the control plane's network.
    pub fn command(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.netns.path.display())).arg(&self.site.kubernetes).arg("kubectl");
        command.arg(format!("--kubeconfig={}", self.kubeconfig().display()));
        command.arg(format!("--cache-dir={}", self.site.file("kubectl").display()));
        command
    }

    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        parts::output(self.command().args(args))
    }

    /// `kubectl apply` of a YAML text.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        let path = self.site.file("apply.yaml");
        fs::write(&path, yaml)?;
        self.kubectl(&["apply", "--server-side", "--force-conflicts", "-f", &path.to_string_lossy()]).map(drop)
    }
}

fn stop(process: &mut Option<Process>) -> Result<()> {
    if let Some(process) = process.take() {
        process.sigkill()?;
        process.wait()?;
    }
    Ok(())
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if std::env::var_os("HITLESS_LAB_KEEP").is_none() {
            cleanup::remove(self.site.id);
        }
    }
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn certificates(site: &Site, address: IpAddr) -> Result<()> {
    let openssl = |args: &str| parts::run(Command::new("openssl").args(args.split(' ')).current_dir(&site.dir));
    openssl(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ca.key -out ca.crt -days 3650 -subj /CN=cluster",
    )?;
    openssl(
        "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout apiserver.key -out apiserver.csr -subj /CN=apiserver",
    )?;
    fs::write(site.file("san"), format!("subjectAltName={CERTIFIED},IP:{address}\nextendedKeyUsage=serverAuth\n"))?;
    openssl(
        "x509 -req -in apiserver.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out apiserver.crt -days 3650 -extfile san",
    )?;
    openssl("genrsa -out sa.key 2048")?;
    openssl("rsa -in sa.key -pubout -out sa.pub")?;
    let mut tokens = String::new();
    for (token, user, groups) in USERS {
        tokens.push_str(&format!("{token},{user},{token},\"{groups}\"\n"));
    }
    for node in 1..=super::MAX_NODES {
        tokens.push_str(&format!("node-{node},system:node:node-{node},node-{node},\"system:nodes\"\n"));
    }
    Ok(fs::write(site.file("tokens.csv"), tokens)?)
}
