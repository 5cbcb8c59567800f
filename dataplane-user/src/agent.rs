//! The agent: wires sources, registry, kernel and the admin socket on one thread.

pub mod core;
mod handover;
mod instruments;
mod mesh;
mod prove;
mod report;

use std::{
    cell::RefCell,
    fs::{File, TryLockError},
    future::Future,
    path::Path,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use tokio::{
    io::{Interest, unix::AsyncFd},
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, mpsc},
    task::{JoinSet, LocalSet},
    time::MissedTickBehavior,
};
use tracing::{debug, info, warn};

use self::{
    core::{Core, Phase, Shared},
    handover::{Door, Heir, Inheritance},
};
use crate::{
    admin,
    config::{Config, LogFormat, OnExit, Source, WhenReplaced},
    kernel::{self, Kernel, Opened, monotonic_ns},
    registry::Registry,
    signal, source,
};

/// How often ended flows are swept out.
const SWEEP: Duration = Duration::from_secs(1);
/// How often the agent looks whether its programs are still attached everywhere.
const CHECK: Duration = Duration::from_secs(3);

/// How long the agent before is kept accepting for pods that are not served here yet.
const JOIN_WITHIN: Duration = Duration::from_secs(10);

/// How long after a failed proof the next one begins.
const PROVE_AGAIN: Duration = Duration::from_secs(5);

/// Runs in the foreground until SIGTERM or SIGINT, or until another agent has taken over.
pub fn run(config: Config) -> anyhow::Result<()> {
    start_logging(config.log_format, &config.log_level)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("the agent's event loop cannot be started")?;
    let (kernel, on_exit) = (config.kernel.clone(), config.on_exit);
    let tasks = Rc::new(LocalSet::new());
    let fate = runtime.block_on(tasks.run_until(live(config, tasks.clone())))?;
    drop(tasks);
    // Its lock goes with the agent's kernel side.
    drop(runtime);
    match (fate, on_exit) {
        (Fate::Replaced, _) => info!("stopped; another agent serves"),
        (Fate::Stopped, OnExit::Keep) => {
            info!("stopped; the kernel path stays in force (`hitless uninstall` removes it)");
        }
        (Fate::Stopped, OnExit::Uninstall) => {
            let removed = kernel::uninstall(&kernel)?;
            info!(links = removed.links, interface_hooks = removed.interface_hooks, "stopped and uninstalled");
        }
    }
    Ok(())
}

/// Why an agent ends that nothing is wrong with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Stopped,
    Replaced,
}

/// What tells the agent to stop.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn stop(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// An agent's life: it serves, gives everything to an heir, and serves again if that one goes.
async fn live(config: Config, tasks: Rc<LocalSet>) -> anyhow::Result<Fate> {
    // First of all: a signal during the start is not lost.
    let mut signals = Signals::new()?;
    let (mut lock, mut inheritance) = claim(&config)?;
    loop {
        // What serves and has not ended by itself ends with its set.
        let served = LocalSet::new().run_until(serve(&config, &tasks, &mut signals, inheritance)).await?;
        let (heir, estate) = match served {
            Served::Stopped => return Ok(Fate::Stopped),
            Served::Replaced(heir, estate) => (heir, estate),
        };
        drop(lock);
        let pods = estate.mesh.bequests();
        let given = heir.give(estate.layout.clone(), &pods).await;
        drop(pods);
        if let Err(error) = &given {
            warn!(pid = heir.pid, %error, "the agent that was to take over does not take it");
        }
        let serves = tokio::select! {
            serves = heir.serves(), if given.is_ok() => serves,
            // Whoever stops this one relies on the other.
            _ = signals.stop(), if given.is_ok() => {
                estate.end(&config).await;
                return Ok(Fate::Replaced);
            }
            else => false,
        };
        let unclaimed = if serves {
            info!(pid = heir.pid, "another agent serves");
            estate.end(&config).await;
            if config.when_replaced == WhenReplaced::Exit {
                return Ok(Fate::Replaced);
            }
            None
        } else {
            Some(estate)
        };
        // Of an heir that went before it served another one may have been quicker.
        let Some(free) = stand_by(&config.state_dir, &mut signals).await else { return Ok(Fate::Replaced) };
        info!("the agent that took over has gone: serving again");
        (lock, inheritance) = (free, Inheritance::default());
        if let Some(estate) = unclaimed {
            inheritance.pods = estate.mesh.bequests();
            let config = config.clone();
            // What it carries has its time, beside what is served anew.
            tasks.spawn_local(async move { estate.end(&config).await });
        }
    }
}

