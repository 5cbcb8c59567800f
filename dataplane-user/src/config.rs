//! The agent's configuration: the same names as flags, as environment variables and in the file.
//!
//! A flag wins over `HITLESS_<NAME>`, that over the file, that over the default.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use dataplane_ebpf::{
    abi::{self, LAYER_CHOOSE, LAYER_KNOW, LAYER_REBIND, Settings},
    health::{MAX_LEVEL, ticks_of_ms},
};
use serde::{Deserialize, Serialize};

use crate::{
    kernel::{
        self, Sizes, Tcx,
        canary::{RESERVED_BACKENDS, RESERVED_SERVICES},
    },
    registry::Limits,
    source,
};

/// One struct of options over another, field by field.
macro_rules! prefer {
    ($over:expr, $under:expr, $($field:ident),* $(,)?) => {
        Self { $($field: $over.$field.or($under.$field)),* }
    };
}

pub mod in_force;
pub mod mesh;

pub use mesh::{MeshOptions, MeshSettings};

/// Everything that can be set. Unset fields take what the next source says.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Options {
    /// Where services, backends and pods come from: kube (the Kubernetes API), file:PATH (YAML, or
    /// JSON if it ends in .json; watched) or stream:PATH (a Unix socket to be made; newline-delimited
    /// JSON events)
    #[arg(long, env = "HITLESS_SOURCE", value_name = "SOURCE")]
    pub source: Option<Source>,

    #[command(flatten)]
    #[serde(flatten)]
    pub cluster: Cluster,

    #[command(flatten)]
    #[serde(flatten)]
    pub place: Place,

    /// Enrol the node's own network namespace: connections of processes on the host
    #[arg(long, env = "HITLESS_HOST", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub host: Option<bool>,

    /// Which layers act: l1 (know early), l2 (choose well), l3 (rebind); all, none, or some: l1,l3
    /// [default: all]
    #[arg(long, env = "HITLESS_LAYERS", value_name = "LIST")]
    pub layers: Option<Layers>,

    /// First SYN timeout of a service connection; 0 leaves the system's [default: 200ms]
    #[arg(long, env = "HITLESS_SYN_TIMEOUT", value_name = "DURATION")]
    pub syn_timeout: Option<Span>,

    /// The n-th SYN without an answer goes to another backend; 0: never [default: 2]
    #[arg(long, env = "HITLESS_SYN_LIMIT", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=16))]
    pub syn_limit: Option<u32>,

    /// How often one connect is replayed to another backend, at most [default: 3]
    #[arg(long, env = "HITLESS_MAX_REPLAYS", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=3))]
    pub max_replays: Option<u32>,

    /// How long a backend is suspect after one failed connect [default: 1s]
    #[arg(long, env = "HITLESS_SUSPECT_TTL", value_name = "DURATION")]
    pub suspect_ttl: Option<Span>,

    /// How often that may double [default: 5]
    #[arg(long, env = "HITLESS_SUSPECT_LEVELS", value_name = "N", value_parser = clap::value_parser!(u32).range(0..=14))]
    pub suspect_levels: Option<u32>,

    /// One client's word makes at most this share of a service suspect [default: 50]
    #[arg(long, env = "HITLESS_SUSPECT_PERCENT", value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(0..=100))]
    pub suspect_percent: Option<u32>,

    /// The bit(s) of the packet mark that are hitless's own [default: 0x480000]
    #[arg(long, env = "HITLESS_MARK", value_name = "HEX")]
    pub mark: Option<Mark>,

    /// tc programs by tcx links where the kernel has them (auto), or always by clsact (off)
    /// [default: auto]
    #[arg(long, env = "HITLESS_TCX", value_name = "WHEN")]
    pub tcx: Option<TcxUse>,

    /// Prove each hook by a connect of its own before saying ready [default: on]
    #[arg(long, env = "HITLESS_CANARY", value_name = "WHEN")]
    pub canary: Option<Switch>,

    /// What a clean stop does: keep (the kernel path goes on working) or uninstall [default: keep]
    #[arg(long, env = "HITLESS_ON_EXIT", value_name = "WHAT")]
    pub on_exit: Option<OnExit>,

    /// Take over from an agent that runs on the same state directory, with all connections that wait in its
    /// listeners, instead of refusing to start
    #[arg(long, env = "HITLESS_TAKE_OVER", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub take_over: Option<bool>,

    /// What an agent does that another one took over from: exit, or stand-by (it serves again when that one is gone;
    /// for DaemonSets, which would start one that exits again) [default: exit]
    #[arg(long, env = "HITLESS_WHEN_REPLACED", value_name = "WHAT")]
    pub when_replaced: Option<WhenReplaced>,

    /// A file to be written once the agent is ready, and removed when it stops
    #[arg(long, env = "HITLESS_READY_FILE", value_name = "PATH")]
    pub ready_file: Option<PathBuf>,

    /// Where metrics, /healthz and /readyz are served over HTTP: ADDRESS:PORT, or off
    /// [default: off; with the kube source [::]:15084]
    #[arg(long, env = "HITLESS_METRICS_ADDRESS", value_name = "ADDRESS")]
    pub metrics_address: Option<MetricsAddress>,

    #[command(flatten)]
    #[serde(flatten)]
    pub mesh: MeshOptions,

    /// How log lines look [default: text]
    #[arg(long, env = "HITLESS_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,

    /// What is logged: error, warn, info, debug, trace, or a tracing filter [default: info]
    #[arg(long, env = "HITLESS_LOG_LEVEL", value_name = "LEVEL")]
    pub log_level: Option<String>,
}

