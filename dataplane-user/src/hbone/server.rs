//! One accepted connection: its handshake, its bounds, and each CONNECT on it handed to a service.

use std::{
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{Method, Response, StatusCode};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
    task::spawn_local,
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::{
    CONNECTION_WINDOW, MAX_FRAME, MAX_HEADER_LIST, STREAM_WINDOW, Stream, Timeouts,
    bounds::PREFACE,
    headers::{Authority, BAGGAGE, Baggage, Metadata},
    keepalive::{self, End, Load, Place},
    pipe::{Pipe, Secure, TLS_BUFFER},
    tls::{HandshakeError, Peer, TlsError, peer_of, reason_of},
};
use crate::identity::SpiffeId;

/// As Istio's proxy has it.
const MAX_STREAMS: u32 = 200;
const SEND_BUFFER: usize = 256 << 10;
/// Streams that a peer may reset before it was answered, in a row, and how many more every second. A client that
/// gives up is normal, one that does nothing else makes us dial for nothing (CVE-2023-44487).
const MAX_CANCELLED: u32 = 200;
const CANCELLED_PER_SECOND: u32 = 20;

/// What a connection's owner wants of it. Goes through a `watch` channel, from any thread, to all connections of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    #[default]
    Serving,
    /// GOAWAY: no new streams, the running ones finish.
    Draining,
    /// Cut.
    Closed,
}

/// A CONNECT as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub authority: Authority,
    pub metadata: Metadata,
    /// Proved by the client's certificate.
    pub client: SpiffeId,
    /// The socket's other end.
    pub peer: SocketAddr,
}

/// Why a CONNECT gets no tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// 400: method, authority or another header makes no sense here.
    BadRequest,
    /// 401: policy.
    Denied,
    /// 503: the application could not be dialled, or nobody here has that address.
    Unavailable,
}

impl Refusal {
    pub fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::Denied => StatusCode::UNAUTHORIZED,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// How a connection ended that did not end well.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("the connection of {client} at {peer} failed: {reason}")]
    Failed { peer: SocketAddr, client: SpiffeId, reason: String },
    #[error("{client} at {peer} is gone: nothing came for {after:?} after a PING")]
    Silent { peer: SocketAddr, client: SpiffeId, after: Duration },
    #[error("{client} at {peer} was cut off: {reason}")]
    Abusive { peer: SocketAddr, client: SpiffeId, reason: &'static str },
}

/// The way to answer one CONNECT. Dropped unanswered, it answers 503.
pub struct Answer {
    respond: Respond,
    recv: Option<RecvStream>,
    place: Option<Place>,
}

/// Shared with the task that cancels the service when the peer resets the stream first.
type Respond = Rc<RefCell<Option<SendResponse<Bytes>>>>;

impl Answer {
    /// 200: the application was dialled. `baggage` tells the peer who that is.
    pub fn accept(mut self, baggage: Option<&Baggage>) -> Result<Stream, h2::Error> {
        let mut response = Response::new(());
        if let Some(value) = baggage.and_then(|b| b.to_string().parse().ok()) {
            response.headers_mut().insert(BAGGAGE, value);
        }
        // They are taken here and in `answer` only, both of which end this answer.
        let (Some(mut respond), Some(recv), Some(place)) =
            (self.respond.borrow_mut().take(), self.recv.take(), self.place.take())
        else {
            return Err(Reason::INTERNAL_ERROR.into());
        };
        let send = respond.send_response(response, false)?;
        Ok(Stream { send, recv, _place: place })
    }

    pub fn refuse(mut self, refusal: Refusal) {
        self.answer(refusal);
    }

    fn answer(&mut self, refusal: Refusal) {
        if let Some(mut respond) = self.respond.borrow_mut().take() {
            let mut response = Response::new(());
            *response.status_mut() = refusal.status();
            // The peer may have reset the stream: then there is nobody to tell.
            let _ = respond.send_response(response, true);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.answer(Refusal::Unavailable);
    }
}

/// Serves an accepted socket until it ends. Each CONNECT runs `service` in a task of its own, which also does the
/// relaying. Call where tasks may be `spawn_local`.
pub async fn serve<S, Fut>(
    tcp: TcpStream,
    peer: SocketAddr,
    config: Arc<ServerConfig>,
    timeouts: Timeouts,
    mut phase: watch::Receiver<Phase>,
    service: Rc<S>,
) -> Result<(), ServeError>
where
    S: Fn(Request, Answer) -> Fut + 'static,
    Fut: Future<Output = ()> + 'static,
{
    let failed = |reason| HandshakeError { peer, reason };
    let pipe = Pipe::new(tcp).map_err(|e| failed(TlsError::Io(e.kind())))?;
    let heard = pipe.heard();
    let begun = Instant::now();
    let handshake = accept(pipe, config);
    let (io, client) = timeout(timeouts.handshake, handshake)
        .await
        .map_err(|_| failed(TlsError::TimedOut(timeouts.handshake)))?
        .map_err(failed)?;
    let h2 = h2::server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEADER_LIST)
        .max_concurrent_streams(MAX_STREAMS)
        .max_send_buffer_size(SEND_BUFFER)
        .handshake::<_, Bytes>(io);
    let left = timeouts.handshake.saturating_sub(begun.elapsed());
    let mut h2 = timeout(left, h2)
        .await
        .map_err(|_| failed(TlsError::TimedOut(timeouts.handshake)))?
        .map_err(|e| failed(TlsError::Protocol(e.to_string())))?;