/// The state directory's lock, from an agent that hands it over if need be.
fn claim(config: &Config) -> anyhow::Result<(File, Inheritance)> {
    let state_dir = &config.state_dir;
    if let Some(lock) = try_lock(state_dir)? {
        return Ok((lock, Inheritance::default()));
    }
    if !config.take_over {
        bail!(
            "another agent uses {}: stop it, take over from it (--take-over), or give this one another --state-dir and \
             --name",
            state_dir.display()
        );
    }
    let inheritance = handover::take(state_dir)?;
    let Some(lock) = try_lock(state_dir)? else {
        bail!("another agent uses {}, although it was handed over: was a third one started?", state_dir.display());
    };
    info!(pods = inheritance.pods.len(), "took over from another agent");
    Ok((lock, inheritance))
}

/// How often an agent in reserve looks whether it is needed.
const NEEDED: Duration = Duration::from_millis(200);

/// Until no other agent holds the state directory. None: told to stop.
async fn stand_by(state_dir: &Path, signals: &mut Signals) -> Option<File> {
    loop {
        match try_lock(state_dir) {
            Ok(Some(lock)) => return Some(lock),
            Ok(None) => {}
            Err(error) => warn!(%error, "in reserve"),
        }
        tokio::select! {
            _ = signals.stop() => return None,
            () = tokio::time::sleep(NEEDED) => {}
        }
    }
}

/// How serving ended well.
#[allow(clippy::large_enum_variant, reason = "there is one, and it is moved once")]
enum Served {
    Stopped,
    Replaced(Heir, Estate),
}

/// What an agent that was replaced has left to do.
struct Estate {
    layout: String,
    mesh: mesh::Mesh,
    /// Policies and certificates: what is carried goes on obeying them.
    _parts: JoinSet<anyhow::Result<()>>,
}

impl Estate {
    /// Lets what is carried end.
    async fn end(self, config: &Config) {
        if let Some(settings) = &config.mesh {
            self.mesh.close();
            mesh::wait_for_carried(&self.mesh, settings.drain).await;
        }
    }
}