/// How the kube source gets to its cluster.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Cluster {
    /// With the kube source: this node's name in the API [default: the host's name]
    #[arg(long, env = "HITLESS_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,

    /// With the kube source: credentials and address of the API server [default: the pod's service
    /// account, else KUBECONFIG, else ~/.kube/config]
    #[arg(long, env = "HITLESS_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// With the kube source: the container runtime's socket on the node, where images' STOPSIGNAL is asked for;
    /// auto: where containerd, k3s or CRI-O have it; off [default: auto]
    #[arg(long, env = "HITLESS_CRI_SOCKET", value_name = "PATH")]
    pub cri_socket: Option<source::kube::cri::Socket>,
}

/// What names an agent's pins and socket: every command that looks at an agent takes these.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Place {
    /// Directory of the agent's admin socket [default: /run/hitless]
    #[arg(long, env = "HITLESS_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,

    /// The cgroup whose processes are served; default: the root of the cgroup2 hierarchy
    #[arg(long, env = "HITLESS_CGROUP", value_name = "DIR")]
    pub cgroup: Option<PathBuf>,

    /// A mounted BPF file system, for the pins [default: /sys/fs/bpf]
    #[arg(long, env = "HITLESS_BPFFS", value_name = "DIR")]
    pub bpffs: Option<PathBuf>,

    /// The directory of pins in it; one per agent of a machine [default: hitless]
    #[arg(long, env = "HITLESS_NAME", value_name = "NAME")]
    pub name: Option<String>,

    /// Map sizes other than the defaults: backends=1000,slots=4000 (also frontends, services, pods,
    /// listeners, affinity, suspects, rebinds, mesh, eventsBytes)
    #[arg(long, env = "HITLESS_SIZES", value_name = "MAP=N,…")]
    pub sizes: Option<MapSizes>,

    /// Sets this agent's map layout apart from another's, as an upgrade does
    #[arg(long, env = "HITLESS_LAYOUT_SALT", value_name = "TEXT", hide = true)]
    pub layout_salt: Option<String>,
}

