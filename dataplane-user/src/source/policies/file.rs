//! Files of policies, watched. A file that can't be read leaves what it said before in force; the others go on.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use tokio::sync::Notify;
use tracing::{debug, warn};

use super::change;
use crate::{
    policy::{
        Enforcement, Origin,
        file::{self, Contents},
        object::{Kind, Parsed},
    },
    source::file::{SETTLE, Version, Watcher, parent},
};

/// When the files are looked at without being told: file systems without notification.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// Both kinds are a file source's.
const KINDS: [Kind; 2] = [Kind::AuthorizationPolicy, Kind::PeerAuthentication];

/// Follows a file or a directory of files for as long as the agent runs. `reread` is rung by SIGHUP. From this call on,
/// and not only from the first poll, nothing is settled until the files were read.
pub fn watch(
    path: PathBuf,
    enforcement: Arc<Enforcement>,
    reread: Rc<Notify>,
) -> impl Future<Output = std::io::Result<()>> {
    enforcement.change(|policies| policies.await_source(Origin::File, &KINDS));
    follow(Files::new(path), enforcement, reread)
}

async fn follow(mut files: Files, enforcement: Arc<Enforcement>, reread: Rc<Notify>) -> std::io::Result<()> {
    let mut watcher = Watcher::with_removals(directories(&files.path));
    let (mut forced, mut told) = (true, true);
    loop {
        let looked;
        // Reading takes its time: beside the agent's thread.
        (files, looked) = tokio::task::spawn_blocking(move || {
            let looked = files.look(forced, told);
            (files, looked)
        })
        .await?;
        match looked {
            Looked::Writing => {
                tokio::time::sleep(SETTLE).await;
                continue;
            }
            Looked::Same => {}
            Looked::Changed => {
                files.tell();
                let (objects, complete) = (files.objects(), files.all_read());
                change(&enforcement, Origin::File, |policies| {
                    let mut outcome = policies.sync(Origin::File, &KINDS, objects);
                    if !complete {
                        outcome.changed |= policies.await_source(Origin::File, &KINDS).changed;
                    }
                    outcome
                });
                // They may have changed while they were read.
                forced = false;
                continue;
            }
        }
        (forced, told) = tokio::select! {
            () = watcher.changed() => (false, true),
            () = reread.notified() => (true, true),
            () = tokio::time::sleep(LOOK_AGAIN) => (false, false),
        };
        watcher.renew(directories(&files.path));
    }
}

/// Where something happens when the files change: a ConfigMap's are links into a directory that is replaced.
fn directories(path: &Path) -> Vec<PathBuf> {
    let mut found = if path.is_dir() { vec![path.to_owned()] } else { vec![parent(path)] };
    if let Ok(target) = std::fs::canonicalize(path) {
        found.push(if target.is_dir() { target } else { parent(&target) });
    }
    found.dedup();
    found
}

enum Looked {
    Same,
    Changed,
    /// Found by looking, and in the middle of being written.
    Writing,
}

/// What was read of each file.
struct Files {
    path: PathBuf,
    known: BTreeMap<PathBuf, Known>,
    /// Why the directory can't be read.
    failure: Option<String>,
    told: BTreeSet<String>,
    /// What was found is what was told.
    complete: bool,
    /// The path was there once.
    found: bool,
}

struct Known {
    version: Option<Version>,
    contents: Contents,
    failure: Option<String>,
    /// It could be read once.
    read: bool,
}

impl Files {
    fn new(path: PathBuf) -> Self {
        Self { path, known: BTreeMap::new(), failure: None, told: BTreeSet::new(), complete: false, found: false }
    }

    fn look(&mut self, forced: bool, told: bool) -> Looked {
        let found = match file::files(&self.path) {
            Ok(found) => found,
            Err(error) => {
                // What the files said stays in force: a volume that is not there is no wish to let everybody in.
                let failure = Some(error.to_string());
                return if self.failure == failure {
                    Looked::Same
                } else {
                    self.failure = failure;
                    Looked::Changed
                };
            }
        };
        self.found = true;
        let mut changed = forced | self.failure.take().is_some() | !std::mem::replace(&mut self.complete, true);
        let before = self.known.len();
        self.known.retain(|path, _| found.contains(path));
        changed |= self.known.len() != before;
        for path in found {
            let version = Version::of(&path).ok();
            if !forced && self.known.get(&path).is_some_and(|known| version.is_some() && known.version == version) {
                continue;
            }
            if !forced && !told && version.as_ref().is_some_and(Version::fresh) {
                // What was read of the others so far is still to be told.
                self.complete = false;
                return Looked::Writing;
            }
            changed = true;
            self.read(path, version);
        }
        if changed { Looked::Changed } else { Looked::Same }
    }

    fn read(&mut self, path: PathBuf, version: Option<Version>) {
        let read = file::read_file(&path);
        let known = self.known.entry(path).or_insert(Known {
            version: None,
            contents: Contents::default(),
            failure: None,
            read: false,
        });
        known.version = version;
        match read {
            Ok(contents) => {
                known.contents = contents;
                known.failure = None;
                known.read = true;
            }
            Err(error) => known.failure = Some(error.to_string()),
        }
    }

    fn objects(&self) -> Vec<Parsed> {
        self.known.values().flat_map(|known| known.contents.objects.iter().cloned()).collect()
    }

