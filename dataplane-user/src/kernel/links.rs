//! Attaches the programs, pinned, and puts new programs behind the links of an agent before.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::{
    error::Error,
    interfaces,
    load::Programs,
    snapshot,
    sys::{self, Attach},
};

/// Where a program of the object is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Cgroup(Attach),
    /// Another program of the same kind may run beside it for a moment: what it does is idempotent.
    SignalGenerate,
    /// It counts listeners, so never twice.
    SockState,
}

/// Every program that is attached once; those of the pods' interfaces are in `enroll`.
pub const HOOKS: &[(&str, Hook)] = &[
    ("hitless_connect4", Hook::Cgroup(Attach::CgroupInet4Connect)),
    ("hitless_connect6", Hook::Cgroup(Attach::CgroupInet6Connect)),
    ("hitless_sendmsg4", Hook::Cgroup(Attach::CgroupUdp4Sendmsg)),
    ("hitless_sendmsg6", Hook::Cgroup(Attach::CgroupUdp6Sendmsg)),
    ("hitless_recvmsg4", Hook::Cgroup(Attach::CgroupUdp4Recvmsg)),
    ("hitless_recvmsg6", Hook::Cgroup(Attach::CgroupUdp6Recvmsg)),
    ("hitless_getpeername4", Hook::Cgroup(Attach::CgroupInet4Getpeername)),
    ("hitless_getpeername6", Hook::Cgroup(Attach::CgroupInet6Getpeername)),
    ("hitless_sockops", Hook::Cgroup(Attach::CgroupSockOps)),
    ("hitless_signal", Hook::SignalGenerate),
    ("hitless_sock_state", Hook::SockState),
];

/// How a hook came to its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Attached {
    New,
    Updated,
}

/// Attaches every hook, or updates the link that is pinned for it.
pub fn attach_all(programs: &Programs, cgroup: &Path, links: &Path) -> Result<Vec<(&'static str, Attached)>, Error> {
    let directory = Cgroup::open(cgroup)?;
    let mut done = Vec::new();
    for (name, hook) in HOOKS {
        let Some(program) = programs.get(name) else {
            return Err(Error::Missing { what: format!("program {name}") });
        };
        let pin = links.join(name);
        let attached = match hook {
            Hook::Cgroup(attach) => directory.attach(program, *attach, &pin),
            Hook::SignalGenerate => replace(&pin, || sys::raw_tracepoint_open(program, "signal_generate")),
            Hook::SockState => {
                unpin(&pin).and_then(|()| replace(&pin, || sys::raw_tracepoint_open(program, "inet_sock_set_state")))
            }
        };
        let target = match hook {
            Hook::Cgroup(_) => format!("cgroup {}", cgroup.display()),
            Hook::SignalGenerate => "tracepoint signal_generate".to_owned(),
            Hook::SockState => "tracepoint inet_sock_set_state".to_owned(),
        };
        done.push((*name, attached.map_err(|source| Error::Attach { program: (*name).to_owned(), target, source })?));
    }
    Ok(done)
}

/// Names of the hooks whose pinned link is missing or hangs on nothing (any more).
pub fn detached(cgroup: &Path, links: &Path) -> Vec<&'static str> {
    let id = fs::metadata(cgroup).map_or(0, |metadata| metadata.ino());
    let alive = |name: &str, hook: &Hook| {
        let Ok(link) = sys::open_pin(&links.join(name)) else { return false };
        match hook {
            Hook::Cgroup(_) => sys::link_info(link.as_fd()).is_ok_and(|info| info.target() == id && id != 0),
            _ => true,
        }
    };
    HOOKS.iter().filter(|(name, hook)| !alive(name, hook)).map(|(name, _)| *name).collect()
}

struct Cgroup {
    fd: OwnedFd,
    id: u64,
}

impl Cgroup {
    fn open(path: &Path) -> Result<Self, Error> {
        super::pins::check_cgroup2(path)?;
        let failed = |source| Error::Cgroup { path: path.to_owned(), source };
        let directory = fs::File::open(path).map_err(failed)?;
        // A cgroup's id is the inode number of its directory.
        let id = directory.metadata().map_err(failed)?.ino();
        Ok(Self { fd: directory.into(), id })
    }

    fn attach(&self, program: BorrowedFd<'_>, attach: Attach, pin: &Path) -> io::Result<Attached> {
        update_or(pin, program, self.id, || sys::link_create(program, self.fd.as_raw_fd() as u32, attach))
    }
}

/// Updates the link pinned at `pin` if it hangs on `target`, else makes one and pins it there.
pub fn update_or(
    pin: &Path,
    program: BorrowedFd<'_>,
    target: u64,
    create: impl FnOnce() -> io::Result<OwnedFd>,
) -> io::Result<Attached> {
    if let Ok(link) = sys::open_pin(pin)
        && sys::link_info(link.as_fd()).is_ok_and(|info| info.target() == target)
    {
        match sys::link_update(link.as_fd(), program) {
            Ok(()) => return Ok(Attached::Updated),
            // Its cgroup or interface went away in between.
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => {}
            Err(error) => return Err(error),
        }
    }
    replace(pin, create)
}

/// Pins a new link over the one that is pinned: the old one is detached as the new one has its name.
fn replace(pin: &Path, create: impl FnOnce() -> io::Result<OwnedFd>) -> io::Result<Attached> {
    let link = create()?;
    pin_over(link.as_fd(), pin)?;
    Ok(Attached::New)
}

/// What a link is pinned as until it takes its place.
const FRESH: &str = "-new";

/// Pins an object under a name that may be taken; there is no moment without the name.
pub fn pin_over(fd: BorrowedFd<'_>, pin: &Path) -> io::Result<()> {
    let mut fresh = PathBuf::from(pin).into_os_string();
    fresh.push(FRESH);
    let fresh = PathBuf::from(fresh);
    unpin(&fresh)?;
    sys::pin(fd, &fresh)?;
    fs::rename(&fresh, pin)
}

/// Finishes what an agent was killed at: its new link takes the place that it was made for.
pub fn finish(links: &Path) -> Result<(), Error> {
    for fresh in snapshot::pinned(links)? {
        if let Some(pin) = fresh.to_str().and_then(|name| name.strip_suffix(FRESH)) {
            fs::rename(&fresh, pin).map_err(|source| Error::Pin { path: fresh, doing: "renaming", source })?;
        }
    }
    Ok(())
}

/// Drops links of hooks that this version no longer has: their programs serve from maps of another.
pub fn drop_foreign(links: &Path) -> Result<(), Error> {
    for pin in snapshot::pinned(links)? {
        let known = pin
            .file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| HOOKS.iter().any(|(hook, _)| *hook == name) || interfaces::cookie_of(&pin).is_some());
        if !known {
            unpin(&pin).map_err(|source| Error::Pin { path: pin, doing: "unpinning", source })?;
        }
    }
    Ok(())
}

/// Takes the program off now. A kernel that frees pins later (by RCU, as 6.18 does) would leave it there for a moment
/// after the pin has gone; where a link cannot be detached, that is what happens.
pub fn detach(pin: &Path) {
    if let Ok(link) = sys::open_pin(pin) {
        let _ = sys::link_detach(link.as_fd());
    }
}

/// Removes a pin; fine when there is none.
pub fn unpin(pin: &Path) -> io::Result<()> {
    match fs::remove_file(pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
