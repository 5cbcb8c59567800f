//! Who knew when that a pod goes, and what was rescued: a bounded history of drains.

use std::{collections::VecDeque, sync::Arc};

use super::lag::Lags;

/// Drains that are remembered; the oldest are forgotten.
pub const REMEMBERED: usize = 512;
/// A word of the control plane belongs to a drain that began within this time.
const LATE_NS: u64 = 3600 * 1_000_000_000;

/// Who can know. In the order of [`Drain::at_ns`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// The pod was deleted (deletionTimestamp), or is gone.
    Api = 0,
    Sigterm = 1,
    Listener = 2,
    ControlPlane = 3,
}

#[derive(Clone, Debug)]
pub struct Drain {
    pub pod: Arc<str>,
    pub services: Vec<String>,
    /// `CLOCK_MONOTONIC` per signal; 0: not said (yet).
    pub at_ns: [u64; 4],
    /// Connections that were moved off it, and connects to it that failed.
    pub rebound: u64,
    pub failed: u64,
    /// Its listener came back: a restart in place.
    pub returned: bool,
    gone: bool,
    backends: Vec<u32>,
}

impl Drain {
    /// Who said it first, and when.
    pub fn first(&self) -> (Signal, u64) {
        let all = [Signal::Api, Signal::Sigterm, Signal::Listener, Signal::ControlPlane];
        let said = all.into_iter().map(|signal| (signal, self.at_ns[signal as usize])).filter(|(_, at)| *at != 0);
        said.min_by_key(|(_, at)| *at).unwrap_or((Signal::Api, 0))
    }
}

/// What a drain is about, for when it is new.
#[derive(Clone, Debug, Default)]
pub struct About {
    pub services: Vec<String>,
    pub backends: Vec<u32>,
}

#[derive(Debug, Default)]
pub struct Drains(VecDeque<Drain>);

impl Drains {
    pub fn iter(&self) -> impl Iterator<Item = &Drain> {
        self.0.iter()
    }

    /// A pod goes, says `signal`. `begins` false: the word only counts when the drain is known already.
    pub fn said(
        &mut self,
        pod: &Arc<str>,
        signal: Signal,
        at_ns: u64,
        begins: bool,
        about: impl FnOnce() -> About,
        lags: &mut Lags,
    ) {
        let fits = |drain: &&mut Drain| {
            drain.pod == *pod
                && match signal {
                    Signal::ControlPlane => at_ns.saturating_sub(drain.first().1) < LATE_NS,
                    _ => !drain.gone,
                }
                && !drain.returned
        };
        if let Some(drain) = self.0.iter_mut().rev().find(fits) {
            let (first, first_ns) = drain.first();
            let place = &mut drain.at_ns[signal as usize];
            if *place == 0 {
                *place = at_ns.max(1);
                if signal == Signal::ControlPlane {
                    let late = at_ns.saturating_sub(first_ns);
                    match first {
                        Signal::Api => lags.late_api.observe_ns(late),
                        Signal::Sigterm => lags.late_sigterm.observe_ns(late),
                        Signal::Listener => lags.late_listener.observe_ns(late),
                        Signal::ControlPlane => {}
                    }
                }
            }
            return;
        }
        if !begins {
            return;
        }
        let About { services, backends } = about();
        // A pod behind no service is nobody's rollout.
        if backends.is_empty() {
            return;
        }
        let mut at = [0; 4];
        at[signal as usize] = at_ns.max(1);
        lags.drains[signal as usize] += 1;
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        let pod = pod.clone();
        self.0.push_back(Drain {
            pod,
            services,
            at_ns: at,
            rebound: 0,
            failed: 0,
            returned: false,
            gone: false,
            backends,
        });
    }

    /// The pod object is no more: another of the same name is another drain.
    pub fn gone(&mut self, pod: &str) {
        if let Some(drain) = self.0.iter_mut().rev().find(|drain| *drain.pod == *pod) {
            drain.gone = true;
        }
    }

    /// It listens again: it was a restart, unless the pod was deleted.
    pub fn returned(&mut self, pod: &str) {
        if let Some(drain) = self.0.iter_mut().rev().find(|drain| *drain.pod == *pod && drain.at_ns[0] == 0) {
            drain.returned = true;
        }
    }

    pub fn rebound(&mut self, backend: u32) {
        if let Some(drain) = self.of(backend) {
            drain.rebound += 1;
        }
    }

    pub fn failed(&mut self, backend: u32) {
        if let Some(drain) = self.of(backend) {
            drain.failed += 1;
        }
    }

    fn of(&mut self, backend: u32) -> Option<&mut Drain> {
        self.0.iter_mut().rev().find(|drain| drain.backends.contains(&backend))
    }

    /// Pods of which the control plane has not spoken yet.
    pub fn unconfirmed(&self) -> Vec<Arc<str>> {
        self.0.iter().filter(|drain| drain.at_ns[3] == 0 && !drain.returned).map(|drain| drain.pod.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> About {
        About { services: vec!["shop/web".into()], backends: vec![7] }
    }

    #[test]
    fn the_order_of_the_signals_is_kept_and_the_control_plane_s_lag_measured_once() {
        let (mut drains, mut lags) = (Drains::default(), Lags::default());
        let pod: Arc<str> = "shop/web-1".into();
        drains.said(&pod, Signal::ControlPlane, 1, false, about, &mut lags);
        assert_eq!(drains.iter().count(), 0, "a pod that is not ready yet does not drain");
        drains.said(&pod, Signal::Sigterm, 1_000_000_000, true, about, &mut lags);
        drains.said(&pod, Signal::Listener, 1_100_000_000, true, about, &mut lags);
        drains.rebound(7);
        drains.gone(&pod);
        drains.said(&pod, Signal::ControlPlane, 4_000_000_000, true, about, &mut lags);
        drains.said(&pod, Signal::ControlPlane, 9_000_000_000, true, about, &mut lags);
        let drain = drains.iter().next().unwrap();
        assert_eq!(drain.at_ns, [0, 1_000_000_000, 1_100_000_000, 4_000_000_000]);
        assert_eq!((drain.rebound, drain.first().0), (1, Signal::Sigterm));
        assert_eq!((lags.late_sigterm.sum, lags.drains), (3.0, [0, 1, 0, 0]));
        drains.said(&pod, Signal::Api, 20_000_000_000, true, about, &mut lags);
        assert_eq!(drains.iter().count(), 2, "the next life of the name is another drain");
    }

    #[test]
    fn the_history_is_bounded() {
        let (mut drains, mut lags) = (Drains::default(), Lags::default());
        for n in 0..2 * REMEMBERED {
            drains.said(&format!("a/{n}").into(), Signal::Api, 1, true, about, &mut lags);
        }
        assert_eq!(drains.iter().count(), REMEMBERED);
    }
}
