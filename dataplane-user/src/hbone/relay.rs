//! Bytes between a TCP connection and a CONNECT stream, both ways: half-close, back-pressure, and resets carried over.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io::{self, IoSlice},
    os::fd::AsRawFd,
    pin::pin,
    task::{Context, Poll},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use nix::sys::socket::{setsockopt, sockopt};
use tokio::{
    io::AsyncReadExt,
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};

use super::Stream;

/// A connection that only chats reads so much at once …
pub(super) const SMALL: usize = 16 << 10;
const SMALLEST: usize = 4 << 10;
/// … and one that fills its buffer soon reads so much.
pub(super) const LARGE: usize = 64 << 10;
/// Frames written to the application in one system call.
const GATHER: usize = 32;

/// What went through, whether it ended well or not.
#[derive(Debug, Default)]
pub struct Counts {
    /// From the TCP connection into the tunnel.
    pub sent: Cell<u64>,
    /// Out of the tunnel to the TCP connection.
    pub received: Cell<u64>,
}

/// Which side ended a relay before its time.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    #[error("the local connection failed: {0}")]
    Local(io::Error),
    #[error("the tunnel was reset ({0})")]
    Tunnel(h2::Error),
}

/// Relays until both directions have ended. A failure of one side resets the other.
pub async fn tunnel(mut tcp: TcpStream, stream: Stream, counts: &Counts) -> Result<(), RelayError> {
    let Stream { mut send, mut recv, _place } = stream;
    unfinished(&tcp);
    let result = {
        let (read, write) = tcp.split();
        let up = upload(read, &mut send, &counts.sent);
        let down = download(write, &mut recv, &counts.received);
        tokio::try_join!(up, down).map(drop)
    };
    match &result {
        Ok(()) => finished(&tcp),
        // RFC 9113 section 8.5: a TCP error is CONNECT_ERROR to the other side.
        Err(RelayError::Local(_)) => send.send_reset(Reason::CONNECT_ERROR),
        Err(RelayError::Tunnel(_)) => {}
    }
    result
}

/// TCP to tunnel.
async fn upload(mut tcp: ReadHalf<'_>, send: &mut SendStream<Bytes>, count: &Cell<u64>) -> Result<(), RelayError> {
    let mut size = SMALL;
    loop {
        // The other direction may have ended: then nobody else would notice a reset.
        tokio::select! {
            biased;
            ready = tcp.readable() => ready.map_err(RelayError::Local)?,
            reset = poll_fn(|cx| send.poll_reset(cx)) => return Err(RelayError::Tunnel(reason(reset))),
        }
        // An idle stream holds neither a buffer nor a part of the connection's window.
        let mut buffer = BytesMut::new();
        loop {
            send.reserve_capacity(size);
            let room = poll_fn(|cx| poll_room(send, cx)).await?.min(size);
            buffer.reserve(room);
            match read_now(&mut tcp, &mut (&mut buffer).limit(room)).await.map_err(RelayError::Local)? {
                None => break,
                Some(0) => return send.send_data(Bytes::new(), true).map_err(RelayError::Tunnel),
                Some(n) => {
                    count.set(count.get() + n as u64);
                    send.send_data(buffer.split().freeze(), false).map_err(RelayError::Tunnel)?;
                    if n < room {
                        // Nothing more is waiting.
                        size = if n < size / 4 { (size / 2).max(SMALLEST) } else { size };
                        break;
                    }
                    size = (size * 2).min(LARGE);
                }
            }
        }
        send.reserve_capacity(0);
    }
}

/// What is there, without waiting: nothing, or how much. Unlike `try_read`, it knows from a read that did not fill the
/// buffer that the socket is empty, and saves the system call that would only say so.
async fn read_now(tcp: &mut ReadHalf<'_>, buffer: &mut impl BufMut) -> io::Result<Option<usize>> {
    poll_fn(|cx| match pin!(tcp.read_buf(buffer)).poll(cx) {
        Poll::Ready(result) => Poll::Ready(result.map(Some)),
        Poll::Pending => Poll::Ready(Ok(None)),
    })
    .await
}

