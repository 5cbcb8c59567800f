//! What is in force: every option with its default filled in, and where it was set.
//!
//! Options name files and hold no content of them: there is nothing here that may not be shown.

use std::{collections::BTreeMap, fmt, path::Path};

use serde_json::Value;

use super::{
    Cluster, Config, LogFormat, MapSizes, Mark, MeshOptions, MetricsAddress, OnExit, Options, Place, Span, Switch,
    TcxUse, WhenReplaced,
};
use crate::{
    identity::istio::IstioPlaces,
    kernel::{self, Sizes},
};

/// Where an option was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Flag,
    Environment,
    File,
    Default,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flag => "flag",
            Self::Environment => "environment",
            Self::File => "file",
            Self::Default => "default",
        })
    }
}

/// By the options' names.
pub type Origins = BTreeMap<String, Origin>;

/// One option in force.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// Its name in the file.
    pub key: String,
    /// As the file would have it; null: not set, and without a default.
    pub value: Value,
    pub from: Origin,
}

impl Options {
    /// What holds where nothing is set. Options that are absent here have no default.
    pub fn defaults() -> Self {
        let kernel = kernel::Config::default();
        let settings = kernel.settings;
        let istio = IstioPlaces::default();
        Self {
            place: Place {
                state_dir: Some(Place::default().state_dir()),
                bpffs: Some(kernel.bpffs),
                name: Some(kernel.name),
                sizes: Some(MapSizes(Sizes::default())),
                ..Place::default()
            },
            cluster: Cluster { cri_socket: Some(Default::default()), ..Cluster::default() },
            host: Some(false),
            layers: Some(Default::default()),
            syn_timeout: "200ms".parse::<Span>().ok(),
            syn_limit: Some(settings.syn_limit),
            max_replays: Some(settings.max_replays),
            suspect_ttl: "1s".parse::<Span>().ok(),
            suspect_levels: Some(settings.suspect_max_level - 1),
            suspect_percent: Some(settings.suspect_percent),
            mark: Some(Mark(settings.mark)),
            tcx: Some(TcxUse::default()),
            canary: Some(Switch::default()),
            on_exit: Some(OnExit::default()),
            take_over: Some(false),
            when_replaced: Some(WhenReplaced::default()),
            metrics_address: Some(MetricsAddress(None)),
            mesh: MeshOptions {
                mtls: Some(Switch::Off),
                trust_domain: Some("cluster.local".into()),
                istio_ca_root: Some(istio.root),
                istio_token: Some(istio.token),
                cluster_id: Some(istio.cluster_id),
                root_namespace: Some(crate::policy::ROOT_NAMESPACE.into()),
                local_tls: Some(Switch::Off),
                tunnel_drain: "10s".parse::<Span>().ok(),
                tunnel_workers: Some(0),
                ..MeshOptions::default()
            },
            log_format: Some(LogFormat::default()),
            log_level: Some("info".into()),
            ..Self::default()
        }
    }

    /// Which options are set, by the name that clap knows them by; `how` tells of those that a flag or the
    /// environment set, the rest is the file's.
    pub fn origins(&self, how: impl Fn(&str) -> Option<Origin>) -> Origins {
        let set = values(self).filter(|(_, value)| !value.is_null());
        set.map(|(key, _)| {
            let from = how(&key.replace('-', "_")).unwrap_or(Origin::File);
            (key, from)
        })
        .collect()
    }
}

impl Config {
    /// Every option. `cgroup` is the one that is served.
    pub fn settings(&self, cgroup: &Path) -> Vec<Setting> {
        let mut filled = self.given.clone().over(Options::defaults());
        filled.place.cgroup = Some(cgroup.to_owned());
        filled.metrics_address = Some(MetricsAddress(self.metrics));
        filled.cluster.node_name = Some(self.kube.node.clone());
        // It sets maps apart in tests and is no option for people.
        let shown = values(&filled).filter(|(key, value)| !(key == "layout-salt" && value.is_null()));
        shown
            .map(|(key, value)| Setting {
                from: self.origins.get(&key).copied().unwrap_or(Origin::Default),
                key,
                value,
            })
            .collect()
    }
}

/// By name; an option that is not set is null.
fn values(options: &Options) -> impl Iterator<Item = (String, Value)> {
    let Ok(Value::Object(map)) = serde_json::to_value(options) else {
        unreachable!("options are a mapping of plain data")
    };
    map.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> Options {
        serde_saphyr::from_str(text).unwrap()
    }

    #[test]
    fn the_defaults_that_are_shown_are_those_that_hold() {
        let given = options("source: file:/a");
        let resolved = |options: Options| {
            let config = options.resolve().unwrap();
            format!("{:?}", Config { given: Options::default(), ..config })
        };
        assert_eq!(resolved(given.clone().over(Options::defaults())), resolved(given));
    }

    #[test]
    fn only_what_has_no_default_is_shown_as_not_set() {
        let config = options("source: file:/a").resolve().unwrap();
        let settings = config.settings(Path::new("/sys/fs/cgroup"));
        let unset: Vec<_> = settings.iter().filter(|setting| setting.value.is_null()).map(|s| &*s.key).collect();
        assert_eq!(unset, ["identity", "kubeconfig", "policies", "ready-file"]);
    }

    #[test]
    fn each_option_says_where_it_was_set() {
        let given = options("{source: 'file:/a', syn-limit: 4, layers: l1, sizes: {pods: 7}}");
        let origins = given.origins(|id| match id {
            "syn_limit" => Some(Origin::Flag),
            "layers" => Some(Origin::Environment),
            _ => None,
        });
        let config = Config { origins, ..given.resolve().unwrap() };
        let settings = config.settings(Path::new("/c"));
        let find = |key: &str| {
            let setting = settings.iter().find(|setting| setting.key == key).unwrap();
            (setting.value.to_string(), setting.from)
        };
        assert_eq!(find("syn-limit"), ("4".into(), Origin::Flag));
        assert_eq!(find("layers"), ("\"l1\"".into(), Origin::Environment));
        assert_eq!(find("source"), ("\"file:/a\"".into(), Origin::File));
        assert_eq!(find("max-replays"), ("3".into(), Origin::Default));
        assert!(find("sizes").0.contains("\"pods\":7"), "{}", find("sizes").0);
        assert_eq!(find("cgroup"), ("\"/c\"".into(), Origin::Default));
    }
}
