//! What the programs tell through the `EVENTS` ring.

use std::time::Duration;

use tokio::{
    io::{Interest, unix::AsyncFd},
    time::MissedTickBehavior,
};

use crate::{agent::core::Shared, kernel::Events};

/// How many records are taken in before others of the agent's thread have their turn.
const BURST: usize = 256;

/// How often the ring is read without a wake-up: only what is urgent wakes (`events.rs` of the object).
const LOOK: Duration = Duration::from_millis(50);

/// Reads the ring for as long as the agent runs.
pub async fn watch(events: Events, core: Shared) -> std::io::Result<()> {
    // SAFETY: the ring keeps its descriptor, always the same one, for as long as it lives.
    let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) };
    let mut events = events.map_err(std::io::Error::other)?;
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // Cleared before the ring is read: what comes after that signals again.
            ready = events.readable_mut() => ready?.clear_ready(),
            _ = look.tick() => {}
        }
        let mut taken = 0;
        while let Some(event) = events.get_mut().next_event() {
            core.borrow_mut().event(&event);
            taken += 1;
            if taken % BURST == 0 {
                tokio::task::yield_now().await;
            }
        }
    }
}