/// The options with every default filled in.
#[derive(Clone, Debug)]
pub struct Config {
    pub source: Source,
    pub kube: source::kube::Settings,
    pub state_dir: PathBuf,
    pub kernel: kernel::Config,
    pub host: bool,
    pub layers: Layers,
    pub canary: bool,
    pub on_exit: OnExit,
    pub take_over: bool,
    pub when_replaced: WhenReplaced,
    pub ready_file: Option<PathBuf>,
    /// Where metrics are served.
    pub metrics: Option<std::net::SocketAddr>,
    /// None: no mesh.
    pub mesh: Option<MeshSettings>,
    pub log_format: LogFormat,
    pub log_level: String,
    /// What was set, by whatever means, and by which.
    pub given: Options,
    pub origins: in_force::Origins,
}

impl Place {
    /// `self` wins, field by field.
    pub fn over(self, under: Self) -> Self {
        prefer!(self, under, state_dir, cgroup, bpffs, name, sizes, layout_salt)
    }

    pub fn state_dir(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(|| "/run/hitless".into())
    }

    /// What the kernel side needs to know to find its pins.
    pub fn kernel(&self) -> kernel::Config {
        let default = kernel::Config::default();
        kernel::Config {
            cgroup: self.cgroup.clone(),
            bpffs: self.bpffs.clone().unwrap_or(default.bpffs),
            name: self.name.clone().unwrap_or(default.name),
            layout_salt: self.layout_salt.clone().unwrap_or_default(),
            sizes: self.sizes.clone().map_or(default.sizes, |sizes| sizes.0),
            tcx: default.tcx,
            settings: default.settings,
        }
    }
}

impl Cluster {
    /// `self` wins, field by field.
    pub fn over(self, under: Self) -> Self {
        prefer!(self, under, node_name, kubeconfig, cri_socket)
    }

    pub fn settings(self) -> source::kube::Settings {
        let host = || nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned());
        source::kube::Settings {
            kubeconfig: self.kubeconfig,
            node: self.node_name.unwrap_or_else(|| host().unwrap_or_default()),
            cri: self.cri_socket.unwrap_or_default(),
            mesh: false,
        }
    }
}

impl Options {
    /// `self` wins, field by field.
    pub fn over(self, under: Self) -> Self {
        let place = self.place.clone().over(under.place.clone());
        let mesh = self.mesh.clone().over(under.mesh.clone());
        let cluster = self.cluster.clone().over(under.cluster.clone());
        macro_rules! all {
            ($($field:ident),* $(,)?) => { Self { place, cluster, mesh, $($field: self.$field.or(under.$field)),* } };
        }
        all!(
            source,
            host,
            layers,
            syn_timeout,
            syn_limit,
            max_replays,
            suspect_ttl,
            suspect_levels,
            suspect_percent,
            mark,
            tcx,
            canary,
            on_exit,
            take_over,
            when_replaced,
            ready_file,
            metrics_address,
            log_format,
            log_level,
        )
    }

