//! The agent's admin API: gRPC at a Unix socket, for root only; the command line is its client.
//!
//! It is served by a thread of its own, which also reads the maps: the agent's thread answers
//! [`Query`]s with what only it knows, a bounded piece at a time, and encodes nothing.

mod about_mesh;
pub mod client;
pub mod protocol;
mod server;
mod socket;
pub mod ztunnel;

use std::path::{Path, PathBuf};

use tokio::sync::{broadcast, mpsc, oneshot};

use crate::{
    config::in_force::Setting,
    metrics::{Facts, mesh},
    model::Object,
};
use protocol::{Drain, EndpointRow, EventRow, Status};
pub use server::{Server, serve};

/// The socket's place in the state directory.
pub fn socket(state_dir: &Path) -> PathBuf {
    state_dir.join("hitless.sock")
}

/// What the agent's loop is asked. A dropped answer means that nobody waits for it any more.
#[derive(Debug)]
pub enum Query {
    /// Without what the maps tell: counters and occupancy.
    Status(oneshot::Sender<Status>),
    /// Of one service, or all; piece by piece, as fast as they are taken.
    Endpoints(Option<String>, mpsc::Sender<Vec<EndpointRow>>),
    /// For metrics, and for the health of the loop itself.
    Facts(oneshot::Sender<Box<Facts>>),
    Drains(oneshot::Sender<Vec<Drain>>),
    Config(oneshot::Sender<Vec<Setting>>),
    /// A way to certificates, policies and counters of the tunnel; none without a mesh.
    Mesh(oneshot::Sender<Option<mesh::Facts>>),
    /// The desired state; piece by piece, as fast as it is taken.
    State(mpsc::Sender<Vec<Object>>),
    /// The last events, and those to come.
    Events(oneshot::Sender<(Vec<EventRow>, broadcast::Receiver<EventRow>)>),
}
