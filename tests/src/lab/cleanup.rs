//! Taking a lab down: everything it made is found again by its identifier.

use std::{
    fmt, fs, io,
    os::fd::{IntoRawFd, OwnedFd},
    path::{Path, PathBuf},
    str::FromStr,
    sync::{
        Mutex, Once,
        atomic::{AtomicI32, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MntFlags, umount2},
    sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
};

use super::net;

/// Which lab: the process that owns it, and which of its labs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LabId {
    pub pid: u32,
    pub number: u32,
}

impl fmt::Display for LabId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.pid, self.number)
    }
}

impl FromStr for LabId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (pid, number) = text.split_once('x').ok_or(())?;
        Ok(Self { pid: pid.parse().map_err(drop)?, number: number.parse().map_err(drop)? })
    }
}

const DIR_PREFIX: &str = "hitless-lab-";
const NETNS_PREFIX: &str = "hl";

impl LabId {
    pub fn dir(&self) -> PathBuf {
        std::env::temp_dir().join(format!("{DIR_PREFIX}{self}"))
    }

    pub fn cgroup(&self) -> Result<PathBuf> {
        Ok(cgroup2_root()?.join(format!("{DIR_PREFIX}{self}")))
    }

    pub fn netns(&self, name: &str) -> String {
        format!("{NETNS_PREFIX}{self}-{name}")
    }
}

/// Where cgroup2 is mounted: `/sys/fs/cgroup`, or elsewhere on a host that also has version 1.
pub fn cgroup2_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    mounts
        .lines()
        .filter_map(|line| {
            let (place, source) = line.split_once(" - ")?;
            source.starts_with("cgroup2 ").then(|| place.split(' ').nth(4).map(PathBuf::from))?
        })
        .next()
        .context("no cgroup2 is mounted: mount one with `mount -t cgroup2 none /sys/fs/cgroup/unified`")
}

/// Where the hierarchies of cgroup version 1 are mounted: a kubelet makes its groups in each of them.
pub(crate) fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    fields.filter(|fields| fields.get(2) == Some(&"cgroup")).map(|fields| PathBuf::from(fields[1])).collect()
}

static REGISTERED: Mutex<Vec<LabId>> = Mutex::new(Vec::new());
static INTERRUPTED: AtomicI32 = AtomicI32::new(-1);

/// The identifier of a new lab of this process, removed when the process is told to stop.
pub(crate) fn claim() -> Result<LabId> {
    static LABS: AtomicU32 = AtomicU32::new(0);
    let id = LabId { pid: std::process::id(), number: LABS.fetch_add(1, Ordering::Relaxed) };
    register(id)?;
    Ok(id)
}

fn register(id: LabId) -> Result<()> {
    static HANDLER: Once = Once::new();
    let mut result = Ok(());
    HANDLER.call_once(|| {
        // SAFETY: the handler is a function of this program.
        unsafe { libc::atexit(at_exit) };
        result = watch_signals();
    });
    result?;
    REGISTERED.lock().expect("no panic while locked").push(id);
    Ok(())
}

/// Labs in statics are never dropped: they go with the process.
extern "C" fn at_exit() {
    if std::env::var_os("HITLESS_LAB_KEEP").is_none() {
        remove_all();
    }
}

fn remove_all() {
    // Not locked while removing, which takes the lock itself.
    let ids = REGISTERED.lock().map(|ids| ids.clone()).unwrap_or_default();
    ids.into_iter().for_each(remove);
}

extern "C" fn on_signal(signal: libc::c_int) {
    let fd = INTERRUPTED.load(Ordering::Relaxed);
    let byte = signal as u8;
    // SAFETY: write(2) is async-signal-safe; the pipe is never closed.
    unsafe { libc::write(fd, std::ptr::from_ref(&byte).cast(), 1) };
}

fn watch_signals() -> Result<()> {
    let (reader, writer): (OwnedFd, OwnedFd) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    INTERRUPTED.store(writer.into_raw_fd(), Ordering::Relaxed);
    std::thread::Builder::new().name("lab-cleanup".into()).spawn(move || {
        let mut byte = [0u8];
        while nix::unistd::read(&reader, &mut byte) == Err(nix::errno::Errno::EINTR) {}
        eprintln!("\nstopped by signal {}: taking the lab down", byte[0]);
        remove_all();
        std::process::exit(128 + i32::from(byte[0]));
    })?;
    let action = SigAction::new(SigHandler::Handler(on_signal), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only writes a byte to a pipe.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("handle {signal}"))?;
    }
    Ok(())
}

