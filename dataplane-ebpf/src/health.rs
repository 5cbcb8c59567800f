//! The health word: all that is known about one backend in 64 bits, changed by one atomic write.
//!
//! ```text
//!  63            32 31        16 15  12 11   8 7    4 3    0
//! | suspect until  | generation | unused| level| flags| state|
//! ```
//!
//! `state` is what signals and the control plane say; suspicion (a client saw a connect fail) lies
//! over it as `level` and `until`, so that it fades by itself and a probe can end it early. Times
//! are ticks of 2^24 ns (16.8 ms) of `CLOCK_MONOTONIC`: 32 bits of them are two years of uptime.

use crate::abi::{LAYER_CHOOSE, LAYER_KNOW};

/// Nanoseconds to ticks.
#[inline(always)]
pub const fn ticks(ns: u64) -> u32 {
    (ns >> TICK_SHIFT) as u32
}

/// A duration in milliseconds as ticks, never 0.
pub const fn ticks_of_ms(ms: u32) -> u32 {
    let t = ((ms as u64) * 1_000_000) >> TICK_SHIFT;
    if t == 0 { 1 } else { t as u32 }
}

pub const TICK_SHIFT: u32 = 24;
pub const MAX_LEVEL: u32 = 15;

/// What signals and the control plane say of a backend.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No backend has this number (zeroed memory), or it was removed.
    Gone = 0,
    Ready = 1,
    /// Was told to stop, still listens: serving and terminating (KEP-1669).
    Draining = 2,
    /// Closed its listener.
    Refusing = 3,
}

/// The control plane itself says that it terminates: a re-listen does not bring it back.
const FLAG_TERMINATING: u64 = 1 << 4;

/// One backend's health.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health(pub u64);

/// What a choice makes of a [`Health`], best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Class {
    /// Take it.
    Live = 0,
    /// The suspicion has run out: one connect may probe it, who wins [`Health::probed`]'s exchange.
    Probe = 1,
    /// Terminating but serving: when nothing is live.
    Draining = 2,
    /// A client saw it fail: when nothing better is there.
    Suspect = 3,
    /// Refuses: only to fail open.
    Refusing = 4,
    /// Another generation, or gone: never.
    Stale = 5,
}

impl Class {
    /// The class that `self as u32` came from.
    #[inline(always)]
    pub const fn from_u32(class: u32) -> Self {
        match class {
            0 => Self::Live,
            1 => Self::Probe,
            2 => Self::Draining,
            3 => Self::Suspect,
            4 => Self::Refusing,
            _ => Self::Stale,
        }
    }
}

/// Something that was learned of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Its init process was sent a stop signal.
    StopSignal,
    /// Its last listener on the port closed.
    ListenerClosed,
    /// It listens (again).
    ListenerOpened,
    /// The control plane says: terminating, and serving or not.
    Terminating { serving: bool },
    /// The control plane says: it does not terminate (any more).
    NotTerminating,
    /// A connect was refused, timed out or found no route.
    Failed { now: u32, first: u32, max_level: u32 },
    /// A connect was answered.
    Answered,
    /// It is no more.
    Removed,
}

impl Health {
    /// A new backend's word.
    #[inline(always)]
    pub const fn new(state: State, generation: u32) -> Self {
        Self((state as u64) | (((generation & 0xffff) as u64) << 16))
    }

    #[inline(always)]
    pub const fn state(self) -> State {
        match self.0 & 0xf {
            1 => State::Ready,
            2 => State::Draining,
            3 => State::Refusing,
            _ => State::Gone,
        }
    }

    #[inline(always)]
    pub const fn generation(self) -> u32 {
        ((self.0 >> 16) & 0xffff) as u32
    }

    #[inline(always)]
    pub const fn terminating(self) -> bool {
        self.0 & FLAG_TERMINATING != 0
    }

    /// How often in a row it was suspected; 0 is not at all.
    #[inline(always)]
    pub const fn level(self) -> u32 {
        ((self.0 >> 8) & 0xf) as u32
    }

