//! A file of desired state, watched. A bad one changes nothing.
//!
//! The directory is watched, not the file: editors and config tools replace files by renaming, and
//! a ConfigMap's files are symbolic links through `..data`, which is what changes. What counts is
//! whether the file that the path now leads to is another one.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_util::StreamExt;
use inotify::{EventStream, Inotify, WatchMask};
use tokio::sync::Notify;
use tracing::{debug, warn};

use super::parse;
use crate::{agent::core::Shared, kernel::monotonic_ns, model::Event};

/// When the file is looked at without being told: directories that are replaced as a whole, and
/// file systems without notification.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// How long a file that nobody announced must have been left alone.
pub(super) const SETTLE: Duration = Duration::from_millis(100);

/// Which file a path leads to, and in which state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Version {
    target: PathBuf,
    inode: (u64, u64),
    modified: (i64, i64),
    size: u64,
}

impl Version {
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let target = fs::canonicalize(path)?;
        let meta = fs::metadata(&target)?;
        Ok(Self {
            target,
            inode: (meta.dev(), meta.ino()),
            modified: (meta.mtime(), meta.mtime_nsec()),
            size: meta.len(),
        })
    }

    /// Was it written within [`SETTLE`]?
    pub(super) fn fresh(&self) -> bool {
        let modified = Duration::new(self.modified.0.max(0) as u64, self.modified.1.max(0) as u32);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        now.checked_sub(modified).is_none_or(|age| age < SETTLE) && now + SETTLE > modified
    }
}

/// Follows the file for as long as the agent runs. `reread` is rung by SIGHUP.
pub async fn watch(path: PathBuf, core: Shared, reread: Rc<Notify>) -> io::Result<()> {
    let mut watcher = Watcher::new(directories(&path));
    let mut taken = None;
    let (mut forced, mut told) = (true, true);
    loop {
        match Version::of(&path) {
            Ok(version) if !forced && !told && version.fresh() => {
                // Found by looking: it may be in the middle of being written.
                tokio::time::sleep(SETTLE).await;
                continue;
            }
            Ok(version) if forced || taken.as_ref() != Some(&version) => {
                taken = Some(version);
                take(&path, &core).await?;
                // It may have changed while it was read.
                forced = false;
                continue;
            }
            Ok(_) => {}
            Err(error) => {
                taken = None;
                core.borrow_mut().source_failed(format!("file {}: {error}", path.display()));
            }
        }
        (forced, told) = tokio::select! {
            () = watcher.changed() => (false, true),
            () = reread.notified() => (true, true),
            () = tokio::time::sleep(LOOK_AGAIN) => {
                watcher.renew(directories(&path));
                (false, false)
            }
        };
    }
}

/// Reads, parses and applies the file.
async fn take(path: &Path, core: &Shared) -> io::Result<()> {
    let read_ns = monotonic_ns();
    let from = path.to_owned();
    // Megabytes of YAML take a while: beside the agent's thread.
    let parsed = tokio::task::spawn_blocking(move || {
        let text = fs::read_to_string(&from).map_err(|error| format!("file {}: {error}", from.display()))?;
        parse::snapshot(&from, &text).map_err(|mistake| format!("{}:{mistake}", from.display()))
    })
    .await?;
    let mut core = core.borrow_mut();
    match parsed {
        Ok(state) => {
            debug!(path = %path.display(), "file read");
            core.apply(Event::Sync { state }, read_ns);
        }
        Err(problem) => core.source_failed(problem),
    }
    Ok(())
}

/// The file's directory, and that of what it links to.
fn directories(path: &Path) -> Vec<PathBuf> {
    let mut directories = vec![parent(path)];
    if let Ok(target) = fs::canonicalize(path) {
        directories.push(parent(&target));
    }
    directories.dedup();
    directories
}

/// inotify on directories.
pub(super) struct Watcher {
    events: Option<EventStream<[u8; 4096]>>,
    directories: Vec<PathBuf>,
    mask: WatchMask,
}

impl Watcher {
    fn new(directories: Vec<PathBuf>) -> Self {
        // Not CREATE, not MODIFY: a file that is being written is looked at when it is closed.
        Self::with_mask(directories, WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO)
    }

    /// For whom a file that goes means something, too.
    pub(super) fn with_removals(directories: Vec<PathBuf>) -> Self {
        let removals = WatchMask::DELETE | WatchMask::MOVED_FROM | WatchMask::DELETE_SELF | WatchMask::MOVE_SELF;
        Self::with_mask(directories, WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | removals)
    }

    fn with_mask(directories: Vec<PathBuf>, mask: WatchMask) -> Self {
        let mut this = Self { events: None, directories: Vec::new(), mask };
        this.renew(directories);
        this
    }

    /// Watches afresh when the directories are others now.
    pub(super) fn renew(&mut self, directories: Vec<PathBuf>) {
        if self.events.is_some() && directories == self.directories {
            return;
        }
        match open(&directories, self.mask) {
            Ok(events) => self.events = Some(events),
            Err(error) => {
                if self.events.take().is_some() || self.directories.is_empty() {
                    let paths =
                        directories.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
                    warn!(%error, paths, "cannot watch; looking every 2 s instead");
                }
            }
        }
        self.directories = directories;
    }

    /// Something happened in the directories.
    pub(super) async fn changed(&mut self) {
        match &mut self.events {
            Some(events) => {
                if !matches!(events.next().await, Some(Ok(_))) {
                    self.events = None;
                }
            }
            None => std::future::pending().await,
        }
    }
}

fn open(directories: &[PathBuf], mask: WatchMask) -> io::Result<EventStream<[u8; 4096]>> {
    let inotify = Inotify::init()?;
    let mut last = Ok(());
    let mut any = false;
    for directory in directories {
        match inotify.watches().add(directory, mask) {
            Ok(_) => any = true,
            Err(error) => last = Err(error),
        }
    }
    if !any {
        last?;
    }
    inotify.into_event_stream([0; 4096])
}

pub(super) fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