    let Peer { id: client, not_after } = client;
    let load = Load::new();
    let cancelled = Rc::new(Cancelled::new());
    // The first call gives it.
    let Some(ping) = h2.ping_pong() else { return Ok(()) };
    let pulse = keepalive::watch(ping, &heard, &load, &timeouts, timeouts.idle);
    tokio::pin!(pulse);
    // New streams need a proof that is still good; those that run may finish.
    let proved = not_after.duration_since(SystemTime::now()).unwrap_or_default().min(YEAR);
    let proof_ends = sleep_until(Instant::now() + proved);
    tokio::pin!(proof_ends);
    let (mut proof_ended, mut idle, mut owned) = (false, false, true);
    // A pod may be draining already.
    phase.mark_changed();
    loop {
        tokio::select! {
            biased;
            accepted = h2.accept() => match accepted {
                None => return Ok(()),
                Some(Err(e)) => {
                    return Err(ServeError::Failed { peer, client, reason: e.to_string() });
                }
                Some(Ok((request, respond))) => {
                    if cancelled.are_too_many() {
                        h2.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                        // Only so that the peer learns why.
                        let _ = timeout(REASON_WITHIN, poll_fn(|cx| h2.poll_closed(cx))).await;
                        return Err(ServeError::Abusive { peer, client, reason: "it resets what it asks for" });
                    }
                    begin(request, respond, load.take_place(), &client, peer, &service, &cancelled);
                }
            },
            changed = phase.changed(), if owned => {
                owned = changed.is_ok();
                match *phase.borrow_and_update() {
                    Phase::Serving => {}
                    // A second GOAWAY is not sent.
                    Phase::Draining => h2.graceful_shutdown(),
                    Phase::Closed => return Ok(()),
                }
            }
            (end, ping) = &mut pulse => match end {
                End::Idle if !idle => {
                    idle = true;
                    h2.graceful_shutdown();
                    // It ends when the peer has seen GOAWAY, or when that takes too long.
                    load.touch();
                    pulse.set(keepalive::watch(ping, &heard, &load, &timeouts, timeouts.linger));
                }
                End::Idle | End::Closed => return Ok(()),
                End::Silent => {
                    return Err(ServeError::Silent { peer, client, after: timeouts.pong_within });
                }
            },
            () = &mut proof_ends, if !proof_ended => {
                proof_ended = true;
                h2.graceful_shutdown();
            }
        }
    }
}

/// Longer than tokio's timers reach is as good as for ever.
const YEAR: Duration = Duration::from_secs(365 * 86_400);
/// For a peer that is cut off or refused to read why, and no longer.
const REASON_WITHIN: Duration = Duration::from_secs(1);
const REASON_BYTES: u64 = 64 << 10;

/// TLS, and who the client is.
async fn accept(pipe: Pipe, config: Arc<ServerConfig>) -> Result<(Secure, Peer), TlsError> {
    let mut tls = match TlsAcceptor::from(config).accept(pipe).into_fallible().await {
        Ok(tls) => tls,
        Err((error, mut pipe)) => {
            // The client has sent more already (TLS 1.3 lets it): closing over unread bytes would be a reset, and
            // that would take the alert with the reason from it.
            let _ = timeout(REASON_WITHIN, async {
                pipe.shutdown().await?;
                tokio::io::copy(&mut pipe.take(REASON_BYTES), &mut tokio::io::sink()).await
            })
            .await;
            return Err(reason_of(&error));
        }
    };
    tls.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
    let client = peer_of(tls.get_ref().1)?;
    Ok((Secure::new(tls.into(), PREFACE, Rc::default()), client))
}

/// Hands one request to the service, or answers it here when it is no CONNECT to anywhere.
fn begin<S, Fut>(
    request: http::Request<RecvStream>,
    respond: SendResponse<Bytes>,
    place: Place,
    client: &SpiffeId,
    peer: SocketAddr,
    service: &Rc<S>,
    cancelled: &Rc<Cancelled>,
) where
    S: Fn(Request, Answer) -> Fut + 'static,
    Fut: Future<Output = ()> + 'static,
{
    let (head, recv) = request.into_parts();
    let respond = Rc::new(RefCell::new(Some(respond)));
    let answer = Answer { respond: respond.clone(), recv: Some(recv), place: Some(place) };
    let authority = head.uri.authority().and_then(|a| a.as_str().parse::<Authority>().ok());
    let (Method::CONNECT, Some(authority)) = (head.method, authority) else {
        return answer.refuse(Refusal::BadRequest);
    };
    let request = Request { authority, metadata: Metadata::of(&head.headers), client: client.clone(), peer };
    let (service, cancelled) = (service.clone(), cancelled.clone());
    spawn_local(async move {
        let reset = poll_fn(|cx| match respond.borrow_mut().as_mut() {
            Some(respond) => respond.poll_reset(cx).map(drop),
            // Answered: the stream's owner notices.
            None => Poll::Pending,
        });
        tokio::select! {
            biased;
            () = service(request, answer) => {}
            () = reset => cancelled.note(),
        }
    });
}

/// How often the peer has lately reset a stream before its answer.
struct Cancelled {
    count: Cell<u32>,
    since: Cell<Instant>,
}

impl Cancelled {
    fn new() -> Self {
        Self { count: Cell::new(0), since: Cell::new(Instant::now()) }
    }

    fn note(&self) {
        let seconds = self.since.get().elapsed().as_secs();
        if seconds > 0 {
            self.since.set(Instant::now());
            let forgiven = u32::try_from(seconds).unwrap_or(u32::MAX).saturating_mul(CANCELLED_PER_SECOND);
            self.count.set(self.count.get().saturating_sub(forgiven));
        }
        self.count.set(self.count.get() + 1);
    }

    fn are_too_many(&self) -> bool {
        self.count.get() > MAX_CANCELLED
    }
}