    /// Reads a configuration file.
    pub fn read(path: &std::path::Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("configuration {}: cannot be read", path.display()))?;
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        serde_saphyr::from_str(&text).map_err(|error| {
            let error = crate::source::parse::explain(&text, &error);
            anyhow::anyhow!("configuration {}:{error}", path.display())
        })
    }

    pub fn resolve(self) -> anyhow::Result<Config> {
        self.check_ranges()?;
        let given = self.clone();
        let Some(source) = self.source else {
            bail!(
                "source is not set: give --source kube, file:PATH or stream:PATH (`hitless run --help` explains them)"
            )
        };
        let mut kernel = self.place.kernel();
        let layers = self.layers.unwrap_or_default();
        let default = kernel.settings;
        let span = |value: Option<Span>| value.map(|span| u32::try_from(span.0.as_millis()).unwrap_or(u32::MAX));
        kernel.settings = Settings {
            layers: layers.0,
            syn_timeout_jiffies: match span(self.syn_timeout) {
                Some(0) => 0,
                Some(ms) => kernel::jiffies_of_ms(ms),
                None => default.syn_timeout_jiffies,
            },
            syn_limit: self.syn_limit.unwrap_or(default.syn_limit),
            max_replays: self.max_replays.unwrap_or(default.max_replays),
            suspect_ticks: span(self.suspect_ttl).map_or(default.suspect_ticks, ticks_of_ms),
            // The first suspicion is level 1.
            suspect_max_level: self.suspect_levels.map_or(default.suspect_max_level, |levels| levels + 1),
            suspect_percent: self.suspect_percent.unwrap_or(default.suspect_percent),
            mark: self.mark.map_or(default.mark, |mark| mark.0),
            syn_spacing_ns: span(self.syn_timeout).map_or(default.syn_spacing_ns, kernel::syn_spacing_ns),
            ..default
        };
        kernel.tcx = match self.tcx.unwrap_or_default() {
            TcxUse::Auto => Tcx::Auto,
            TcxUse::Off => Tcx::Off,
        };
        let mesh = self.mesh.resolve()?;
        // Who runs in a cluster is watched over there.
        let unset = if source == Source::Kube { Some(CLUSTER_METRICS) } else { None };
        Ok(Config {
            source,
            kube: source::kube::Settings { mesh: mesh.is_some(), ..self.cluster.settings() },
            state_dir: self.place.state_dir(),
            kernel,
            host: self.host.unwrap_or(false),
            layers,
            canary: self.canary.unwrap_or_default() == Switch::On,
            on_exit: self.on_exit.unwrap_or_default(),
            take_over: self.take_over.unwrap_or(false),
            when_replaced: self.when_replaced.unwrap_or_default(),
            ready_file: self.ready_file,
            metrics: self.metrics_address.map_or(unset, |address| address.0),
            mesh,
            log_format: self.log_format.unwrap_or_default(),
            log_level: self.log_level.unwrap_or_else(|| "info".into()),
            given,
            origins: Default::default(),
        })
    }

    /// What clap checks of flags, of the file too.
    fn check_ranges(&self) -> anyhow::Result<()> {
        let ranges = [
            ("syn-limit", self.syn_limit, 16),
            ("max-replays", self.max_replays, abi::MAX_TRIES as u32 - 1),
            ("suspect-levels", self.suspect_levels, MAX_LEVEL - 1),
            ("suspect-percent", self.suspect_percent, 100),
        ];
        for (key, value, max) in ranges {
            if let Some(value) = value
                && value > max
            {
                bail!("{key} is {value}; allowed are 0..={max}");
            }
        }
        if let Some(name) = &self.place.name
            && (name.is_empty() || name.contains('/') || name.starts_with('.'))
        {
            bail!("name is {name:?}; it must be a plain directory name");
        }
        Ok(())
    }
}

impl Config {
    /// What the registry may use: the canary's numbers are at the end of the maps.
    pub fn limits(&self) -> Limits {
        let Sizes { frontends, services, slots, backends, .. } = self.kernel.sizes;
        Limits {
            frontends,
            services: services.saturating_sub(RESERVED_SERVICES),
            slots,
            backends: backends.saturating_sub(RESERVED_BACKENDS),
        }
    }
}

/// Types that are written the same way in a flag and in the file.
macro_rules! by_text {
    ($($ty:ty),*) => {$(
        impl TryFrom<String> for $ty {
            type Error = String;

            fn try_from(text: String) -> Result<Self, String> {
                text.parse()
            }
        }

        impl From<$ty> for String {
            fn from(value: $ty) -> Self {
                value.to_string()
            }
        }
    )*};
}

by_text!(Source, Layers, Span, Mark, MetricsAddress);

/// Where metrics are served by default with the kube source.
const CLUSTER_METRICS: std::net::SocketAddr =
    std::net::SocketAddr::new(std::net::IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED), 15084);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Source {
    Kube,
    File(PathBuf),
    Stream(PathBuf),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "kube" {
            return Ok(Self::Kube);
        }
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("stream", path)) if !path.is_empty() => Ok(Self::Stream(path.into())),
            _ => Err(format!("{text:?} is no source; allowed are kube, file:PATH and stream:PATH")),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kube => f.write_str("kube"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Stream(path) => write!(f, "stream:{}", path.display()),
        }
    }
}

