//! The Unix socket: who is let in, and how many.
//!
//! Only root reaches it, so this is about mistakes, not enemies: a client that speaks something
//! else, or nothing, costs a descriptor for a few seconds and never a place for good.

use std::{
    io,
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use nix::sys::socket::{MsgFlags, recv};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};
use tonic::transport::server::Connected;

/// What an HTTP/2 client begins with (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long a client may take to begin.
const PATIENCE: Duration = Duration::from_secs(5);
/// Clients at a time. One more is turned away, not kept waiting.
const CLIENTS: usize = 64;

/// Listens at `path`, for root only. A socket left by an agent that was killed is replaced: whoever
/// holds the state directory's lock owns the name.
pub fn listen(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Not a moment during which others may connect: nobody knows the name before it is theirs.
    let partial = path.with_extension("partial");
    let _ = std::fs::remove_file(&partial);
    let listener = std::os::unix::net::UnixListener::bind(&partial)?;
    std::fs::set_permissions(&partial, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&partial, path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Lets clients in that speak HTTP/2.
pub async fn accept(listener: UnixListener, clients: mpsc::Sender<io::Result<Client>>) {
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let Ok(place) = places.clone().try_acquire_owned() else {
                    tracing::warn!(most = CLIENTS, "admin client turned away: too many at a time");
                    continue;
                };
                let clients = clients.clone();
                tokio::spawn(async move {
                    match tokio::time::timeout(PATIENCE, preface(&stream)).await {
                        Ok(Ok(())) => drop(clients.send(Ok(Client { stream, _place: place })).await),
                        Ok(Err(error)) => tracing::debug!(%error, "admin client refused"),
                        Err(_) => tracing::debug!("admin client refused: it said nothing"),
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "admin socket: accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Looks at a client's first bytes and leaves them there.
async fn preface(stream: &UnixStream) -> io::Result<()> {
    let mut seen = [0; PREFACE.len()];
    loop {
        let peek = || Ok(recv(stream.as_raw_fd(), &mut seen, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT)?);
        let count = stream.async_io(Interest::READABLE, peek).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if seen[..count] != PREFACE[..count] {
            return Err(io::Error::other("it does not speak gRPC"));
        }
        if count == PREFACE.len() {
            return Ok(());
        }
        // The rest is on its way; what is there already would make the socket readable again.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A client that was let in; its place is free again when it is dropped.
pub struct Client {
    stream: UnixStream,
    _place: OwnedSemaphorePermit,
}

impl Connected for Client {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

impl AsyncRead for Client {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Client {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
