//! What an authority signs is taken, what is none is refused, and a change of roots breaks nothing.

use rcgen::{KeyPair, PKCS_ECDSA_P384_SHA384};

use super::*;
use crate::identity::testing::{self, Leaf, id, write};

fn check(issued: Issued) -> Credential {
    let trust = TrustBundle::new(testing::DOMAIN, issued.roots.clone()).unwrap();
    Credential::check(&id("web"), issued, Arc::new(trust), SystemTime::now()).unwrap()
}

fn refused(directory: &Path) -> String {
    Signer::read(directory).map(drop).unwrap_err().to_string()
}

#[test]
fn what_init_makes_signs_certificates_that_peers_take() {
    let directory = tempfile::tempdir().unwrap();
    let root = Root::new("cluster.local", Duration::from_secs(86_400), SystemTime::now()).unwrap();
    write(directory.path(), pem::CERTIFICATE, &root.certificate);
    write(directory.path(), pem::KEY, &root.key);
    // Without ca.crt the root is in tls.crt.
    let signer = Signer::read(directory.path()).unwrap();
    let credential = check(signer.issue(&id("web"), LIFE, SystemTime::now()).unwrap());
    assert_eq!(credential.key.cert.len(), 1, "the root is not sent along");
    let left = credential.not_after.duration_since(SystemTime::now()).unwrap();
    assert!(left <= LIFE && left > LIFE - Duration::from_secs(60));
    // No longer than the authority itself.
    let credential = check(signer.issue(&id("web"), LIFE * 1_000, SystemTime::now()).unwrap());
    assert_eq!(credential.not_after, signer.not_after);
    assert_eq!(signer.until, signer.not_after, "nothing above it ends sooner");
    let late = signer.issue(&id("web"), LIFE, signer.not_after).map(drop).unwrap_err();
    assert!(late.to_string().contains("expired") && late.to_string().contains("sa/web"), "{late}");
}

#[test]
fn a_root_is_named_after_its_trust_domain() {
    assert!(Root::new("Cluster.local", Duration::from_secs(60), SystemTime::now()).is_err());
    let root = Root::new("cluster.local", Duration::from_secs(60), SystemTime::now()).unwrap();
    let der = pem::certificates(root.certificate.as_bytes(), &"it").unwrap().remove(0);
    let certificate = parse(&der, "it").unwrap();
    assert_eq!(certificate.subject().to_string(), "O=cluster.local, CN=hitless root");
    assert!(certificate.is_ca());
    assert_eq!(crate::identity::credential::the_uri(&certificate).unwrap(), "spiffe://cluster.local");
}

#[test]
fn an_intermediate_signs_and_its_chain_goes_along() {
    let directory = tempfile::tempdir().unwrap();
    let root = testing::Root::new("root");
    let middle = root.intermediate("middle");
    middle.write(directory.path(), &[&root]);
    // cert-manager's way: the intermediate and what is above it, root included.
    write(directory.path(), pem::CERTIFICATE, &(middle.pem() + &root.pem()));
    let signer = Signer::read(directory.path()).unwrap();
    let credential = check(signer.issue(&id("web"), LIFE, SystemTime::now()).unwrap());
    assert_eq!(credential.key.cert[1..], [middle.der()]);
}

#[test]
fn a_directory_that_holds_no_authority_is_refused_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let root = testing::Root::new("root");
    assert!(refused(path).contains("tls.crt: No such file"), "{}", refused(path));
    root.write(path, &[&root]);
    Signer::read(path).unwrap();

    write(path, pem::KEY, &testing::Root::new("other").key_pem());
    assert!(refused(path).contains("the key in tls.key is not the one of tls.crt"), "{}", refused(path));
    write(path, pem::KEY, "-----BEGIN PRIVATE KEY-----\nsecretsecret!\n-----END PRIVATE KEY-----\n");
    let words = refused(path);
    assert!(words.contains("tls.key: a PEM section is not Base64") && !words.contains("secretsecret"), "{words}");
    write(path, pem::KEY, &root.pem());
    assert!(refused(path).contains("no private key in PEM"), "{}", refused(path));

    root.write(path, &[&testing::Root::new("stranger")]);
    assert!(refused(path).contains("would not be trusted"), "{}", refused(path));
    root.write_leaf(path, &Leaf::new(&id("web")));
    assert!(refused(path).contains("is not an authority's"), "{}", refused(path));
    root.write(path, &[&root]);
    write(path, pem::ROOTS, "nothing");
    assert!(refused(path).contains("ca.crt: no certificate in PEM"), "{}", refused(path));
    write(path, pem::ROOTS, &"x".repeat(2 << 20));
    assert!(refused(path).contains("too long for certificates"), "{}", refused(path));
}

#[test]
fn other_keys_than_p256_sign_too() {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    let root: CertificateDer<'static> = params.self_signed(&key).unwrap().into();
    let signer = Signer::new(vec![root.clone()], key, vec![root]).unwrap();
    check(signer.issue(&id("web"), LIFE, SystemTime::now()).unwrap());
}

#[tokio::test]
async fn a_replaced_authority_is_read_and_a_broken_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let (old, new) = (testing::Root::new("old"), testing::Root::new("new"));
    old.write(path, &[&old]);
    let ca = OwnCa::open(path, LIFE).unwrap();
    let mut news = ca.news().unwrap();

    write(path, pem::ROOTS, &(old.pem() + &new.pem()));
    news.changed().await.unwrap();
    assert_eq!(ca.issue(&id("web")).await.unwrap().roots, [old.der(), new.der()]);

    write(path, pem::KEY, "broken");
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert!(!news.has_changed().unwrap());
    check(ca.issue(&id("web")).await.unwrap());

    new.write(path, &[&old, &new]);
    news.changed().await.unwrap();
    let issued = ca.issue(&id("web")).await.unwrap();
    let only_new = TrustBundle::new(testing::DOMAIN, vec![new.der()]).unwrap();
    assert!(check(issued).trusted_by(&only_new, SystemTime::now()));
}
