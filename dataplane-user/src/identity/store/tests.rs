//! The store's promises, most of them with the time and the answers given by hand.

use std::sync::{Mutex, atomic::AtomicUsize};

use proptest::prelude::*;
use rustls_pki_types::CertificateDer;

use super::*;
use crate::identity::{
    Issuing,
    testing::{DOMAIN, Leaf, Root, id, secret},
};

type Answer = dyn Fn(&SpiffeId) -> Result<Issued, IssueError> + Send + Sync;

type Spoiled<'a> = Box<dyn Fn() -> Issued + 'a>;

/// Answers as a test wants, after a while.
struct Scripted {
    answer: Box<Answer>,
    delay: Duration,
    asked: AtomicUsize,
    news: watch::Sender<u64>,
}

impl Scripted {
    fn new(
        delay: Duration,
        answer: impl Fn(&SpiffeId) -> Result<Issued, IssueError> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { answer: Box::new(answer), delay, asked: AtomicUsize::new(0), news: watch::Sender::new(0) })
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Authority for Scripted {
    fn name(&self) -> &str {
        "the test's authority"
    }

    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Issuing<'a> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            tokio::time::sleep(self.delay).await;
            (self.answer)(id)
        })
    }

    fn news(&self) -> Option<watch::Receiver<u64>> {
        Some(self.news.subscribe())
    }
}

fn quick() -> Timing {
    Timing { retry: Duration::from_millis(20), fetch_wait: Duration::from_millis(300), ..Timing::default() }
}

/// A store whose authority is the test itself.
fn by_hand() -> Arc<Store> {
    Store::new(Scripted::new(Duration::ZERO, |_| panic!("nobody runs the store")), Timing::default())
}

fn running(store: &Arc<Store>) -> tokio::task::JoinHandle<()> {
    let store = store.clone();
    tokio::spawn(async move { store.run().await })
}

/// Asks as `run` does and answers at once.
fn answer(store: &Store, answers: impl Fn(&SpiffeId) -> Result<Issued, IssueError>, now: SystemTime) -> usize {
    let due = store.take_due(now, AT_ONCE);
    for (id, number) in &due {
        store.answered(id, *number, answers(id), now, 0.5);
    }
    due.len()
}

fn signs(signer: &Root, roots: Vec<CertificateDer<'static>>) -> impl Fn(&SpiffeId) -> Result<Issued, IssueError> {
    move |id| Ok(Issued { roots: roots.clone(), ..signer.issued(Leaf::new(id)) })
}

fn seconds_from(now: SystemTime, seconds: u64) -> SystemTime {
    now + Duration::from_secs(seconds)
}

#[test]
fn a_certificate_is_renewed_at_half_of_its_life_and_kept_while_that_fails() {
    let (store, root, now) = (by_hand(), Root::new("root"), SystemTime::now());
    store.want([&id("web")]);
    let hour = |now: SystemTime| {
        let root = &root;
        move |id: &SpiffeId| Ok(root.issued(Leaf::new(id).times(now, seconds_from(now, 3_600))))
    };
    let now = seconds_from(now, 1);
    assert_eq!(answer(&store, hour(now), now), 1);
    let first = store.get_at(&id("web"), now).unwrap();
    assert_eq!(answer(&store, hour(now), seconds_from(now, 1_790)), 0, "it is too early");

    let down = |id: &SpiffeId| Err(IssueError::temporary(id, "connection refused", "start it"));
    let mut asked = 0;
    for second in 1_795..3_600 {
        asked += answer(&store, down, seconds_from(now, second));
        assert!(Arc::ptr_eq(&store.get_at(&id("web"), seconds_from(now, second)).unwrap(), &first));
    }
    assert!((30..=50).contains(&asked), "asked {asked} times in half an hour");
    assert!(store.get_at(&id("web"), seconds_from(now, 3_601)).is_none(), "it has expired");
    assert!(store.report()[0].last_error.as_deref().unwrap().contains("connection refused; start it"));

    // When the authority is back, so is the certificate.
    let later = seconds_from(now, 3_700);
    assert_eq!(answer(&store, hour(later), later), 1);
    assert_ne!(store.get_at(&id("web"), later).unwrap().serial, first.serial);
    assert_eq!(store.report()[0].last_error, None);
    assert_eq!((store.numbers().renewed, store.numbers().failed), (2, asked as u64));
}

