//! A real process of the lab, started the way a container runtime starts one.

use std::{
    ffi::CString,
    fs::{self, File},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, kill},
        wait::{WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::net::Netns;

/// How long a process may take to say that it is ready, on a busy machine.
const READY_WITHIN: Duration = Duration::from_secs(20);

/// Since Linux 5.7; libc's constant is too narrow.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

pub(crate) struct Spawn<'a> {
    pub args: &'a [String],
    pub netns: &'a Netns,
    pub cgroup: &'a Path,
    /// As pid 1 of its own PID namespace.
    pub container: bool,
    pub log: &'a Path,
}

impl Spawn<'_> {
    pub(crate) fn start(self) -> Result<Process> {
        let what = self.args.join(" ");
        self.clone3().with_context(|| format!("start `{what}` in {}", self.netns.name))
    }

    /// One `clone3` puts the child into its PID namespace and cgroup from its first instruction;
    /// `std::process` can do neither.
    fn clone3(&self) -> Result<Process> {
        let netns = File::open(&self.netns.path)?;
        let cgroup = File::open(self.cgroup)?;
        let stdin = File::open("/dev/null")?;
        let log = File::create(self.log)?;
        let program = which(&self.args[0])?;
        let program = CString::new(program.as_os_str().as_bytes())?;
        let args = self.args.iter().map(|arg| CString::new(arg.as_str())).collect::<Result<Vec<_>, _>>()?;
        let argv: Vec<_> = args.iter().map(|arg| arg.as_ptr()).chain([std::ptr::null()]).collect();
        let env = std::env::vars_os()
            .map(|(key, value)| CString::new([key.as_bytes(), b"=", value.as_bytes()].concat()))
            .collect::<Result<Vec<_>, _>>()?;
        let envp: Vec<_> = env.iter().map(|var| var.as_ptr()).chain([std::ptr::null()]).collect();

        let mut pidfd: libc::c_int = -1;
        let mut flags = libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP;
        if self.container {
            flags |= libc::CLONE_NEWPID as u64;
        }
        // SAFETY: all-zero is a valid clone_args.
        let mut clone: libc::clone_args = unsafe { std::mem::zeroed() };
        clone.flags = flags;
        clone.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
        clone.exit_signal = libc::SIGCHLD as u64;
        clone.cgroup = cgroup.as_raw_fd() as u64;
        // SAFETY: without CLONE_VM this is fork(2): the child has its own copy of memory. Until it
        // executes the program it only makes async-signal-safe system calls on data prepared above.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &mut clone, size_of::<libc::clone_args>()) };
        if pid == 0 {
            // SAFETY: as above; the descriptors are open, argv and envp end in null.
            unsafe {
                let mut none: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&mut none);
                libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
                // Its own session: Ctrl-C at the lab's terminal is for the lab alone.
                libc::setsid();
                if libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) == 0 {
                    libc::dup2(stdin.as_raw_fd(), 0);
                    libc::dup2(log.as_raw_fd(), 1);
                    libc::dup2(log.as_raw_fd(), 2);
                    libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr());
                }
                libc::_exit(127);
            }
        }
        let pid = Errno::result(pid).context("clone3")?;
        // SAFETY: clone3 has just made this descriptor for us.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        Ok(Process {
            pid: Pid::from_raw(pid as i32),
            pidfd,
            exited: Mutex::new(None),
            log: self.log.to_owned(),
            name: self
                .args
                .iter()
                .take(2)
                .map(|arg| arg.rsplit('/').next().unwrap_or(arg))
                .collect::<Vec<_>>()
                .join(" "),
        })
    }
}

fn which(program: &str) -> Result<PathBuf> {
    if program.contains('/') {
        return Ok(program.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.exists())
        .with_context(|| format!("no {program} in PATH"))
}

/// A process that the lab started; it ends when this is dropped.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    pidfd: OwnedFd,
    exited: Mutex<Option<Exit>>,
    log: PathBuf,
    name: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(Signal),
}

impl Process {
    /// As the host sees it.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    pub fn sigterm(&self) -> Result<()> {
        self.signal(Signal::SIGTERM)
    }

    pub fn sigkill(&self) -> Result<()> {
        self.signal(Signal::SIGKILL)
    }

    /// Stop it from running. Its kernel sockets go on shaking hands.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        // Until it is waited for, its number can't be another process's.
        if self.exited.lock().expect("no panic while locked").is_some() {
            bail!("{} (pid {}) has already ended", self.name, self.pid);
        }
        kill(self.pid, signal).with_context(|| format!("send {signal} to {} (pid {})", self.name, self.pid))
    }

    pub fn running(&self) -> bool {
        self.wait_for(Duration::ZERO).is_ok_and(|exit| exit.is_none())
    }

    /// Wait until it has ended, however long that takes.
    pub fn wait(&self) -> Result<Exit> {
        loop {
            if let Some(exit) = self.wait_for(Duration::from_secs(3600))? {
                return Ok(exit);
            }
        }
    }

    /// `None` when it is still running after `timeout`.
    pub fn wait_for(&self, timeout: Duration) -> Result<Option<Exit>> {
        let mut exited = self.exited.lock().expect("no panic while locked");
        if exited.is_some() {
            return Ok(*exited);
        }
        use std::os::fd::AsFd;
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.as_millis().min(i32::MAX as u128) as i32).expect("not negative");
            match poll(&mut fds, timeout) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error).context("poll a pidfd"),
            }
        }
        *exited = Some(match waitpid(self.pid, None).with_context(|| format!("wait for {}", self.name))? {
            WaitStatus::Exited(_, code) => Exit::Code(code),
            WaitStatus::Signaled(_, signal, _) => Exit::Signal(signal),
            other => bail!("{} (pid {}) neither exited nor was killed: {other:?}", self.name, self.pid),
        });
        Ok(*exited)
    }

    /// Wait until it has made the file that says it is ready.
    pub fn wait_for_file(&self, path: &Path) -> Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        while !path.exists() {
            if let Some(exit) = self.wait_for(Duration::from_millis(2))? {
                bail!("{} ended before it was ready ({exit:?}):\n{}", self.name, self.log());
            }
            if Instant::now() > deadline {
                bail!("{} was not ready within {READY_WITHIN:?}:\n{}", self.name, self.log());
            }
        }
        Ok(())
    }

    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// The end of what it printed.
    pub fn log(&self) -> String {
        tail(&self.log, 40)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.running() {
            let _ = self.sigkill();
            let _ = self.wait_for(Duration::from_secs(5));
        }
    }
}

pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let skip = text.lines().count().saturating_sub(lines);
    text.lines().skip(skip).collect::<Vec<_>>().join("\n")
}
