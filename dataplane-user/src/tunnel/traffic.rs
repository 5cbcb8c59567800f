//! Connections by who talks to whom, as Istio counts them (`istio_tcp_*`): a lock when a connection begins and ends,
//! none for its bytes.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use crate::{identity::SpiffeId, mesh::Workload, model::short_name};

/// Series at most. What comes after them is counted without names.
const MAX_SERIES: usize = 2000;
/// What nobody knows, in Istio's word.
pub const UNKNOWN: &str = "unknown";

/// Which end of the connection is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reporter {
    Source,
    Destination,
}

impl Reporter {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// How it went, in the words of Istio's proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Flags {
    None,
    Denied,
    NotConnected,
}

impl Flags {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Denied => "DENY",
            Self::NotConnected => "CONNECT",
        }
    }
}

/// One end. Empty: nobody knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct End {
    /// The pods of a Deployment are one workload.
    pub workload: Box<str>,
    pub namespace: Box<str>,
    pub principal: Option<SpiffeId>,
    pub app: Box<str>,
    pub version: Box<str>,
}

impl End {
    /// What is known of a pod: labels of pods of this node only. `principal`: what it proved.
    pub fn new(workload: Option<&Workload>, principal: Option<&SpiffeId>) -> Self {
        let label = |names: &[&str]| -> Box<str> {
            let labels = workload.and_then(|one| one.selected_by.as_ref()).map(|selected_by| &selected_by.labels);
            let found = labels.and_then(|labels| names.iter().find_map(|name| labels.get(*name)));
            found.map_or("", |value| value).into()
        };
        Self {
            workload: workload.map_or("", |one| workload_of(short_name(&one.name))).into(),
            namespace: workload.map(Workload::namespace).or(principal.map(SpiffeId::namespace)).unwrap_or("").into(),
            principal: principal.cloned(),
            app: label(&["app", "app.kubernetes.io/name"]),
            version: label(&["version", "app.kubernetes.io/version"]),
        }
    }
}

/// What one series is of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Series {
    pub reporter: Reporter,
    pub source: End,
    pub destination: End,
    /// namespace/name; empty: it was named by address.
    pub service: Box<str>,
    pub flags: Flags,
    pub mutual_tls: bool,
}

#[derive(Debug, Default)]
pub struct Tally {
    pub opened: AtomicU64,
    pub closed: AtomicU64,
    pub failed: AtomicU64,
    /// From the client to the server, and back.
    pub request_bytes: AtomicU64,
    pub response_bytes: AtomicU64,
}

#[derive(Debug, Default)]
pub struct Traffic(RwLock<HashMap<Series, Arc<Tally>>>);

impl Traffic {
    /// Where a connection counts.
    pub fn of(&self, series: Series) -> Arc<Tally> {
        if let Some(tally) = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&series) {
            return tally.clone();
        }
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let series = if table.len() < MAX_SERIES || table.contains_key(&series) { series } else { series.nameless() };
        table.entry(series).or_default().clone()
    }

    pub fn opened(&self, series: Series) -> Arc<Tally> {
        let tally = self.of(series);
        tally.opened.fetch_add(1, Relaxed);
        tally
    }

    pub fn failed(&self, series: Series) {
        self.of(series).failed.fetch_add(1, Relaxed);
    }

    /// All there is, sorted.
    pub fn all(&self) -> Vec<(Series, Arc<Tally>)> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = table.iter().map(|(series, tally)| (series.clone(), tally.clone())).collect();
        drop(table);
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}

impl Series {
    /// A handful of these exist.
    fn nameless(self) -> Self {
        let (source, destination, service) = Default::default();
        Self { source, destination, service, ..self }
    }
}

/// The workload that a pod is of, by the names that Kubernetes' controllers make: `web-5d4f8c7b9c-x2x7q`, `db-0`,
/// `agent-x7k2p`. Their random letters have no vowels (apimachinery, `util/rand`), so words are not taken for them.
pub fn workload_of(pod: &str) -> &str {
    let random =
        |part: &str| !part.is_empty() && part.bytes().all(|byte| b"bcdfghjklmnpqrstvwxz2456789".contains(&byte));
    let Some((owner, last)) = pod.rsplit_once('-').filter(|(owner, _)| !owner.is_empty()) else { return pod };
    if last.len() == 5 && random(last) {
        let hash = owner.rsplit_once('-').filter(|(name, _)| !name.is_empty());
        return match hash {
            // fnv32 in decimal, then in that alphabet: up to ten.
            Some((name, hash)) if (6..=10).contains(&hash.len()) && random(hash) => name,
            _ => owner,
        };
    }
    // Of a StatefulSet.
    if last.bytes().all(|byte| byte.is_ascii_digit()) && !last.is_empty() { owner } else { pod }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_go_by_their_workloads() {
        for (pod, workload) in [
            ("web-5d4f8c7b9c-x2x7q", "web"),
            ("shop-web-7d9c6b5f4-zzzzz", "shop-web"),
            ("agent-x7k2p", "agent"),
            ("db-0", "db"),
            ("db-12", "db"),
            ("web-canary", "web-canary"),
            ("debug", "debug"),
            ("-0", "-0"),
            ("", ""),
        ] {
            assert_eq!(workload_of(pod), workload, "{pod}");
        }
    }

    fn series(workload: String) -> Series {
        let source = End { workload: workload.into(), ..End::default() };
        Series {
            reporter: Reporter::Source,
            source,
            destination: End::default(),
            service: "shop/web".into(),
            flags: Flags::None,
            mutual_tls: true,
        }
    }

    #[test]
    fn series_are_bounded_and_nothing_goes_uncounted() {
        let traffic = Traffic::default();
        for n in 0..MAX_SERIES + 500 {
            traffic.opened(series(format!("web-{n}")));
            traffic.failed(series("web-0".into()));
        }
        let all = traffic.all();
        assert_eq!(all.len(), MAX_SERIES + 1, "and one without names");
        let sum =
            |count: fn(&Tally) -> &AtomicU64| all.iter().map(|(_, tally)| count(tally).load(Relaxed)).sum::<u64>();
        assert_eq!(sum(|tally| &tally.opened), MAX_SERIES as u64 + 500);
        assert_eq!(sum(|tally| &tally.failed), MAX_SERIES as u64 + 500);
        let nameless = all.iter().find(|(series, _)| series.source.workload.is_empty()).expect("it is there");
        assert_eq!(nameless.1.opened.load(Relaxed), 500);
    }
}