#[test]
fn what_peers_would_refuse_is_refused_and_the_last_good_one_stays() {
    let (store, root, now) = (by_hand(), Root::new("root"), SystemTime::now());
    let web = id("web");
    store.want([&web]);
    let mut at = seconds_from(now, 1);
    answer(&store, |id| Ok(root.issued(Leaf::new(id))), at);
    let good = store.get_at(&web, at).unwrap();

    let days = |n: i64| if n < 0 { now - Duration::from_secs(86_400) } else { seconds_from(now, 86_400 * n as u64) };
    let stranger = Root::new("root");
    let spoiled: Vec<(Spoiled<'_>, &str)> = vec![
        (Box::new(|| root.issued(Leaf::new(&web).times(days(-1), now - Duration::from_secs(9)))), "it expired"),
        (Box::new(|| root.issued(Leaf::new(&web).times(days(1), days(2)))), "valid only in"),
        (Box::new(|| root.issued(Leaf::new(&id("other")))), "is for \"spiffe://cluster.local/ns/shop/sa/other\""),
        (Box::new(|| Issued { roots: vec![root.der()], ..stranger.issued(Leaf::new(&web)) }), "a trusted root"),
        (
            Box::new(|| Issued { key: secret(&Leaf::new(&web).key), ..root.issued(Leaf::new(&web)) }),
            "the certificate's",
        ),
        (Box::new(|| Issued { roots: vec![], ..root.issued(Leaf::new(&web)) }), "no root"),
        (Box::new(|| Issued { roots: vec![vec![0].into()], ..root.issued(Leaf::new(&web)) }), "root 1"),
        (Box::new(|| Issued { chain: vec![], ..root.issued(Leaf::new(&web)) }), "chain is empty"),
    ];
    for (issued, words) in spoiled {
        store.write().hurry(at);
        assert_eq!(answer(&store, |_| Ok(issued()), at), 1);
        assert!(Arc::ptr_eq(&store.get_at(&web, at).unwrap(), &good), "{words}");
        let error = store.report()[0].last_error.clone().unwrap();
        assert!(error.contains(words) && error.contains(web.as_str()) && error.contains("stays"), "{error}");
        assert_eq!(store.trust(DOMAIN).unwrap().certificates(), [root.der()], "{words}");
        assert_eq!(store.report()[0].state, State::Failing);
        at = seconds_from(at, 1);
    }
}

#[test]
fn the_same_certificate_again_is_no_change() {
    let (store, root, now) = (by_hand(), Root::new("root"), seconds_from(SystemTime::now(), 1));
    store.want([&id("web")]);
    let leaf = Leaf::new(&id("web"));
    let (chain, key) = (vec![root.sign(&leaf)], secret(&leaf.key));
    let same = |_: &SpiffeId| Ok(Issued { chain: chain.clone(), key: key.clone(), roots: vec![root.der()] });
    answer(&store, same, now);
    let first = store.get_at(&id("web"), now).unwrap();
    store.write().hurry(now);
    answer(&store, same, now);
    assert!(Arc::ptr_eq(&store.get_at(&id("web"), now).unwrap(), &first));
}

