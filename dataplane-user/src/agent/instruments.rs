//! What the agent measures of events, after the maps were written.

use std::sync::Arc;

use dataplane_ebpf::abi;

use super::core::Core;
use crate::{
    kernel::monotonic_ns,
    metrics::drains::{About, Signal},
    model::{Event, Key, Object},
};

/// What an event says of drains; taken before the event is applied, for then names are gone.
pub enum Word {
    Sync(Vec<Arc<str>>),
    /// A pod goes: who says so, may it begin a drain, is the pod object gone.
    Goes {
        pod: Arc<str>,
        signal: Signal,
        begins: bool,
        gone: bool,
        /// None: to be asked for.
        about: Option<About>,
    },
    Upsert,
    Delete,
}

impl Core {
    pub(super) fn listen(&self, event: &Event) -> Word {
        let about = |pod: &str| Some(self.registry.about_pod(pod));
        match event {
            Event::Sync { state } => {
                Word::Sync(state.pods.iter().filter(|pod| pod.terminating).map(|pod| pod.name.clone()).collect())
            }
            // The most urgent word there is, and its names stay: what it is about is looked up afterwards.
            Event::Upsert { object: Object::Pod(pod) } if pod.terminating => {
                Word::Goes { pod: pod.name.clone(), signal: Signal::Api, begins: true, gone: false, about: None }
            }
            Event::Upsert { object: Object::Backend(backend) } if backend.terminating || !backend.ready => {
                let Some(pod) = backend.pod.clone() else { return Word::Upsert };
                let about = about(&pod);
                Word::Goes { pod, signal: Signal::ControlPlane, begins: backend.terminating, gone: false, about }
            }
            Event::Delete { object: Key::Pod { name } } => {
                let about = about(name);
                Word::Goes { pod: name.clone(), signal: Signal::Api, begins: true, gone: true, about }
            }
            Event::Delete { object: Key::Backend { service, port, address, target_port } } => {
                let Some(pod) = self.registry.pod_of(service, port, *address, *target_port) else {
                    return Word::Delete;
                };
                let about = about(&pod);
                Word::Goes { pod, signal: Signal::ControlPlane, begins: true, gone: false, about }
            }
            Event::Upsert { .. } => Word::Upsert,
            Event::Delete { .. } => Word::Delete,
        }
    }

    pub(super) fn heard(&mut self, word: Word, read_ns: u64, at_ns: u64) {
        if !matches!(word, Word::Sync(_)) {
            self.lags.api.observe_ns(at_ns.saturating_sub(read_ns));
        }
        match word {
            Word::Sync(terminating) => {
                self.counted.syncs += 1;
                for pod in terminating {
                    let about = || self.registry.about_pod(&pod);
                    self.drains.said(&pod, Signal::Api, at_ns, true, about, &mut self.lags);
                }
                // A relist that does not call them ready any more is the control plane's word.
                for pod in self.drains.unconfirmed() {
                    if !self.registry.declared_ready(&pod) {
                        self.drains.said(&pod, Signal::ControlPlane, at_ns, false, About::default, &mut self.lags);
                    }
                }
            }
            Word::Goes { pod, signal, begins, gone, about } => {
                let about = || about.unwrap_or_else(|| self.registry.about_pod(&pod));
                self.drains.said(&pod, signal, at_ns, begins, about, &mut self.lags);
                if gone {
                    self.drains.gone(&pod);
                    self.counted.deletes += 1;
                } else {
                    self.counted.upserts += 1;
                }
            }
            Word::Upsert => self.counted.upserts += 1,
            Word::Delete => self.counted.deletes += 1,
        }
    }

    /// A record of the kernel: the maps have it already.
    pub(super) fn measure(&mut self, event: &abi::Event) {
        let signal = match event.kind {
            abi::EVENT_STOP_SIGNAL => Signal::Sigterm,
            abi::EVENT_LISTENER_CLOSED => Signal::Listener,
            abi::EVENT_LISTENER_OPENED => {
                if let Some(pod) = self.registry.pod_label(event.pod) {
                    self.drains.returned(&pod);
                }
                return;
            }
            abi::EVENT_REBOUND => return self.drains.rebound(event.backend),
            abi::EVENT_REFUSED | abi::EVENT_TIMED_OUT | abi::EVENT_UNREACHABLE => {
                return self.drains.failed(event.backend);
            }
            _ => return,
        };
        let lag = monotonic_ns().saturating_sub(event.at_ns);
        match signal {
            Signal::Sigterm => self.lags.sigterm.observe_ns(lag),
            _ => self.lags.listener.observe_ns(lag),
        }
        if let Some(pod) = self.registry.pod_label(event.pod) {
            let about = || self.registry.about_pod(&pod);
            self.drains.said(&pod, signal, event.at_ns, true, about, &mut self.lags);
        }
    }
}
