//! What the container runtime knows of images and the API does not tell: their STOPSIGNAL.
//!
//! The runtime is asked by CRI, and is only a help: where none answers, images are taken to have none. Calls block, and
//! each batch is a connection of its own, which a runtime that was restarted meanwhile can't break.

use std::{
    collections::HashMap,
    fmt, fs, io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use super::world::Name;

#[allow(clippy::all, clippy::allow_attributes_without_reason, reason = "generated")]
mod protocol {
    tonic::include_proto!("runtime.v1");
}

use protocol::{
    ImageSpec, ImageStatusRequest, VersionRequest, image_service_client::ImageServiceClient,
    runtime_service_client::RuntimeServiceClient,
};

/// Where runtimes listen: containerd, that of k3s and RKE2, CRI-O.
const USUAL: [&str; 3] =
    ["/run/containerd/containerd.sock", "/run/k3s/containerd/containerd.sock", "/run/crio/crio.sock"];
/// The root of process 1, which in a container with the node's processes (hostPID) is the node's.
const NODE: &str = "/proc/1/root";

/// A runtime answers in milliseconds, or is not asked any longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many images are asked for at once.
pub const AT_ONCE: usize = 32;
/// More than the configuration of any image.
const LONGEST_ANSWER: usize = 1 << 20;

/// Where the runtime is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Socket {
    /// At the usual paths of the node.
    #[default]
    Auto,
    Off,
    At(PathBuf),
}

impl FromStr for Socket {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            // As the kubelet is told.
            _ => match text.strip_prefix("unix://").unwrap_or(text) {
                path if path.starts_with('/') => Ok(Self::At(path.into())),
                _ => Err(format!("{text:?} is no socket; give a path such as {}, auto or off", USUAL[0])),
            },
        }
    }
}

impl TryFrom<String> for Socket {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Socket> for String {
    fn from(socket: Socket) -> Self {
        socket.to_string()
    }
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::At(path) => path.display().fmt(f),
        }
    }
}

/// Why no runtime answered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no container runtime listens at {0}")]
    Absent(String),
    #[error("{}: {reason}", path.display())]
    Refused { path: PathBuf, reason: String },
}

impl Socket {
    /// The paths, as they are seen from here, where somebody listens.
    fn found(&self) -> Result<Vec<PathBuf>, Error> {
        let named: Vec<&Path> = match self {
            Self::Off => Vec::new(),
            Self::Auto => USUAL.iter().map(Path::new).collect(),
            Self::At(path) => vec![path],
        };
        let found: Vec<_> = named.iter().filter_map(|path| seen(path)).collect();
        if found.is_empty() {
            let named: Vec<_> = named.iter().map(|path| path.display().to_string()).collect();
            return Err(Error::Absent(named.join(", ")));
        }
        Ok(found)
    }
}

/// The node's path, or else our own.
fn seen(path: &Path) -> Option<PathBuf> {
    let is_socket = |path: &PathBuf| fs::metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    // /var/run is a link to /run, and an absolute link would be followed from our own root.
    let direct =
        path.strip_prefix("/var").ok().filter(|below| below.starts_with("run")).or(path.strip_prefix("/").ok());
    [Path::new(NODE).join(direct?), path.to_owned()].into_iter().find(is_socket)
}

/// A runtime that answers.
#[derive(Debug)]
pub struct Runtime {
    pub path: PathBuf,
    /// Name and version.
    pub name: String,
}