#[test]
fn roots_change_for_all_at_once_and_nobody_is_without_a_certificate() {
    let (store, mut now) = (by_hand(), seconds_from(SystemTime::now(), 1));
    let (old, new) = (Root::new("old"), Root::new("new"));
    let (web, db) = (id("web"), id("db"));
    store.want([&web, &db]);
    let roots_of = |id: &SpiffeId, now| store.get_at(id, now).unwrap().trust.certificates().len();
    assert_eq!(answer(&store, signs(&old, vec![old.der()]), now), 2);
    let key = store.get_at(&db, now).unwrap().key.clone();

    // One renews and hears of the second root: all trust it from then on, under the certificates they have.
    now = seconds_from(now, 5);
    store.write().entries.get_mut(&web).unwrap().hurry(now);
    assert_eq!(answer(&store, signs(&old, vec![new.der(), old.der()]), now), 1);
    assert_eq!((roots_of(&web, now), roots_of(&db, now)), (2, 2));
    assert!(Arc::ptr_eq(&store.get_at(&db, now).unwrap().key, &key));
    assert!(Arc::ptr_eq(&store.trust(DOMAIN).unwrap(), &store.get_at(&db, now).unwrap().trust));

    // The old one goes while one identity still has a certificate under it: it is renewed out of turn.
    now = seconds_from(now, 5);
    store.write().entries.get_mut(&web).unwrap().hurry(now);
    assert_eq!(answer(&store, signs(&new, vec![new.der()]), now), 1);
    assert_eq!((roots_of(&web, now), roots_of(&db, now)), (1, 1));
    assert!(Arc::ptr_eq(&store.get_at(&db, now).unwrap().key, &key), "better than none: its peers may not know yet");
    assert_eq!(
        answer(&store, signs(&new, vec![new.der()]), now),
        0,
        "an authority that wavers is not asked in a circle"
    );
    now = seconds_from(now, 1);
    assert_eq!(answer(&store, signs(&new, vec![new.der()]), now), 1);
    assert!(store.get_at(&db, now).unwrap().trusted_by(&new.trust(), now));
    assert_eq!(answer(&store, signs(&new, vec![new.der()]), seconds_from(now, 60)), 0);
}

#[test]
fn trust_domains_have_roots_of_their_own() {
    let (store, now) = (by_hand(), seconds_from(SystemTime::now(), 1));
    let (here, there) = (Root::new("here"), Root::new("there"));
    let far = SpiffeId::new("other.example", "shop", "web").unwrap();
    store.want([&id("web"), &far]);
    let root = |id: &SpiffeId| if id.trust_domain() == DOMAIN { &here } else { &there };
    assert_eq!(answer(&store, |id| Ok(root(id).issued(Leaf::new(id))), now), 2);
    assert_eq!(store.trust(DOMAIN).unwrap().certificates(), [here.der()]);
    assert_eq!(store.trust("other.example").unwrap().certificates(), [there.der()]);
    store.retain(|id| id.trust_domain() == DOMAIN);
    assert!(store.trust("other.example").is_none() && store.trust(DOMAIN).is_some());
}

#[test]
fn those_without_a_certificate_come_before_renewals_and_only_so_many_at_once() {
    let (store, root, now) = (by_hand(), Root::new("root"), seconds_from(SystemTime::now(), 1));
    let ids: Vec<_> = (0..AT_ONCE * 2).map(|n| id(&format!("old-{n}"))).collect();
    store.want(&ids);
    while answer(&store, |id| Ok(root.issued(Leaf::new(id))), now) > 0 {}
    store.write().hurry(now);
    store.want([&id("new")]);
    let due = store.take_due(seconds_from(now, 1), AT_ONCE);
    assert_eq!((due.len(), &due[0].0), (AT_ONCE, &id("new")));
    assert!(store.take_due(seconds_from(now, 1), 0).is_empty());
}

#[test]
fn an_answer_for_somebody_who_left_is_dropped() {
    let (store, root, now) = (by_hand(), Root::new("root"), seconds_from(SystemTime::now(), 1));
    store.want([&id("web")]);
    let due = store.take_due(now, AT_ONCE);
    store.retain(|_| false);
    store.want([&id("web")]);
    store.answered(&id("web"), due[0].1, Ok(root.issued(Leaf::new(&id("web")))), now, 0.5);
    assert!(store.get_at(&id("web"), now).is_none(), "it was for the one before");
    assert_eq!(answer(&store, |id| Ok(root.issued(Leaf::new(id))), seconds_from(now, 1)), 1);
    assert!(store.get_at(&id("web"), now).is_some());
}

