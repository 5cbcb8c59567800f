//! A node: network, mount and host-name namespaces in which the real containerd and kubelet run.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{Cni, ControlPlane, KubeProxy, Site, Spec, parts};
use crate::lab::{
    Process, cleanup,
    net::{self, Family, Netns, ip},
    process::tail,
};

/// The image of the container that holds a pod's namespaces; its program only waits.
pub const PAUSE: &str = "hitless.test/pause:1";

pub struct Node {
    pub name: String,
    pub index: usize,
    pub netns: Netns,
    /// Its pods' groups in cgroup2.
    pub cgroup: PathBuf,
    pub dir: PathBuf,
    site: Site,
    holder: Process,
    containerd: Process,
    kubelet: Option<Process>,
    proxy: Option<Process>,
    started: AtomicU32,
}

impl Node {
    pub(super) fn start(control: &ControlPlane, fabric: &Netns, index: usize, spec: &Spec) -> Result<Self> {
        let name = format!("node-{index}");
        let site = control.site.clone();
        let netns = Netns::create(&site.id, &name)?;
        net::join_segment(fabric, &netns, &name, index)?;
        netns.sysctl(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
        let mut routes = String::new();
        for other in (1..=spec.nodes).filter(|other| *other != index) {
            for family in Family::BOTH {
                let (pods, via) = (net::pod_subnet(family, other), net::underlay(family, other));
                routes.push_str(&format!("route add {pods} via {via} dev eth0\n"));
            }
        }
        // Addresses of services need a route before anything rewrites them.
        routes.push_str("route add default dev eth0\nroute add ::/0 dev eth0\n");
        ip(Some(&netns), &routes)?;

        let dir = site.file(&name);
        let parent = cleanup::LabId::cgroup(&site.id)?;
        let cgroup = parent.join(&name);
        make_cgroups(&site, &name, spec.nodes)?;
        configure(&site, &dir, &name, index, spec.cni)?;
        let holder = hold(&site, &netns, &name, &dir)?;
        let containerd = inside(
            &site,
            &holder,
            &netns,
            &format!("{name}-containerd"),
            vec!["containerd".into(), "--config".into(), dir.join("containerd.toml").display().to_string()],
        )?;
        let mut node = Self {
            name,
            index,
            netns,
            cgroup,
            dir,
            site,
            holder,
            containerd,
            kubelet: None,
            proxy: None,
            started: AtomicU32::new(0),
        };
        node.wait_containerd()?;
        node.import(&super::image::pause()?.build(&node.dir)?)?;
        control.write_kubeconfig(&node.name)?;
        node.start_kubelet()?;
        if spec.kube_proxy != KubeProxy::Off {
            node.start_proxy(spec.kube_proxy)?;
        }
        Ok(node)
    }

    fn kubernetes(&self, component: &str, config: &Path, args: &[String]) -> Vec<String> {
        let mut all = vec![self.site.kubernetes.display().to_string(), component.to_owned()];
        all.push(format!("--config={}", config.display()));
        all.extend(args.iter().cloned());
        all
    }

    pub fn start_kubelet(&mut self) -> Result<()> {
        let flags = [
            format!("--kubeconfig={}", self.site.file(&format!("{}.kubeconfig", self.name)).display()),
            format!("--root-dir={}", self.dir.join("kubelet").display()),
            format!("--hostname-override={}", self.name),
            format!("--node-ip={},{}", net::underlay(Family::V4, self.index), net::underlay(Family::V6, self.index)),
            "--v=1".into(),
        ];
        let args = self.kubernetes("kubelet", &self.dir.join("kubelet.yaml"), &flags);
        self.kubelet = Some(inside(&self.site, &self.holder, &self.netns, &format!("{}-kubelet", self.name), args)?);
        Ok(())
    }

    pub fn stop_kubelet(&mut self) -> Result<()> {
        if let Some(kubelet) = self.kubelet.take() {
            kubelet.sigkill()?;
            kubelet.wait()?;
        }
        Ok(())
    }

    fn start_proxy(&mut self, mode: KubeProxy) -> Result<()> {
        let mode = if mode == KubeProxy::Nftables { "nftables" } else { "iptables" };
        let config = self.dir.join("proxy.yaml");
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: {mode}\n\
             clientConnection: {{kubeconfig: {}}}\nhostnameOverride: {}\nclusterCIDR: 10.244.0.0/16,fd00:244::/32\n\
             conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}\n",
            self.site.file("controllers.kubeconfig").display(),
            self.name
        );
        fs::write(&config, text)?;
        let args = self.kubernetes("proxy", &config, &[]);
        self.proxy = Some(inside(&self.site, &self.holder, &self.netns, &format!("{}-proxy", self.name), args)?);
        Ok(())
    }

    /// A process of the node: in its network, seen by the machine, with the machine's files.
    pub fn host_process(&self, name: &str, args: Vec<String>) -> Result<Process> {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        self.site.start(&format!("{}-{name}-{number}", self.name), &self.netns, args)
    }

    /// A command in the node's network and mounts.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.holder.pid().to_string(), "--net", "--mount", program]);
        command
    }

    pub fn containerd_socket(&self) -> PathBuf {
        self.dir.join("containerd.sock")
    }

    /// `ctr` of the kubelet's namespace.
    pub fn ctr(&self, args: &[&str]) -> Result<String> {
        let socket = self.containerd_socket();
        parts::output(self.command("ctr").arg("--address").arg(socket).args(["--namespace", "k8s.io"]).args(args))
    }

    /// Signals a container's first process, past the kubelet: SIGKILL is what the OOM killer does.
    pub fn kill(&self, container: &str, signal: &str) -> Result<()> {
        self.ctr(&["tasks", "kill", "--signal", signal, bare(container)]).map(drop)
    }

    /// A container's first process, as this machine numbers it.
    pub fn pid(&self, container: &str) -> Result<i32> {
        let tasks = self.ctr(&["tasks", "ls"])?;
        let task = tasks.lines().find_map(|line| line.strip_prefix(bare(container)));
        let pid = task.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        pid.with_context(|| format!("no process of container {container} on {}", self.name))
    }

    /// The running container of a name in a pod, by the runtime's word: no API server is asked.
    pub fn container(&self, pod: &str, name: &str) -> Result<String> {
        let filter = format!(r#"labels."io.kubernetes.pod.name"=={pod},labels."io.kubernetes.container.name"=={name}"#);
        let [found, tasks] = [self.ctr(&["containers", "ls", "--quiet", &filter])?, self.ctr(&["tasks", "ls"])?];
        let runs = |container: &str| tasks.lines().any(|task| task.starts_with(container) && task.ends_with("RUNNING"));
        let running = found.lines().find(|container| runs(container));
        running.map(str::to_owned).with_context(|| format!("no container {name} of {pod} runs on {}", self.name))
    }

    /// Gives an address that is free again to the next pod: the CNI plugin hands them out in order.
    pub fn next_address(&self, address: Ipv4Addr) -> Result<()> {
        let before = Ipv4Addr::from_bits(address.to_bits() - 1);
        let file = self.dir.join("cni-state/networks/pods/last_reserved_ip.0");
        fs::write(&file, before.to_string()).with_context(|| format!("write {}", file.display()))?;
        // The node would send to the old pod's MAC address until it doubts it, half a minute later.
        ip(Some(&self.netns), &format!("neighbor flush to {address}\n"))
    }

    pub(super) fn import(&self, tar: &Path) -> Result<()> {
        self.ctr(&["images", "import", &tar.to_string_lossy()]).map(drop)
    }

    fn wait_containerd(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while let Err(error) = self.ctr(&["version"]) {
            if !self.containerd.running() || Instant::now() > deadline {
                bail!("containerd of {} does not answer: {error:#}\n{}", self.name, self.containerd.log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// The ends of its logs.
    pub fn logs(&self) -> String {
        let kubelet = self.kubelet.as_ref().map_or_else(String::new, Process::log);
        format!(
            "--- containerd of {0}\n{1}\n--- kubelet of {0}\n{kubelet}",
            self.name,
            tail(self.containerd.log_path(), 10)
        )
    }

    /// What a container printed, read from the node's disk: no API server is asked.
    pub fn container_log(&self, pod: &str) -> Result<String> {
        let logs = self.dir.join("log/pods");
        let dirs = fs::read_dir(&logs).with_context(|| format!("read {}", logs.display()))?.flatten();
        let pod = dirs
            .map(|entry| entry.path())
            .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().split('_').nth(1) == Some(pod)));
        // Lines of both streams may fall between each other: one after the other they are whole.
        let (mut text, mut errors) = (String::new(), String::new());
        for container in fs::read_dir(pod.context("no log of the pod")?)?.flatten() {
            for file in fs::read_dir(container.path())?.flatten() {
                for line in fs::read_to_string(file.path())?.lines() {
                    // time, stream, F or P, the line
                    let mut fields = line.splitn(4, ' ').skip(1);
                    let into = if fields.next() == Some("stderr") { &mut errors } else { &mut text };
                    into.push_str(fields.nth(1).unwrap_or_default());
                    into.push('\n');
                }
            }
        }
        text.push_str(&errors);
        Ok(text)
    }
}

/// A container's identifier without the runtime's name.
fn bare(container: &str) -> &str {
    container.trim_start_matches("containerd://")
}

/// Keeps the node's namespaces while nothing else runs in them.
fn hold(site: &Site, netns: &Netns, name: &str, dir: &Path) -> Result<Process> {
    let ready = dir.join("held");
    let d = dir.display();
    let script = format!(
        "set -e; mount --bind {d}/run /run; mkdir -p /run/netns; mount --bind {d}/log /var/log; \
         mkdir -p /var/lib/cni; mount --bind {d}/cni-state /var/lib/cni; hostname {name}; \
         : > {}; exec sleep infinity",
        ready.display()
    );
    // A machine without /var/lib/cni must not get one by us; the directory is the package's own.
    let words = ["unshare", "--mount", "--uts", "--propagation=private", "sh", "-c", &script];
    let holder = site.start(&format!("{name}-holder"), netns, words.map(str::to_owned).to_vec())?;
    holder.wait_for_file(&ready)?;
    Ok(holder)
}

fn inside(site: &Site, holder: &Process, netns: &Netns, name: &str, args: Vec<String>) -> Result<Process> {
    let enter = ["nsenter", "-t", &holder.pid().to_string(), "--mount", "--uts", "--wd=/"].map(str::to_owned);
    site.start(name, netns, enter.into_iter().chain(args).collect())
}

/// A kubelet wants its root group in every hierarchy.
fn make_cgroups(site: &Site, name: &str, nodes: usize) -> Result<()> {
    let root = cleanup::cgroup2_root()?;
    let below = site.cgroup.strip_prefix(&root)?;
    for hierarchy in cleanup::hierarchies() {
        let mut dir = hierarchy.clone();
        for part in below.join(name).iter() {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let value = fs::read_to_string(dir.join(file)).unwrap_or_default();
                dir_and_copy(&dir.join(part), file, &value)?;
            }
            dir.push(part);
        }
        share(&hierarchy.join(below), "cpu.shares", 1024 * nodes)?;
        share(&hierarchy.join(below).join(name), "cpu.shares", 1024)?;
    }
    let dir = site.cgroup.join(name);
    fs::create_dir_all(&dir)?;
    for dir in [&root, &site.cgroup, &dir] {
        for controller in ["cpu", "cpuset", "memory", "pids", "io"] {
            // Version 1 may own it.
            let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    share(&site.cgroup, "cpu.weight", 100 * nodes)?;
    share(&dir, "cpu.weight", 100)?;
    Ok(())
}

/// A node's pods have as much of the CPU as on a machine of their own, by the rule of its kubelet, which does not know
/// that there is a group above: all pods together would have what a single process of the machine has.
fn share(cgroup: &Path, file: &str, of_a_cpu: usize) -> Result<()> {
    let (file, cpus) = (cgroup.join(file), std::thread::available_parallelism()?.get());
    // In one hierarchy of version 1, or in version 2 where it owns the controller.
    if file.exists() {
        fs::write(&file, (cpus * of_a_cpu).to_string()).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

fn dir_and_copy(dir: &Path, file: &str, value: &str) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("create cgroup {}", dir.display()))?;
    if !value.trim().is_empty() {
        fs::write(dir.join(file), value.trim()).with_context(|| format!("write {file} of {}", dir.display()))?;
    }
    Ok(())
}

fn configure(site: &Site, dir: &Path, name: &str, index: usize, cni: Cni) -> Result<()> {
    for sub in ["run", "log/pods", "cni-state", "cni", "containerd", "state", "kubelet"] {
        fs::create_dir_all(dir.join(sub))?;
    }
    let d = dir.display();
    fs::write(
        dir.join("containerd.toml"),
        format!(
            "version = 2\nroot = \"{d}/containerd\"\nstate = \"{d}/state\"\noom_score = 0\n\
         [grpc]\naddress = \"{d}/containerd.sock\"\n[ttrpc]\naddress = \"{d}/containerd.ttrpc\"\n\
         [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{PAUSE}\"\nrestrict_oom_score_adj = true\n\
         disable_apparmor = true\n\
         [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = \"/usr/lib/cni\"\nconf_dir = \"{d}/cni\"\n"
        ),
    )?;
    let ranges = Family::BOTH.map(|family| format!(r#"[{{"subnet":"{}"}}]"#, net::pod_subnet(family, index))).join(",");
    let plugin = match cni {
        Cni::Bridge => r#""type":"bridge","bridge":"cni0","isGateway":true,"hairpinMode":true"#,
        Cni::Ptp => r#""type":"ptp""#,
    };
    fs::write(
        dir.join("cni/10-pods.conflist"),
        format!(
            r#"{{"cniVersion":"1.0.0","name":"pods","plugins":[{{{plugin},"ipMasq":false,
           "ipam":{{"type":"host-local","dataDir":"{d}/cni-state/networks","ranges":[{ranges}],
           "routes":[{{"dst":"0.0.0.0/0"}},{{"dst":"::/0"}}]}}}}]}}"#
        ),
    )?;
    let root = site.cgroup.strip_prefix(cleanup::cgroup2_root()?)?.join(name);
    fs::write(dir.join("resolv.conf"), "")?;
    fs::write(
        dir.join("kubelet.yaml"),
        format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
         authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}\nauthorization: {{mode: AlwaysAllow}}\n\
         cgroupDriver: cgroupfs\ncgroupRoot: /{}\nfailCgroupV1: false\nfailSwapOn: false\nenforceNodeAllocatable: []\n\
         localStorageCapacityIsolation: false\noomScoreAdj: 0\ncontainerRuntimeEndpoint: unix://{d}/containerd.sock\n\
         podLogsDir: {d}/log/pods\nresolvConf: {d}/resolv.conf\nfileCheckFrequency: 0s\nserializeImagePulls: false\n\
         registerNode: true\nvolumePluginDir: {d}/plugins\nproviderID: test://{name}\n\
         syncFrequency: 10s\nnodeStatusReportFrequency: 10s\nnodeStatusUpdateFrequency: 5s\nevictionHard: {{memory.available: 1Mi}}\n",
            root.display(),
        ),
    )?;
    Ok(())
}
