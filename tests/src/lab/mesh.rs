//! What a lab's agents need for a mesh: an authority of their own, and policies in a file.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::Result;
use dataplane_user::identity::ca::Root;

use super::scene::{Scene, SceneSpec};

/// The trust domain of the labs' meshes.
pub const TRUST_DOMAIN: &str = "cluster.local";

/// No plaintext enters the labs' pods.
pub const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: lab}
spec: {mtls: {mode: STRICT}}
";

/// As long as what `hitless ca init` makes: one that ends soon is warned of.
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 86_400);

/// The authority and the policies of one lab, in a directory that goes with it.
pub struct Mesh {
    directory: tempfile::TempDir,
}

impl Mesh {
    pub fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let root = Root::new(TRUST_DOMAIN, ROOT_LIFE, SystemTime::now())?;
        let ca = directory.path().join("ca");
        fs::create_dir(&ca)?;
        fs::write(ca.join("tls.crt"), &root.certificate)?;
        fs::write(ca.join("ca.crt"), &root.certificate)?;
        fs::write(ca.join("tls.key"), root.key.as_str())?;
        let mesh = Self { directory };
        mesh.set_policies("")?;
        Ok(mesh)
    }

    /// Two nodes of a mesh, and the pods of the service on these, all joined. `more` is for `hitless run`.
    pub fn scene(webs: &[usize], more: &[&str]) -> Result<(Scene, Self)> {
        let mesh = Self::new()?;
        let agent_args = mesh.args().into_iter().chain(more.iter().map(|arg| (*arg).to_owned())).collect();
        let scene = Scene::new(&SceneSpec { webs: webs.to_vec(), agent_args, ..SceneSpec::default() })?;
        scene.wait_joined()?;
        Ok((scene, mesh))
    }

    /// Further arguments of `hitless run`.
    pub fn args(&self) -> Vec<String> {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let identity = format!("ca:{}", text(&self.ca()));
        let args = ["--mtls", "on", "--trust-domain", TRUST_DOMAIN, "--identity", &identity, "--policies"];
        args.map(str::to_owned).into_iter().chain([text(&self.policies())]).collect()
    }

    /// Puts other policies in force, as Istio's objects in YAML.
    pub fn set_policies(&self, yaml: &str) -> Result<()> {
        let partial = self.directory.path().join("partial");
        fs::write(&partial, yaml)?;
        fs::rename(partial, self.policies())?;
        Ok(())
    }

    /// The authority's directory.
    pub fn ca(&self) -> PathBuf {
        self.directory.path().join("ca")
    }

    fn policies(&self) -> PathBuf {
        self.directory.path().join("policies.yaml")
    }
}
