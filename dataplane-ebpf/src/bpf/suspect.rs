//! Changes to health words that the kernel makes by itself: failed and answered connects, signals.

use aya_ebpf::{bindings::BPF_NOEXIST, helpers::bpf_ktime_get_ns};
use dataplane_ebpf::{
    abi::{
        EVENT_RECOVERED, EVENT_SUSPECTED, Event, LAYER_CHOOSE, SUSPECT_WINDOW_NS, ServiceId, Settings, Stat,
        SuspectKey, Suspects,
    },
    choose::may_suspect,
    health::{Health, Input, State, ticks},
};

use crate::{
    cell,
    events::emit,
    maps::{HEALTH, SERVICES, SUSPECTS, count, settings},
};

/// How often a lost race for a word is run again. Each loss means that somebody else made news.
const ATTEMPTS: u32 = 4;

/// Applies `input` to the backend's word, if it still is of that generation. Returns the word that
/// was replaced, or `None` when nothing changed.
#[inline(always)]
fn apply(backend: u32, generation: u32, input: Input) -> Option<Health> {
    let word = HEALTH.get_ptr_mut(backend)?;
    for _ in 0..ATTEMPTS {
        // SAFETY: checked by the verifier.
        let old = Health(unsafe { cell::read(word) });
        if old.generation() != generation & 0xffff {
            return None;
        }
        let new = old.after(input);
        if new == old {
            return None;
        }
        // SAFETY: checked by the verifier.
        if unsafe { cell::exchange(word, old.0, new.0) } {
            return Some(old);
        }
    }
    None
}

/// What [`health_apply`] can be told.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum News {
    StopSignal = 1,
    ListenerClosed = 2,
    ListenerOpened = 3,
    Answered = 4,
}

/// Applies the news to the backend's word, if it still is of that generation. False when that
/// changed nothing.
#[inline(always)]
pub fn health_apply(backend: u32, generation: u32, news: News) -> bool {
    hitless_health_apply(backend, generation, news as u32) != 0
}

/// A global function: the verifier checks it once by itself, however many loops call it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_health_apply(backend: u32, generation: u32, news: u32) -> u32 {
    const STOP_SIGNAL: u32 = News::StopSignal as u32;
    const LISTENER_CLOSED: u32 = News::ListenerClosed as u32;
    const LISTENER_OPENED: u32 = News::ListenerOpened as u32;
    let input = match news {
        STOP_SIGNAL => Input::StopSignal,
        LISTENER_CLOSED => Input::ListenerClosed,
        LISTENER_OPENED => Input::ListenerOpened,
        _ => Input::Answered,
    };
    apply(backend, generation, input).is_some() as u32
}

/// A connect of the client `netns_cookie` to this backend of `service` failed with `errno`.
#[inline(always)]
pub fn failed(settings: &Settings, backend: u32, generation: u32, service: ServiceId, netns_cookie: u64, errno: u32) {
    if settings.layers & LAYER_CHOOSE != 0 {
        hitless_failed(backend, generation, service, netns_cookie, errno);
    }
}

/// [`failed`], verified once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hitless_failed(
    backend: u32,
    generation: u32,
    service: ServiceId,
    netns_cookie: u64,
    errno: u32,
) -> u32 {
    let Some(settings) = settings() else { return 0 };
    // SAFETY: a helper without arguments.
    let now_ns = unsafe { bpf_ktime_get_ns() };
    let input =
        Input::Failed { now: ticks(now_ns), first: settings.suspect_ticks, max_level: settings.suspect_max_level };
    let Some(word) = HEALTH.get_ptr(backend) else { return 0 };
    // SAFETY: checked by the verifier.
    let old = Health(unsafe { cell::read(word) });
    if old.generation() != generation & 0xffff || old.after(input) == old || matches!(old.state(), State::Refusing) {
        return 0;
    }
    // Only the step from trusted to suspect needs the client's share; that a probe fails is told by itself.
    let first = old.level() == 0;
    let key = SuspectKey { netns_cookie, service, _pad: 0 };
    if first && !reserve(&key, now_ns, settings.suspect_percent) {
        count(Stat::SuspectFloor);
        return 0;
    }
    match apply(backend, generation, input) {
        Some(before) if before.level() == 0 => {
            count(Stat::Suspected);
            emit(Event {
                kind: EVENT_SUSPECTED,
                netns_cookie,
                service,
                backend,
                generation,
                detail: errno,
                ..Event::default()
            });
        }
        // Somebody else was faster: the share is not used up.
        _ if first => release(&key),
        _ => {}
    }
    0
}

/// The backend answered a connect: the end of a suspicion.
#[inline(always)]
pub fn answered(backend: u32, generation: u32) {
    let Some(word) = HEALTH.get_ptr(backend) else { return };
    // SAFETY: checked by the verifier.
    let word = Health(unsafe { cell::read(word) });
    if word.level() == 0 {
        return;
    }
    if health_apply(backend, generation, News::Answered) {
        count(Stat::Recovered);
        emit(Event { kind: EVENT_RECOVERED, backend, generation, ..Event::default() });
    }
}

/// Takes one of the suspicions that the client is allowed within the window.
#[inline(always)]
fn reserve(key: &SuspectKey, now_ns: u64, percent: u32) -> bool {
    let Some(service) = SERVICES.get_ptr(key.service) else { return false };
    // SAFETY: checked by the verifier.
    let ready = unsafe { cell::read(&raw const (*service).ready) };
    if SUSPECTS.get_ptr(key).is_none() {
        let fresh = Suspects { since_ns: now_ns, marked: 0, _pad: 0 };
        // Lost to another CPU or full: the lookup below tells.
        let _ = SUSPECTS.insert(key, fresh, u64::from(BPF_NOEXIST));
    }
    let Some(entry) = SUSPECTS.get_ptr_mut(key) else {
        count(Stat::MapFull);
        return false;
    };
    // SAFETY: checked by the verifier. Two CPUs that both restart the window both begin at 0.
    unsafe {
        if now_ns - cell::read(&raw const (*entry).since_ns) > SUSPECT_WINDOW_NS {
            core::ptr::write_volatile(&raw mut (*entry).since_ns, now_ns);
            core::ptr::write_volatile(&raw mut (*entry).marked, 0);
        }
        let marked = cell::increment(&raw mut (*entry).marked);
        if may_suspect(marked, ready, percent) {
            return true;
        }
        cell::decrement(&raw mut (*entry).marked);
    }
    false
}

#[inline(always)]
fn release(key: &SuspectKey) {
    if let Some(entry) = SUSPECTS.get_ptr_mut(key) {
        // SAFETY: checked by the verifier.
        unsafe { cell::decrement(&raw mut (*entry).marked) };
    }
}
