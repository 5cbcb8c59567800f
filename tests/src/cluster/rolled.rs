//! Rolling updates under load, by the service's address and through a gateway that picks pods itself: what may be lost
//! of it, with a mesh or without.

use std::collections::BTreeMap;

use anyhow::Result;

use super::{
    gateway::Gateway,
    image,
    load::Outcome,
    long,
    scene::{NAMESPACE, PATH, Scene},
};

pub const REPLICAS: usize = 3;

/// How often to roll.
pub fn rollouts() -> usize {
    if long() { 5 } else { 2 }
}

/// What both ways lost, and what the kernel says of the client's and the gateway's connects.
pub struct Rolled {
    pub direct: Outcome,
    pub through: Outcome,
    pub counters: BTreeMap<String, u64>,
    pub gateway: String,
}

impl Rolled {
    /// Rolls a scene with hitless, twice so often.
    pub fn of(scene: &Scene, qps: u32) -> Result<Self> {
        scene.cluster.load(&image::envoy()?)?;
        let gateway = Gateway::start(&scene.cluster, NAMESPACE, "web", 1)?;
        scene.wait_enrolled("gateway")?;
        let times = rollouts();
        let direct = scene.roll_under_load(&format!("direct-{qps}"), &scene.url(), qps, times)?;
        let through = scene.roll_under_load(&format!("gateway-{qps}"), &gateway.url(PATH), qps, times)?;
        let counters = scene.agents[0].counters()?;
        assert!(counters["stop_signals"] > 0, "no pod's end was seen: {counters:?}");
        for outcome in [&direct, &through] {
            assert!(outcome.requests > u64::from(qps) * 10, "hardly any load: {outcome:?}");
        }
        let gateway = gateway.failures(&scene.cluster);
        Ok(Self { direct, through, counters, gateway })
    }

    pub fn requests(&self) -> u64 {
        self.direct.requests + self.through.requests
    }

    /// Every connection is made, by the service's address and by a gateway that picks pods itself. A request may still
    /// be lost with the server that had accepted it: on two cores that also run the cluster it may wait 100 ms for its
    /// turn, and a server that ends meanwhile takes it along, which is no connect's failure.
    pub fn assert_only_accepted_requests_lost(&self, most: u64) {
        let Self { direct, through, counters, gateway } = self;
        let context = format!("{direct:?}\n{through:?}\n{counters:?}\n{gateway}");
        for counter in ["connects_refused", "connects_timed_out", "connects_unreachable", "connects_no_backend"] {
            assert_eq!(counters[counter], 0, "{counter}: {context}");
        }
        // Envoy's flag of a connect that failed.
        let failed_connect = |line: &str| line.split(' ').nth(2).is_some_and(|flags| flags.contains("UF"));
        assert!(!gateway.lines().any(failed_connect), "{context}");
        let failed = direct.failed + through.failed;
        assert!(failed <= most, "{failed} requests failed, more than {most}: {context}");
    }
}
