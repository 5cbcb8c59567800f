//! A real istiod beside the cluster's API server, and the real istioctl.

use std::{fs, net::IpAddr, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result, bail};
use dataplane_user::identity::istio::IstioPlaces;
use k8s_openapi::ByteString;

use super::{Cluster, node::PAUSE, parts, trouble::wait_for};
use crate::lab::Process;

/// What Istio calls the cluster: another name than it gives one by itself.
pub const CLUSTER_ID: &str = "west";
/// The audience of tokens that are for istiod.
pub const AUDIENCE: &str = "istio-ca";
/// Where pods stand for the agents, which are processes of their nodes: tokens are bound to them, and istiod looks where
/// they run.
const AGENTS: &str = "hitless-system";
const ACCOUNT: &str = "hitless";
const PORT: u16 = 15012;

pub struct Istio {
    /// Of the programs and the CRDs.
    parts: PathBuf,
    address: IpAddr,
    /// Of the certificates that it gives, and the longest that it gives.
    life: Duration,
    /// Where its authority is, when it was given one.
    plugged: Option<PathBuf>,
    istiod: Option<Process>,
}

/// An authority as Istio's Secret `cacerts` holds it, each in PEM.
pub struct Authority {
    pub certificate: String,
    pub key: String,
    /// From the certificate to its root.
    pub chain: String,
}

