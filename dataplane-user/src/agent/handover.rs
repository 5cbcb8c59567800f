//! One agent takes over from another on the same node, and no connection meets a closed door meanwhile.
//!
//! The pods' listeners are the agent's, and a listener that is closed refuses whoever waits in it. So the agent that goes
//! gives the open sockets to the one that comes, through a Unix socket in the state directory (`SCM_RIGHTS`). Packets on
//! it are JSON, one each:
//!
//! ```text
//! heir                                  holder
//! Take ───────────────────────────────▶ (stops writing maps; goes on accepting)
//!   ◀─────────────────────────────────── Layout
//!   ◀─────────────────────────────────── Pod, with its listeners   (of each)
//!   ◀─────────────────────────────────── Yours                     (the state directory's lock is free)
//! (starts, accepts too)
//! Serving ────────────────────────────▶ (accepts no more; lets what it carries end)
//! ```
//!
//! An heir that goes before it has said `Serving` has taken nothing away: the holder serves again.

use std::{
    fs::{File, Permissions},
    io::{self, IoSlice, IoSliceMut},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use nix::{
    cmsg_space,
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
            accept4, bind, connect, getsockopt, listen as start_listening, recvmsg, sendmsg, setsockopt, socket,
            sockopt,
        },
        time::TimeVal,
    },
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::{info, warn};

use crate::tunnel::{Bequest, Listeners};

/// Of the packets. An agent refuses what it does not speak.
const VERSION: u32 = 1;
/// The most descriptors that the kernel passes in one packet (`SCM_MAX_FD`).
const MAX_DESCRIPTORS: usize = 253;
const MAX_PACKET: usize = 4096;
/// How long the other agent may be silent.
const PATIENCE: Duration = Duration::from_secs(20);

/// A packet of either side.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum Packet {
    Take {
        version: u32,
    },
    Refused {
        why: String,
    },
    /// Of the holder's maps.
    Layout {
        layout: String,
    },
    /// With the network namespace, the IPv4 listeners and as many IPv6 listeners as are told.
    Pod {
        name: Arc<str>,
        port: u16,
        v6: usize,
    },
    Yours,
    Serving,
}

/// `<state directory>/hand-over.sock`.
fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("hand-over.sock")
}

/// What an agent begins with that follows another one.
#[derive(Debug, Default)]
pub struct Inheritance {
    pub pods: Vec<Bequest>,
    /// None: it is this very agent, whose heir has gone.
    pub holder: Option<Holder>,
}

/// The agent that is being followed: it goes on accepting until it is told.
#[derive(Debug)]
pub struct Holder {
    /// Of its maps.
    pub layout: String,
    socket: OwnedFd,
}

impl Holder {
    /// From here on this agent takes the connections.
    pub fn serving(self) {
        if let Err(error) = send(self.socket.as_fd(), &Packet::Serving, &[], MsgFlags::MSG_DONTWAIT) {
            // It has gone by itself: the listeners are here all the same.
            info!(%error, "the agent before does not wait for an answer");
        }
    }
}

/// Takes over from the agent that holds the state directory. It blocks: nothing else is to be done yet.
pub fn take(state_dir: &Path) -> anyhow::Result<Inheritance> {
    let path = path(state_dir);
    let open = || {
        let socket = new_socket(SockFlag::SOCK_CLOEXEC)?;
        let patience = TimeVal::new(PATIENCE.as_secs() as i64, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
        setsockopt(&socket, sockopt::SendTimeout, &patience)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(&path)?)?;
        io::Result::Ok(socket)
    };
    let socket = open().with_context(|| {
        format!("the agent that uses {} cannot be asked to hand over: stop it first", state_dir.display())
    })?;
    send(socket.as_fd(), &Packet::Take { version: VERSION }, &[], MsgFlags::empty()).context("ask it to hand over")?;
    let mut inheritance = Inheritance::default();
    let mut of = None;
    loop {
        let (packet, descriptors) =
            receive(socket.as_fd(), MsgFlags::empty()).context("what the agent before hands over")?;
        match packet {
            Packet::Layout { layout } => of = Some(layout),
            Packet::Pod { name, port, v6 } => inheritance.pods.push(bequest(name, port, v6, descriptors)?),
            Packet::Yours => break,
            Packet::Refused { why } => bail!("the agent before does not hand over: {why}"),
            Packet::Take { .. } | Packet::Serving => bail!("the agent before says what only its heir says"),
        }
    }
    let layout = of.context("the agent before did not name its maps")?;
    inheritance.holder = Some(Holder { layout, socket });
    Ok(inheritance)
}