async fn serve(
    config: &Config,
    outlasting: &LocalSet,
    signals: &mut Signals,
    inheritance: Inheritance,
) -> anyhow::Result<Served> {
    let ready_file = config.ready_file.clone().map(ReadyFile::new);
    let door = Door::open(&config.state_dir)
        .with_context(|| format!("state directory {}: no socket can be made there", config.state_dir.display()))?;
    let Opened { kernel, seed, adopted, events, mut outcomes, logger } = Kernel::open(config.kernel.clone())?;
    if adopted {
        info!(layout = kernel.layout(), backends = seed.backends.len(), "adopted the kernel path of an earlier agent");
    }
    let registry = Registry::with_limits(seed, config.limits()).with_mesh(config.mesh.is_some());
    let (mut tasks, mut parts) = (JoinSet::new(), JoinSet::new());
    // What SIGHUP has read again.
    let rereads = [Rc::new(Notify::new()), Rc::new(Notify::new())];
    let api = match &config.source {
        Source::Kube => Some(source::kube::client(&config.kube).await?),
        _ => None,
    };
    let mesh = match &config.mesh {
        Some(settings) => {
            let (reread, pods) = (rereads[1].clone(), inheritance.pods);
            let (mesh, of_mesh) = mesh::Mesh::start(settings, kernel.tunnel_maps(), reread, api.clone(), pods)?;
            for (name, part) in of_mesh {
                parts.spawn_local_on(async move { part.await.with_context(|| format!("{name} failed")) }, outlasting);
            }
            mesh
        }
        None => mesh::Mesh::none(&kernel.tunnel_maps())?,
    };
    let core: Shared = Rc::new(RefCell::new(Core::new(registry, kernel, adopted, mesh)));
    core.borrow_mut().holder = inheritance.holder;
    if config.mesh.is_some() {
        spawn(&mut tasks, "mesh", mesh::tend(core.clone()));
    }
    if config.host {
        core.borrow_mut().enroll_host();
    }

    match &config.source {
        Source::File(path) => {
            let watch = source::file::watch(path.clone(), core.clone(), rereads[0].clone());
            spawn(&mut tasks, "file source", after_policies(core.clone(), watch));
        }
        Source::Stream(path) => {
            let listener = source::stream::listen(path)?;
            let serve = source::stream::serve(listener, core.clone());
            spawn(&mut tasks, "stream source", after_policies(core.clone(), serve));
        }
        Source::Kube => {
            if let Some(client) = api {
                let serve = source::kube::serve(client, config.kube.clone(), core.clone());
                spawn(&mut tasks, "kube source", after_policies(core.clone(), serve));
            }
        }
    }
    spawn(&mut tasks, "event ring", signal::watch(events, core.clone()));
    let admin_socket = admin::socket(&config.state_dir);
    let (queries, mut asked) = mpsc::channel(16);
    let metrics = match config.metrics {
        Some(at) => Some(
            crate::metrics::http::listen(at)
                .with_context(|| format!("metrics cannot be served at {at}: name another --metrics-address, or off"))?,
        ),
        None => None,
    };
    let reader = core.borrow().kernel.reader();
    let admin_server = admin::serve(&admin_socket, metrics, queries, reader)
        .with_context(|| format!("socket {}: cannot be made; name another --state-dir", admin_socket.display()))?;
    let (asked_core, asked_config, started) = (core.clone(), config.clone(), Instant::now());
    spawn(&mut tasks, "admin", async move {
        while let Some(query) = asked.recv().await {
            report::answer(query, &asked_core, &asked_config, started);
        }
        Ok(())
    });
    if let Some(logger) = logger {
        spawn(&mut tasks, "kernel log", kernel_log(logger));
    }
    let outcomes_core = core.clone();
    spawn(&mut tasks, "enrolment", async move {
        while let Some(outcome) = outcomes.recv().await {
            outcomes_core.borrow_mut().complete(outcome);
        }
        Ok(())
    });
    spawn(&mut tasks, "upkeep", upkeep(core.clone()));
    spawn(&mut tasks, "readiness", get_ready(core.clone(), config.clone(), ready_file.clone()));
    spawn(&mut tasks, "SIGHUP", async move {
        let mut hangup = signal(SignalKind::hangup())?;
        while hangup.recv().await.is_some() {
            info!("SIGHUP: reading the source again");
            rereads.iter().for_each(|reread| reread.notify_one());
        }
        Ok(())
    });
    info!(
        source = %config.source,
        layers = %config.layers,
        admin = %admin_socket.display(),
        "agent started; waiting for the first full state"
    );

    let ended = tokio::select! {
        signal = signals.stop() => Ok(Err(signal)),
        heir = door.heir() => Ok(Ok(heir)),
        Some(ended) = tasks.join_next() => Err(ended),
        Some(ended) = parts.join_next() => Err(ended),
    };
    if let (Some(settings), Ok(Err(_))) = (&config.mesh, &ended) {
        mesh::drain(&core, settings.drain).await;
    }
    tasks.shutdown().await;
    drop(ready_file);
    drop(door);
    let _ = std::fs::remove_file(&admin_socket);
    drop(admin_server);
    if let Source::Stream(path) = &config.source {
        let _ = std::fs::remove_file(path);
    }
    match ended {
        Ok(Err(signal)) => {
            info!(signal, "stopping");
            Ok(Served::Stopped)
        }
        Ok(Ok(heir)) => {
            info!(pid = heir.pid, "another agent takes over");
            let mut core = core.borrow_mut();
            let layout = core.kernel.layout().to_owned();
            Ok(Served::Replaced(heir, Estate { layout, mesh: std::mem::take(&mut core.mesh), _parts: parts }))
        }
        // Tasks run for as long as the agent does: whatever ended is broken.
        Err(ended) => {
            ended.context("a part of the agent panicked")??;
            bail!("a part of the agent ended by itself")
        }
    }
}

/// What is to be let into a pod is known before the pod is.
async fn after_policies(core: Shared, source: impl Future<Output = std::io::Result<()>>) -> std::io::Result<()> {
    mesh::policies_known(&core).await;
    source.await
}

