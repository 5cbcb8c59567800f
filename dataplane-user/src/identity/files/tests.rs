//! Directories of certificates: whose they are, what is not taken, and what happens when they change.

use std::{
    os::unix::fs::symlink,
    time::{Duration, SystemTime},
};

use super::*;
use crate::identity::{
    Timing,
    store::{State, Store},
    testing::{DOMAIN, Leaf, Root, id, write},
};

fn read(directory: &Path) -> World {
    World::read(directory, &World::default())
}

#[test]
fn each_directory_below_holds_one_and_its_name_is_free() {
    let directory = tempfile::tempdir().unwrap();
    let root = Root::new("root");
    root.write_leaf(&directory.path().join("a"), &Leaf::new(&id("web")));
    root.write_leaf(&directory.path().join("b"), &Leaf::new(&id("db")));
    // The same in the directory itself, whose ca.crt serves those below too.
    root.write_leaf(directory.path(), &Leaf::new(&id("here")));
    fs::remove_file(directory.path().join("b").join(pem::ROOTS)).unwrap();
    let world = read(directory.path());
    assert!(world.problems.is_empty(), "{:?}", world.problems);
    for name in ["web", "db", "here"] {
        let issued = world.issue(&id(name)).unwrap();
        Credential::check(&id(name), issued, root.trust(), SystemTime::now()).unwrap();
    }
    assert!(world.issue(&id("other")).is_none());
}

#[test]
fn of_two_for_one_identity_the_longer_lived_counts() {
    let directory = tempfile::tempdir().unwrap();
    let root = Root::new("root");
    let now = SystemTime::now();
    let days = |n: u64| now + Duration::from_secs(n * 86_400);
    for (name, to) in [("a", days(1)), ("b", days(3)), ("c", days(2))] {
        root.write_leaf(&directory.path().join(name), &Leaf::new(&id("web")).times(now, to));
    }
    let world = read(directory.path());
    assert_eq!(world.issue(&id("web")).unwrap().chain, world.pairs[&directory.path().join("b")].chain);
}

#[test]
fn a_bad_pair_is_named_and_hinders_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let root = Root::new("root");
    let spoil = |name: &str, file: &str, text: &str| {
        root.write_leaf(&path.join(name), &Leaf::new(&id(name)));
        write(&path.join(name), file, text);
    };
    root.write_leaf(&path.join("good"), &Leaf::new(&id("good")));
    spoil("garbage", pem::CERTIFICATE, "garbage");
    spoil("keyless", pem::KEY, "");
    spoil("other-key", pem::KEY, &Root::new("x").key_pem());
    spoil("other-root", pem::ROOTS, &Root::new("x").pem());
    root.write_leaf(&path.join("no-uri"), &Leaf::new(&id("x")).uris(&[]));
    root.write_leaf(&path.join("two-uris"), &Leaf::new(&id("x")).uris(&[id("a").as_str(), id("b").as_str()]));
    root.write_leaf(&path.join("no-spiffe"), &Leaf::new(&id("x")).uris(&["https://example.org"]));
    let past = SystemTime::now() - Duration::from_secs(60);
    root.write_leaf(&path.join("expired"), &Leaf::new(&id("x")).times(past - Duration::from_secs(60), past));

    let world = read(path);
    assert!(world.issue(&id("good")).is_some());
    let problems: Vec<_> = world
        .problems
        .iter()
        .map(|(place, problem)| format!("{}: {problem}", place.file_name().unwrap().to_string_lossy()))
        .collect();
    let expected = [
        ("expired", "expired 6"),
        ("garbage", "no certificate in PEM"),
        ("keyless", "no private key in PEM"),
        ("no-spiffe", "is no identity"),
        ("no-uri", "has no URI"),
        ("other-key", "is not the certificate's"),
        ("other-root", "does not lead to a trusted root"),
        ("two-uris", "has 2 URIs"),
    ];
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    for ((name, words), problem) in expected.iter().zip(&problems) {
        assert!(problem.starts_with(name) && problem.contains(words), "{problem}");
    }
}

/// A Secret is mounted as links through `..data`, which is replaced as a whole.
#[tokio::test]
async fn a_secret_that_is_updated_is_taken_and_a_broken_one_leaves_the_last_good() {
    let directory = tempfile::tempdir().unwrap();
    let mount = directory.path().join("web");
    let root = Root::new("root");
    let version = |name: &str| {
        let target = mount.join(name);
        root.write_leaf(&target, &Leaf::new(&id("web")));
        target
    };
    let publish = |name: &str| {
        symlink(name, mount.join("..new")).unwrap();
        fs::rename(mount.join("..new"), mount.join("..data")).unwrap();
    };
    version("..1");
    publish("..1");
    for file in [pem::CERTIFICATE, pem::KEY, pem::ROOTS] {
        symlink(format!("..data/{file}"), mount.join(file)).unwrap();
    }
    let store = Store::new(Arc::new(Files::open(directory.path())), Timing::default());
    let runner = store.clone();
    let running = tokio::spawn(async move { runner.run().await });
    let first = store.fetch(&id("web")).await.unwrap();

    version("..2");
    publish("..2");
    let until = tokio::time::Instant::now() + Duration::from_secs(20);
    let changed = |serial: &str| store.get(&id("web")).unwrap().serial != serial;
    while !changed(&first.serial) {
        assert!(tokio::time::Instant::now() < until, "the new certificate was not taken");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let second = store.get(&id("web")).unwrap();

    write(&version("..3"), pem::KEY, "broken");
    publish("..3");
    while store.report()[0].state != State::Failing {
        assert!(tokio::time::Instant::now() < until, "the broken one was not noticed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(store.get(&id("web")).unwrap().serial, second.serial);
    assert_eq!(store.trust(DOMAIN).unwrap().roots.len(), 1, "nor were its roots taken away");
    let error = store.report()[0].last_error.clone().unwrap();
    assert!(error.contains("sa/web") && error.contains("no private key in PEM"), "{error}");

    version("..4");
    publish("..4");
    while store.report()[0].state != State::Valid {
        assert!(tokio::time::Instant::now() < until, "the corrected one was not taken");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(changed(&second.serial));
    running.abort();
}