/// The first runtime that answers.
pub fn runtime(socket: &Socket) -> Result<Runtime, Error> {
    let mut refused = None;
    for path in socket.found()? {
        let asked = ask(&path, async |channel| {
            let answer = RuntimeServiceClient::new(channel).version(VersionRequest {}).await?.into_inner();
            Ok(format!("{} {}", answer.runtime_name, answer.runtime_version))
        });
        match asked {
            Ok(name) => return Ok(Runtime { path, name }),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    Err(refused.unwrap_or_else(|| Error::Absent(socket.to_string())))
}

/// The STOPSIGNAL of each image, by the identifiers that containers' statuses tell. None: it has none, or no runtime
/// knows the image.
pub fn stop_signals(socket: &Socket, images: &[Name]) -> Result<Vec<(Name, Option<String>)>, Error> {
    let mut known: HashMap<Name, Option<String>> = HashMap::new();
    let (mut answered, mut refused) = (false, None);
    // A node may have a second runtime, which is none of the kubelet's: what one does not know the next may.
    for path in socket.found()? {
        let missing: Vec<_> = images.iter().filter(|image| !known.contains_key(*image)).cloned().collect();
        if missing.is_empty() {
            break;
        }
        match ask(&path, async |channel| all(channel, missing).await) {
            Ok(signals) => {
                answered = true;
                known.extend(signals);
            }
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    match refused {
        Some(error) if !answered => Err(error),
        _ => Ok(images.iter().map(|image| (image.clone(), known.remove(image).flatten())).collect()),
    }
}

async fn all(channel: Channel, images: Vec<Name>) -> Result<Vec<(Name, Option<String>)>, tonic::Status> {
    let mut client = ImageServiceClient::new(channel).max_decoding_message_size(LONGEST_ANSWER);
    let mut signals = Vec::with_capacity(images.len());
    for image in images {
        // `docker-pullable://name@digest`, as statuses of cri-dockerd have it.
        let named = image.rsplit_once("://").map_or(&*image, |(_, named)| named).to_owned();
        let request = ImageStatusRequest { image: Some(ImageSpec { image: named }), verbose: true };
        match client.image_status(request).await {
            Ok(answer) => {
                let answer = answer.into_inner();
                if answer.image.is_some() {
                    signals.push((image, answer.info.get("info").and_then(|info| stop_signal(info))));
                }
            }
            // Its status, which was the API server's word, names none that this runtime could have.
            Err(status) if matches!(status.code(), tonic::Code::NotFound | tonic::Code::InvalidArgument) => {}
            Err(status) => return Err(status),
        }
    }
    Ok(signals)
}

/// Of the image's configuration (OCI image-spec, config.md).
fn stop_signal(info: &str) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Info {
        image_spec: ImageSpec,
    }
    #[derive(Deserialize)]
    struct ImageSpec {
        config: Config,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Config {
        stop_signal: String,
    }
    let signal = serde_json::from_str::<Info>(info).ok()?.image_spec.config.stop_signal;
    (!signal.is_empty()).then_some(signal)
}

fn ask<T>(path: &Path, work: impl AsyncFnOnce(Channel) -> Result<T, tonic::Status>) -> Result<T, Error> {
    let refused = |reason: String| Error::Refused { path: path.to_owned(), reason };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| refused(error.to_string()))?.block_on(async {
        let asked = tokio::time::timeout(PATIENCE, async {
            let stream = UnixStream::connect(path).await.map_err(|error| refused(error.to_string()))?;
            let mut stream = Some(TokioIo::new(stream));
            let connector = tower::service_fn(move |_| {
                let stream = stream.take().ok_or(io::ErrorKind::NotConnected);
                async { stream.map_err(io::Error::from) }
            });
            // The name is not looked up; HTTP/2 wants one.
            let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await;
            let channel = channel.map_err(|error| refused(format!("it does not speak gRPC ({error})")))?;
            work(channel).await.map_err(|status| refused(explain(&status)))
        });
        asked.await.unwrap_or_else(|_| Err(refused(format!("no answer within {} s", PATIENCE.as_secs()))))
    })
}

fn explain(status: &tonic::Status) -> String {
    match status.code() {
        tonic::Code::Unimplemented => "it does not offer CRI (runtime.v1)".into(),
        code => format!("{code:?}: {}", status.message()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_signal_is_read_from_what_containerd_tells_of_an_image() {
        let told = |config: &str| format!(r#"{{"chainID":"sha256:1","imageSpec":{{"os":"linux","config":{config}}}}}"#);
        assert_eq!(stop_signal(&told(r#"{"Cmd":["a"],"StopSignal":"SIGQUIT"}"#)).as_deref(), Some("SIGQUIT"));
        for none in [&*told("{}"), &told(r#"{"StopSignal":""}"#), "{}", "", r#"{"imageSpec":{"config":null}}"#] {
            assert_eq!(stop_signal(none), None, "{none}");
        }
    }

    #[test]
    fn sockets_are_named_as_the_kubelet_names_them() {
        for text in ["auto", "off", "/run/x.sock"] {
            assert_eq!(text.parse::<Socket>().unwrap().to_string(), text);
        }
        assert_eq!("unix:///run/x.sock".parse(), Ok(Socket::At("/run/x.sock".into())));
        assert!("tcp://1.2.3.4".parse::<Socket>().unwrap_err().contains("give a path"));
    }

    #[test]
    fn who_is_not_there_and_who_is_no_runtime_is_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("runtime.sock");
        let socket = Socket::At(path.clone());
        let images: [Name; 1] = ["sha256:1".into()];
        assert!(matches!(stop_signals(&socket, &images), Err(Error::Absent(_))));
        let listener = UnixListener::bind(&path).unwrap();
        let other = std::thread::spawn(move || {
            for _ in 0..2 {
                drop(listener.accept().unwrap());
            }
        });
        for error in [stop_signals(&socket, &images).map(drop), runtime(&socket).map(drop)] {
            assert!(matches!(error, Err(Error::Refused { .. })), "{error:?}");
        }
        other.join().unwrap();
    }
}