    /// The tick at which the suspicion runs out.
    #[inline(always)]
    pub const fn until(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// What a choice at tick `now`, made by a slot of `generation`, makes of it.
    #[inline(always)]
    pub const fn class(self, generation: u32, now: u32) -> Class {
        if self.generation() != generation & 0xffff {
            return Class::Stale;
        }
        match self.state() {
            State::Gone => Class::Stale,
            State::Refusing => Class::Refusing,
            // A draining backend that also failed is as good as refusing, but may be probed by nobody.
            State::Draining if self.level() > 0 => Class::Suspect,
            State::Draining => Class::Draining,
            State::Ready if self.level() == 0 => Class::Live,
            State::Ready if before(now, self.until()) => Class::Suspect,
            State::Ready => Class::Probe,
        }
    }

    /// [`Health::class`] as far as the switched-on `layers` look, for a slot of the service's ready or
    /// `terminating` section. A backend that terminates is never better than draining.
    #[inline(always)]
    pub const fn seen(self, generation: u32, now: u32, layers: u32, terminating: bool) -> Class {
        let class = if layers & LAYER_CHOOSE != 0 {
            self.class(generation, now)
        } else if layers & LAYER_KNOW != 0 {
            self.without_suspicion().class(generation, now)
        } else {
            match self.class(generation, now) {
                Class::Stale => Class::Stale,
                _ => Class::Live,
            }
        };
        match class {
            Class::Live if terminating => Class::Draining,
            Class::Probe if terminating => Class::Suspect,
            class => class,
        }
    }

    /// The word that the one prober of a suspect backend must exchange in: suspect for the second
    /// half of a term, in which a failure is news (see [`Input::Failed`]), unless the probe ends it.
    #[inline(always)]
    pub const fn probed(self, now: u32, first: u32) -> Self {
        let half = term(self.level(), first) / 2;
        self.with_until(now.wrapping_add(if half == 0 { 1 } else { half }))
    }

    /// What `input` makes of this word. Returns the word itself when nothing changes.
    #[inline(always)]
    pub const fn after(self, input: Input) -> Self {
        if matches!(self.state(), State::Gone) {
            return self;
        }
        match input {
            Input::StopSignal => match self.state() {
                State::Ready => self.with_state(State::Draining),
                _ => self,
            },
            Input::ListenerClosed => self.with_state(State::Refusing),
            Input::ListenerOpened => {
                if self.terminating() {
                    self.with_state(State::Draining).without_suspicion()
                } else {
                    self.with_state(State::Ready).without_suspicion()
                }
            }
            Input::Terminating { serving } => {
                let flagged = Self(self.0 | FLAG_TERMINATING);
                match (self.state(), serving) {
                    (_, false) => flagged.with_state(State::Refusing),
                    // The node's own signal is fresher than the control plane's word.
                    (State::Refusing, true) => flagged,
                    (_, true) => flagged.with_state(State::Draining),
                }
            }
            Input::NotTerminating => {
                if self.terminating() {
                    Self(self.0 & !FLAG_TERMINATING).with_state(State::Ready)
                } else {
                    self
                }
            }
            Input::Failed { now, first, max_level } => {
                // In the first half of a term: connects that were under way when it began tell nothing new.
                if self.level() > 0 && before(now, self.until().wrapping_sub(term(self.level(), first) / 2)) {
                    return self;
                }
                let cap = if max_level > MAX_LEVEL { MAX_LEVEL } else { max_level };
                let level = if self.level() < cap { self.level() + 1 } else { self.level() };
                if level == 0 {
                    return self;
                }
                self.with_level(level).with_until(now.wrapping_add(term(level, first)))
            }
            Input::Answered => self.without_suspicion(),
            Input::Removed => self.with_state(State::Gone),
        }
    }

    const fn with_state(self, state: State) -> Self {
        Self((self.0 & !0xf) | state as u64)
    }

    const fn with_level(self, level: u32) -> Self {
        Self((self.0 & !0xf00) | ((level as u64 & 0xf) << 8))
    }

    const fn with_until(self, until: u32) -> Self {
        Self((self.0 & 0xffff_ffff) | ((until as u64) << 32))
    }

    const fn without_suspicion(self) -> Self {
        self.with_level(0).with_until(0)
    }
}

/// How long the `level`-th suspicion in a row lasts, in ticks: the first one's length, doubled.
const fn term(level: u32, first: u32) -> u32 {
    first << (if level == 0 { 0 } else { (level - 1) & 0xf })
}

/// Serial-number comparison (RFC 1982): the clock may wrap.
const fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FIRST: u32 = 60;
    const fn failed(now: u32) -> Input {
        Input::Failed { now, first: FIRST, max_level: 5 }
    }

    #[test]
    fn zeroed_memory_is_never_chosen() {
        assert_eq!(Health(0).class(0, 0), Class::Stale);
        assert_eq!(Health(0).after(Input::ListenerOpened), Health(0));
    }

    #[test]
    fn a_slot_of_another_generation_is_stale() {
        let h = Health::new(State::Ready, 7);
        assert_eq!(h.class(7, 0), Class::Live);
        assert_eq!(h.class(8, 0), Class::Stale);
    }

    #[test]
    fn layers_that_are_off_look_away() {
        let ready = Health::new(State::Ready, 1);
        let suspect = ready.after(failed(0));
        let refusing = ready.after(Input::ListenerClosed);
        let seen = |h: Health, layers| h.seen(1, 0, layers, false);
        assert_eq!(seen(suspect, LAYER_CHOOSE), Class::Suspect);
        assert_eq!(seen(suspect, LAYER_KNOW), Class::Live);
        assert_eq!(seen(refusing, LAYER_KNOW), Class::Refusing);
        assert_eq!(seen(refusing, 0), Class::Live, "the classic way takes whatever is listed");
        assert_eq!(refusing.seen(2, 0, 0, false), Class::Stale, "but never another generation's slot");
        assert_eq!(ready.seen(1, 0, LAYER_CHOOSE, true), Class::Draining);
    }