/// How much may be sent, at least one byte.
fn poll_room(send: &mut SendStream<Bytes>, cx: &mut Context<'_>) -> Poll<Result<usize, RelayError>> {
    loop {
        if send.capacity() > 0 {
            return Poll::Ready(Ok(send.capacity()));
        }
        match send.poll_capacity(cx) {
            Poll::Ready(Some(Ok(_))) => {}
            Poll::Ready(Some(Err(e))) => return Poll::Ready(Err(RelayError::Tunnel(e))),
            // The stream takes no more: it was reset, and the reason is known elsewhere.
            Poll::Ready(None) => return Poll::Ready(Err(RelayError::Tunnel(reason(Ok(Reason::STREAM_CLOSED))))),
            Poll::Pending => {
                return match send.poll_reset(cx) {
                    Poll::Ready(why) => Poll::Ready(Err(RelayError::Tunnel(reason(why)))),
                    Poll::Pending => Poll::Pending,
                };
            }
        }
    }
}

/// Tunnel to TCP.
async fn download(tcp: WriteHalf<'_>, recv: &mut RecvStream, count: &Cell<u64>) -> Result<(), RelayError> {
    let mut chunks = Vec::<Bytes>::with_capacity(4);
    loop {
        let ended = poll_fn(|cx| poll_chunks(recv, &mut chunks, cx)).await.map_err(RelayError::Tunnel)?;
        let mut taken = 0;
        while taken < chunks.len() {
            let mut written = match write_now(&tcp, &chunks[taken..]) {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    tcp.writable().await.map_err(RelayError::Local)?;
                    continue;
                }
                Err(e) => return Err(RelayError::Local(e)),
            };
            count.set(count.get() + written as u64);
            // Only now may the peer send as much again.
            recv.flow_control().release_capacity(written).map_err(RelayError::Tunnel)?;
            while written > 0 {
                let step = written.min(chunks[taken].len());
                chunks[taken].advance(step);
                written -= step;
                if chunks[taken].is_empty() {
                    taken += 1;
                }
            }
        }
        chunks.clear();
        if ended {
            return shutdown(tcp.as_ref()).map_err(RelayError::Local);
        }
    }
}

/// What the socket takes at once. By itself, so that a connection that waits does not hold the slices.
fn write_now(tcp: &WriteHalf<'_>, chunks: &[Bytes]) -> io::Result<usize> {
    let mut slices = [IoSlice::new(&[]); GATHER];
    for (slice, chunk) in slices.iter_mut().zip(chunks) {
        *slice = IoSlice::new(chunk);
    }
    tcp.try_write_vectored(&slices[..chunks.len().min(GATHER)])
}

/// Everything that has come, at least one chunk unless the stream ended; whether it has.
fn poll_chunks(recv: &mut RecvStream, chunks: &mut Vec<Bytes>, cx: &mut Context<'_>) -> Poll<Result<bool, h2::Error>> {
    loop {
        match recv.poll_data(cx) {
            Poll::Ready(Some(Ok(chunk))) => {
                if !chunk.is_empty() {
                    chunks.push(chunk);
                }
                if chunks.len() == GATHER {
                    return Poll::Ready(Ok(false));
                }
            }
            Poll::Ready(None) => return Poll::Ready(Ok(true)),
            // What came before a reset still goes out when it was read together with it.
            Poll::Ready(Some(Err(e))) if chunks.is_empty() => return Poll::Ready(Err(e)),
            Poll::Ready(Some(Err(_))) => return Poll::Ready(Ok(false)),
            Poll::Pending if chunks.is_empty() => return Poll::Pending,
            Poll::Pending => return Poll::Ready(Ok(false)),
        }
    }
}

pub(super) fn shutdown(tcp: &TcpStream) -> io::Result<()> {
    match nix::sys::socket::shutdown(tcp.as_raw_fd(), nix::sys::socket::Shutdown::Write) {
        // The other side was quicker.
        Ok(()) | Err(nix::Error::ENOTCONN) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// From now on its close is RST instead of FIN, whoever closes it: when this process is killed, or a policy cuts the
/// relay off, nobody is to take what he has for all there was.
pub fn unfinished(tcp: &TcpStream) {
    // It fails only on a socket that is gone already.
    let _ = tcp.set_zero_linger();
}

/// All was said in both directions.
pub(super) fn finished(tcp: &TcpStream) {
    let _ = setsockopt(tcp, sockopt::Linger, &nix::libc::linger { l_onoff: 0, l_linger: 0 });
}

fn reason(reset: Result<Reason, h2::Error>) -> h2::Error {
    reset.map_or_else(|e| e, h2::Error::from)
}
