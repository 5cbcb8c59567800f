//! The agent's admin socket: what the command line asks of a running agent.
//!
//! One request per connection, a line of JSON; the answer is a line of JSON too, but for events,
//! which are a line each. The agent's loop answers [`Query`]s; nothing here touches its state.

pub mod client;
pub mod protocol;
mod server;

use std::path::{Path, PathBuf};

use tokio::sync::{broadcast, oneshot};

use protocol::{EndpointRow, EventRow, Status};
pub use server::serve;

/// The socket's place in the state directory.
pub fn socket(state_dir: &Path) -> PathBuf {
    state_dir.join("hitless.sock")
}

/// What the agent's loop is asked. A dropped answer means that nobody waits for it any more.
#[derive(Debug)]
pub enum Query {
    Status(oneshot::Sender<Status>),
    /// Of one service, or all.
    Endpoints(Option<String>, oneshot::Sender<Vec<EndpointRow>>),
    /// The last events, and those to come.
    Events(oneshot::Sender<(Vec<EventRow>, broadcast::Receiver<EventRow>)>),
}