#[test]
fn a_clock_that_is_set_back_is_noticed() {
    let (store, root, now) = (by_hand(), Root::new("root"), SystemTime::now());
    let at = |now: SystemTime| {
        let root = &root;
        move |id: &SpiffeId| Ok(root.issued(Leaf::new(id).times(now, seconds_from(now, 3_600))))
    };
    store.want([&id("web")]);
    let (wrong, right) = (seconds_from(now, 86_400), seconds_from(now, 1));
    answer(&store, at(wrong), wrong);
    assert!(store.get_at(&id("web"), right).is_none(), "it is tomorrow's");
    assert_eq!(answer(&store, at(right), right), 1);
    assert!(store.get_at(&id("web"), right).is_some());
}

#[test]
fn the_report_and_the_numbers_tell_of_each() {
    let (store, root, now) = (by_hand(), Root::new("root"), seconds_from(SystemTime::now(), 1));
    store.want([&id("b"), &id("a")]);
    let no = |id: &SpiffeId| Err(IssueError::refused(id, "not here", "ask elsewhere"));
    answer(&store, |who| if *who == id("a") { no(who) } else { Ok(root.issued(Leaf::new(who))) }, now);
    let report = store.report();
    assert_eq!(report.iter().map(|line| line.state).collect::<Vec<_>>(), [State::Waiting, State::Valid]);
    assert_eq!(
        report[0].last_error.as_deref().unwrap(),
        format!("no certificate for {}: not here; ask elsewhere", id("a"))
    );
    assert_eq!(report[1].serial, Some(store.get_at(&id("b"), now).unwrap().serial.clone()));
    assert_eq!(report[1].not_after.unwrap() - report[1].not_before.unwrap(), 3_660);
    let numbers = store.numbers();
    assert_eq!((numbers.renewed, numbers.failed, numbers.waiting), (1, 1, 1));
    assert!(matches!(&numbers.expiry[..], [(who, 3_500..=3_600)] if *who == id("b")), "{numbers:?}");
}

#[tokio::test]
async fn callers_of_one_identity_share_one_question() {
    let root = Root::new("root");
    let authority = Scripted::new(Duration::from_millis(50), move |id| Ok(root.issued(Leaf::new(id))));
    let store = Store::new(authority.clone(), Timing::default());
    let running = running(&store);
    let callers: Vec<_> = (0..50)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.fetch(&id("web")).await.unwrap().serial.clone() })
        })
        .collect();
    let mut serials = Vec::new();
    for caller in callers {
        serials.push(caller.await.unwrap());
    }
    serials.dedup();
    assert_eq!((serials.len(), authority.asked()), (1, 1));
    assert!(store.get(&id("web")).is_some());
    running.abort();
}

#[tokio::test]
async fn nobody_waits_for_ever() {
    // Longer than any test: an authority that hangs.
    let authority = Scripted::new(Duration::from_secs(3_600), |_| unreachable!("nobody waits so long"));
    let store = Store::new(authority, Timing { answer_wait: Duration::from_millis(50), ..quick() });
    let running = running(&store);
    let error = store.fetch(&id("web")).await.unwrap_err();
    assert_eq!(error.kind, IssueErrorKind::Temporary);
    let words = error.to_string();
    assert!(words.contains("sa/web") && words.contains("the test's authority has not answered"), "{words}");
    running.abort();
}

#[tokio::test]
async fn a_failure_that_passes_is_only_a_delay() {
    let root = Root::new("root");
    let left = Mutex::new(3);
    let authority = Scripted::new(Duration::ZERO, move |id| {
        let mut left = left.lock().unwrap();
        if *left > 0 {
            *left -= 1;
            return Err(IssueError::temporary(id, "connection refused", "start it"));
        }
        Ok(root.issued(Leaf::new(id)))
    });
    let store = Store::new(authority.clone(), Timing { fetch_wait: Duration::from_secs(20), ..quick() });
    let running = running(&store);
    store.fetch(&id("web")).await.unwrap();
    assert_eq!(authority.asked(), 4);
    running.abort();
}

#[tokio::test]
async fn a_refusal_is_told_at_once_and_asked_again_later() {
    let authority = Scripted::new(Duration::ZERO, |id| Err(IssueError::refused(id, "no such pod", "wait for it")));
    let store = Store::new(authority.clone(), Timing { fetch_wait: Duration::from_secs(3_600), ..quick() });
    let running = running(&store);
    for _ in 0..20 {
        let error = store.fetch(&id("web")).await.unwrap_err();
        assert!(error.to_string().contains("no such pod; wait for it"), "{error}");
    }
    assert_eq!(authority.asked(), 1, "callers do not hurry an authority that said no");
    running.abort();
}

