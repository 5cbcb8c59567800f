//! What the tunnel has done, counted where it happens.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::hbone::pool::PoolSize;

macro_rules! counts {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// One of [`Counts`]; the name is the counter's in metrics.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Count { $($(#[$doc])* $variant,)* }

        impl Count {
            pub const ALL: &'static [Count] = &[$(Count::$variant,)*];

            pub const fn name(self) -> &'static str {
                match self { $(Count::$variant => $name,)* }
            }
        }
    };
}

counts! {
    /// Connections of pods here that were carried in HBONE.
    OutboundTunnelled => "outbound_tunnelled",
    /// … that were carried to a pod of this node, without a second TLS.
    OutboundLocal => "outbound_local",
    /// … whose destination was in the mesh no more: carried as they are.
    OutboundPlain => "outbound_plaintext",
    /// … that were tried on another backend before their first byte.
    OutboundRepicked => "outbound_repicked",
    /// … that found no backend.
    OutboundFailed => "outbound_failed",
    /// … that a policy of the destination forbade.
    OutboundDenied => "outbound_denied",
    /// Connects to a listener of the agent that nobody had led there.
    OutboundStray => "outbound_stray",
    /// Streams that reached an application here.
    InboundTunnelled => "inbound_tunnelled",
    /// Plaintext that the policies let through.
    InboundPlain => "inbound_plaintext",
    /// Streams for an application that refused, taken by another backend of its services.
    InboundBounced => "inbound_bounced",
    /// Connections and streams that the policies refused.
    InboundDenied => "inbound_denied",
    /// Streams whose application could not be reached.
    InboundFailed => "inbound_failed",
    /// Streams that make no sense here.
    InboundBad => "inbound_bad_request",
    /// Handshakes that failed, and connections that were cut off.
    InboundRejected => "inbound_rejected",
    /// Connections that were cut because the policies changed.
    Revoked => "revoked",
    BytesSent => "bytes_sent",
    BytesReceived => "bytes_received",
}

#[derive(Debug, Default)]
pub struct Counts([AtomicU64; Count::ALL.len()]);

impl Counts {
    pub fn add(&self, count: Count, n: u64) {
        self.0[count as usize].fetch_add(n, Relaxed);
    }

    pub fn one(&self, count: Count) {
        self.add(count, 1);
    }

    pub fn get(&self, count: Count) -> u64 {
        self.0[count as usize].load(Relaxed)
    }
}

/// What the workers' pools hold together, as each of them last looked.
#[derive(Debug, Default)]
pub struct Pooled {
    connections: AtomicU64,
    streams: AtomicU64,
}

impl Pooled {
    /// A worker's pool has another size than when it last looked.
    pub fn change(&self, before: PoolSize, now: PoolSize) {
        // Wrapping, as the atomics do: what was added is taken away again.
        let add = |to: &AtomicU64, before: usize, now: usize| {
            to.fetch_add((now as u64).wrapping_sub(before as u64), Relaxed);
        };
        add(&self.connections, before.connections, now.connections);
        add(&self.streams, before.streams, now.streams);
    }

    /// Connections and streams.
    pub fn read(&self) -> (u64, u64) {
        (self.connections.load(Relaxed), self.streams.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_of_several_workers_add_up_and_shrink_again() {
        let pooled = Pooled::default();
        let size = |connections, streams| PoolSize { connections, streams, dials: 0 };
        pooled.change(size(0, 0), size(3, 9));
        pooled.change(size(0, 0), size(1, 1));
        pooled.change(size(3, 9), size(1, 0));
        assert_eq!(pooled.read(), (2, 1));
    }
}
