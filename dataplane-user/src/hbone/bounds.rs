//! Frames that cost us work and the peer nothing: how many of them a connection may send.
//!
//! h2 bounds what a peer can make it *keep* (header lists, CONTINUATION, resets, tiny DATA frames). This bounds what a
//! peer can make it *do*: floods of PING, SETTINGS, PRIORITY, WINDOW_UPDATE and unknown frames. It looks at nothing but
//! the 9 bytes in front of each frame (RFC 9113 section 4.1).

use std::time::Duration;

use tokio::time::Instant;

const HEADER: usize = 9;
/// The client's connection preface (RFC 9113 section 3.4).
pub(super) const PREFACE: usize = 24;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

/// A peer sends too many frames of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it floods us with {0} frames")]
pub struct Flood(pub &'static str);

/// Reads along with what a peer sends.
pub(super) struct Meter {
    /// Payload, or preface, that is still to come before the next frame's header.
    skip: usize,
    head: [u8; HEADER],
    have: usize,
    started: Instant,
    pings: u32,
    settings: u32,
    updates: u32,
    others: u32,
}

/// Frames of a kind per window of time. Far above what a peer with 200 busy streams needs.
const WINDOW: Duration = Duration::from_secs(10);
const MAX_PINGS: u32 = 1_000;
const MAX_SETTINGS: u32 = 100;
const MAX_UPDATES: u32 = 1_000_000;
/// PRIORITY and frames that nobody knows.
const MAX_OTHERS: u32 = 1_000;

impl Meter {
    /// `preface` bytes come before the first frame.
    pub(super) fn new(preface: usize) -> Self {
        let head = [0; HEADER];
        let started = Instant::now();
        Self { skip: preface, head, have: 0, started, pings: 0, settings: 0, updates: 0, others: 0 }
    }

    /// Takes the next bytes of the plaintext.
    pub(super) fn read(&mut self, mut bytes: &[u8]) -> Result<(), Flood> {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return Ok(());
            }
            let taken = (HEADER - self.have).min(bytes.len());
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have < HEADER {
                return Ok(());
            }
            self.have = 0;
            let [a, b, c, kind, ..] = self.head;
            self.skip = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            self.count(kind)?;
        }
    }

    fn count(&mut self, kind: u8) -> Result<(), Flood> {
        let (count, most, name) = match kind {
            // Bounded by h2, by flow control and by the bounds on streams.
            DATA | HEADERS | RST_STREAM | CONTINUATION => return Ok(()),
            PING => (&mut self.pings, MAX_PINGS, "PING"),
            SETTINGS => (&mut self.settings, MAX_SETTINGS, "SETTINGS"),
            WINDOW_UPDATE => (&mut self.updates, MAX_UPDATES, "WINDOW_UPDATE"),
            _ => (&mut self.others, MAX_OTHERS, "PRIORITY or unknown"),
        };
        *count += 1;
        if *count <= most {
            return Ok(());
        }
        // The clock is looked at only here.
        if self.started.elapsed() < WINDOW {
            return Err(Flood(name));
        }
        (self.pings, self.settings, self.updates, self.others) = (0, 0, 0, 0);
        self.started = Instant::now();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, 0, 0, 0, 0, 0];
        frame.resize(HEADER + payload, 0xaa);
        frame
    }

    #[test]
    fn data_is_never_a_flood_however_it_is_cut() {
        let mut meter = Meter::new(0);
        let bytes: Vec<u8> = (0..5000).flat_map(|i| frame(DATA, i % 70)).collect();
        for chunk in bytes.chunks(7) {
            meter.read(chunk).unwrap();
        }
        assert_eq!((meter.skip, meter.have), (0, 0));
        assert_eq!((meter.pings, meter.others), (0, 0), "payload was taken for frames");
    }

    #[test]
    fn each_cheap_frame_has_its_bound() {
        for (kind, most) in [(PING, MAX_PINGS), (SETTINGS, MAX_SETTINGS), (2, MAX_OTHERS), (77, MAX_OTHERS)] {
            let mut meter = Meter::new(PREFACE);
            meter.read(&[0; PREFACE]).unwrap();
            for _ in 0..most {
                meter.read(&frame(kind, 8)).unwrap();
            }
            assert!(meter.read(&frame(kind, 8)).is_err(), "{kind}");
        }
    }
}