    /// Nothing is left of which it is not known what it forbids.
    fn all_read(&self) -> bool {
        self.found && self.known.values().all(|known| known.read)
    }

    /// Each complaint once, until it is gone.
    fn tell(&mut self) {
        let mut now = BTreeSet::new();
        let instead =
            |read: bool| if read { "what it said before stays in force" } else { "what it forbids is not known yet" };
        if let Some(failure) = &self.failure {
            now.insert(format!("{failure}; {}", instead(self.found)));
        }
        for (path, known) in &self.known {
            if let Some(failure) = &known.failure {
                now.insert(format!("{failure}; {}", instead(known.read)));
            }
            let unnamed = known.contents.unnamed.iter().map(|reason| format!("{}: {reason}", path.display()));
            now.extend(unnamed);
            if !known.contents.passed_over.is_empty() {
                debug!(path = %path.display(), kinds = known.contents.passed_over.join(", "), "objects that are no policies");
            }
        }
        for complaint in now.difference(&self.told) {
            warn!(reason = complaint, "policy file refused");
        }
        self.told = now;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::policy::{Mode, Workload};

    fn policy(name: &str, mode: &str) -> String {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{selector: {{matchLabels: {{app: {name}}}}}, mtls: {{mode: {mode}}}}}\n"
        )
    }

    fn mode(enforcement: &Enforcement, app: &str) -> Mode {
        let labels = [("app".into(), app.into())].into();
        let workload =
            Workload { name: format!("shop/{app}").into(), namespace: "shop".into(), labels, policies: Vec::new() };
        enforcement.of(&workload).mode(80)
    }

    #[tokio::test]
    async fn a_file_that_was_never_read_leaves_it_open_what_is_forbidden() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("policies.yaml");
        let enforcement = Arc::new(Enforcement::default());
        let following = watch(path.clone(), enforcement.clone(), Rc::new(Notify::new()));
        let checks = async {
            tokio::time::sleep(SETTLE).await;
            assert!(!enforcement.snapshot().settled(), "there is no such file");
            fs::write(&path, "kind: [").unwrap();
            tokio::time::sleep(SETTLE * 5).await;
            assert!(!enforcement.snapshot().settled(), "it can't be read");
            fs::write(&path, policy("a", "STRICT")).unwrap();
            tokio::time::timeout(Duration::from_secs(20), enforcement.settled()).await.expect("it can be read");
            assert_eq!(mode(&enforcement, "a"), Mode::Strict);
        };
        tokio::select! {
            ended = following => panic!("{ended:?}"),
            () = checks => {}
        }
    }

    /// Until the policies are as wanted, or far longer than it takes.
    async fn until(enforcement: &Enforcement, what: &str, wanted: impl Fn() -> bool) {
        let mut changes = enforcement.subscribe();
        let waited = tokio::time::timeout(Duration::from_secs(20), async {
            while !wanted() {
                changes.changed().await.unwrap();
            }
        });
        assert!(waited.await.is_ok(), "not in force: {what}");
    }

    #[tokio::test]
    async fn a_directory_is_followed_file_by_file_and_a_bad_one_keeps_what_it_said() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("policies");
        fs::create_dir(&directory).unwrap();
        let path = |name: &str| directory.join(name);
        fs::write(path("a.yaml"), policy("a", "STRICT")).unwrap();
        fs::write(path("b.yml"), policy("b", "STRICT")).unwrap();
        fs::write(path("ignored.txt"), policy("c", "STRICT")).unwrap();
        let enforcement = Arc::new(Enforcement::default());
        let reread = Rc::new(Notify::new());
        let following = watch(directory.clone(), enforcement.clone(), reread);
        let checks = async {
            until(&enforcement, "a and b", || mode(&enforcement, "a") == Mode::Strict).await;
            assert_eq!((mode(&enforcement, "b"), mode(&enforcement, "c")), (Mode::Strict, Mode::Permissive));
            // One file breaks, another changes: replaced by renaming, as editors do.
            fs::write(path("a.yaml"), "kind: [").unwrap();
            fs::write(path("b.partial"), policy("b", "DISABLE")).unwrap();
            fs::rename(path("b.partial"), path("b.yml")).unwrap();
            until(&enforcement, "b's change", || mode(&enforcement, "b") == Mode::Disable).await;
            assert_eq!(mode(&enforcement, "a"), Mode::Strict, "its last good version");
            fs::remove_file(path("a.yaml")).unwrap();
            until(&enforcement, "a is gone", || mode(&enforcement, "a") == Mode::Permissive).await;
            // The whole directory goes: nobody wished for that.
            fs::rename(&directory, parent.path().join("elsewhere")).unwrap();
            tokio::time::sleep(LOOK_AGAIN + LOOK_AGAIN / 2).await;
            assert_eq!(mode(&enforcement, "b"), Mode::Disable);
            fs::create_dir(&directory).unwrap();
            fs::write(path("d.yaml"), policy("d", "STRICT")).unwrap();
            until(&enforcement, "d in a new directory", || mode(&enforcement, "d") == Mode::Strict).await;
        };
        tokio::select! {
            ended = following => panic!("{ended:?}"),
            () = checks => {}
        }
    }
}
