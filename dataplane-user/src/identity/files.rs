//! Certificates that somebody else puts into a directory: cert-manager, a script, a mounted Secret.
//!
//! Each directory below it, and the directory itself, may hold `tls.crt` (leaf first), `tls.key` and `ca.crt`. Whose they
//! are is read from the certificate, so the directories' names are free. A directory without `ca.crt` takes the one of
//! the directory above. The roots of a trust domain are those of all its directories together.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::SystemTime,
};

use rustls_pki_types::CertificateDer;
use tokio::sync::watch;
use tracing::{info, warn};

use super::{
    Authority, BadSpiffeId, Credential, Flaw, IssueError, Issued, Issuing, SecretKey, SpiffeId, TrustBundle,
    authority::Task,
    credential::{parse, the_uri, validity},
    pem,
    watch::{follow, places},
};

/// Certificates by identity from a directory, which is read again when it changes.
pub struct Files {
    name: String,
    state: Arc<RwLock<World>>,
    news: watch::Receiver<u64>,
    _follow: Task,
}

/// What was read last, by directory.
#[derive(Default, PartialEq)]
struct World {
    pairs: BTreeMap<PathBuf, Arc<Pair>>,
    problems: BTreeMap<PathBuf, String>,
}

#[derive(PartialEq)]
struct Pair {
    id: SpiffeId,
    chain: Vec<CertificateDer<'static>>,
    key: SecretKey,
    roots: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

impl Files {
    /// Within a runtime of tokio, as it follows the directory from then on. The directory may still be empty.
    pub fn open(directory: &Path) -> Self {
        let state = Arc::new(RwLock::new(World::default()));
        let (tell, news) = watch::channel(0);
        let (path, current) = (directory.to_owned(), state.clone());
        look(&path, &current, &tell);
        let follow = Task::spawn(async move {
            follow(|| all_places(&path), || look(&path, &current, &tell)).await;
        });
        Self { name: format!("directory {}", directory.display()), state, news, _follow: follow }
    }
}

impl Authority for Files {
    fn name(&self) -> &str {
        &self.name
    }

    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Issuing<'a> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let issued = state.issue(id).ok_or_else(|| {
            let mut reason = format!("there is none in {}", self.name);
            for (directory, problem) in state.problems.iter().take(3) {
                reason += &format!("; {} is not taken: {problem}", directory.display());
            }
            IssueError::refused(id, reason, "put its tls.crt, tls.key and ca.crt into a directory there")
        });
        Box::pin(std::future::ready(issued))
    }

    fn news(&self) -> Option<watch::Receiver<u64>> {
        Some(self.news.clone())
    }
}

fn look(directory: &Path, current: &RwLock<World>, tell: &watch::Sender<u64>) {
    let mut current = current.write().unwrap_or_else(PoisonError::into_inner);
    let new = World::read(directory, &current);
    if *current == new {
        return;
    }
    for (place, problem) in &new.problems {
        if current.problems.get(place) != Some(problem) {
            warn!(directory = %place.display(), problem, "certificate not taken");
        }
    }
    info!(directory = %directory.display(), certificates = new.good().count(), "certificates read");
    *current = new;
    drop(current);
    tell.send_modify(|count| *count += 1);
}

impl World {
    fn read(directory: &Path, before: &Self) -> Self {
        let mut world = Self::default();
        for place in holders(directory) {
            match read_pair(&place, directory) {
                Ok(pair) => {
                    world.pairs.insert(place, Arc::new(pair));
                }
                Err(problem) => {
                    // A file that is broken takes no root away.
                    if let Some(pair) = before.pairs.get(&place) {
                        world.pairs.insert(place.clone(), pair.clone());
                    }
                    world.problems.insert(place, problem);
                }
            }
        }
        world
    }

    fn good(&self) -> impl Iterator<Item = &Arc<Pair>> {
        self.pairs.iter().filter(|(place, _)| !self.problems.contains_key(*place)).map(|(_, pair)| pair)
    }

    /// The one that is valid for longest, with the roots of all directories of its trust domain.
    fn issue(&self, id: &SpiffeId) -> Option<Issued> {
        let pair = self.good().filter(|pair| pair.id == *id).max_by_key(|pair| pair.not_after)?;
        let domain = self.pairs.values().filter(|other| other.id.trust_domain() == id.trust_domain());
        let roots = domain.flat_map(|other| other.roots.iter().cloned()).collect();
        Some(Issued { chain: pair.chain.clone(), key: pair.key.clone(), roots })
    }
}

fn read_pair(directory: &Path, above: &Path) -> Result<Pair, String> {
    let (certificate, key) = (directory.join(pem::CERTIFICATE), directory.join(pem::KEY));
    let chain = pem::certificates(&pem::read(&certificate)?, &certificate.display())?;
    let key = pem::key(&pem::read(&key)?, &key.display())?;
    let own = directory.join(pem::ROOTS);
    let roots = if own.exists() { own } else { above.join(pem::ROOTS) };
    let roots = pem::certificates(&pem::read(&roots)?, &roots.display())?;
    let issued = Issued { chain, key, roots };
    let credential =
        whose(&issued, SystemTime::now()).map_err(|problem| format!("{}: {problem}", certificate.display()))?;
    let not_after = validity(&parse(&issued.chain[0], "the leaf").map_err(|flaw| flaw.to_string())?).1;
    let Issued { chain, key, roots } = issued;
    Ok(Pair { id: credential.id, chain, key, roots, not_after })
}

/// Reads from the certificate whose it is, and takes it if the peers would.
pub(crate) fn whose(issued: &Issued, now: SystemTime) -> Result<Credential, String> {
    let Issued { chain, key, roots } = issued;
    let said = |flaw: Flaw| flaw.to_string();
    let leaf = parse(chain.first().ok_or(Flaw::EmptyChain).map_err(said)?, "the leaf").map_err(said)?;
    let id: SpiffeId = the_uri(&leaf).map_err(said)?.parse().map_err(|bad: BadSpiffeId| bad.to_string())?;
    let trust = TrustBundle::new(id.trust_domain(), roots.clone()).map_err(said)?;
    let issued = Issued { chain: chain.clone(), key: key.clone(), roots: roots.clone() };
    Credential::check(&id, issued, Arc::new(trust), now).map_err(said)
}

/// The directory and those below it that hold a certificate. Kubernetes' own (`..data`) are not for readers.
fn holders(directory: &Path) -> Vec<PathBuf> {
    let mut holders = below(directory);
    holders.push(directory.to_owned());
    holders.retain(|place| place.join(pem::CERTIFICATE).exists());
    holders.sort();
    holders
}

fn below(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let visible = entries.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'));
    visible.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn all_places(directory: &Path) -> Vec<PathBuf> {
    let mut all = places(directory, pem::CERTIFICATE);
    for place in below(directory) {
        all.extend(places(&place, pem::CERTIFICATE));
    }
    all.sort();
    all.dedup();
    all
}

#[cfg(test)]
mod tests;
