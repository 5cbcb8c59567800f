//! The certificates in force. One task asks the authority; everybody else only looks, or waits for it.
//!
//! A certificate is replaced by a better one and by nothing else: what an authority gives is checked as a peer would,
//! and while it fails or gives nonsense the last good one stays until it expires.

use std::{
    collections::HashMap,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_util::{StreamExt as _, future::OptionFuture, stream::FuturesUnordered};
use serde::Serialize;
use tokio::sync::{Notify, watch};
use tracing::{debug, info, warn};

use super::{
    Authority, Credential, Flaw, IssueError, IssueErrorKind, Issued, Schedule, SpiffeId, Timing, TrustBundle,
    credential::{parse, validity},
};

/// Questions that are open at the authority at a time: a node that starts does not flood it.
const AT_ONCE: usize = 16;
/// The clock may be set, and the machine may have slept.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(86_400);
/// Before an authority expires it is said each day: a new root has to get to every node before it signs.
const AUTHORITY_ENDS: Duration = Duration::from_secs(30 * 86_400);

/// Held by all threads; [`Store::run`] must be running for certificates to come.
pub struct Store {
    authority: Arc<dyn Authority>,
    timing: Timing,
    table: RwLock<Table>,
    /// Rung when an identity is wanted that was not.
    wanted: Notify,
    renewed: AtomicU64,
    failed: AtomicU64,
}

#[derive(Default)]
struct Table {
    entries: HashMap<SpiffeId, Entry>,
    /// By trust domain.
    trust: HashMap<Arc<str>, Arc<TrustBundle>>,
    /// Distinguishes an entry from its predecessor of the same identity.
    next: u64,
}

struct Entry {
    number: u64,
    credential: Option<Arc<Credential>>,
    schedule: Schedule,
    error: Option<IssueError>,
    asking: bool,
    /// Something was new while the question was open: ask again.
    again: bool,
    /// It was said that it expires soon and is not renewed.
    warned: bool,
    /// Counts the answers; ends when the entry does.
    answers: watch::Sender<u64>,
}

/// An identity as `hitless certificates` shows it. Times are seconds since 1970.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub identity: String,
    pub state: State,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_before: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub not_after: Option<u64>,
    /// When the authority will be asked next.
    pub next: u64,
    /// How many roots are trusted in the identity's trust domain.
    pub roots: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum State {
    /// Wanted, and not there yet.
    Waiting,
    Valid,
    /// Valid, but the last try to renew it failed.
    Failing,
    Expired,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Valid => "valid",
            Self::Failing => "failing",
            Self::Expired => "expired",
        }
    }
}

/// What metrics count.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Certificates that were taken into use.
    pub renewed: u64,
    /// Questions without a usable answer.
    pub failed: u64,
    pub waiting: usize,
    /// Seconds until each certificate expires; negative when it has.
    pub expiry: Vec<(SpiffeId, i64)>,
    /// Seconds until the authority's own certificate expires, where it is known.
    pub authority_expiry: Option<i64>,
    /// Seconds until the last root of each trust domain expires.
    pub roots_expiry: Vec<(Arc<str>, i64)>,
}

/// A certificate that is not renewed while it ends.
struct Ending {
    id: SpiffeId,
    left: Duration,
    error: IssueError,
}

impl Store {
    pub fn new(authority: Arc<dyn Authority>, timing: Timing) -> Arc<Self> {
        Arc::new(Self {
            authority,
            timing,
            table: RwLock::default(),
            wanted: Notify::new(),
            renewed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        })
    }

    /// What is there and valid now; never asks anybody.
    pub fn get(&self, id: &SpiffeId) -> Option<Arc<Credential>> {
        self.get_at(id, SystemTime::now())
    }

    fn get_at(&self, id: &SpiffeId, now: SystemTime) -> Option<Arc<Credential>> {
        let table = self.read();
        let credential = table.entries.get(id)?.credential.as_ref()?;
        credential.valid_at(now).then(|| credential.clone())
    }

    /// The roots of a trust domain, as its authority named them last.
    pub fn trust(&self, trust_domain: &str) -> Option<Arc<TrustBundle>> {
        self.read().trust.get(trust_domain).cloned()
    }

