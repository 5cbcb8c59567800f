//! What the programs tell through the `EVENTS` ring.

use tokio::io::{Interest, unix::AsyncFd};

use crate::{agent::core::Shared, kernel::Events};

/// How many records are taken in before others of the agent's thread have their turn.
const BURST: usize = 256;

/// Reads the ring for as long as the agent runs.
pub async fn watch(events: Events, core: Shared) -> std::io::Result<()> {
    // SAFETY: the ring keeps its descriptor, always the same one, for as long as it lives.
    let events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) };
    let mut events = events.map_err(std::io::Error::other)?;
    loop {
        let mut ready = events.readable_mut().await?;
        let mut taken = 0;
        while taken < BURST
            && let Some(event) = ready.get_inner_mut().next_event()
        {
            core.borrow_mut().event(&event);
            taken += 1;
        }
        if taken < BURST {
            ready.clear_ready();
            // What came between the last look and the clearing is signalled by nobody.
            while let Some(event) = ready.get_inner_mut().next_event() {
                core.borrow_mut().event(&event);
            }
        }
        tokio::task::yield_now().await;
    }
}