    #[test]
    fn sigterm_drains_close_refuses_and_a_relisten_brings_back() {
        let h = Health::new(State::Ready, 1);
        let h = h.after(Input::StopSignal);
        assert_eq!(h.class(1, 0), Class::Draining);
        let h = h.after(Input::ListenerClosed);
        assert_eq!(h.class(1, 0), Class::Refusing);
        let h = h.after(Input::StopSignal);
        assert_eq!(h.class(1, 0), Class::Refusing, "a late signal does not revive it");
        assert_eq!(h.after(Input::ListenerOpened).class(1, 0), Class::Live);
    }

    #[test]
    fn a_relisten_does_not_bring_back_what_the_control_plane_terminates() {
        let h = Health::new(State::Ready, 1).after(Input::Terminating { serving: true });
        assert_eq!(h.class(1, 0), Class::Draining);
        let h = h.after(Input::ListenerClosed).after(Input::Terminating { serving: true });
        assert_eq!(h.class(1, 0), Class::Refusing, "a late control plane does not revive it");
        assert_eq!(h.after(Input::ListenerOpened).class(1, 0), Class::Draining);
    }

    #[test]
    fn suspicion_doubles_runs_out_and_ends_with_an_answer() {
        let h = Health::new(State::Ready, 1).after(failed(1000));
        assert_eq!((h.level(), h.until()), (1, 1000 + FIRST));
        assert_eq!(h.class(1, 1000), Class::Suspect);
        assert_eq!(h.after(failed(1001)), h, "connects under way tell nothing new");
        assert_eq!(h.class(1, 1000 + FIRST), Class::Probe);
        let probing = h.probed(1000 + FIRST, FIRST);
        assert_eq!(probing.class(1, 1001 + FIRST), Class::Suspect, "one prober at a time");
        let again = probing.after(failed(1000 + FIRST));
        assert_eq!((again.level(), again.until()), (2, 1000 + 3 * FIRST), "the probe failed");
        assert_eq!(again.after(Input::Answered).class(1, 0), Class::Live);
    }

    #[test]
    fn suspicion_stops_doubling_at_its_limit_and_survives_the_clock_wrapping() {
        let mut h = Health::new(State::Ready, 1);
        let mut now = u32::MAX - 10;
        for _ in 0..10 {
            h = h.after(failed(now));
            assert_eq!(h.class(1, now), Class::Suspect);
            now = h.until();
            assert_eq!(h.class(1, now), Class::Probe);
        }
        assert_eq!(h.level(), 5);
    }

    fn any_health() -> impl Strategy<Value = Health> {
        (any::<u64>(), 0..=3u64).prop_map(|(word, state)| Health((word & !0xf) | state))
    }

    fn any_input() -> impl Strategy<Value = Input> {
        prop_oneof![
            Just(Input::StopSignal),
            Just(Input::ListenerClosed),
            Just(Input::ListenerOpened),
            any::<bool>().prop_map(|serving| Input::Terminating { serving }),
            Just(Input::NotTerminating),
            (any::<u32>(), 1..1000u32, 0..=20u32).prop_map(|(now, first, max_level)| Input::Failed {
                now,
                first,
                max_level
            }),
            Just(Input::Answered),
            Just(Input::Removed),
        ]
    }

    proptest! {
        #[test]
        fn no_input_changes_the_generation_or_revives_the_gone(health in any_health(), input in any_input()) {
            let after = health.after(input);
            prop_assert_eq!(after.generation(), health.generation());
            if health.state() == State::Gone {
                prop_assert_eq!(after, health);
            }
        }

        /// All but a failed connect may be told twice: signals, agent and programs tell the same.
        #[test]
        fn what_is_told_twice_is_told_once(health in any_health(), input in any_input()) {
            prop_assume!(!matches!(input, Input::Failed { .. }));
            let once = health.after(input);
            prop_assert_eq!(once.after(input), once);
        }

        #[test]
        fn a_failure_never_makes_a_backend_better(health in any_health(), now: u32) {
            let failed = health.after(Input::Failed { now, first: FIRST, max_level: 5 });
            let class = |health: Health| health.class(health.generation(), now);
            prop_assert!(class(failed) >= class(health));
        }

        #[test]
        fn a_terminating_backend_is_never_live(health in any_health(), inputs in prop::collection::vec(any_input(), 0..8)) {
            prop_assume!(health.state() != State::Gone);
            let mut health = health.after(Input::Terminating { serving: true });
            for input in inputs {
                if input != Input::NotTerminating {
                    health = health.after(input);
                }
            }
            prop_assert!(health.class(health.generation(), 0) > Class::Probe);
        }
    }
}