#[tokio::test]
async fn who_waits_for_an_identity_that_is_dropped_is_told() {
    let authority = Scripted::new(Duration::from_secs(3_600), |_| unreachable!("nobody waits so long"));
    let store = Store::new(authority, Timing { fetch_wait: Duration::from_secs(3_600), ..Timing::default() });
    let (running, waiting) = (running(&store), store.clone());
    let caller = tokio::spawn(async move { waiting.fetch(&id("web")).await.map(drop) });
    while store.report().is_empty() {
        tokio::task::yield_now().await;
    }
    store.retain(|_| false);
    let error = caller.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("nothing here wants it any more"), "{error}");
    running.abort();
}

#[tokio::test]
async fn news_from_the_authority_are_followed() {
    let root = Root::new("root");
    let authority = Scripted::new(Duration::from_millis(20), move |id| Ok(root.issued(Leaf::new(id))));
    let store = Store::new(authority.clone(), Timing::default());
    let running = running(&store);
    let first = store.fetch(&id("web")).await.unwrap();
    // Twice, the second while the first is being answered: what was asked before the news may be old.
    authority.news.send_modify(|count| *count += 1);
    while authority.asked() < 2 {
        tokio::task::yield_now().await;
    }
    authority.news.send_modify(|count| *count += 1);
    while authority.asked() < 3 || store.get(&id("web")).unwrap().serial == first.serial {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    running.abort();
}

/// What an authority may do to the store, and what else happens to it.
#[derive(Clone, Debug)]
enum Step {
    Good { root: usize },
    Foreign,
    Old,
    Other,
    Down,
    Refused,
    Later(u64),
    News,
    Want(usize),
    Drop(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..2usize).prop_map(|root| Step::Good { root }),
        1 => Just(Step::Foreign),
        1 => Just(Step::Old),
        1 => Just(Step::Other),
        2 => Just(Step::Down),
        1 => Just(Step::Refused),
        4 => (1..4_000u64).prop_map(Step::Later),
        1 => Just(Step::News),
        2 => (0..3usize).prop_map(Step::Want),
        1 => (0..3usize).prop_map(Step::Drop),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever comes in whatever order: what is in force is valid, its identity's own, under roots that it was taken
    /// with or that came later, and only time or its dropping takes it away; and the next question is never far.
    #[test]
    fn what_is_in_force_is_always_good(steps in prop::collection::vec(step(), 1..60)) {
        let store = by_hand();
        let roots = [Root::new("one"), Root::new("two")];
        let stranger = Root::new("one");
        let ids = [id("a"), id("b"), id("c")];
        let mut now = seconds_from(SystemTime::now(), 1);
        store.want(&ids);
        for step in steps {
            let before: Vec<_> = ids.iter().map(|id| store.get_at(id, now)).collect();
            let fresh = |id: &SpiffeId| Leaf::new(id).times(now, seconds_from(now, 3_600));
            let dropped = match &step {
                Step::Good { root } => { answer(&store, |id| Ok(roots[*root].issued(fresh(id))), now); None }
                Step::Foreign => {
                    let issued = |id: &SpiffeId| Issued { roots: vec![roots[0].der()], ..stranger.issued(fresh(id)) };
                    answer(&store, |id| Ok(issued(id)), now);
                    None
                }
                Step::Old => {
                    let leaf = |id: &SpiffeId| Leaf::new(id).times(now - Duration::from_secs(60), now);
                    answer(&store, |id| Ok(roots[0].issued(leaf(id))), now);
                    None
                }
                Step::Other => { answer(&store, |_| Ok(roots[0].issued(fresh(&id("other")))), now); None }
                Step::Down => { answer(&store, |id| Err(IssueError::temporary(id, "down", "start it")), now); None }
                Step::Refused => { answer(&store, |id| Err(IssueError::refused(id, "no", "ask")), now); None }
                Step::Later(seconds) => { now = seconds_from(now, *seconds); None }
                Step::News => { store.write().hurry(now); None }
                Step::Want(n) => { store.want([&ids[*n]]); None }
                Step::Drop(n) => { store.retain(|id| *id != ids[*n]); Some(*n) }
            };
            for (n, id) in ids.iter().enumerate() {
                let after = store.get_at(id, now);
                if let Some(credential) = &after {
                    prop_assert!(credential.valid_at(now) && credential.id == *id);
                    prop_assert!(Arc::ptr_eq(&credential.trust, &store.trust(DOMAIN).unwrap()));
                    prop_assert!(!credential.trusted_by(&stranger.trust(), now));
                }
                if let Some(held) = &before[n] {
                    let may_go = dropped == Some(n) || !held.valid_at(now);
                    prop_assert!(after.is_some() || may_go, "{:?} took away what was good", step);
                }
            }
            for entry in store.read().entries.values() {
                prop_assert!(!entry.asking);
                let wait = entry.schedule.due().duration_since(now).unwrap_or_default();
                prop_assert!(wait < Duration::from_secs(2_000), "{wait:?}");
            }
        }
    }
}

#[test]
fn a_certificate_that_is_not_renewed_is_warned_of_once_before_it_expires() {
    let root = Root::new("root");
    let store = by_hand();
    store.want([&id("web")]);
    let start = SystemTime::now();
    let (from, to) = (start - Duration::from_secs(60), seconds_from(start, 3_540));
    assert_eq!(answer(&store, |id| Ok(root.issued(Leaf::new(id).times(from, to))), start), 1);
    let credential = store.get_at(&id("web"), start).unwrap();
    let life = credential.not_after.duration_since(credential.not_before).unwrap();
    let late = credential.not_after - life / 8;
    assert!(store.ending(late).is_empty(), "nobody has failed to renew it");
    let fails = |id: &SpiffeId| Err(IssueError::temporary(id, "nobody answers", "is it there?"));
    let asked = credential.not_after - life / 3;
    assert_eq!(answer(&store, fails, asked), 1);
    assert!(store.ending(credential.not_after - life / 3).is_empty(), "there is time");
    let ending = store.ending(late);
    assert_eq!(ending.iter().map(|ending| ending.id.clone()).collect::<Vec<_>>(), [id("web")]);
    assert!(ending[0].left <= life / 8 && ending[0].error.to_string().contains("nobody answers"));
    assert!(store.ending(late).is_empty(), "it was said");
    let numbers = store.numbers();
    assert_eq!(numbers.authority_expiry, None, "an authority that does not say");
    assert!(matches!(&numbers.roots_expiry[..], [(domain, left)] if &**domain == DOMAIN && *left > 0), "{numbers:?}");
}

/// Signs with something that ends.
struct Ends(SystemTime);

impl Authority for Ends {
    fn name(&self) -> &str {
        "one that ends"
    }

    fn issue<'a>(&'a self, id: &'a SpiffeId) -> Issuing<'a> {
        let refused = IssueError::refused(id, "it only ends", "nothing");
        Box::pin(std::future::ready(Err(refused)))
    }

    fn news(&self) -> Option<watch::Receiver<u64>> {
        None
    }

    fn not_after(&self) -> Option<SystemTime> {
        Some(self.0)
    }
}

#[test]
fn the_end_of_an_authority_is_said_each_day_of_its_last_month() {
    let now = SystemTime::now();
    let store = Store::new(Arc::new(Ends(now + 40 * DAY)), Timing::default());
    let mut said = None;
    assert_eq!(store.authority_ends(now, &mut said), None);
    assert_eq!(store.authority_ends(now + 20 * DAY, &mut said), Some(20 * DAY));
    assert_eq!(store.authority_ends(now + 20 * DAY + DAY / 2, &mut said), None);
    assert_eq!(store.authority_ends(now + 21 * DAY, &mut said), Some(19 * DAY));
    assert_eq!(store.authority_ends(now + 41 * DAY, &mut said), Some(Duration::ZERO));
    let left = store.numbers().authority_expiry.unwrap();
    assert!((40 * 86_400 - 5..=40 * 86_400).contains(&left), "{left}");
}
