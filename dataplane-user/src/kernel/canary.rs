//! "Ready" means proved: a connect has gone through each hook, not "attach returned 0".
//!
//! A process in a cgroup and network namespaces of its own is enrolled like any pod, with services
//! and backends of reserved numbers, through the one writer. It connects, sends, listens and is
//! sent a signal; what it sees and what the maps say afterwards proves each hook or names the one
//! that fails. All of it is removed at the end; what a killed agent left, by the next one.
//!
//! The proof runs on a thread of its own. Whatever touches the kernel side is handed to the agent
//! as a [`Step`] to be made on its thread, so the agent serves meanwhile.

mod child;
mod network;
mod process;
mod proofs;
mod protocol;
mod world;

use std::{
    io,
    path::{Path, PathBuf},
    sync::mpsc,
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

pub use self::child::serve;
pub use self::world::{BACKENDS as RESERVED_BACKENDS, CLIENT_POD, SERVER_POD, SERVICES as RESERVED_SERVICES, World};
use self::{
    process::{Cgroup, Process},
    proofs::Proofs,
    protocol::{Reply, Request},
};
use super::Kernel;
use crate::registry::change::{Change, Netns};

/// The enroller may have the pods of a whole node before the canary's.
const ENROLMENT: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "the maps are too small for a canary; raise --sizes services above {RESERVED_SERVICES} and backends above {RESERVED_BACKENDS}"
    )]
    NoRoom,
    #[error("the canary's cgroup {path}: {source}; the agent must be able to make cgroups there")]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("starting the canary's process {program}: {source}")]
    Spawn { program: PathBuf, source: io::Error },
    #[error("the canary's process, asked for {request}: {source}")]
    Process { request: String, source: io::Error },
    #[error("the canary failed {doing}: {seen}; `hitless doctor` says what this machine lacks")]
    Prepare { doing: &'static str, seen: String },
    #[error("the canary's objects could not be written: {0}")]
    Write(String),
    #[error("the canary's pods are not enrolled after {} s; an error about hitless/canary-… in the agent's log says why", ENROLMENT.as_secs())]
    NotEnrolled,
    #[error("{}; `hitless status` shows the links, `hitless doctor` what this machine lacks", failures(.0))]
    NotProved(Report),
    #[error("the agent stopped before the canary was done")]
    Abandoned,
    #[error("starting the canary's thread: {0}")]
    Thread(io::Error),
}

/// What became of one proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    Proved,
    /// It could not be tried; `seen` says why.
    Skipped,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HookProof {
    /// The program, as its link is named; with a remark when a program is proved in several ways.
    pub hook: &'static str,
    pub outcome: Outcome,
    pub seen: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub hooks: Vec<HookProof>,
    pub took_ms: u64,
}

fn failures(report: &Report) -> String {
    let failed = report.hooks.iter().filter(|proof| proof.outcome == Outcome::Failed);
    let texts: Vec<_> = failed.map(|proof| format!("{} does not work: {}", proof.hook, proof.seen)).collect();
    texts.join("; ")
}

/// What the agent does next for the canary.
pub enum Step {
    /// Call it with the kernel side.
    With(Box<dyn FnOnce(&mut Kernel) + Send>),
    /// The proof is over and everything is removed.
    Done(Result<Report, Error>),
}

/// A proof under way.
///
/// ```text
/// let mut canary = Canary::start(&kernel, Path::new("/proc/self/exe"))?;
/// loop { select! {
///     step = canary.next() => match step { Step::With(work) => work(&mut kernel), Step::Done(result) => … },
///     Some(outcome) = outcomes.recv() => kernel.complete(outcome), …
/// } }
/// ```
pub struct Canary {
    steps: UnboundedReceiver<Step>,
    thread: Option<JoinHandle<()>>,
    world: World,
}

impl Canary {
    /// Begins. The kernel side must be active. `program` has [`serve`] as its subcommand `canary`.
    pub fn start(kernel: &Kernel, program: &Path) -> Result<Self, Error> {
        let (services, backends) = kernel.numbers();
        let world = World::new(services, backends).ok_or(Error::NoRoom)?;
        let world = world.next_generation(|id| kernel.health(id).generation());
        let (sender, steps) = unbounded_channel();
        let (cgroup, program) = (kernel.cgroup().to_owned(), program.to_owned());
        let run = move || {
            let agent = Agent(sender);
            let result = prove(&agent, world, &cgroup, &program);
            // Nobody to tell: the agent is stopping.
            let _ = agent.0.send(Step::Done(result));
        };
        let thread = thread::Builder::new().name("canary".to_owned()).spawn(run).map_err(Error::Thread)?;
        Ok(Self { steps, thread: Some(thread), world })
    }

