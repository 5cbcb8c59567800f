//! Tells when files in some directories may have changed.
//!
//! Directories are watched and not files, for the same reasons as in `source::file`: files are replaced by renaming, and
//! those of a mounted Secret are symbolic links through `..data`.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::StreamExt as _;
use inotify::{EventStream, Inotify, WatchMask};
use tracing::warn;

/// Without being told: file systems without notification, directories that are replaced as a whole.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// A certificate and its key are written one after the other.
const SETTLE: Duration = Duration::from_millis(100);

/// Calls `look` each time something may have changed in one of the directories. Does not return.
pub async fn follow(directories: impl Fn() -> Vec<PathBuf>, mut look: impl FnMut()) {
    let mut watched = Vec::new();
    let mut events = None;
    loop {
        let now: Vec<_> = directories().into_iter().filter_map(|path| Some((inode(&path)?, path))).collect();
        if now != watched || events.is_none() {
            let opened = open(now.iter().map(|(_, path)| path.as_path()));
            if let Err(error) = &opened
                && now != watched
            {
                warn!(%error, "directories of certificates cannot be watched; looking every 5 s instead");
            }
            (events, watched) = (opened.ok(), now);
        }
        // After the watch was set up, so that nothing is missed in between.
        look();
        if tokio::time::timeout(LOOK_AGAIN, changed(&mut events)).await.is_ok() {
            tokio::time::sleep(SETTLE).await;
        }
    }
}

/// The directory itself, and the one that a file in it really lies in.
pub fn places(directory: &Path, file: &str) -> Vec<PathBuf> {
    let target = fs::canonicalize(directory.join(file)).ok();
    let real = target.as_deref().and_then(Path::parent).map(Path::to_owned);
    let mut places = vec![directory.to_owned()];
    places.extend(real.filter(|real| real != directory));
    places
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

async fn changed(events: &mut Option<EventStream<[u8; 4096]>>) {
    match events {
        Some(stream) => {
            if !matches!(stream.next().await, Some(Ok(_))) {
                *events = None;
            }
        }
        None => std::future::pending().await,
    }
}

fn open<'a>(directories: impl Iterator<Item = &'a Path>) -> io::Result<EventStream<[u8; 4096]>> {
    let inotify = Inotify::init()?;
    let mask =
        WatchMask::CLOSE_WRITE | WatchMask::MOVED_TO | WatchMask::MOVED_FROM | WatchMask::CREATE | WatchMask::DELETE;
    for directory in directories {
        inotify.watches().add(directory, mask)?;
    }
    inotify.into_event_stream([0; 4096])
}
