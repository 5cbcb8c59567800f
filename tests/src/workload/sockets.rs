//! Makes sockets in a pod and hands them to the lab's own process.
//!
//! A socket belongs to the network namespace and the cgroup that it was made in for all its life, so
//! that a test which holds it is a client in the pod: each `connect()` meets the pod's programs.

use std::{
    io::{IoSlice, IoSliceMut, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use nix::{
    cmsg_space,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg,
        sendmsg, socket,
    },
};

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Unix socket that takes requests
    #[arg(long)]
    pub listen: PathBuf,
    #[arg(long, hide = true)]
    pub ready_file: Option<PathBuf>,
}

/// What kind of socket: a byte on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Tcp4 = 1,
    Tcp6,
    Udp4,
    Udp6,
    /// For whole packets, header included.
    Raw4,
    Raw6,
}

impl Kind {
    const ALL: [Self; 6] = [Self::Tcp4, Self::Tcp6, Self::Udp4, Self::Udp6, Self::Raw4, Self::Raw6];

    fn open(self) -> nix::Result<OwnedFd> {
        let (family, kind) = match self {
            Self::Tcp4 => (AddressFamily::Inet, SockType::Stream),
            Self::Tcp6 => (AddressFamily::Inet6, SockType::Stream),
            Self::Udp4 => (AddressFamily::Inet, SockType::Datagram),
            Self::Udp6 => (AddressFamily::Inet6, SockType::Datagram),
            Self::Raw4 => (AddressFamily::Inet, SockType::Raw),
            Self::Raw6 => (AddressFamily::Inet6, SockType::Raw),
        };
        let protocol = (kind == SockType::Raw).then_some(SockProtocol::Raw);
        socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol)
    }
}

pub fn main(options: &Options) -> Result<()> {
    let listener = UnixListener::bind(&options.listen).with_context(|| format!("bind {}", options.listen.display()))?;
    super::say_ready(options.ready_file.as_deref())?;
    for stream in listener.incoming() {
        let mut stream = stream?;
        std::thread::spawn(move || {
            if let Err(error) = serve(&mut stream) {
                eprintln!("sockets: {error:#}");
            }
        });
    }
    Ok(())
}

fn serve(stream: &mut UnixStream) -> Result<()> {
    let mut request = [0];
    while stream.read(&mut request)? == 1 {
        let kind = Kind::ALL.into_iter().find(|kind| *kind as u8 == request[0]).context("no such kind of socket")?;
        let socket = kind.open()?;
        let fds = [socket.as_raw_fd()];
        sendmsg::<()>(
            stream.as_raw_fd(),
            &[IoSlice::new(&request)],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::empty(),
            None,
        )?;
    }
    Ok(())
}

/// The lab's end.
pub(crate) struct Maker(UnixStream);

impl Maker {
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        Ok(Self(UnixStream::connect(path).with_context(|| format!("connect {}", path.display()))?))
    }

    pub(crate) fn make(&mut self, kind: Kind) -> Result<OwnedFd> {
        self.0.write_all(&[kind as u8])?;
        let mut byte = [0];
        let mut iov = [IoSliceMut::new(&mut byte)];
        let mut space = cmsg_space!(RawFd);
        let message = recvmsg::<()>(self.0.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control
                && let [fd] = fds[..]
            {
                // SAFETY: the kernel has just installed this descriptor for us; nobody else knows of it.
                return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        bail!("no socket of kind {kind:?} came")
    }
}