/// Take down all that carries this identifier. Goes on after a failure, and says what is left.
pub fn remove(id: LabId) {
    REGISTERED.lock().unwrap_or_else(std::sync::PoisonError::into_inner).retain(|other| *other != id);
    let cgroup = id.cgroup();
    if let Ok(cgroup) = &cgroup {
        kill_cgroup(cgroup);
    }
    for (name, _) in leftovers_netns().into_iter().filter(|(_, owner)| *owner == id) {
        report(&format!("delete network namespace {name}"), net::delete_netns(&name));
    }
    let bpffs = id.dir().join("bpf");
    match umount2(&bpffs, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::errno::Errno::ENOENT | nix::errno::Errno::EINVAL) => {}
        Err(error) => eprintln!("could not unmount {}: {error}", bpffs.display()),
    }
    if let Ok(cgroup) = &cgroup {
        report(&format!("remove cgroup {}", cgroup.display()), remove_cgroup(cgroup).map_err(Into::into));
    }
    for cgroup in hierarchies().into_iter().map(|root| root.join(format!("{DIR_PREFIX}{id}"))) {
        report(&format!("remove cgroup {}", cgroup.display()), remove_cgroup(&cgroup).map_err(Into::into));
    }
    if id.dir().exists() {
        report(&format!("remove {}", id.dir().display()), fs::remove_dir_all(id.dir()).map_err(Into::into));
    }
}

/// Remove what labs left behind whose process is gone. Returns them.
pub fn sweep() -> Result<Vec<LabId>> {
    let in_dir = |dir: &Path| -> Vec<LabId> {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.filter_map(|e| e.file_name().to_str()?.strip_prefix(DIR_PREFIX)?.parse().ok()).collect()
    };
    let mut ids = in_dir(&std::env::temp_dir());
    ids.extend(in_dir(&cgroup2_root()?));
    ids.extend(leftovers_netns().into_iter().map(|(_, id)| id));
    ids.sort_unstable_by_key(|id| (id.pid, id.number));
    ids.dedup();
    ids.retain(|id| start_time(id.pid.cast_signed()).is_none());
    for id in &ids {
        remove(*id);
    }
    Ok(ids)
}

/// When a process started, in clock ticks since boot: its number may come again, this does not. `None` once it ended,
/// even if nobody has waited for it yet.
pub(crate) fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in brackets, may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next(), Some("Z" | "X")) {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn leftovers_netns() -> Vec<(String, LabId)> {
    let entries = fs::read_dir(net::NETNS_DIR).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let id = name.strip_prefix(NETNS_PREFIX)?.split_once('-')?.0.parse().ok()?;
            Some((name, id))
        })
        .collect()
}

fn report(what: &str, result: Result<()>) {
    if let Err(error) = result {
        eprintln!("could not {what}: {error:#}");
    }
}

/// End every process of a cgroup subtree (all were started by the lab: nothing else enters it).
pub(super) fn kill_cgroup(cgroup: &Path) {
    if !cgroup.exists() {
        return;
    }
    if fs::write(cgroup.join("cgroup.kill"), "1").is_err() {
        // Before Linux 5.14 there is no cgroup.kill: one by one.
        for dir in subtree(cgroup) {
            for pid in fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default().lines() {
                if let Ok(pid) = pid.parse() {
                    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
        }
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while populated(cgroup) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn populated(cgroup: &Path) -> bool {
    fs::read_to_string(cgroup.join("cgroup.events")).is_ok_and(|events| events.contains("populated 1"))
}

/// Children before parents.
fn subtree(cgroup: &Path) -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            dirs.extend(subtree(&entry.path()));
        }
    }
    dirs.push(cgroup.to_owned());
    dirs
}

pub(super) fn remove_cgroup(cgroup: &Path) -> io::Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    for dir in subtree(cgroup) {
        let deadline = Instant::now() + Duration::from_secs(2);
        // A killed process leaves its cgroup a moment after it is no longer counted.
        while let Err(error) = fs::remove_dir(&dir) {
            if error.raw_os_error() != Some(libc::EBUSY) || Instant::now() > deadline {
                return Err(error);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    Ok(())
}

/// Wait until this process is told to stop, then take its labs down and exit.
pub fn wait_for_signal() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) < 0 {
        bail!("no lab is registered");
    }
    loop {
        std::thread::park();
    }
}
