//! Tells the agent what happened. Losing a record is harmless: the maps hold the truth, and it is counted.

use aya_ebpf::{
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::bpf_ktime_get_ns,
};
use dataplane_ebpf::abi::{EVENT_LISTENER_CLOSED, EVENT_LISTENER_OPENED, EVENT_STOP_SIGNAL, Event, Stat};

use crate::maps::{EVENTS, count};

/// Appends a record, stamped with the time.
#[inline(always)]
pub fn emit(event: Event) {
    let Some(mut entry) = EVENTS.reserve_untyped::<Event>(0) else {
        count(Stat::EventsLost);
        return;
    };
    // SAFETY: a helper without arguments.
    let at_ns = unsafe { bpf_ktime_get_ns() };
    // What a peer must learn at once is not left to the reader's next look. For the rest no wake-up: on a
    // virtual machine its interrupt costs more (4 to 8 us) than all else that a replay does.
    let urgent = matches!(event.kind, EVENT_STOP_SIGNAL | EVENT_LISTENER_OPENED | EVENT_LISTENER_CLOSED);
    entry.write(Event { at_ns, ..event });
    entry.submit(if urgent { u64::from(BPF_RB_FORCE_WAKEUP) } else { u64::from(BPF_RB_NO_WAKEUP) });
}