    /// The next step. Cancel safe; not to be called after [`Step::Done`].
    pub async fn next(&mut self) -> Step {
        self.steps.recv().await.unwrap_or(Step::Done(Err(Error::Abandoned)))
    }

    /// [`Canary::next`] for whoever has no runtime.
    pub fn poll(&mut self) -> Option<Step> {
        self.steps.try_recv().ok()
    }

    /// Ends the proof early, when the agent stops: takes what it wrote out of the maps.
    pub fn abandon(mut self, kernel: &mut Kernel) {
        self.steps.close();
        while self.steps.try_recv().is_ok() {}
        let _ = kernel.write(&self.world.remove());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The agent's thread, as the canary's sees it.
struct Agent(UnboundedSender<Step>);

impl Agent {
    /// Has `f` run on the agent's thread and waits for what it returns.
    fn ask<R: Send + 'static>(&self, f: impl FnOnce(&mut Kernel) -> R + Send + 'static) -> Result<R, Error> {
        let (answer, answers) = mpsc::sync_channel(1);
        let step = Step::With(Box::new(move |kernel| drop(answer.send(f(kernel)))));
        self.0.send(step).map_err(|_| Error::Abandoned)?;
        answers.recv().map_err(|_| Error::Abandoned)
    }

    fn write(&self, changes: Vec<Change>) -> Result<(), Error> {
        let rejected = self.ask(move |kernel| {
            let rejected = kernel.write(&changes);
            rejected.iter().map(|rejected| rejected.error.to_string()).collect::<Vec<_>>()
        })?;
        if rejected.is_empty() { Ok(()) } else { Err(Error::Write(rejected.join("; "))) }
    }

    /// Waits until both of the canary's pods are (not) enrolled.
    fn enrolled(&self, wanted: bool) -> Result<(), Error> {
        let began = Instant::now();
        loop {
            let enrolled = self.ask(|kernel| {
                let enrolled = kernel.enrolled();
                [CLIENT_POD, SERVER_POD].map(|pod| enrolled.contains_key(&pod))
            })?;
            if enrolled == [wanted; 2] {
                return Ok(());
            }
            if began.elapsed() > ENROLMENT {
                return Err(Error::NotEnrolled);
            }
            sleep(Duration::from_millis(2));
        }
    }
}

/// The canary's thread.
fn prove(agent: &Agent, world: World, cgroup: &Path, program: &Path) -> Result<Report, Error> {
    let began = Instant::now();
    // What an agent before left.
    agent.write(world.remove())?;
    let cgroup = Cgroup::make(cgroup)?;
    let mut process = Process::start(program)?;
    let ready = process.ask(&Request::Prepare { cgroup: cgroup.0.clone() })?;
    let (client, server, no_ipv6) = match ready {
        Reply::Ready { client, server, no_ipv6 } => (client, server, no_ipv6),
        Reply::Failed { seen } => return Err(Error::Prepare { doing: "making its network", seen }),
        reply => return Err(Error::Prepare { doing: "making its network", seen: format!("{reply:?}") }),
    };
    let changes = world.make(Netns::Path(client), Netns::Path(server));
    let proved = agent.write(changes).and_then(|()| agent.enrolled(true)).and_then(|()| {
        let settings = agent.ask(|kernel| kernel.settings())?;
        let mut proofs = Proofs { agent, process: &mut process, world, settings, no_ipv6, proofs: Vec::new() };
        proofs.all()?;
        Ok(proofs.proofs)
    });
    // While the namespaces are there: filters and links leave by the way they came.
    let removed = agent.write(world.remove()).and_then(|()| agent.enrolled(false));
    drop(process);
    drop(cgroup);
    let hooks = proved?;
    removed?;
    let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let report = Report { hooks, took_ms };
    if report.hooks.iter().any(|proof| proof.outcome == Outcome::Failed) {
        return Err(Error::NotProved(report));
    }
    Ok(report)
}