fn spawn(
    tasks: &mut JoinSet<anyhow::Result<()>>,
    name: &'static str,
    work: impl Future<Output = std::io::Result<()>> + 'static,
) {
    tasks.spawn_local(async move { work.await.with_context(|| format!("{name} failed")) });
}

async fn upkeep(core: Shared) -> std::io::Result<()> {
    let mut sweep = tokio::time::interval(SWEEP);
    let mut check = tokio::time::interval(CHECK);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = sweep.tick() => match core.borrow_mut().kernel.sweep(monotonic_ns()) {
                Ok(swept) if swept.removed > 0 => debug!(removed = swept.removed, seen = swept.seen, "ended flows swept"),
                Ok(_) => {}
                Err(error) => warn!(%error, "sweeping ended flows"),
            },
            _ = check.tick() => core.borrow_mut().check(),
        }
    }
}

/// Ready is proved: programs attached, the pods of the first state tried, each hook passed by a
/// connect of its own.
async fn get_ready(core: Shared, config: Config, file: Option<Rc<ReadyFile>>) -> std::io::Result<()> {
    let (mut phase, enrolled) = {
        let core = core.borrow();
        (core.phase.subscribe(), core.enrolled.clone())
    };
    // The sender lives in `core`.
    let _ = phase.wait_for(|phase| *phase >= Phase::Active).await;
    loop {
        let changed = enrolled.notified();
        if core.borrow().pods_settled() {
            break;
        }
        changed.await;
    }
    while config.canary && !prove::hooks(&core).await {
        tokio::time::sleep(PROVE_AGAIN).await;
    }
    core.borrow().phase.send_replace(Phase::Ready);
    info!("ready");
    if let Some(file) = file {
        file.write();
    }
    let _ = tokio::time::timeout(JOIN_WITHIN, mesh::joined(&core)).await;
    core.borrow_mut().mesh.renounce();
    let holder = core.borrow_mut().holder.take();
    if let Some(holder) = holder {
        holder.serving();
    }
    std::future::pending().await
}

async fn kernel_log(logger: aya_log::EbpfLogger<&'static dyn log::Log>) -> std::io::Result<()> {
    // SAFETY: the logger keeps its descriptor, always the same one, for as long as it lives.
    let logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
    let mut logger = logger.map_err(std::io::Error::other)?;
    loop {
        let mut ready = logger.readable_mut().await?;
        ready.get_inner_mut().flush();
        ready.clear_ready();
    }
}

/// One agent per state directory: its sockets' names are this one's while the lock is held. None: another one's.
fn try_lock(state_dir: &Path) -> anyhow::Result<Option<File>> {
    let make = || {
        std::fs::create_dir_all(state_dir)?;
        File::create(state_dir.join("lock"))
    };
    let file = make().with_context(|| {
        format!("state directory {}: cannot be made; name another with --state-dir", state_dir.display())
    })?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("state directory {}: cannot be locked", state_dir.display()))
        }
    }
}

fn start_logging(format: LogFormat, level: &str) -> anyhow::Result<()> {
    use tracing_subscriber::EnvFilter;
    // aya says what it does; who runs the agent asks about hitless.
    let plain = level.parse::<tracing::Level>().is_ok();
    let filter = if plain { format!("{level},aya=warn,aya_obj=warn") } else { level.to_owned() };
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        anyhow::anyhow!(
            "log-level is {level:?} ({error}); allowed are error, warn, info, debug, trace, or a filter such as \
             dataplane_user::source=debug,info"
        )
    })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    match format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
    Ok(())
}

/// Tells whoever waits for it that the agent is ready; gone with the agent.
struct ReadyFile(std::path::PathBuf);

impl ReadyFile {
    fn new(path: std::path::PathBuf) -> Rc<Self> {
        // Of an agent that was killed.
        let _ = std::fs::remove_file(&path);
        Rc::new(Self(path))
    }

    fn write(&self) {
        let write = |path: &Path| {
            let partial = path.with_extension("partial");
            std::fs::write(&partial, format!("{}\n", std::process::id()))?;
            std::fs::rename(&partial, path)
        };
        if let Err(error) = write(&self.0) {
            warn!(%error, path = %self.0.display(), "ready file not written");
        }
    }
}

impl Drop for ReadyFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