/// `LAYER_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Layers(pub u32);

const LAYERS: [(&str, u32); 3] = [("l1", LAYER_KNOW), ("l2", LAYER_CHOOSE), ("l3", LAYER_REBIND)];

impl Default for Layers {
    fn default() -> Self {
        Self(LAYERS.iter().fold(0, |all, (_, layer)| all | layer))
    }
}

impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "all" => return Ok(Self::default()),
            "none" => return Ok(Self(0)),
            _ => {}
        }
        text.split(',')
            .try_fold(0, |layers, name| {
                let name = name.trim().to_ascii_lowercase();
                match LAYERS.iter().find(|(known, _)| *known == name) {
                    Some((_, layer)) => Ok(layers | layer),
                    None => {
                        Err(format!("{name:?} is no layer; allowed are l1, l2, l3 (joined by commas), all and none"))
                    }
                }
            })
            .map(Self)
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = LAYERS.iter().filter(|(_, layer)| self.0 & layer != 0).map(|(name, _)| *name).collect();
        f.write_str(if names.is_empty() { "none".into() } else { names.join(",") }.as_str())
    }
}

/// A duration with its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &text[digits.len()..] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "" if digits == "0" => 0,
            _ => return Err(format!("{text:?} is no duration; give a number with ms, s or m, such as 200ms")),
        };
        let number: u64 = digits.parse().map_err(|_| format!("{text:?} is no duration; give one such as 200ms"))?;
        let ms = number.checked_mul(unit).filter(|ms| *ms <= 3_600_000);
        ms.map(|ms| Self(Duration::from_millis(ms))).ok_or_else(|| format!("{text:?} is more than an hour"))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ms", self.0.as_millis())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mark(pub u32);

impl FromStr for Mark {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = match text.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16),
            None => text.parse(),
        };
        match parsed {
            Ok(mark) if mark != 0 => Ok(Self(mark)),
            _ => Err(format!("{text:?} is no mark; allowed are 32-bit numbers other than 0, such as 0x480000")),
        }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Where metrics are served; `None`: nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MetricsAddress(pub Option<std::net::SocketAddr>);

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "off" => Ok(Self(None)),
            _ => text.parse().map(|at| Self(Some(at))).map_err(|_| {
                format!("{text:?} is no address; give one with its port, such as [::]:15084 or 127.0.0.1:15084, or off")
            }),
        }
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(at) => at.fmt(f),
            None => f.write_str("off"),
        }
    }
}

/// A mapping in the file; `name=number,…` as a flag.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MapSizes(pub Sizes);

impl FromStr for MapSizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut object = serde_json::Map::new();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let parsed =
                part.split_once('=').and_then(|(name, size)| Some((name.trim(), size.trim().parse::<u32>().ok()?)));
            let Some((name, size)) = parsed else {
                return Err(format!("{part:?} is no map size; give one such as backends=1000"));
            };
            if size == 0 {
                return Err(format!("{name}=0: a map has at least one element"));
            }
            object.insert(name.into(), size.into());
        }
        serde_json::from_value(object.into()).map(Self).map_err(|error| error.to_string())
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TcxUse {
    #[default]
    Auto,
    Off,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    #[default]
    On,
    Off,
}

