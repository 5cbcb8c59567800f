//! Checks of what the kube source asks: the API server, with the agent's own credentials, and the container runtime.

use super::Check;
use crate::source::kube::{
    Settings, cri,
    reach::{Reach, reach},
};

/// May the agent look at what it needs?
pub fn api_server(settings: &Settings) -> Check {
    const NAME: &str = "API server";
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let reached = runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(reach(settings)));
    match reached {
        Ok(reach) => judge(settings, reach),
        Err(error) => Check::fail(
            NAME,
            format!("{error:#}"),
            "give --kubeconfig FILE, or run as a pod with a service account; see that the node's routes and firewall \
             let it through to that address",
        ),
    }
}

fn judge(settings: &Settings, reach: Reach) -> Check {
    const NAME: &str = "API server";
    let Reach { url, version, refused, node_known } = reach;
    let at = format!("{url}, {version}");
    if let Some((_, first)) = refused.iter().find(|(needed, _)| *needed).or(refused.first()) {
        let more = if refused.len() > 1 { format!(" (and {} more)", refused.len() - 1) } else { String::new() };
        let remedy = "grant the agent's account list and watch of pods, services, endpointslices, namespaces and nodes: \
                      the chart's ClusterRole has them";
        let found = format!("{at}: {first}{more}");
        // Without the others it goes on with less: no enrolment by namespace, no node ports.
        let needed = refused.iter().any(|(needed, _)| *needed);
        return if needed { Check::fail(NAME, found, remedy) } else { Check::warn(NAME, found, remedy) };
    }
    if !node_known {
        return Check::warn(
            NAME,
            format!("{at}: it has no node {:?}: no pod would be this node's", settings.node),
            "give the node's name in the API with --node-name (in a pod: HITLESS_NODE_NAME from spec.nodeName)",
        );
    }
    Check::ok(NAME, format!("{at}; this is its node {}", settings.node))
}

/// Can images be asked for?
pub fn runtime(socket: &cri::Socket) -> Check {
    const NAME: &str = "container runtime";
    if *socket == cri::Socket::Off {
        return Check::ok(NAME, "not asked (cri-socket: off): STOPSIGNAL of images is what pods' annotations say");
    }
    match cri::runtime(socket) {
        Ok(runtime) => Check::ok(NAME, format!("{} at {}", runtime.name, runtime.path.display())),
        Err(error) => Check::warn(
            NAME,
            format!("{error}: a STOPSIGNAL other than TERM in images is not known"),
            "name the socket with --cri-socket, with hostPID: true as a path of the node; or annotate such pods with \
             hitless.io/stop-signals",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    fn reached(refused: &[(bool, &str)], node_known: bool) -> Check {
        let settings = Settings { kubeconfig: None, node: "node-1".into(), cri: cri::Socket::Off, mesh: false };
        let refused = refused.iter().map(|(needed, reason)| (*needed, (*reason).to_owned())).collect();
        judge(&settings, Reach { url: "https://api:6443".into(), version: "v1.34.4".into(), refused, node_known })
    }

    #[test]
    fn what_may_not_be_read_fails_only_where_nothing_goes_without_it() {
        assert_eq!(reached(&[], true).status, Status::Ok);
        let none = reached(&[(false, "nodes: forbidden"), (true, "pods: forbidden")], false);
        assert_eq!(none.status, Status::Fail);
        assert!(none.found.contains("v1.34.4: pods: forbidden (and 1 more)"), "{none:?}");
        assert_eq!(reached(&[(false, "nodes: forbidden")], false).status, Status::Warn);
        let unknown = reached(&[], false);
        assert_eq!(unknown.status, Status::Warn);
        assert!(unknown.remedy.is_some_and(|remedy| remedy.contains("--node-name")));
    }

    #[test]
    fn a_runtime_that_is_not_there_is_warned_of() {
        let check = runtime(&"/nowhere/runtime.sock".parse().unwrap());
        assert_eq!(check.status, Status::Warn);
        assert!(check.found.contains("/nowhere/runtime.sock"), "{check:?}");
        assert_eq!(runtime(&cri::Socket::Off).status, Status::Ok);
    }
}