impl Istio {
    /// Istio's CRDs, an istiod, and a pod on each node for its agent.
    pub fn install(cluster: &Cluster, life: Duration) -> Result<Self> {
        let parts = parts::istio()?;
        let crds = parts.join("crds.yaml").display().to_string();
        cluster.kubectl(&["apply", "--server-side", "-f", &crds])?;
        cluster.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", "crd", "--all"])?;
        let mut yaml = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: istio-system}}\n---\n\
             apiVersion: v1\nkind: Namespace\nmetadata: {{name: {AGENTS}}}\n---\n\
             apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {ACCOUNT}, namespace: {AGENTS}}}\n"
        );
        for node in cluster.nodes() {
            yaml += &format!(
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {}, namespace: {AGENTS}}}\n\
                 spec: {{nodeName: {0}, serviceAccountName: {ACCOUNT}, terminationGracePeriodSeconds: 1, \
                 containers: [{{name: agent, image: {PAUSE}, imagePullPolicy: Never}}]}}\n",
                node.name
            );
        }
        cluster.apply(&yaml)?;
        let mut istio = Self { parts, address: cluster.control.address, life, plugged: None, istiod: None };
        istio.start(cluster)?;
        Ok(istio)
    }

    /// With the root that it has in its Secret, if it ran before.
    pub fn start(&mut self, cluster: &Cluster) -> Result<()> {
        let life = format!("{}s", self.life.as_secs());
        let env = [
            ("POD_NAMESPACE", "istio-system"),
            ("POD_NAME", "istiod-1"),
            ("CLUSTER_ID", CLUSTER_ID),
            ("CA_TRUSTED_NODE_ACCOUNTS", &format!("{AGENTS}/{ACCOUNT}")),
            // Else its certificate has only names of the cluster's DNS, which the lab has not.
            ("ISTIOD_CUSTOM_HOST", &self.address.to_string()),
            ("DEFAULT_WORKLOAD_CERT_TTL", &life),
            ("MAX_WORKLOAD_CERT_TTL", &life),
            // It is alone.
            ("ENABLE_LEADER_ELECTION", "false"),
            // Webhooks and gateways: nothing here asks for them.
            ("INJECT_ENABLED", "false"),
            ("VALIDATION_WEBHOOK_CONFIG_NAME", ""),
            ("PILOT_ENABLE_GATEWAY_API", "false"),
        ];
        let mut args = vec!["env".to_owned()];
        args.extend(env.iter().map(|(key, value)| format!("{key}={value}")));
        args.extend(self.plugged.iter().map(|directory| format!("ROOT_CA_DIR={}", directory.display())));
        args.extend([self.program(), "istiod".into(), "discovery".into()]);
        // The role that Istio's chart gives it is not tried here.
        args.push(format!("--kubeconfig={}", cluster.control.site.file("controllers.kubeconfig").display()));
        self.istiod = Some(cluster.control.site.start("istiod", &cluster.control.netns, args)?);
        wait_for("istiod serves", || {
            if !self.istiod.as_ref().is_some_and(Process::running) {
                bail!("istiod ended:\n{}", self.log());
            }
            let ready = self.in_control(cluster).args(["istiod", "request", "GET", "/ready"]).output()?;
            Ok(ready.status.success().then_some(()))
        })
        .with_context(|| self.log())
    }

    pub fn stop(&mut self) -> Result<()> {
        if let Some(istiod) = self.istiod.take() {
            istiod.sigterm()?;
            istiod.wait()?;
        }
        Ok(())
    }

    /// The authority that it made for itself.
    pub fn own_authority(&self, cluster: &Cluster) -> Result<Authority> {
        let secret = cluster.get(&["-n", "istio-system", "secret", "istio-ca-secret"])?;
        let read = |key: &str| -> Result<String> {
            let bytes: ByteString = serde_json::from_value(secret["data"][key].clone())?;
            Ok(String::from_utf8(bytes.0)?)
        };
        let certificate = read("ca-cert.pem")?;
        Ok(Authority { chain: certificate.clone(), certificate, key: read("ca-key.pem")? })
    }

    /// An intermediate one under a root of its own, as organisations give their meshes.
    pub fn new_authority(&self, cluster: &Cluster) -> Result<Authority> {
        let directory = cluster.dir().join("authority");
        fs::create_dir_all(&directory)?;
        let openssl = |args: &str| parts::run(Command::new("openssl").args(args.split(' ')).current_dir(&directory));
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        let usage = "-addext keyUsage=critical,keyCertSign,cRLSign";
        openssl(&format!("req -x509 {key} {usage} -keyout root.key -out root.pem -days 30 -subj /O=org/CN=root"))?;
        openssl(&format!("req {key} -keyout ca.key -out ca.csr -subj /O=org/CN=mesh"))?;
        let extensions =
            "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,digitalSignature\n";
        fs::write(directory.join("extensions"), extensions)?;
        openssl(
            "x509 -req -in ca.csr -CA root.pem -CAkey root.key -CAcreateserial -out ca.pem -days 20 -extfile extensions",
        )?;
        let read = |name: &str| fs::read_to_string(directory.join(name));
        let certificate = read("ca.pem")?;
        Ok(Authority { chain: certificate.clone() + &read("root.pem")?, certificate, key: read("ca.key")? })
    }

    /// It signs with another authority, or names other roots.
    pub fn plug(&mut self, cluster: &Cluster, authority: &Authority, roots: &str) -> Result<()> {
        let directory = cluster.dir().join("cacerts");
        fs::create_dir_all(&directory)?;
        let Authority { certificate, key, chain } = authority;
        let files = [
            ("ca-cert.pem", certificate),
            ("ca-key.pem", key),
            ("cert-chain.pem", chain),
            ("root-cert.pem", &roots.into()),
        ];
        for (name, content) in files {
            fs::write(directory.join(name), content)?;
        }
        self.plugged = Some(directory);
        self.stop()?;
        self.start(cluster)
    }

    pub fn log(&self) -> String {
        self.istiod.as_ref().map_or_else(String::new, Process::log)
    }

    /// It has logged this, since it was started last.
    pub fn said(&self, words: &str) -> Result<bool> {
        let istiod = self.istiod.as_ref().context("istiod is not running")?;
        Ok(fs::read_to_string(istiod.log_path())?.contains(words))
    }

    /// Where it signs.
    pub fn address(&self) -> String {
        format!("https://{}:{PORT}", self.address)
    }

    /// The root as a namespace's pods are given it, and a token of the node's agent.
    pub fn places(&self, cluster: &Cluster, node: &str) -> Result<IstioPlaces> {
        let places = IstioPlaces {
            root: cluster.dir().join("istio-root.pem"),
            token: cluster.dir().join(format!("{node}.istio-token")),
            cluster_id: CLUSTER_ID.into(),
        };
        self.project_root(cluster, &places, "BEGIN CERTIFICATE")?;
        fs::write(&places.token, self.agent_token(cluster, node, AUDIENCE)?)?;
        Ok(places)
    }

    /// As the kubelet does, once istiod has written a root with this in it.
    pub fn project_root(&self, cluster: &Cluster, places: &IstioPlaces, with: &str) -> Result<()> {
        let root = wait_for("istiod's root is in the namespace", || {
            let at = ["-n", AGENTS, "get", "configmap", "istio-ca-root-cert", "-o", r"jsonpath={.data.root-cert\.pem}"];
            Ok(cluster.kubectl(&at).ok().filter(|pem| pem.contains(with)))
        })?;
        Ok(fs::write(&places.root, root)?)
    }

    /// As the kubelet would project it into the agent's pod on a node.
    pub fn agent_token(&self, cluster: &Cluster, node: &str, audience: &str) -> Result<String> {
        token(cluster, AGENTS, ACCOUNT, node, audience)
    }

    /// `istioctl`, as administrator of the cluster.
    pub fn ctl(&self, cluster: &Cluster, args: &[&str]) -> Result<String> {
        let kubeconfig = format!("--kubeconfig={}", cluster.control.kubeconfig().display());
        parts::output(self.in_control(cluster).arg("istioctl").arg(kubeconfig).args(args))
    }

    fn in_control(&self, cluster: &Cluster) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", cluster.control.netns.path.display())).arg(self.program());
        command
    }

    fn program(&self) -> String {
        self.parts.join("istio").display().to_string()
    }
}

/// Of a service account, bound to one of its pods.
pub fn token(cluster: &Cluster, namespace: &str, account: &str, pod: &str, audience: &str) -> Result<String> {
    let bound = ["--bound-object-kind", "Pod", "--bound-object-name", pod, "--audience", audience, "--duration", "1h"];
    cluster.kubectl(&[&["-n", namespace, "create", "token", account], &bound[..]].concat())
}