fn bequest(name: Arc<str>, port: u16, v6: usize, descriptors: Vec<OwnedFd>) -> anyhow::Result<Bequest> {
    let count = descriptors.len();
    let mut descriptors = descriptors.into_iter();
    let v4 = count.checked_sub(1 + v6).filter(|v4| *v4 >= v6 && *v4 > 0);
    let (Some(netns), Some(v4)) = (descriptors.next(), v4) else {
        bail!("pod {name}: {count} descriptors were handed over with {v6} IPv6 listeners among them")
    };
    let mut listeners: Vec<_> = descriptors.by_ref().take(v4).map(|v4| Listeners { v4: v4.into(), v6: None }).collect();
    for (listeners, v6) in listeners.iter_mut().zip(descriptors) {
        listeners.v6 = Some(v6.into());
    }
    Ok(Bequest { name, netns: File::from(netns), port, listeners })
}

/// Where heirs knock; gone with it.
pub struct Door {
    socket: AsyncFd<OwnedFd>,
    path: PathBuf,
}

impl Door {
    /// For root only. Whoever holds the state directory's lock owns the name.
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        let path = path(state_dir);
        let partial = path.with_extension("partial");
        let _ = std::fs::remove_file(&partial);
        let socket = new_socket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(&partial)?)?;
        std::fs::set_permissions(&partial, Permissions::from_mode(0o600))?;
        start_listening(&socket, Backlog::new(1)?)?;
        std::fs::rename(&partial, &path)?;
        Ok(Self { socket: watched(socket, Interest::READABLE)?, path })
    }

    /// Until one asks whom this agent can give everything to.
    pub async fn heir(&self) -> Heir {
        loop {
            match self.next().await {
                Ok(heir) => return heir,
                Err(error) => warn!(%error, "no hand-over"),
            }
        }
    }

    async fn next(&self) -> io::Result<Heir> {
        let accept =
            |socket: &OwnedFd| Ok(accept4(socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?);
        let socket = self.socket.async_io(Interest::READABLE, accept).await?;
        // SAFETY: accept4() just made it, and nobody else knows of it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let peer = getsockopt(&socket, sockopt::PeerCredentials)?;
        if peer.uid() != nix::unistd::geteuid().as_raw() {
            return Err(io::Error::other(format!("process {} of user {} asked for it", peer.pid(), peer.uid())));
        }
        let heir = Heir { socket: watched(socket, Interest::READABLE | Interest::WRITABLE)?, pid: peer.pid() };
        match tokio::time::timeout(PATIENCE, heir.hear()).await {
            Ok(Ok(Packet::Take { version: VERSION })) => Ok(heir),
            Ok(Ok(Packet::Take { version })) => {
                let why = format!("it speaks version {VERSION} of the hand-over, not {version}");
                heir.say(&Packet::Refused { why: why.clone() }, &[]).await?;
                Err(io::Error::other(why))
            }
            Ok(Ok(other)) => Err(io::Error::other(format!("process {} began with {other:?}", heir.pid))),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::Error::other(format!("process {} asked for nothing", heir.pid))),
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// An agent that has asked to take over.
pub struct Heir {
    socket: AsyncFd<OwnedFd>,
    pub pid: i32,
}

impl Heir {
    /// The state directory is free: from here on the maps are its own.
    pub async fn give(&self, layout: String, pods: &[Bequest]) -> io::Result<()> {
        let give = async {
            self.say(&Packet::Layout { layout }, &[]).await?;
            for Bequest { name, netns, port, listeners } in pods {
                let v6 = listeners.iter().filter_map(|listeners| listeners.v6.as_ref()).map(AsRawFd::as_raw_fd);
                let v6: Vec<_> = v6.collect();
                let v4 = listeners.iter().map(|listeners| listeners.v4.as_raw_fd());
                let descriptors: Vec<_> =
                    std::iter::once(netns.as_raw_fd()).chain(v4).chain(v6.iter().copied()).collect();
                self.say(&Packet::Pod { name: name.clone(), port: *port, v6: v6.len() }, &descriptors).await?;
            }
            self.say(&Packet::Yours, &[]).await
        };
        tokio::time::timeout(PATIENCE, give).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }

    /// Whether it serves: false when it has gone before that.
    pub async fn serves(&self) -> bool {
        match self.hear().await {
            Ok(Packet::Serving) => true,
            Ok(other) => {
                warn!(pid = self.pid, ?other, "the agent that takes over is not understood");
                false
            }
            Err(error) => {
                warn!(pid = self.pid, %error, "the agent that was to take over has gone");
                false
            }
        }
    }

    async fn say(&self, packet: &Packet, descriptors: &[RawFd]) -> io::Result<()> {
        let say = |socket: &OwnedFd| send(socket.as_fd(), packet, descriptors, MsgFlags::MSG_DONTWAIT);
        self.socket.async_io(Interest::WRITABLE, say).await
    }

    async fn hear(&self) -> io::Result<Packet> {
        let hear = |socket: &OwnedFd| receive(socket.as_fd(), MsgFlags::MSG_DONTWAIT);
        self.socket.async_io(Interest::READABLE, hear).await.map(|(packet, _)| packet)
    }
}

fn new_socket(flags: SockFlag) -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?)
}

fn watched(socket: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: it keeps its descriptor, always the same one, for as long as it lives.
    unsafe { AsyncFd::register_with_interest(socket, interest) }.map_err(io::Error::other)
}