/// YAML takes a bare on or off for a boolean wherever it is not told what to expect, as in flattened options.
impl<'de> Deserialize<'de> for Switch {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Word;
        impl serde::de::Visitor<'_> for Word {
            type Value = Switch;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("on or off")
            }

            fn visit_bool<E>(self, on: bool) -> Result<Switch, E> {
                Ok(if on { Switch::On } else { Switch::Off })
            }

            fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<Switch, E> {
                match word {
                    "on" => Ok(Switch::On),
                    "off" => Ok(Switch::Off),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(word), &self)),
                }
            }
        }
        deserializer.deserialize_any(Word)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnExit {
    /// Leave maps, links and pins: the kernel goes on choosing and rebinding
    #[default]
    Keep,
    /// Remove all that the agent made
    Uninstall,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenReplaced {
    /// Let what it carries end, and exit
    #[default]
    Exit,
    /// Let what it carries end, and wait for the other agent to go
    StandBy,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        options: Options,
    }

    const FILE: &str = "
source: file:/etc/hitless/services.yaml
node-name: node-1
kubeconfig: /etc/hitless/kubeconfig
cri-socket: /run/x.sock
state-dir: /run/x
cgroup: /sys/fs/cgroup/x
bpffs: /sys/fs/bpf
name: one
sizes: {backends: 7, slots: 9}
host: true
layers: l1,l3
syn-timeout: 300ms
syn-limit: 3
max-replays: 2
suspect-ttl: 2s
suspect-levels: 4
suspect-percent: 40
mark: '0x10'
tcx: off
canary: off
on-exit: uninstall
take-over: true
when-replaced: stand-by
ready-file: /run/x/ready
mtls: on
trust-domain: example.org
identity: ca:/etc/hitless/ca
istio-ca-root: /etc/istio/root.pem
istio-token: /run/token
cluster-id: west
policies: /etc/hitless/policies
root-namespace: mesh
local-tls: on
tunnel-drain: 3s
tunnel-workers: 2
metrics-address: 127.0.0.1:15084
log-format: json
log-level: debug
";

    fn flags(args: &[&str]) -> Options {
        Flags::try_parse_from([&["x"], args].concat()).unwrap().options
    }

    #[test]
    fn flags_and_file_have_the_same_names_and_say_the_same() {
        let file: Options = serde_saphyr::from_str(FILE).unwrap();
        let mut args = Vec::new();
        for line in FILE.trim().lines() {
            let (key, value) = line.split_once(": ").unwrap();
            let value = value.trim_matches('\'').trim_matches(['{', '}']);
            args.push(format!("--{key}={}", value.replace(": ", "=").replace(", ", ",")));
        }
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        assert_eq!(flags(&args), file);
        let json = serde_json::to_value(&file).unwrap();
        let unset: Vec<_> = json.as_object().unwrap().iter().filter(|(_, value)| value.is_null()).collect();
        assert!(unset.iter().all(|(key, _)| *key == "layout-salt"), "the file above sets every key but {unset:?}");
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let file: Options = serde_saphyr::from_str("{source: 'file:/a', layers: l1, syn-limit: 4}").unwrap();
        let config = flags(&["--layers", "l2,l3"]).over(file).resolve().unwrap();
        assert_eq!(config.layers.to_string(), "l2,l3");
        assert_eq!(config.kernel.settings.syn_limit, 4);
        assert_eq!(config.kernel.settings.max_replays, 3);
    }

    #[test]
    fn what_is_wrong_is_named_with_what_is_allowed() {
        let wrong = [
            (
                "layers: l4",
                "1:9: field layers: \"l4\" is no layer; allowed are l1, l2, l3 (joined by commas), all and none",
            ),
            (
                "source: nfs:/x",
                "1:9: field source: \"nfs:/x\" is no source; allowed are kube, file:PATH and stream:PATH",
            ),
            ("a: 1", "1:1: unknown field `a`"),
            ("syn-timeout: fast", "1:14: field syn-timeout: \"fast\" is no duration"),
        ];
        for (text, want) in wrong {
            let error = serde_saphyr::from_str::<Options>(text).unwrap_err();
            let said = crate::source::parse::explain(text, &error).to_string();
            assert!(said.starts_with(want), "{said}");
        }
        let file: Options = serde_saphyr::from_str("{source: 'file:/a', suspect-percent: 140}").unwrap();
        assert_eq!(file.resolve().unwrap_err().to_string(), "suspect-percent is 140; allowed are 0..=100");
    }
}
