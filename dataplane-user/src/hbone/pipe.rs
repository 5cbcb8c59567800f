//! The socket under TLS: large reads, and when the peer was last heard.

use std::{
    cell::{Cell, OnceCell},
    io::{self, IoSlice},
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Instant,
};
use tokio_rustls::TlsStream;

use super::{
    bounds::Meter,
    tls::{TlsError, reason_of},
};

/// rustls asks for 4 KiB at a time, whatever is waiting: a bulk transfer would cost a system call for every 4 KiB.
const BULK: usize = 64 << 10;

/// After so much, the tasks that carry it on have their turn: h2 would read until its windows are full (16 MiB), and
/// what comes first would have left the CPU's caches by the time that it is written.
const TURN: usize = 256 << 10;

/// What the connection's other tasks learn about its socket.
#[derive(Clone)]
pub(super) struct Heard(Rc<Cell<Instant>>);

impl Heard {
    fn now() -> Self {
        Self(Rc::new(Cell::new(Instant::now())))
    }

    /// When the last byte came; at first, when the socket was opened.
    pub(super) fn last(&self) -> Instant {
        self.0.get()
    }

    pub(super) fn silence(&self) -> Duration {
        self.last().elapsed()
    }
}

pub(super) struct Pipe {
    tcp: TcpStream,
    heard: Heard,
    /// There only while it holds bytes, so an idle connection costs none.
    waiting: Vec<u8>,
    taken: usize,
    /// The last read filled what it was given: more is waiting.
    bulk: bool,
    /// What may still be read in this turn.
    turn: usize,
}

impl Pipe {
    pub(super) fn new(tcp: TcpStream) -> io::Result<Self> {
        tcp.set_nodelay(true)?;
        Ok(Self { tcp, heard: Heard::now(), waiting: Vec::new(), taken: 0, bulk: false, turn: TURN })
    }

    pub(super) fn heard(&self) -> Heard {
        self.heard.clone()
    }

    fn note(&self, n: usize) {
        if n > 0 {
            self.heard.0.set(Instant::now());
        }
    }
}

impl AsyncRead for Pipe {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.taken == this.waiting.len() {
            if !this.bulk || buf.remaining() >= BULK {
                let (before, room) = (buf.filled().len(), buf.remaining());
                ready!(Pin::new(&mut this.tcp).poll_read(cx, buf))?;
                let n = buf.filled().len() - before;
                this.note(n);
                this.bulk = n == room;
                return Poll::Ready(Ok(()));
            }
            ready!(this.tcp.poll_read_ready(cx))?;
            if this.turn < BULK {
                this.turn = TURN;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let mut bulk = Vec::with_capacity(BULK);
            // The future has no state: it may be made anew for every poll.
            let n = ready!(pin!(this.tcp.read_buf(&mut bulk)).poll(cx))?;
            this.note(n);
            this.bulk = n == BULK;
            // A turn ends also where the socket is empty.
            this.turn = if this.bulk { this.turn - n } else { TURN };
            (this.waiting, this.taken) = (bulk, 0);
        }
        let n = buf.remaining().min(this.waiting.len() - this.taken);
        buf.put_slice(&this.waiting[this.taken..this.taken + n]);
        this.taken += n;
        if this.taken == this.waiting.len() {
            (this.waiting, this.taken) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

/// Plaintext that rustls may hold encrypted: so many records go out in one system call.
pub(super) const TLS_BUFFER: usize = 256 << 10;

/// TLS over the socket. Remembers why it failed, because h2 keeps only the text of an error.
pub(super) struct Secure {
    tls: TlsStream<Pipe>,
    meter: Meter,
    failure: Rc<OnceCell<TlsError>>,
}

impl Secure {
    /// `preface` bytes will come before the first frame.
    pub(super) fn new(tls: TlsStream<Pipe>, preface: usize, failure: Rc<OnceCell<TlsError>>) -> Self {
        Self { tls, meter: Meter::new(preface), failure }
    }

    fn note<T>(&self, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(error)) = &result {
            // Later failures only follow from the first.
            let _ = self.failure.set(reason_of(error));
        }
        result
    }
}

impl AsyncRead for Secure {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.tls).poll_read(cx, buf);
        self.note(result)?.map(|()| self.meter.read(&buf.filled()[before..]).map_err(io::Error::other))
    }
}

impl AsyncWrite for Secure {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}