fn send(socket: BorrowedFd<'_>, packet: &Packet, descriptors: &[RawFd], flags: MsgFlags) -> io::Result<()> {
    let bytes = serde_json::to_vec(packet)?;
    if bytes.len() > MAX_PACKET || descriptors.len() > MAX_DESCRIPTORS {
        return Err(io::Error::other(format!("{} descriptors do not fit into one packet", descriptors.len())));
    }
    let rights = [ControlMessage::ScmRights(descriptors)];
    let control = if descriptors.is_empty() { &[][..] } else { &rights[..] };
    let flags = flags | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<UnixAddr>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, flags, None)?;
    Ok(())
}

fn receive(socket: BorrowedFd<'_>, flags: MsgFlags) -> io::Result<(Packet, Vec<OwnedFd>)> {
    let mut bytes = [0; MAX_PACKET];
    let mut control = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let (length, cut) = (received.bytes, received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC));
    let mut descriptors = Vec::new();
    for message in received.cmsgs().map_err(|error: Errno| io::Error::from(error))? {
        if let ControlMessageOwned::ScmRights(passed) = message {
            // SAFETY: the kernel made them for this process just now.
            descriptors.extend(passed.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if cut {
        return Err(io::Error::other("a packet or its descriptors do not fit: is the limit of open files reached?"));
    }
    Ok((serde_json::from_slice(&bytes[..length])?, descriptors))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn listeners(v6: bool) -> Listeners {
        let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
        Listeners { v4, v6: v6.then(|| TcpListener::bind("[::1]:0").unwrap()) }
    }

    fn pod(name: &str, workers: usize, v6: bool) -> Bequest {
        let netns = File::open("/proc/self/ns/net").unwrap();
        Bequest { name: name.into(), netns, port: 7, listeners: (0..workers).map(|_| listeners(v6)).collect() }
    }

    #[tokio::test]
    async fn listeners_come_over_in_their_places_and_with_all_who_wait_in_them() {
        let directory = tempfile::tempdir().unwrap();
        let door = Door::open(directory.path()).unwrap();
        let state_dir = directory.path().to_owned();
        let taker = std::thread::spawn(move || take(&state_dir).unwrap());
        let heir = door.heir().await;
        let pods = [pod("a/both", 3, true), pod("a/four", 2, false), pod("a/many", 64, true)];
        let at = pods[0].listeners[1].v4.local_addr().unwrap();
        let waiting = std::net::TcpStream::connect(at).unwrap();
        heir.give("abc".into(), &pods).await.unwrap();
        let addresses = |bequest: &Bequest| -> Vec<_> {
            let both =
                |one: &Listeners| (one.v4.local_addr().unwrap(), one.v6.as_ref().map(|v6| v6.local_addr().unwrap()));
            bequest.listeners.iter().map(both).collect()
        };
        let given: Vec<_> = pods.iter().map(|pod| (pod.name.clone(), pod.port, addresses(pod))).collect();
        drop(pods);
        let taken = taker.join().unwrap();
        let got: Vec<_> = taken.pods.iter().map(|pod| (pod.name.clone(), pod.port, addresses(pod))).collect();
        assert_eq!(got, given);
        let (accepted, from) = taken.pods[0].listeners[1].v4.accept().unwrap();
        assert_eq!((from, accepted.peer_addr().unwrap()), (waiting.local_addr().unwrap(), from));
        let holder = taken.holder.unwrap();
        assert_eq!(holder.layout, "abc");
        holder.serving();
        assert!(heir.serves().await);
    }

    #[tokio::test]
    async fn an_heir_that_goes_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let door = Door::open(directory.path()).unwrap();
        let state_dir = directory.path().to_owned();
        let taker = std::thread::spawn(move || take(&state_dir).map(drop));
        let heir = door.heir().await;
        heir.give("abc".into(), &[pod("a/b", 1, true)]).await.unwrap();
        taker.join().unwrap().unwrap();
        assert!(!heir.serves().await);
    }

    #[tokio::test]
    async fn who_speaks_otherwise_is_told_and_turned_away() {
        let directory = tempfile::tempdir().unwrap();
        let door = Door::open(directory.path()).unwrap();
        let socket = new_socket(SockFlag::SOCK_CLOEXEC).unwrap();
        connect(socket.as_raw_fd(), &UnixAddr::new(&path(directory.path())).unwrap()).unwrap();
        send(socket.as_fd(), &Packet::Take { version: 99 }, &[], MsgFlags::empty()).unwrap();
        assert!(door.next().await.is_err_and(|error| error.to_string().contains("not 99")));
        let (answer, _) = receive(socket.as_fd(), MsgFlags::empty()).unwrap();
        assert!(matches!(&answer, Packet::Refused { why } if why.contains("version 1")), "{answer:?}");
        drop(door);
        assert!(!path(directory.path()).exists());
        let alone = take(directory.path()).unwrap_err();
        assert!(alone.to_string().contains("stop it first"), "{alone:#}");
    }
}
