//! A Unix socket of newline-delimited JSON events; each line is answered once it is in the maps.
//!
//! ```text
//! → {"op":"delete","object":{"kind":"pod","name":"shop/web-1"}}
//! ← {"ok":true,"applied_ns":81234567890,"lag_ns":9120,"changes":6}
//! → {"op":"upsert","object":{"kind":"pod"}}
//! ← {"ok":false,"error":"1:40: missing field `name`","line":2}
//! ```
//!
//! `applied_ns` is `CLOCK_MONOTONIC`; `lag_ns` is from the line being read to the maps being written.
//! Answers come in the order of the lines. A client that leaves takes nothing back with it.

use std::{os::unix::fs::PermissionsExt, path::Path};

use anyhow::Context as _;
use serde::Serialize;
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
};
use tracing::{debug, info, warn};

use super::parse;
use crate::{
    agent::core::{Applied, Shared},
    kernel::monotonic_ns,
    model::Event,
    registry::Problem,
};

/// The longest line: a relist of a million backends.
const MAX_LINE: usize = 256 << 20;
/// From here on a line is parsed beside the agent's thread, which goes on with its work.
const LARGE_LINE: usize = 256 << 10;

#[derive(Serialize)]
struct Answer<'a> {
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    applied_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lag_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    changes: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u64>,
    /// Of a relist: what was skipped of it.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    problems: &'a [Problem],
}

/// Makes the socket; only its owner may tell the agent what to do.
pub fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        anyhow::bail!("another process listens on {}: stop it, or use another path", path.display());
    }
    // Left behind by an agent that was killed.
    if std::fs::symlink_metadata(path).is_ok_and(|meta| std::os::unix::fs::FileTypeExt::is_socket(&meta.file_type())) {
        let _ = std::fs::remove_file(path);
    }
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).with_context(|| format!("directory {}", directory.display()))?;
    }
    let listener = UnixListener::bind(path)
        .with_context(|| format!("socket {} cannot be made: is its directory writable?", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves clients for as long as the agent runs.
pub async fn serve(listener: UnixListener, core: Shared) -> std::io::Result<()> {
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                let core = core.clone();
                tokio::task::spawn_local(async move {
                    debug!("stream client came");
                    match serve_client(client, core).await {
                        Ok(lines) => info!(lines, "stream client left; its state stays in force"),
                        Err(error) => warn!(%error, "stream client failed; its state stays in force"),
                    }
                });
            }
            // Out of descriptors: those that are open go on.
            Err(error) => {
                warn!(%error, "stream client not accepted");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_client(client: UnixStream, core: Shared) -> std::io::Result<u64> {
    let (read, mut write) = client.into_split();
    let mut reader = BufReader::with_capacity(64 << 10, read);
    let mut line = Vec::new();
    let mut answers = Vec::new();
    let mut count = 0;
    loop {
        line.clear();
        let more = read_line(&mut reader, &mut line).await?;
        if !more {
            return Ok(count);
        }
        count += 1;
        if line.len() > MAX_LINE {
            let error = format!("line is longer than {} MiB", MAX_LINE >> 20);
            answer(&mut answers, Err(error), 0, count, false);
            write.write_all(&answers).await?;
            return Ok(count);
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let read_ns = monotonic_ns();
        let parsed = if line.len() < LARGE_LINE {
            parse::event(&line)
        } else {
            let large = std::mem::take(&mut line);
            tokio::task::spawn_blocking(move || parse::event(&large)).await?
        };
        match parsed {
            Ok(event) => {
                let sync = matches!(event, Event::Sync { .. });
                let applied = core.borrow_mut().apply(event, read_ns);
                answer(&mut answers, Ok(applied), read_ns, count, sync);
            }
            Err(mistake) => answer(&mut answers, Err(mistake.to_string()), read_ns, count, false),
        }
        // Lines that came together are answered together.
        if !reader.buffer().contains(&b'\n') {
            write.write_all(&answers).await?;
            answers.clear();
        }
    }
}

fn answer(into: &mut Vec<u8>, outcome: Result<Applied, String>, read_ns: u64, line: u64, sync: bool) {
    let mut answer =
        Answer { ok: true, applied_ns: None, lag_ns: None, changes: None, error: None, line: None, problems: &[] };
    let applied;
    match outcome {
        Ok(done) => {
            applied = done;
            answer.applied_ns = Some(applied.at_ns);
            answer.lag_ns = Some(applied.at_ns.saturating_sub(read_ns));
            answer.changes = Some(applied.changes);
            match applied.problems.first() {
                // A relist is in force but for what is named.
                Some(_) if sync => answer.problems = &applied.problems[..applied.problems.len().min(100)],
                Some(problem) => {
                    answer.ok = false;
                    answer.error = Some(problem.to_string());
                    answer.line = Some(line);
                }
                None => {}
            }
        }
        Err(error) => {
            answer.ok = false;
            answer.error = Some(error);
            answer.line = Some(line);
        }
    }
    serde_json::to_writer(&mut *into, &answer).expect("an answer is plain strings and numbers");
    into.push(b'\n');
}

/// Reads a line, or a little more than [`MAX_LINE`] of one. False: the client has left.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin), line: &mut Vec<u8>) -> std::io::Result<bool> {
    loop {
        let there = reader.fill_buf().await?;
        if there.is_empty() {
            // A last line without its end was cut off: not to be trusted.
            return Ok(false);
        }
        let end = there.iter().position(|&byte| byte == b'\n');
        let used = end.map_or(there.len(), |end| end + 1);
        line.extend_from_slice(&there[..end.unwrap_or(used)]);
        reader.consume(used);
        if end.is_some() || line.len() > MAX_LINE {
            return Ok(true);
        }
    }
}
