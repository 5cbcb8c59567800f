//! The canary, driven from the agent's thread.

use std::path::Path;

use tracing::{error, info};

use super::core::Shared;
use crate::{
    admin::protocol::Hook,
    kernel::canary::{Canary, Error, Outcome, Report, Step},
};

/// A proof under way; what it wrote leaves the maps should the agent stop meanwhile.
struct Running {
    canary: Option<Canary>,
    core: Shared,
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(canary) = self.canary.take() {
            canary.abandon(&mut self.core.borrow_mut().kernel);
        }
    }
}

/// Proves each hook by a connect of the agent's own. False: not all are.
pub async fn hooks(core: &Shared) -> bool {
    let result = run(core).await;
    let mut core = core.borrow_mut();
    let (hooks, failure) = match result {
        Ok(report) => {
            info!(hooks = report.hooks.len(), ms = report.took_ms, "every hook proved");
            (rows(&report), None)
        }
        Err(Error::NotProved(report)) => (rows(&report), Some(Error::NotProved(report).to_string())),
        Err(problem) => (Vec::new(), Some(problem.to_string())),
    };
    core.hooks = hooks;
    if failure.is_some() && failure != core.unproved {
        error!(problem = failure.as_deref(), "hooks not proved; trying again every few seconds");
    }
    core.unproved = failure;
    core.unproved.is_none()
}

async fn run(core: &Shared) -> Result<Report, Error> {
    let canary = Canary::start(&core.borrow().kernel, Path::new("/proc/self/exe"))?;
    let mut running = Running { canary: Some(canary), core: core.clone() };
    while let Some(canary) = &mut running.canary {
        match canary.next().await {
            Step::With(work) => work(&mut core.borrow_mut().kernel),
            Step::Done(result) => {
                // Its thread has removed everything.
                running.canary = None;
                return result;
            }
        }
    }
    Err(Error::Abandoned)
}

fn rows(report: &Report) -> Vec<Hook> {
    let row = |proof: &crate::kernel::canary::HookProof| Hook {
        hook: proof.hook.into(),
        ok: proof.outcome != Outcome::Failed,
        seen: proof.seen.clone(),
    };
    report.hooks.iter().map(row).collect()
}
