//! `hitless drain watch`, `rollout report` and `connections`: who knew when that a pod goes, and what was rescued.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use super::{LookArgs, Output, json, print, table::table};
use crate::admin::{
    client::Client,
    protocol::{Connection, Drain},
};

/// How often a live view looks.
const LOOK: Duration = Duration::from_millis(300);

/// Prints drains, and with `follow` each one again whenever something of it changes.
pub fn watch(follow: bool, look: &LookArgs) -> anyhow::Result<ExitCode> {
    let mut client = Client::connect(&look.socket()?)?;
    let mut told: BTreeMap<(String, u64), Drain> = BTreeMap::new();
    loop {
        let drains = client.drains()?;
        let key = |drain: &Drain| (drain.pod.clone(), drain.first_ns);
        for drain in &drains {
            if told.get(&key(drain)) == Some(drain) {
                continue;
            }
            match look.output {
                Output::Json => print(&(serde_json::to_string(drain)? + "\n"))?,
                Output::Table => print(&line(drain))?,
            }
        }
        if !follow {
            return Ok(ExitCode::SUCCESS);
        }
        // What the agent has forgotten is forgotten here too.
        told = drains.into_iter().map(|drain| (key(&drain), drain)).collect();
        std::thread::sleep(LOOK);
    }
}

/// One drain as a sentence: the signals in the order they came, from the first on.
fn line(drain: &Drain) -> String {
    let mut said = [
        ("deleted", drain.api_ns),
        ("stop signal", drain.sigterm_ns),
        ("listener closed", drain.listener_ns),
        ("control plane", drain.control_plane_ns),
    ];
    said.sort_by_key(|(_, at)| at.unwrap_or(u64::MAX));
    let said = said.iter().filter_map(|(name, at)| {
        let after = at.as_ref()?.saturating_sub(drain.first_ns);
        Some(format!("{name} +{}", span(after)))
    });
    let said: Vec<_> = said.collect();
    let end = match (drain.returned, drain.control_plane_ns) {
        (true, _) => "; listens again",
        (false, None) => "; the control plane does not know yet",
        _ => "",
    };
    format!(
        "{:>14.6}  {}: {}{end}; {} rescued, {} failed\n",
        drain.first_ns as f64 / 1e9,
        drain.pod,
        said.join(", "),
        drain.rebound,
        drain.failed
    )
}

fn span(ns: u64) -> String {
    match ns {
        0..10_000_000 => format!("{} µs", ns / 1000),
        10_000_000..10_000_000_000 => format!("{} ms", ns / 1_000_000),
        _ => format!("{:.1} s", ns as f64 / 1e9),
    }
}

/// Pods of one workload that went, each within [`APART_NS`] of the one before.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Rollout {
    workload: String,
    services: Vec<String>,
    began_ns: u64,
    took_ns: u64,
    pods: usize,
    rebound: u64,
    failed: u64,
    /// Drains of which the control plane spoke, and the longest that it was late.
    confirmed: usize,
    worst_control_plane_lag_ns: u64,
}

/// A pause of this length ends a rollout.
const APART_NS: u64 = 120_000_000_000;

fn rollouts(drains: &[Drain]) -> Vec<Rollout> {
    let mut found: Vec<Rollout> = Vec::new();
    for drain in drains.iter().filter(|drain| !drain.returned) {
        let workload = workload(&drain.pod);
        let now = drain.first_ns;
        let open = |r: &&mut Rollout| r.workload == workload && now.saturating_sub(r.began_ns + r.took_ns) < APART_NS;
        let rollout = match found.iter_mut().rev().find(open) {
            Some(rollout) => rollout,
            None => {
                let services = drain.services.clone();
                let none = (0, 0, 0);
                found.push(Rollout {
                    workload,
                    services,
                    began_ns: now,
                    took_ns: 0,
                    pods: 0,
                    rebound: none.0,
                    failed: none.1,
                    confirmed: 0,
                    worst_control_plane_lag_ns: none.2,
                });
                found.last_mut().expect("it was just pushed")
            }
        };
        rollout.pods += 1;
        rollout.rebound += drain.rebound;
        rollout.failed += drain.failed;
        let last = drain.control_plane_ns.unwrap_or(now);
        rollout.took_ns = rollout.took_ns.max(last.saturating_sub(rollout.began_ns));
        if let Some(at) = drain.control_plane_ns {
            rollout.confirmed += 1;
            rollout.worst_control_plane_lag_ns = rollout.worst_control_plane_lag_ns.max(at.saturating_sub(now));
        }
    }
    found
}

/// The workload by its pod's name: without the ordinal, or the ReplicaSet's hash and the pod's.
fn workload(pod: &str) -> String {
    let Some((rest, last)) = pod.rsplit_once('-') else { return pod.to_owned() };
    let hash = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || b"bcdfghjklmnpqrstvwxz".contains(&b));
    match rest.rsplit_once('-') {
        Some((name, set)) if last.len() == 5 && hash(last) && (6..=10).contains(&set.len()) && hash(set) => name,
        _ if last.bytes().all(|b| b.is_ascii_digit()) || last.len() == 5 && hash(last) => rest,
        _ => pod,
    }
    .to_owned()
}

