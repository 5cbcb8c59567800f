//! Bytes between two TCP connections of the same node, for traffic that needs no second encryption: copied while there
//! are few, moved by the kernel once there are many.

use std::{cell::Cell, io, os::fd::AsFd};

use bytes::{Buf, BytesMut};
use nix::{
    fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice},
    unistd::pipe2,
};
use tokio::{io::Interest, net::TcpStream};

use super::relay::{Counts, LARGE, SMALL, finished, shutdown, unfinished};

/// Only a direction that has moved so much gets a pipe: two descriptors and a page or two.
const MANY: u64 = 1 << 20;
/// What a pipe may hold; the kernel's limit for programs without privileges.
const PIPE: usize = 1 << 20;

/// Relays until both directions have ended. A failure of one side resets the other.
pub async fn relay(near: TcpStream, far: TcpStream, counts: &Counts) -> io::Result<()> {
    unfinished(&near);
    unfinished(&far);
    let result = tokio::try_join!(forward(&near, &far, &counts.sent), forward(&far, &near, &counts.received)).map(drop);
    if result.is_ok() {
        finished(&near);
        finished(&far);
    }
    result
}

async fn forward(from: &TcpStream, to: &TcpStream, count: &Cell<u64>) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    let mut size = SMALL;
    while count.get() < MANY {
        from.readable().await?;
        buffer.reserve(size);
        match from.try_read_buf(&mut buffer) {
            Ok(0) => return shutdown(to),
            Ok(n) => size = if n >= size { (size * 2).min(LARGE) } else { size },
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                // An idle connection holds no buffer.
                buffer = BytesMut::new();
                continue;
            }
            Err(e) => return Err(e),
        }
        while !buffer.is_empty() {
            match to.try_write(&buffer) {
                Ok(n) => {
                    count.set(count.get() + n as u64);
                    buffer.advance(n);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => to.writable().await?,
                Err(e) => return Err(e),
            }
        }
    }
    drop(buffer);
    let (out, into) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
    // Smaller when the user has too many of them: slower, and still right.
    let _ = fcntl(&into, FcntlArg::F_SETPIPE_SZ(PIPE as i32));
    loop {
        let mut waiting = moved(from, Interest::READABLE, from, &into, PIPE).await?;
        if waiting == 0 {
            return shutdown(to);
        }
        while waiting > 0 {
            let n = moved(to, Interest::WRITABLE, &out, to, waiting).await?;
            count.set(count.get() + n as u64);
            waiting -= n;
        }
    }
}

/// Moves bytes as soon as `socket` allows it.
async fn moved(
    socket: &TcpStream,
    interest: Interest,
    from: &impl AsFd,
    to: &impl AsFd,
    most: usize,
) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    socket.async_io(interest, || Ok(splice(from, None, to, None, most, flags)?)).await
}
