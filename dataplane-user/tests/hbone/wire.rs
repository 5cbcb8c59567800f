//! HTTP/2 frames made and read by hand, for what no well-behaved library sends.

use std::{io, net::SocketAddr, sync::Arc};

use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// RFC 9113 section 7.
pub const ENHANCE_YOUR_CALM: u32 = 0xb;

#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// HPACK without tables or Huffman codes (RFC 7541 section 6.2.2); names of 127 bytes at most.
pub fn field(name: &str, value: &str) -> Vec<u8> {
    let mut bytes = vec![0, u8::try_from(name.len()).unwrap()];
    bytes.extend(name.as_bytes());
    // RFC 7541 section 5.1, with a prefix of 7 bits.
    let mut length = value.len();
    if length < 127 {
        bytes.push(u8::try_from(length).unwrap());
    } else {
        bytes.push(127);
        length -= 127;
        while length >= 128 {
            bytes.push(u8::try_from(length % 128).unwrap() | 128);
            length /= 128;
        }
        bytes.push(u8::try_from(length).unwrap());
    }
    bytes.extend(value.as_bytes());
    bytes
}

pub fn request(method: &str, authority: &str) -> Vec<u8> {
    [field(":method", method), field(":authority", authority)].concat()
}

pub fn connect(stream: u32, authority: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &request("CONNECT", authority))
}

pub async fn tls(server: SocketAddr, config: Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(server).await?;
    TlsConnector::from(config).connect(ServerName::IpAddress(server.ip().into()), tcp).await
}

/// HEADER_TABLE_SIZE 0: nothing that is read refers to a table.
pub const NO_TABLE: &[u8] = &[0, 1, 0, 0, 0, 0];

/// A connection with preface and SETTINGS sent.
pub async fn h2(server: SocketAddr, config: Arc<ClientConfig>) -> TlsStream<TcpStream> {
    let mut tls = tls(server, config).await.unwrap();
    tls.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, NO_TABLE)].concat()).await.unwrap();
    tls
}

pub async fn read(from: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Frame> {
    let mut head = [0; 9];
    from.read_exact(&mut head).await?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    from.read_exact(&mut payload).await?;
    let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
    Ok(Frame { kind: head[3], flags: head[4], stream, payload })
}

/// The next frame of a kind, others skipped.
pub async fn next(from: &mut (impl AsyncReadExt + Unpin), kind: u8) -> io::Result<Frame> {
    loop {
        let frame = read(from).await?;
        if frame.kind == kind && !(kind == SETTINGS && frame.flags & ACK != 0) {
            return Ok(frame);
        }
    }
}

/// The code of the GOAWAY that ends a connection; nothing when it ends without one.
pub async fn go_away(from: &mut (impl AsyncReadExt + Unpin)) -> Option<u32> {
    let frame = next(from, GOAWAY).await.ok()?;
    Some(u32::from_be_bytes(frame.payload[4..8].try_into().unwrap()))
}

/// `:status` of a HEADERS frame as our server encodes it: indexed for 200 and 400, else a literal.
pub fn status(frame: &Frame) -> Option<u16> {
    // RFC 7541 section 6.3: what the table's new size is.
    let payload = &frame.payload[frame.payload.iter().position(|b| b & 0xe0 != 0x20)?..];
    match payload.first()? {
        // RFC 7541 appendix A.
        0x88 => Some(200),
        0x8c => Some(400),
        _ => {
            let huffman = payload[1] & 128 != 0;
            let text = &payload[2..];
            // The Huffman codes of 401 and 503 (RFC 7541 appendix B); digits have five or six bits.
            match (huffman, text) {
                (false, [a, b, c, ..]) => std::str::from_utf8(&[*a, *b, *c]).ok()?.parse().ok(),
                (true, [0x68, 0x01, ..]) => Some(401),
                (true, [0x6c, 0x0c, ..]) => Some(503),
                _ => None,
            }
        }
    }
}
