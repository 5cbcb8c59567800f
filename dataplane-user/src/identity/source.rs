//! Which authority is used, as one word of the configuration: `ca:`, `files:`, `spiffe:` or `istio:` and a place.

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    Authority,
    ca::{self, OwnCa},
    files::Files,
    istio::{Istio, IstioConfig, IstioPlaces},
    workload_api::WorkloadApi,
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Source {
    /// A directory with the mesh's own authority.
    Ca(PathBuf),
    /// A directory of certificates that somebody else writes.
    Files(PathBuf),
    /// A SPIFFE agent's socket.
    Spiffe(PathBuf),
    /// istiod's address.
    Istio(String),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} names no source of certificates: use ca:<directory>, files:<directory>, spiffe:<socket> or \
     istio:https://<host>:<port>"
)]
pub struct BadSource(String);

impl Source {
    /// Within a runtime of tokio, where it then follows its place.
    /// `istio`: used when it is istiod.
    pub fn open(&self, istio: &IstioPlaces) -> Result<Arc<dyn Authority>, ca::BadCa> {
        Ok(match self {
            Self::Ca(directory) => Arc::new(OwnCa::open(directory, ca::LIFE)?),
            Self::Files(directory) => Arc::new(Files::open(directory)),
            Self::Spiffe(socket) => Arc::new(WorkloadApi::open(socket)),
            Self::Istio(address) => Arc::new(Istio::new(IstioConfig::new(address, istio))),
        })
    }
}

impl FromStr for Source {
    type Err = BadSource;

    fn from_str(text: &str) -> Result<Self, BadSource> {
        let bad = || BadSource(text.to_owned());
        let (kind, place) = text.split_once(':').ok_or_else(bad)?;
        match kind {
            "istio" if place.starts_with("https://") && place.len() > "https://".len() => {
                Ok(Self::Istio(place.to_owned()))
            }
            // A relative path would mean something else after a restart elsewhere.
            "ca" if place.starts_with('/') => Ok(Self::Ca(place.into())),
            "files" if place.starts_with('/') => Ok(Self::Files(place.into())),
            "spiffe" if place.starts_with('/') => Ok(Self::Spiffe(place.into())),
            _ => Err(bad()),
        }
    }
}

impl TryFrom<String> for Source {
    type Error = BadSource;

    fn try_from(word: String) -> Result<Self, BadSource> {
        word.parse()
    }
}

impl From<Source> for String {
    fn from(source: Source) -> Self {
        source.to_string()
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ca(place) => write!(f, "ca:{}", place.display()),
            Self::Files(place) => write!(f, "files:{}", place.display()),
            Self::Spiffe(place) => write!(f, "spiffe:{}", place.display()),
            Self::Istio(address) => write!(f, "istio:{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_one_word_and_written_as_it_is_read() {
        for word in ["ca:/etc/ca", "files:/etc/certs", "spiffe:/run/spire/agent.sock", "istio:https://istiod:15012"] {
            assert_eq!(word.parse::<Source>().unwrap().to_string(), word);
        }
        for word in
            ["", "ca", "ca:", "ca:relative", "istio:istiod:15012", "istio:http://istiod", "istio:https://", "x:/y"]
        {
            let error = word.parse::<Source>().unwrap_err().to_string();
            assert!(error.contains("ca:<directory>"), "{error}");
        }
    }
}
