//! Takes ended flows out of `REBINDS` and corrects `REBOUND`, a bounded number of entries per call.

use std::sync::atomic::Ordering::SeqCst;

use dataplane_ebpf::abi::{FlowKey, REBIND_FIN_CLIENT, REBIND_FIN_PEER, REBIND_RST, Rebind};

use super::{
    error::Error,
    maps::Maps,
    sys::{self, Cursor},
};

/// How long a closing flow lingers for late segments.
const CLOSING_NS: u64 = 10_000_000_000;
/// How long a flow without a packet is kept.
const IDLE_NS: u64 = 6 * 3600 * 1_000_000_000;
/// Entries per call: about a millisecond.
const PER_CALL: usize = 4096;

/// What one call did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    pub seen: u32,
    pub removed: u32,
    /// `REBOUND` after a walk that ended with this call, if it was too high.
    pub corrected: Option<u64>,
}

/// A walk over `REBINDS`, spread over calls.
#[derive(Debug, Default)]
pub struct Sweep {
    cursor: Cursor,
    /// `REBOUND` as the walk began, less what the walk removed.
    expected: u64,
    kept: u64,
}

impl Sweep {
    pub fn run(&mut self, maps: &Maps, now_ns: u64) -> Result<Swept, Error> {
        let Some(rebound) = maps.rebound.word(0) else { return Ok(Swept::default()) };
        if self.cursor.is_start() {
            self.expected = rebound.load(SeqCst);
            self.kept = 0;
            if self.expected == 0 {
                return Ok(Swept::default());
            }
        }
        let mut swept = Swept::default();
        let entries = sys::map_lookup_batch::<FlowKey, Rebind>(maps.rebinds.fd(), &mut self.cursor, PER_CALL)
            .map_err(|source| maps.rebinds.failed("reading it", source))?;
        for (key, rebind) in entries {
            swept.seen += 1;
            if ended(&rebind, now_ns) {
                if maps.rebinds.delete(&key)? {
                    rebound.fetch_update(SeqCst, SeqCst, |n| Some(n.saturating_sub(1))).ok();
                    self.expected = self.expected.saturating_sub(1);
                    swept.removed += 1;
                }
            } else {
                self.kept += 1;
            }
        }
        // Evictions are not counted where they happen, so the count can only be too high. It is
        // corrected when nobody touched it during the walk.
        if self.cursor.is_start()
            && self.kept < self.expected
            && rebound.compare_exchange(self.expected, self.kept, SeqCst, SeqCst).is_ok()
        {
            swept.corrected = Some(self.kept);
        }
        Ok(swept)
    }
}

fn ended(rebind: &Rebind, now_ns: u64) -> bool {
    let both = REBIND_FIN_CLIENT | REBIND_FIN_PEER;
    let closing = rebind.closing & REBIND_RST != 0 || rebind.closing & both == both;
    let quiet = now_ns.saturating_sub(rebind.last_seen_ns);
    quiet > if closing { CLOSING_NS } else { IDLE_NS }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_ends_after_fins_or_a_reset_have_lingered_or_when_it_is_idle_for_hours() {
        let second = 1_000_000_000;
        let now = 100_000 * second;
        let flow = |closing, quiet| Rebind { closing, last_seen_ns: now - quiet, ..Rebind::default() };
        assert!(!ended(&flow(0, 3600 * second), now));
        assert!(ended(&flow(0, 7 * 3600 * second), now));
        assert!(!ended(&flow(REBIND_FIN_CLIENT, 60 * second), now), "half closed is not closed");
        assert!(!ended(&flow(REBIND_FIN_CLIENT | REBIND_FIN_PEER, 9 * second), now));
        assert!(ended(&flow(REBIND_FIN_CLIENT | REBIND_FIN_PEER, 11 * second), now));
        assert!(ended(&flow(REBIND_RST, 11 * second), now));
        assert!(!ended(&Rebind { last_seen_ns: now + second, ..Rebind::default() }, now), "a packet since");
    }
}
