//! One connection to a peer: its handshake, its driver, and CONNECT on it.

use std::{
    cell::OnceCell,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    task::{Context as TaskContext, Poll, Waker},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, StatusCode};
use rustls_pki_types::ServerName;
use tokio::{
    net::TcpStream,
    task::spawn_local,
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::TlsConnector;

use super::{
    CONNECTION_WINDOW, MAX_FRAME, MAX_HEADER_LIST, STREAM_WINDOW, Stream, Timeouts,
    headers::{Authority, BAGGAGE, Baggage, HeaderError, Metadata},
    keepalive::{self, Load, Place},
    pipe::{Heard, Pipe, Secure, TLS_BUFFER},
    tls::{Context, HandshakeError, Peer, TlsError, peer_of, reason_of},
};
use crate::identity::{SpiffeId, TrustBundle};

/// As Istio's pool has it.
const MAX_STREAMS: usize = 100;
/// Of one stream, sent but not yet on the wire.
const SEND_BUFFER: usize = 256 << 10;

/// A CONNECT to send.
#[derive(Clone, Debug)]
pub struct Connect {
    pub authority: Authority,
    pub metadata: Metadata,
    /// How long the peer may be silent (no byte of any kind from it) before this CONNECT is given up as
    /// [`ConnectError::Silent`]. Short when there is somebody else to ask.
    pub patience: Duration,
    /// How long the answer may take from a peer that lives.
    pub within: Duration,
}

impl Connect {
    pub fn new(authority: Authority, metadata: Metadata) -> Self {
        Self { authority, metadata, patience: Duration::from_millis(250), within: Duration::from_secs(10) }
    }
}

/// Why there is no stream. Cloned to everybody who waited for the same dial.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("can't reach {peer}: {message}")]
    Dial { peer: SocketAddr, kind: io::ErrorKind, message: Arc<str> },
    #[error(transparent)]
    Tls(#[from] HandshakeError),
    #[error("{peer} answered CONNECT with {status}")]
    Refused { peer: SocketAddr, status: StatusCode },
    #[error("{peer} takes no more streams on this connection and did not look at this one ({reason})")]
    Unprocessed { peer: SocketAddr, reason: Arc<str> },
    #[error("{peer} was silent for {after:?}")]
    Silent { peer: SocketAddr, after: Duration },
    #[error("{peer} lives but did not answer CONNECT within {after:?}")]
    TimedOut { peer: SocketAddr, after: Duration },
    #[error("the connection to {peer} ended before CONNECT was answered: {reason}")]
    Closed { peer: SocketAddr, reason: Arc<str> },
    #[error("the headers of CONNECT take {0} bytes; 16,384 are allowed")]
    TooLong(usize),
    #[error(transparent)]
    Header(#[from] HeaderError),
}

impl ConnectError {
    /// Whether another backend of the same service may be asked. No byte of the client's was relayed in any of these
    /// cases; a denial and our own mistakes would only be repeated there.
    pub fn elsewhere_is_safe(&self) -> bool {
        match self {
            Self::Dial { .. }
            | Self::Tls(_)
            | Self::Unprocessed { .. }
            | Self::Silent { .. }
            | Self::TimedOut { .. }
            | Self::Closed { .. } => true,
            Self::Refused { status, .. } => status.is_server_error(),
            Self::TooLong(_) | Self::Header(_) => false,
        }
    }
}

/// A CONNECT that was answered with 200.
pub struct Tunnel {
    pub stream: Stream,
    /// What the peer says about its workload.
    pub baggage: Option<Baggage>,
    /// Who the peer is, proved.
    pub peer: SpiffeId,
}

/// A connection whose peer is proved. Dropped, it ends with its last stream.
pub struct Connection {
    pub(super) address: SocketAddr,
    pub(super) peer: Peer,
    send: SendRequest<Bytes>,
    heard: Heard,
    load: Rc<Load>,
    trust: Arc<TrustBundle>,
    /// Of both certificates, the earlier end.
    proved_until: SystemTime,
    timeouts: Timeouts,
    failure: Rc<OnceCell<TlsError>>,
}

impl Connection {
    /// Handshakes on a dialled socket and starts the connection's driver. Call where tasks may be `spawn_local`.
    pub async fn open(
        tcp: TcpStream,
        address: SocketAddr,
        context: &Context,
        expected: &Arc<[SpiffeId]>,
        timeouts: Timeouts,
    ) -> Result<Self, HandshakeError> {
        let config = context.client_for(expected);
        let handshake = async {
            let pipe = Pipe::new(tcp).map_err(|e| TlsError::Io(e.kind()))?;
            let heard = pipe.heard();
            let name = ServerName::IpAddress(address.ip().into());
            let mut tls = TlsConnector::from(config).connect(name, pipe).await.map_err(|e| reason_of(&e))?;
            tls.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
            let peer = peer_of(tls.get_ref().1)?;
            let failure = Rc::new(OnceCell::new());
            let io = Secure::new(tls.into(), 0, failure.clone());
            let (send, driver) = h2::client::Builder::new()
                .enable_push(false)
                .initial_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW)
                .max_frame_size(MAX_FRAME)
                .max_header_list_size(MAX_HEADER_LIST)
                .max_send_buffer_size(SEND_BUFFER)
                .handshake::<_, Bytes>(io)
                .await
                .map_err(|e| TlsError::Protocol(e.to_string()))?;
            Ok((peer, heard, failure, send, driver))
        };
        let failed = |reason| HandshakeError { peer: address, reason };
        let (peer, heard, failure, send, mut driver) = timeout(timeouts.handshake, handshake)
            .await
            .map_err(|_| failed(TlsError::TimedOut(timeouts.handshake)))?
            .map_err(failed)?;
        let load = Load::new();
        let ping = driver.ping_pong();
        let (driver_heard, driver_load) = (heard.clone(), load.clone());
        spawn_local(async move {
            // The first call gives it.
            let Some(ping) = ping else { return };
            let ended = {
                let watch = keepalive::watch(ping, &driver_heard, &driver_load, &timeouts, timeouts.idle);
                tokio::select! {
                    biased;
                    ended = &mut driver => ended.map_err(|e| e.to_string()),
                    (why, _) = watch => Err(format!("{why:?}")),
                }
            };
            tracing::debug!(peer = %address, ?ended, "connection ended");
        });
        let credential = context.credential();
        Ok(Self {
            address,
            proved_until: credential.not_after.min(peer.not_after),
            peer,
            send,
            heard,
            load,
            trust: credential.trust.clone(),
            timeouts,
            failure,
        })
    }

    pub fn streams(&self) -> usize {
        self.load.streams()
    }

    /// Whether new streams may use it: no GOAWAY, not ended, and the proofs of both sides are still good under the
    /// trust bundle that is in force.
    pub(super) fn is_usable(&self, trust: &Arc<TrustBundle>) -> bool {
        self.is_open() && Arc::ptr_eq(&self.trust, trust) && SystemTime::now() < self.proved_until
    }

    /// Whether h2 would begin a stream.
    pub(super) fn is_open(&self) -> bool {
        let mut cx = TaskContext::from_waker(Waker::noop());
        matches!(self.send.clone().poll_ready(&mut cx), Poll::Ready(Ok(())))
    }

    /// A place for one more stream, when the peer's limit and ours allow it.
    pub(super) fn place(&self) -> Option<Place> {
        let most = self.send.current_max_send_streams().min(MAX_STREAMS);
        (self.load.streams() < most).then(|| self.load.take_place())
    }

    /// Sends CONNECT and waits for its answer. Dropped before, the stream is cancelled.
    pub(super) async fn connect(&self, place: Place, connect: &Connect) -> Result<Tunnel, ConnectError> {
        let peer = self.address;
        let mut request = http::Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.version_mut() = http::Version::HTTP_2;
        let authority = connect.authority.to_string();
        *request.uri_mut() =
            authority.parse().map_err(|_| HeaderError { header: ":authority", reason: "no URI can hold it" })?;
        connect.metadata.write(request.headers_mut())?;
        // RFC 9113 section 6.5.2: name, value and 32 bytes each.
        let entry = |name: usize, value: usize| name + value + 32;
        let size = request.headers().iter().map(|(n, v)| entry(n.as_str().len(), v.len())).sum::<usize>()
            + entry(7, 7)
            + entry(10, authority.len());
        if size > MAX_HEADER_LIST as usize {
            return Err(ConnectError::TooLong(size));
        }
        let (mut answer, send) = self.send.clone().send_request(request, false).map_err(|e| self.failed(&e))?;
        let sent = Instant::now();
        let mut probed = None;
        let mut next = sent + self.timeouts.probe_after.min(connect.patience);
        let answer = loop {
            tokio::select! {
                biased;
                answer = &mut answer => break answer,
                () = sleep_until(next.min(sent + connect.within)) => {}
            }
            let now = Instant::now();
            if now >= sent + connect.within {
                return Err(ConnectError::TimedOut { peer, after: connect.within });
            }
            match probed {
                // A PONG, or anything else, came since.
                Some(at) if self.heard.last() > at => {
                    probed = None;
                    next = now + self.timeouts.probe_after;
                }
                Some(_) if now >= self.heard.last().max(sent) + connect.patience => {
                    return Err(ConnectError::Silent { peer, after: connect.patience });
                }
                _ => {
                    self.load.probe.notify_one();
                    probed = probed.or(Some(now));
                    next = self.heard.last().max(sent) + connect.patience;
                    next = next.max(now + Duration::from_millis(1));
                }
            }
        };
        let answer = answer.map_err(|e| self.failed(&e))?;
        let status = answer.status();
        if !status.is_success() {
            return Err(ConnectError::Refused { peer, status });
        }
        let baggage = answer.headers().get(BAGGAGE).and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
        let stream = Stream { send, recv: answer.into_body(), _place: place };
        Ok(Tunnel { stream, baggage, peer: self.peer.id.clone() })
    }

    fn failed(&self, error: &h2::Error) -> ConnectError {
        let peer = self.address;
        let reason = || error.to_string().into();
        let refused = error.is_reset() && error.is_remote() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
        // h2 gives a remote GOAWAY as the error of exactly those streams that are above its last stream.
        if refused || (error.is_go_away() && error.is_remote()) {
            return ConnectError::Unprocessed { peer, reason: reason() };
        }
        // The server proves the client after the client has finished: its refusal comes as the first thing read.
        match self.failure.get() {
            Some(reason) if !matches!(reason, TlsError::Io(_)) => {
                HandshakeError { peer, reason: reason.clone() }.into()
            }
            _ => ConnectError::Closed { peer, reason: reason() },
        }
    }
}
