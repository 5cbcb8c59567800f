//! Certificates from real authorities. Nothing here needs the lab: no namespaces, no BPF.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Result;
use dataplane_user::identity::{Credential, SpiffeId, State, Store, Timing, workload_api::WorkloadApi};
use hitless_tests::spire::{Spire, TRUST_DOMAIN};

/// SPIRE's agent looks for changes every five seconds; busy machines are slower.
const PATIENCE: Duration = Duration::from_secs(90);
const DAY: Duration = Duration::from_secs(86_400);

fn id(name: &str) -> SpiffeId {
    SpiffeId::new(TRUST_DOMAIN, "shop", name).expect("an identity")
}

fn store(spire: &Spire) -> Arc<Store> {
    let timing = Timing { fetch_wait: PATIENCE, ..Timing::default() };
    let store = Store::new(Arc::new(WorkloadApi::open(&spire.socket())), timing);
    let runner = store.clone();
    tokio::spawn(async move { runner.run().await });
    store
}

/// Waits for it; all the while there must be a valid certificate that its own roots trust.
async fn until(store: &Store, id: &SpiffeId, what: &str, is: impl Fn(&Credential) -> bool) -> Arc<Credential> {
    let give_up = Instant::now() + PATIENCE;
    loop {
        let credential = store.get(id).unwrap_or_else(|| panic!("no valid certificate while waiting: {what}"));
        if is(&credential) {
            return credential;
        }
        assert!(Instant::now() < give_up, "{what}: {:?}", store.report());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// SPIRE's agent refuses what it has not heard of yet.
async fn granted(store: &Store, id: &SpiffeId) -> Result<Arc<Credential>> {
    let give_up = Instant::now() + PATIENCE;
    loop {
        match store.fetch(id).await {
            Err(_) if Instant::now() < give_up => tokio::time::sleep(Duration::from_millis(200)).await,
            answer => return Ok(answer?),
        }
    }
}

fn trusted(credential: &Credential) -> bool {
    credential.trusted_by(&credential.trust, SystemTime::now())
}

#[tokio::test(flavor = "multi_thread")]
async fn spire_hands_out_certificates_renews_them_and_takes_them_back() -> Result<()> {
    let mut spire = Spire::start()?;
    let web = spire.register(id("web").as_str(), Duration::from_secs(20))?;
    spire.register(id("db").as_str(), DAY)?;
    let store = store(&spire);
    let first = granted(&store, &id("web")).await?;
    let db = granted(&store, &id("db")).await?;
    assert!(trusted(&first) && trusted(&db));
    assert_eq!(first.id, id("web"));

    // Its life is 20 s; SPIRE's agent renews at half of it.
    let second = until(&store, &id("web"), "SPIRE renews", |now| now.serial != first.serial).await;
    assert!(second.not_after > first.not_after && trusted(&second));

    // An identity that nobody registered is refused by name, one that is taken back stays until it expires.
    let unknown = store.fetch(&id("unknown")).await.map(drop).expect_err("it is not registered").to_string();
    assert!(unknown.contains("sa/unknown") && unknown.contains("register an entry"), "{unknown}");
    spire.unregister(&web)?;
    until(&store, &id("db"), "the deletion is told", |_| {
        store.report().iter().any(|line| line.identity == id("web").as_str() && line.last_error.is_some())
    })
    .await;

    spire.stop_agent()?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(store.get(&id("db")).map(|now| now.serial.clone()), Some(db.serial.clone()));
    let gone = store.report().into_iter().find(|line| line.identity == id("web").as_str()).expect("it is wanted");
    assert!(matches!(gone.state, State::Failing | State::Expired), "{gone:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_of_spire_is_replaced_without_a_moment_of_distrust() -> Result<()> {
    let spire = Spire::start()?;
    spire.register(id("web").as_str(), DAY)?;
    let store = store(&spire);
    let before = granted(&store, &id("web")).await?;

    let prepared = spire.prepare()?;
    let both = until(&store, &id("web"), "the second root is trusted", |now| now.trust.roots.len() == 2).await;
    assert!(trusted(&both) && both.serial == before.serial, "the certificate is still the first one's");

    let old = spire.activate(&prepared)?;
    spire.taint(&old)?;
    let renewed = until(&store, &id("web"), "the second root signs", |now| now.serial != before.serial).await;
    assert!(trusted(&renewed) && !renewed.trusted_by(&before.trust, SystemTime::now()));

    spire.revoke(&old)?;
    let alone = until(&store, &id("web"), "the first root is trusted no more", |now| now.trust.roots.len() == 1).await;
    assert!(trusted(&alone) && !before.trusted_by(&alone.trust, SystemTime::now()));
    Ok(())
}
