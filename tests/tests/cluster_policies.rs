//! What the agent makes of Istio's policies: the real etcd and kube-apiserver, CRDs that come late, objects as users
//! write them and as no schema would let them through.

use std::{rc::Rc, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use dataplane_user::{
    identity::SpiffeId,
    policy::{Enforcement, Mode, Reason, Request, Workload},
    source::{kube, policies},
};
use hitless_tests::cluster::{ControlPlane, mesh};
use tokio::task::LocalSet;

/// Far longer than it takes, but shorter than a person would wait.
const WITHIN: Duration = Duration::from_secs(90);

fn object(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: shop}}\nspec: {spec}\n"
    )
}

const NAMESPACE: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n";

struct Follower {
    enforcement: Arc<Enforcement>,
    workload: Workload,
}

impl Follower {
    fn mode(&self) -> Mode {
        self.enforcement.of(&self.workload).mode(80)
    }

    fn reason(&self) -> Reason {
        let id: SpiffeId = "spiffe://cluster.local/ns/shop/sa/web".parse().expect("it is one");
        let (source_ip, destination_ip) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let request = Request { source_ip, source: Some(&id), destination_ip, destination_port: 80 };
        self.enforcement.admit(&self.workload, &request).reason
    }

    async fn until(&self, what: &str, wanted: impl Fn() -> bool) -> Result<()> {
        let mut changes = self.enforcement.subscribe();
        let waiting = async {
            while !wanted() {
                changes.changed().await?;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(WITHIN, waiting).await.with_context(|| format!("not within {WITHIN:?}: {what}"))?
    }
}

/// Runs a scenario beside the source, both on one thread as in the agent; `kubectl` blocks, and so goes beside it.
fn follow(
    user: &str,
    scenario: impl AsyncFnOnce(Rc<Follower>, Arc<tokio::sync::Mutex<ControlPlane>>) -> Result<()>,
) -> Result<()> {
    let control = ControlPlane::api_only()?;
    let settings = kube::Settings {
        kubeconfig: Some(control.site.file(&format!("{user}.kubeconfig"))),
        node: "node-1".into(),
        cri: kube::cri::Socket::Off,
        mesh: true,
    };
    let control = Arc::new(tokio::sync::Mutex::new(control));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(LocalSet::new().run_until(async {
        let client = kube::client(&settings).await?;
        let enforcement = Arc::new(Enforcement::default());
        let source = tokio::task::spawn_local(policies::kube::serve(client, enforcement.clone()));
        let workload = Workload { name: "shop/db-0".into(), namespace: "shop".into(), ..Workload::default() };
        scenario(Rc::new(Follower { enforcement, workload }), control).await?;
        source.abort();
        Ok(())
    }))
}

async fn with<T: Send + 'static>(
    control: &Arc<tokio::sync::Mutex<ControlPlane>>,
    work: impl FnOnce(&mut ControlPlane) -> Result<T> + Send + 'static,
) -> Result<T> {
    let control = control.clone();
    tokio::task::spawn_blocking(move || work(&mut control.blocking_lock())).await?
}

#[test]
fn policies_of_the_api_are_in_force_as_they_come_and_go() -> Result<()> {
    follow("admin", async |follower, control| {
        // Without CRDs there are no policies, and that is known.
        tokio::time::timeout(WITHIN, follower.enforcement.settled()).await.context("settled without CRDs")?;
        assert_eq!((follower.mode(), follower.reason()), (Mode::Permissive, Reason::Default));

        // They are installed later, and found without a restart.
        with(&control, |control| {
            control.apply(&[NAMESPACE, &mesh::crds()].concat())?;
            mesh::wait_crds(control)?;
            control.apply(&object("PeerAuthentication", "default", "{mtls: {mode: STRICT}}"))?;
            control.apply(&object(
                "AuthorizationPolicy",
                "db",
                "{rules: [{from: [{source: {serviceAccounts: [job]}}], to: [{operation: {ports: ['80']}}]}]}",
            ))
        })
        .await?;
        follower.until("STRICT", || follower.mode() == Mode::Strict).await?;
        follower.until("the ALLOW policy", || follower.reason() == Reason::NotAllowed).await?;

        // A change is in force; a malformed one leaves it so, and is named.
        let allow = object("AuthorizationPolicy", "db", "{rules: [{from: [{source: {serviceAccounts: [web]}}]}]}");
        with(&control, move |control| control.apply(&allow)).await?;
        follower.until("the changed policy", || follower.reason() == Reason::Allowed).await?;
        let broken = object("AuthorizationPolicy", "db", "{rules: [{from: [{source: {ipBlocks: [10.0.0.0/33]}}]}]}");
        let deny = object("AuthorizationPolicy", "zz", "{action: DENY, rules: [{to: [{operation: {ports: ['81']}}]}]}");
        with(&control, move |control| control.apply(&[broken, deny].concat())).await?;
        let standing = || follower.enforcement.read(|policies| policies.standing());
        follower.until("the one behind it", || standing().len() == 3).await?;
        assert_eq!(follower.reason(), Reason::Allowed);
        let refused = standing().into_iter().find(|one| &*one.name == "shop/db").and_then(|one| one.refused);
        let refused = refused.context("the malformed version is named")?;
        assert!(refused.contains("10.0.0.0/33") && refused.contains("the version before stays"), "{refused}");

        // Without an API server the last state stays; what went meanwhile is noticed when it is back.
        with(&control, ControlPlane::kill_apiserver).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!((follower.mode(), follower.reason()), (Mode::Strict, Reason::Allowed));
        with(&control, |control| {
            control.start_apiserver()?;
            control.kubectl(&["-n", "shop", "delete", "peerauthentication", "default"])?;
            control.kubectl(&["-n", "shop", "delete", "authorizationpolicy", "db", "zz"])
        })
        .await?;
        follower.until("nothing", || follower.mode() == Mode::Permissive && follower.reason() == Reason::Default).await
    })
}

#[test]
fn what_may_not_be_read_is_not_taken_for_nothing() -> Result<()> {
    // The scheduler may read neither kind.
    follow("scheduler", async |follower, control| {
        with(&control, |control| control.apply(&mesh::crds())).await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(!follower.enforcement.snapshot().settled());
        with(&control, |control| {
            control.apply(
                "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {name: policies}\nrules: [{apiGroups: \
                 [security.istio.io], resources: [authorizationpolicies, peerauthentications], verbs: [list, watch]}]\n---\n\
                 apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {name: policies}\nroleRef: {apiGroup: \
                 rbac.authorization.k8s.io, kind: ClusterRole, name: policies}\nsubjects: [{kind: User, name: \
                 \"system:kube-scheduler\"}]\n",
            )
        })
        .await?;
        tokio::time::timeout(WITHIN, follower.enforcement.settled()).await.context("settled once it is granted")
    })
}
