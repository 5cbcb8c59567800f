//! The tunnel's protocol: CONNECT streams of HTTP/2 in mutual TLS on port 15008, as Istio ambient speaks it (HBONE).
//!
//! A library over tokio sockets that others opened: it decides neither where to connect nor who may. It runs on
//! current-thread runtimes where tasks may be `spawn_local` (a local runtime, a `LocalSet`); nothing here is shared between workers.

mod bounds;
pub mod client;
pub mod headers;
mod keepalive;
pub mod local;
mod pipe;
pub mod pool;
pub mod relay;
pub mod server;
pub mod tls;

use std::time::Duration;

use bytes::Bytes;
use h2::{RecvStream, SendStream};

/// The port of the wire format.
pub const PORT: u16 = 15008;

/// Windows and bounds as Istio's proxy has them.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
const MAX_FRAME: u32 = 1 << 20;
const MAX_HEADER_LIST: u32 = 16 << 10;

/// How long what may take, on both sides of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// From an accepted socket to a proved peer; on the client the dial is in it too.
    pub handshake: Duration,
    /// A PING goes out when nothing was heard for that long …
    pub ping_every: Duration,
    /// … and the connection is dead when nothing was heard for that long after it.
    pub pong_within: Duration,
    /// A connection without streams is closed after that.
    pub idle: Duration,
    /// A CONNECT without an answer for that long makes the client send a PING at once.
    pub probe_after: Duration,
    /// Between GOAWAY and the end of a connection whose streams have ended but that the peer keeps open.
    pub linger: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            ping_every: Duration::from_secs(10),
            pong_within: Duration::from_secs(20),
            idle: Duration::from_secs(300),
            probe_after: Duration::from_millis(100),
            linger: Duration::from_secs(10),
        }
    }
}

/// The two directions of one CONNECT stream. Dropped before both have ended, it is reset.
pub struct Stream {
    pub send: SendStream<Bytes>,
    pub recv: RecvStream,
    /// Keeps the connection's count of streams.
    _place: keepalive::Place,
}
