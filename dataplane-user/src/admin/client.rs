//! The command line's end of the admin socket.

use std::{
    io::{BufRead, BufReader, ErrorKind, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;

use super::protocol::{EventRow, Refusal, Request};

/// No agent answers at the socket.
#[derive(Debug, thiserror::Error)]
#[error("no agent answers at {0}: is `hitless run` running, with this --state-dir?")]
pub struct NoAgent(String);

/// Asks a running agent.
pub fn ask<T: DeserializeOwned>(socket: &Path, request: &Request) -> anyhow::Result<T> {
    let mut reader = send(socket, request)?;
    let mut line = String::new();
    reader.read_line(&mut line).context("read the agent's answer")?;
    parse(&line)
}

/// Reads events until the agent or `each` ends it (by `Ok(false)`).
pub fn events(
    socket: &Path,
    follow: bool,
    mut each: impl FnMut(EventRow) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let mut reader = send(socket, &Request::Events { follow })?;
    if follow {
        reader.get_ref().set_read_timeout(None)?;
    }
    let mut line = String::new();
    while reader.read_line(&mut line).context("read the agent's events")? > 0 {
        if !each(parse(&line)?)? {
            break;
        }
        line.clear();
    }
    Ok(())
}

fn send(socket: &Path, request: &Request) -> anyhow::Result<BufReader<UnixStream>> {
    let mut stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => anyhow::Error::new(NoAgent(socket.display().to_string())),
        ErrorKind::PermissionDenied => {
            anyhow::anyhow!("{}: permission denied: the agent talks to root only", socket.display())
        }
        _ => anyhow::Error::new(error).context(format!("connect {}", socket.display())),
    })?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line).context("send the request")?;
    Ok(BufReader::new(stream))
}

fn parse<T: DeserializeOwned>(line: &str) -> anyhow::Result<T> {
    if let Ok(Refusal { error }) = serde_json::from_str(line) {
        bail!("the agent says: {error}");
    }
    serde_json::from_str(line).with_context(|| format!("an answer of another version of the agent: {}", line.trim()))
}