    /// Has certificates made and renewed for these from now on.
    pub fn want<'a>(&self, ids: impl IntoIterator<Item = &'a SpiffeId>) {
        let now = SystemTime::now();
        let mut table = self.write();
        for id in ids {
            table.entry(id, now);
        }
        drop(table);
        self.wanted.notify_one();
    }

    /// A valid certificate: at once when there is one, else when the authority has answered. Callers of the same
    /// identity share one question, and none of them waits longer than `Timing::fetch_wait`.
    pub async fn fetch(&self, id: &SpiffeId) -> Result<Arc<Credential>, IssueError> {
        if let Some(credential) = self.get(id) {
            return Ok(credential);
        }
        let mut answers = self.write().entry(id, SystemTime::now()).answers.subscribe();
        self.wanted.notify_one();
        let waited = tokio::time::timeout(self.timing.fetch_wait, async {
            loop {
                match self.standing(id) {
                    Some(Ok(credential)) => return Ok(credential),
                    // Asked again only after its pause: nobody is kept waiting for that.
                    Some(Err(error)) if error.kind == IssueErrorKind::Refused => return Err(error),
                    Some(Err(_)) | None => {}
                }
                if answers.changed().await.is_err() {
                    return Err(IssueError::refused(
                        id,
                        "nothing here wants it any more",
                        "its pod has left this node",
                    ));
                }
            }
        })
        .await;
        waited.unwrap_or_else(|_| {
            let last = self.read().entries.get(id).and_then(|entry| entry.error.clone());
            Err(last.unwrap_or_else(|| {
                let reason = format!(
                    "{} has not answered within {} s",
                    self.authority.name(),
                    self.timing.fetch_wait.as_secs_f32()
                );
                IssueError::temporary(id, reason, "is it running and can it be reached from this node?")
            }))
        })
    }

    /// What can be said of an identity without asking. None: not yet anything.
    fn standing(&self, id: &SpiffeId) -> Option<Result<Arc<Credential>, IssueError>> {
        let table = self.read();
        let entry = table.entries.get(id)?;
        match &entry.credential {
            Some(credential) if credential.valid_at(SystemTime::now()) => Some(Ok(credential.clone())),
            _ => entry.error.clone().map(Err),
        }
    }

    /// Forgets the identities that are not wanted any more, and with them their keys.
    pub fn retain(&self, wanted: impl Fn(&SpiffeId) -> bool) {
        self.write().retain(wanted);
    }

    /// Every identity, sorted.
    pub fn report(&self) -> Vec<Report> {
        let now = SystemTime::now();
        let table = self.read();
        let mut reports: Vec<_> = table
            .entries
            .iter()
            .map(|(id, entry)| {
                let credential = entry.credential.as_ref();
                Report {
                    identity: id.to_string(),
                    state: entry.state(now),
                    serial: credential.map(|credential| credential.serial.clone()),
                    not_before: credential.map(|credential| seconds(credential.not_before)),
                    not_after: credential.map(|credential| seconds(credential.not_after)),
                    next: seconds(entry.schedule.due()),
                    roots: table.trust.get(id.trust_domain()).map_or(0, |trust| trust.roots.len()),
                    last_error: entry.error.as_ref().map(ToString::to_string),
                }
            })
            .collect();
        reports.sort_by(|a, b| a.identity.cmp(&b.identity));
        reports
    }

    /// Every identity with what is held of it, and why there is nothing newer; sorted.
    pub fn held(&self) -> Vec<(SpiffeId, Option<Arc<Credential>>, Option<String>)> {
        let table = self.read();
        let row = |(id, entry): (&SpiffeId, &Entry)| {
            (id.clone(), entry.credential.clone(), entry.error.as_ref().map(ToString::to_string))
        };
        let mut held: Vec<_> = table.entries.iter().map(row).collect();
        held.sort_by(|a, b| a.0.cmp(&b.0));
        held
    }

    pub fn numbers(&self) -> Numbers {
        let now = seconds(SystemTime::now()) as i64;
        let table = self.read();
        let expiry = table.entries.iter().filter_map(|(id, entry)| {
            let credential = entry.credential.as_ref()?;
            Some((id.clone(), seconds(credential.not_after) as i64 - now))
        });
        let mut expiry: Vec<_> = expiry.collect();
        expiry.sort();
        let roots = table.trust.iter().filter_map(|(domain, trust)| {
            let last =
                trust.certificates().iter().filter_map(|root| parse(root, "").ok()).map(|root| validity(&root).1);
            Some((domain.clone(), seconds(last.max()?) as i64 - now))
        });
        let mut roots_expiry: Vec<_> = roots.collect();
        roots_expiry.sort();
        Numbers {
            authority_expiry: self.authority.not_after().map(|end| seconds(end) as i64 - now),
            roots_expiry,
            renewed: self.renewed.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            waiting: table.entries.len() - expiry.len(),
            expiry,
        }
    }

    /// Asks, renews and follows the authority's news for as long as it is polled. One such task per store.
    pub async fn run(&self) {
        let mut news = self.authority.news();
        let mut open = FuturesUnordered::new();
        let mut said = None;
        loop {
            let now = SystemTime::now();
            for Ending { id, left, error } in self.ending(now) {
                warn!(%id, left_s = left.as_secs(), %error, "the certificate expires soon and is not renewed");
            }
            if let Some(left) = self.authority_ends(now, &mut said) {
                let authority = self.authority.name();
                warn!(
                    authority,
                    days = left.as_secs() / DAY.as_secs(),
                    "the authority expires, and all it signed with it"
                );
            }
            for (id, number) in self.take_due(now, AT_ONCE - open.len()) {
                open.push(async move {
                    let answer = tokio::time::timeout(self.timing.answer_wait, self.authority.issue(&id)).await;
                    let answer = answer.unwrap_or_else(|_| {
                        let wait = self.timing.answer_wait.as_secs_f32();
                        let reason = format!("{} has not answered within {wait} s", self.authority.name());
                        Err(IssueError::temporary(&id, reason, "is it running and can it be reached from this node?"))
                    });
                    (id, number, answer)
                });
            }
            let sleep = if open.len() < AT_ONCE { self.until_due(now) } else { LOOK_AGAIN };
            let told: OptionFuture<_> = news.as_mut().map(watch::Receiver::changed).into();
            tokio::select! {
                Some((id, number, answer)) = open.next() => {
                    self.answered(&id, number, answer, SystemTime::now(), fastrand::f64());
                }
                () = self.wanted.notified() => {}
                Some(told) = told => match told {
                    Ok(()) => self.write().hurry(SystemTime::now()),
                    Err(_) => news = None,
                },
                () = tokio::time::sleep(sleep) => {}
            }
        }
    }

    /// Certificates that are not renewed and have less than a quarter of their life left; each is told once.
    fn ending(&self, now: SystemTime) -> Vec<Ending> {
        let mut table = self.write();
        let ending = table.entries.iter_mut().filter(|(_, entry)| !entry.warned).filter_map(|(id, entry)| {
            let (credential, error) = (entry.credential.as_ref()?, entry.error.as_ref()?);
            let life = credential.not_after.duration_since(credential.not_before).unwrap_or_default();
            let left = credential.not_after.duration_since(now).unwrap_or_default();
            if left > life / 4 {
                return None;
            }
            entry.warned = true;
            Some(Ending { id: id.clone(), left, error: error.clone() })
        });
        ending.collect()
    }

    /// How long the authority has left, when that is to be said: once a day towards its end.
    fn authority_ends(&self, now: SystemTime, said: &mut Option<SystemTime>) -> Option<Duration> {
        let left = self.authority.not_after()?.duration_since(now).unwrap_or_default();
        let due = said.is_none_or(|said| now.duration_since(said).map_or(true, |since| since >= DAY));
        (left < AUTHORITY_ENDS && due).then(|| {
            *said = Some(now);
            left
        })
    }

    /// Marks what is due as being asked for; those that have nothing come first.
    fn take_due(&self, now: SystemTime, most: usize) -> Vec<(SpiffeId, u64)> {
        let mut table = self.write();
        let mut due: Vec<_> = table.entries.iter_mut().filter(|(_, entry)| entry.is_due(now)).collect();
        due.sort_by_key(|(_, entry)| (entry.credential.is_some(), entry.schedule.due()));
        due.truncate(most);
        due.into_iter()
            .map(|(id, entry)| {
                (entry.asking, entry.again) = (true, false);
                (id.clone(), entry.number)
            })
            .collect()
    }

    fn until_due(&self, now: SystemTime) -> Duration {
        let table = self.read();
        let next = table.entries.values().filter(|entry| !entry.asking).map(|entry| entry.schedule.due()).min();
        next.map_or(LOOK_AGAIN, |next| next.duration_since(now).unwrap_or_default().min(LOOK_AGAIN))
    }

    /// Takes an answer, or what is wrong with it, to the entry that asked.
    fn answered(&self, id: &SpiffeId, number: u64, answer: Result<Issued, IssueError>, now: SystemTime, dice: f64) {
        let known = self.trust(id.trust_domain());
        let taken = answer.and_then(|issued| {
            let trust = match known {
                Some(trust) if trust.is_of(&issued.roots) => Ok(trust),
                _ => TrustBundle::new(id.trust_domain(), issued.roots.clone()).map(Arc::new),
            };
            trust.and_then(|trust| Credential::check(id, issued, trust, now)).map_err(|flaw| self.useless(id, &flaw))
        });
        // Costs signatures, so before the lock is taken.
        let left_behind = match &taken {
            Ok(credential) => self.left_behind(id, &credential.trust, now),
            Err(_) => Vec::new(),
        };
        let mut table = self.write();
        if let Ok(credential) = &taken {
            table.trust(&credential.trust, &left_behind, now + self.timing.retry);
        }
        // Dropped while it was asked for, and perhaps wanted again since.
        let Some(entry) = table.entries.get_mut(id).filter(|entry| entry.number == number) else { return };
        entry.asking = false;
        match taken {
            Ok(credential) => {
                self.renewed.fetch_add(1, Ordering::Relaxed);
                if entry.error.take().is_some() {
                    info!(%id, "the certificate is renewed again");
                }
                debug!(%id, serial = credential.serial, "certificate taken");
                entry.schedule.succeeded(credential.not_before, credential.not_after, now, dice, &self.timing);
                entry.take(credential);
            }
            Err(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                entry.schedule.failed(error.kind, now, dice, &self.timing);
                if entry.error.as_ref() != Some(&error) {
                    let kept = entry.credential.as_ref().is_some_and(|credential| credential.valid_at(now));
                    warn!(%error, kept, "no new certificate");
                }
                entry.error = Some(error);
            }
        }
        if entry.again {
            entry.schedule.hurry(now);
        }
        entry.answers.send_modify(|count| *count += 1);
    }

    fn useless(&self, id: &SpiffeId, flaw: &Flaw) -> IssueError {
        let reason = format!("{} gave one that is not taken: {flaw}", self.authority.name());
        IssueError::refused(id, reason, "correct it at its source; the last good one stays until it expires")
    }

    /// Who else has a certificate that does not lead to these roots: peers that know only these would refuse it.
    fn left_behind(&self, renewed: &SpiffeId, trust: &Arc<TrustBundle>, now: SystemTime) -> Vec<SpiffeId> {
        let held: Vec<_> = {
            let table = self.read();
            let entries = table.entries.values().filter_map(|entry| entry.credential.clone());
            entries.filter(|held| held.id != *renewed && held.trust.trust_domain == trust.trust_domain).collect()
        };
        let others = held.into_iter().filter(|held| !Arc::ptr_eq(&held.trust, trust) && !held.trusted_by(trust, now));
        others.map(|held| held.id.clone()).collect()
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        // Nothing panics between two writes that belong together.
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn entry(&mut self, id: &SpiffeId, now: SystemTime) -> &mut Entry {
        self.entries.entry(id.clone()).or_insert_with(|| {
            self.next += 1;
            Entry {
                number: self.next,
                credential: None,
                schedule: Schedule::new(now),
                error: None,
                asking: false,
                again: false,
                warned: false,
                answers: watch::Sender::new(0),
            }
        })
    }

    fn retain(&mut self, wanted: impl Fn(&SpiffeId) -> bool) {
        self.entries.retain(|id, _| wanted(id));
        let entries = &self.entries;
        self.trust.retain(|domain, _| entries.keys().any(|id| id.trust_domain() == &**domain));
    }

    /// New roots are in force for every identity of their trust domain at once, under the certificates that are there.
    /// Those that this leaves behind are asked for again `soon`, but not at once: an authority that contradicts itself
    /// from answer to answer would be asked without an end.
    fn trust(&mut self, trust: &Arc<TrustBundle>, left_behind: &[SpiffeId], soon: SystemTime) {
        let before = self.trust.insert(trust.trust_domain.clone(), trust.clone());
        if before.as_ref().is_some_and(|before| Arc::ptr_eq(before, trust)) {
            return;
        }
        info!(trust_domain = &*trust.trust_domain, roots = trust.roots.len(), "roots to trust have changed");
        for (id, entry) in &mut self.entries {
            if let Some(credential) = &mut entry.credential
                && credential.trust.trust_domain == trust.trust_domain
            {
                *credential = Arc::new(Credential { trust: trust.clone(), ..(**credential).clone() });
            }
            if left_behind.contains(id) {
                entry.hurry(soon);
            }
        }
    }

    fn hurry(&mut self, now: SystemTime) {
        for entry in self.entries.values_mut() {
            entry.hurry(now);
        }
    }
}

impl Entry {
    fn hurry(&mut self, now: SystemTime) {
        self.again = self.asking;
        self.schedule.hurry(now);
    }

    fn is_due(&self, now: SystemTime) -> bool {
        // The clock may have been set to a time that the certificate is not valid at, long before it is due.
        let useless = self.credential.as_ref().is_some_and(|credential| !credential.valid_at(now));
        !self.asking && (self.schedule.due() <= now || (useless && self.schedule.failures() == 0))
    }

    /// The same certificate again keeps its place: whoever compares pointers sees no change.
    fn take(&mut self, new: Credential) {
        self.warned = false;
        match &self.credential {
            Some(old) if old.key.cert == new.key.cert && Arc::ptr_eq(&old.trust, &new.trust) => {}
            _ => self.credential = Some(Arc::new(new)),
        }
    }

    fn state(&self, now: SystemTime) -> State {
        match &self.credential {
            None => State::Waiting,
            Some(credential) if !credential.valid_at(now) => State::Expired,
            Some(_) if self.error.is_some() => State::Failing,
            Some(_) => State::Valid,
        }
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests;
