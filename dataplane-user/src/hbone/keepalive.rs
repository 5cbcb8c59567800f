//! A connection's pulse and load: PINGs when nothing was heard, and the end of what is dead or unused.

use std::{cell::Cell, future::poll_fn, rc::Rc, time::Duration};

use h2::{Ping, PingPong};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::{Timeouts, pipe::Heard};

/// How many streams a connection carries, and since when there are none.
pub(super) struct Load {
    streams: Cell<usize>,
    idle_since: Cell<Instant>,
    /// A CONNECT waits for its answer: ask the peer whether it is there.
    pub(super) probe: Notify,
}

impl Load {
    pub(super) fn new() -> Rc<Self> {
        Rc::new(Self { streams: Cell::new(0), idle_since: Cell::new(Instant::now()), probe: Notify::new() })
    }

    pub(super) fn streams(&self) -> usize {
        self.streams.get()
    }

    /// Idleness begins anew.
    pub(super) fn touch(&self) {
        self.idle_since.set(Instant::now());
    }

    pub(super) fn take_place(self: &Rc<Self>) -> Place {
        self.streams.set(self.streams.get() + 1);
        Place(self.clone())
    }
}

/// One stream's share of a connection.
pub(super) struct Place(Rc<Load>);

impl Drop for Place {
    fn drop(&mut self) {
        let left = self.0.streams.get() - 1;
        self.0.streams.set(left);
        if left == 0 {
            self.0.idle_since.set(Instant::now());
        }
    }
}

/// Why a connection is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Nothing came in time after a PING.
    Silent,
    /// No stream for longer than it is worth keeping.
    Idle,
    /// h2 has closed it already.
    Closed,
}

/// Runs beside a connection and returns when that should end.
pub(super) async fn watch(
    mut ping: PingPong,
    heard: &Heard,
    load: &Load,
    timeouts: &Timeouts,
    idle: Duration,
) -> (End, PingPong) {
    loop {
        let mut due = heard.last() + timeouts.ping_every;
        if load.streams() == 0 {
            let idle_at = load.idle_since.get() + idle;
            if idle_at <= Instant::now() {
                return (End::Idle, ping);
            }
            due = due.min(idle_at);
        }
        tokio::select! {
            () = load.probe.notified() => {}
            () = sleep_until(due) => {
                if heard.silence() < timeouts.ping_every {
                    continue;
                }
            }
        }
        let mut sent = Instant::now();
        if ping.send_ping(Ping::opaque()).is_err() {
            return (End::Closed, ping);
        }
        loop {
            tokio::select! {
                pong = poll_fn(|cx| ping.poll_pong(cx)) => match pong {
                    Ok(_) => break,
                    Err(_) => return (End::Closed, ping),
                },
                () = sleep_until(sent + timeouts.pong_within) => {
                    // A pong may wait behind data; whoever sends data lives.
                    if heard.last() <= sent {
                        return (End::Silent, ping);
                    }
                    sent = Instant::now();
                }
            }
        }
    }
}
