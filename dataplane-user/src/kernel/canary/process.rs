//! The canary's process and its cgroup, as the agent's side holds them; both are gone when this is dropped.

use std::{
    fs, io,
    io::{BufRead as _, BufReader, Write as _},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread::sleep,
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    Error,
    protocol::{Reply, Request},
};

const PREFIX: &str = "hitless-canary-";
/// Longer than the canary itself waits for anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// A cgroup for the canary alone, below the one that the programs are attached to.
#[derive(Debug)]
pub struct Cgroup(pub PathBuf);

impl Cgroup {
    /// Also removes those of canaries that were killed.
    pub fn make(parent: &Path) -> Result<Self, Error> {
        sweep(parent);
        let path = parent.join(format!("{PREFIX}{}", std::process::id()));
        match fs::create_dir(&path) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(Error::Cgroup { path, source }),
            _ => Ok(Self(path)),
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process leaves its cgroup a moment after it was waited for.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() || !self.0.exists() {
                return;
            }
            sleep(Duration::from_millis(5));
        }
        tracing::warn!(cgroup = %self.0.display(), "the canary's cgroup could not be removed; the next start does");
    }
}

/// Removes the canaries' cgroups that nobody is in: rmdir refuses all others.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// The running process.
#[derive(Debug)]
pub struct Process {
    child: Child,
    requests: Option<ChildStdin>,
    replies: BufReader<ChildStdout>,
}

impl Process {
    /// `program` is this binary; `canary` its hidden subcommand.
    pub fn start(program: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Spawn { program: program.to_owned(), source };
        let mut child =
            Command::new(program).arg("canary").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(failed)?;
        let (requests, replies) = (child.stdin.take(), child.stdout.take());
        let Some(replies) = replies else { return Err(failed(io::ErrorKind::BrokenPipe.into())) };
        Ok(Self { child, requests, replies: BufReader::new(replies) })
    }

    /// One request, one reply.
    pub fn ask(&mut self, request: &Request) -> Result<Reply, Error> {
        self.exchange(request).map_err(|source| Error::Process { request: format!("{request:?}"), source })
    }

    fn exchange(&mut self, request: &Request) -> io::Result<Reply> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.requests.as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write_all(&line)?;
        let mut waited = [PollFd::new(self.replies.get_ref().as_fd(), PollFlags::POLLIN)];
        if poll(&mut waited, PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX))? == 0 {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer"));
        }
        let mut line = String::new();
        if self.replies.read_line(&mut line)? == 0 {
            let status =
                self.child.try_wait()?.map_or_else(|| "it closed its output".into(), |status| status.to_string());
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, status));
        }
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.requests.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