pub fn report(look: &LookArgs) -> anyhow::Result<ExitCode> {
    let rollouts = rollouts(&Client::connect(&look.socket()?)?.drains()?);
    if look.output == Output::Json {
        json(&rollouts)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<_> = rollouts
        .iter()
        .map(|r| {
            let late = if r.confirmed == 0 { "-".into() } else { span(r.worst_control_plane_lag_ns) };
            let told = format!("{late} ({} of {})", r.confirmed, r.pods);
            let services = r.services.join(",");
            [
                r.workload.clone(),
                services,
                r.pods.to_string(),
                span(r.took_ns),
                r.rebound.to_string(),
                told,
                r.failed.to_string(),
            ]
        })
        .collect();
    print(&table(["WORKLOAD", "SERVICES", "PODS", "TOOK", "RESCUED", "CONTROL PLANE LATE BY", "FAILED"], &rows))?;
    Ok(ExitCode::SUCCESS)
}

pub fn connections(look: &LookArgs) -> anyhow::Result<ExitCode> {
    let connections = Client::connect(&look.socket()?)?.connections()?;
    if look.output == Output::Json {
        json(&connections)?;
        return Ok(ExitCode::SUCCESS);
    }
    print(&tables(connections))?;
    Ok(ExitCode::SUCCESS)
}

/// Those that were moved, then those that are carried.
fn tables(connections: Vec<Connection>) -> String {
    let (carried, moved): (Vec<_>, Vec<_>) = connections.into_iter().partition(|c| c.carried.is_some());
    let mut out = String::new();
    if !moved.is_empty() || carried.is_empty() {
        let idle = |c: &Connection| c.idle_ms.map_or_else(|| "-".into(), |ms| span(ms * 1_000_000));
        let rows: Vec<_> = moved
            .into_iter()
            .map(|c| {
                let idle = idle(&c);
                [c.client, c.peer, c.backend, c.state, idle]
            })
            .collect();
        out += &table(["CLIENT", "BELIEVES IN", "LIVES ON", "STATE", "IDLE"], &rows);
    }
    if carried.is_empty() {
        return out;
    }
    if !out.is_empty() {
        out.push('\n');
    }
    let rows: Vec<_> = carried
        .into_iter()
        .map(|c| {
            let about = c.carried.unwrap_or_default();
            let known = |text: Option<String>| text.unwrap_or_else(|| "-".into());
            [
                about.direction,
                c.state,
                c.client,
                c.backend,
                known(about.service),
                known(about.source_identity),
                known(about.destination_identity),
                span(about.age_ms * 1_000_000),
                about.bytes_sent.to_string(),
                about.bytes_received.to_string(),
            ]
        })
        .collect();
    let heads =
        ["DIRECTION", "STATE", "CLIENT", "SERVER", "SERVICE", "CLIENT IS", "SERVER IS", "AGE", "SENT", "RECEIVED"];
    out + &table(heads, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::protocol::Carried;

    #[test]
    fn moved_and_carried_connections_are_two_tables() {
        let moved = Connection { client: "10.0.0.1:1".into(), idle_ms: Some(1000), ..Connection::default() };
        let about = Carried {
            direction: "outbound".into(),
            source_identity: Some("spiffe://d/ns/a/sa/b".into()),
            age_ms: 2000,
            bytes_sent: 7,
            ..Carried::default()
        };
        let carried = Connection { state: "hbone".into(), carried: Some(about), ..Connection::default() };
        let both = tables(vec![moved.clone(), carried.clone()]);
        let (first, second) = both.split_once("\n\n").unwrap();
        assert!(first.starts_with("CLIENT") && first.contains("10.0.0.1:1"), "{first}");
        assert!(second.starts_with("DIRECTION") && second.contains("spiffe://d/ns/a/sa/b"), "{second}");
        assert!(tables(vec![carried]).starts_with("DIRECTION"), "no empty table before it");
        assert!(tables(vec![]).starts_with("CLIENT"));
        let json = serde_json::to_value(&moved).unwrap();
        assert_eq!(json["idleMs"], 1000);
        assert!(json.get("carried").is_none(), "{json}");
    }

    #[test]
    fn pods_of_one_workload_are_one_rollout_and_its_worst_lag_is_told() {
        assert_eq!(workload("shop/web-7c9d8b6f5d-x2bcd"), "shop/web");
        assert_eq!(workload("shop/db-2"), "shop/db");
        let s = 1_000_000_000;
        let drain = |pod: &str, at: u64, late: Option<u64>| Drain {
            pod: pod.into(),
            first_ns: at * s,
            control_plane_ns: late.map(|late| (at + late) * s),
            rebound: 3,
            ..Drain::default()
        };
        let all = [
            drain("a/web-1", 10, Some(2)),
            drain("a/db-1", 11, None),
            drain("a/web-2", 20, Some(5)),
            drain("a/web-3", 900, None),
        ];
        let found = rollouts(&all);
        let told: Vec<_> = found
            .iter()
            .map(|r| (r.workload.as_str(), r.pods, r.rebound, r.confirmed, r.worst_control_plane_lag_ns / s))
            .collect();
        assert_eq!(told, [("a/web", 2, 6, 2, 5), ("a/db", 1, 3, 0, 0), ("a/web", 1, 3, 0, 0)]);
    }

    #[test]
    fn a_drain_is_told_in_the_order_in_which_it_became_known() {
        let drain = Drain {
            pod: "a/web-1".into(),
            first_ns: 1_000_000_000,
            sigterm_ns: Some(1_000_000_000),
            listener_ns: Some(1_000_400_000),
            ..Drain::default()
        };
        assert_eq!(
            line(&drain),
            "      1.000000  a/web-1: stop signal +0 µs, listener closed +400 µs; the control plane does not know yet; 0 rescued, 0 failed\n"
        );
    }
}
