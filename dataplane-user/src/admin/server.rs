//! The agent's end of the admin socket.

use std::{io, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use serde::Serialize;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{broadcast::error::RecvError, mpsc, oneshot},
    task::JoinHandle,
};

use super::{
    Query,
    protocol::{EventRow, Refusal, Request},
};

/// Requests are short.
const MAX_REQUEST: u64 = 4096;
/// How long a client may take to say what it wants, or to read a line.
const PATIENCE: Duration = Duration::from_secs(10);

/// Listens at `path`, for root only. A socket left by an agent that was killed is replaced: whoever
/// holds the state directory's lock owns the name.
pub fn serve(path: &Path, queries: mpsc::Sender<Query>) -> io::Result<JoinHandle<()>> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let queries = queries.clone();
                    tokio::spawn(async move {
                        if let Err(error) = answer(stream, queries).await {
                            tracing::debug!(%error, "admin client");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "admin socket: accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }))
}

async fn answer(stream: UnixStream, queries: mpsc::Sender<Query>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    let mut line = String::new();
    let request = async { (&mut read).take(MAX_REQUEST).read_line(&mut line).await };
    tokio::time::timeout(PATIENCE, request).await.map_err(|_| io::ErrorKind::TimedOut)??;
    match serde_json::from_str(&line) {
        Ok(Request::Status) => relay(&mut write, ask(&queries, Query::Status).await).await,
        Ok(Request::Endpoints { service }) => {
            relay(&mut write, ask(&queries, |to| Query::Endpoints(service, to)).await).await
        }
        Ok(Request::Events { follow }) => {
            let Some((past, mut coming)) = ask(&queries, Query::Events).await else {
                return relay::<()>(&mut write, None).await;
            };
            for event in &past {
                send(&mut write, event).await?;
            }
            if !follow {
                return Ok(());
            }
            loop {
                tokio::select! {
                    event = coming.recv() => match event {
                        Ok(event) => send(&mut write, &event).await?,
                        // Said, not hidden: the reader was slower than the kernel.
                        Err(RecvError::Lagged(lost)) => send(&mut write, &lost_events(lost)).await?,
                        Err(RecvError::Closed) => return Ok(()),
                    },
                    () = gone(&mut read) => return Ok(()),
                }
            }
        }
        Err(error) => send(&mut write, &Refusal { error: format!("not a request: {error}") }).await,
    }
}

fn lost_events(lost: u64) -> EventRow {
    EventRow { event: format!("{lost} events were not read in time"), ..EventRow::default() }
}

/// Returns when the client has left.
async fn gone(read: &mut BufReader<OwnedReadHalf>) {
    let mut rest = [0; 64];
    while matches!(read.read(&mut rest).await, Ok(1..)) {}
}

async fn ask<T>(queries: &mpsc::Sender<Query>, query: impl FnOnce(oneshot::Sender<T>) -> Query) -> Option<T> {
    let (to, answer) = oneshot::channel();
    queries.send(query(to)).await.ok()?;
    answer.await.ok()
}

async fn relay<T: Serialize>(write: &mut OwnedWriteHalf, answer: Option<T>) -> io::Result<()> {
    match answer {
        Some(answer) => send(write, &answer).await,
        None => send(write, &Refusal { error: "the agent is stopping".into() }).await,
    }
}

async fn send(write: &mut OwnedWriteHalf, answer: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    tokio::time::timeout(PATIENCE, write.write_all(&line)).await.map_err(|_| io::ErrorKind::TimedOut)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{client, protocol::Status};

    #[test]
    fn a_request_is_answered_and_nonsense_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        std::fs::write(&path, "left by an agent before").unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (queries, mut asked) = mpsc::channel(4);
        runtime.block_on(async {
            serve(&path, queries).unwrap();
            let agent = tokio::spawn(async move {
                while let Some(query) = asked.recv().await {
                    if let Query::Status(to) = query {
                        let _ = to.send(Status { ready: true, ..Status::default() });
                    }
                }
            });
            let client = tokio::task::spawn_blocking(move || {
                let status: Status = client::ask(&path, &Request::Status).unwrap();
                assert!(status.ready);
                let refused = client::ask::<Vec<()>>(&path, &Request::Endpoints { service: None }).unwrap_err();
                assert!(refused.to_string().contains("the agent is stopping"), "{refused}");
            });
            client.await.unwrap();
            agent.abort();
        });
    }
}
