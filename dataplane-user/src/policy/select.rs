//! The policies of one workload: chosen once per change, asked per connection.

use std::sync::Arc;

use super::{Action, Decision, DryRun, Mode, Policy, PolicyName, Reason, Request, mtls::Modes};

/// What is in force for a workload. Asking allocates nothing.
#[derive(Debug, Default)]
pub struct Selected {
    in_force: Lists,
    /// With those that are only tried out, which come first; None when nothing is.
    trial: Option<Box<Lists>>,
    modes: Modes,
}

#[derive(Debug, Default)]
struct Lists {
    deny: Box<[Arc<Policy>]>,
    allow: Box<[Arc<Policy>]>,
}

type Verdict<'a> = (Reason, Option<&'a Arc<Policy>>);

impl Selected {
    pub(super) fn new(policies: &[Arc<Policy>], modes: Modes) -> Self {
        let (tried, in_force): (Vec<_>, Vec<_>) = policies.iter().partition(|policy| policy.source.dry_run);
        let trial = (!tried.is_empty()).then(|| Box::new(Lists::new(tried.iter().chain(&in_force).copied())));
        Self { in_force: Lists::new(in_force.into_iter()), trial, modes }
    }

    /// What may enter a port of the workload.
    pub fn mode(&self, port: u16) -> Mode {
        self.modes.of(port).0
    }

    /// The same, with the policy that says so.
    pub fn mode_by(&self, port: u16) -> (Mode, Option<&PolicyName>) {
        self.modes.of(port)
    }

    /// What may enter, when that is the same for every port.
    pub fn only_mode(&self) -> Option<Mode> {
        self.modes.common()
    }

    /// Does any port of it take mutual TLS only?
    pub fn any_strict(&self) -> bool {
        self.modes.any_strict()
    }

    /// Nothing is in force that could refuse anything.
    pub fn is_open(&self) -> bool {
        self.in_force.deny.is_empty() && self.in_force.allow.is_empty() && !self.any_strict()
    }

    /// Decides without counting: for whoever only wants to know, such as a re-check of open connections.
    pub fn decide(&self, request: &Request<'_>) -> Decision {
        if let Some(by) = self.refuses_plaintext(request) {
            return Decision { allow: false, reason: Reason::Plaintext, by: by.cloned(), dry_run: None };
        }
        let real = self.in_force.verdict(request);
        decision(real, self.tried(request, real))
    }

    /// Decides a connection that came, and counts it.
    pub fn admit(&self, request: &Request<'_>) -> Decision {
        if self.refuses_plaintext(request).is_some() {
            return self.decide(request);
        }
        let real = self.in_force.verdict(request);
        match real {
            (reason, Some(policy)) => policy.counters.count(reason.allow()),
            // Each of them had its chance.
            (Reason::NotAllowed, None) => self.in_force.allow.iter().for_each(|policy| policy.counters.count(false)),
            _ => {}
        }
        let tried = self.tried(request, real);
        match (tried, &self.trial) {
            (Some((reason, Some(policy))), _) => policy.counters.count_dry(reason.allow()),
            (Some((_, None)), Some(trial)) => {
                let tried = trial.allow.iter().filter(|policy| policy.source.dry_run);
                tried.for_each(|policy| policy.counters.count_dry(false));
            }
            _ => {}
        }
        decision(real, tried)
    }

    /// Some: plaintext where none may enter, by the policy that says so.
    fn refuses_plaintext(&self, request: &Request<'_>) -> Option<Option<&PolicyName>> {
        let (mode, by) = self.modes.of(request.destination_port);
        (request.source.is_none() && mode == Mode::Strict).then_some(by)
    }

    /// What the dry runs would have changed.
    fn tried(&self, request: &Request<'_>, real: Verdict<'_>) -> Option<Verdict<'_>> {
        let tried = self.trial.as_ref()?.verdict(request);
        let same = |a: &Arc<Policy>, b: &Arc<Policy>| Arc::ptr_eq(a, b);
        let equal = tried.0 == real.0 && tried.1.zip(real.1).is_none_or(|(a, b)| same(a, b));
        (!equal).then_some(tried)
    }
}

fn decision((reason, by): Verdict<'_>, tried: Option<Verdict<'_>>) -> Decision {
    let name = |policy: &Arc<Policy>| policy.name.clone();
    let dry_run = tried.map(|(reason, by)| DryRun { allow: reason.allow(), reason, by: by.map(name) });
    Decision { allow: reason.allow(), reason, by: by.map(name), dry_run }
}

impl Lists {
    fn new<'a>(policies: impl Iterator<Item = &'a Arc<Policy>>) -> Self {
        let (deny, allow): (Vec<_>, Vec<_>) =
            policies.cloned().partition(|policy| policy.source.action == Action::Deny);
        Self { deny: deny.into(), allow: allow.into() }
    }

    /// Any DENY that matches denies; without ALLOW policies all else is allowed; with them one must match.
    fn verdict(&self, request: &Request<'_>) -> Verdict<'_> {
        if let Some(policy) = self.deny.iter().find(|policy| policy.matches(request)) {
            return (Reason::Denied, Some(policy));
        }
        if self.allow.is_empty() {
            return (Reason::Default, None);
        }
        match self.allow.iter().find(|policy| policy.matches(request)) {
            Some(policy) => (Reason::Allowed, Some(policy)),
            None => (Reason::NotAllowed, None),
        }
    }
}
