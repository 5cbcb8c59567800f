//! Certificates that are taken, and each kind that is not.

use rcgen::{
    BasicConstraints, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P384_SHA384,
    PKCS_ECDSA_P521_SHA512, PKCS_ED25519, PKCS_RSA_SHA256,
};

use super::*;
use crate::identity::testing::{Leaf, Root, id, secret};

fn check(root: &Root, issued: Issued) -> Result<Credential, Flaw> {
    Credential::check(&id("web"), issued, root.trust(), SystemTime::now())
}

#[test]
fn a_good_certificate_is_taken_with_its_key_and_roots() {
    let root = Root::new("root");
    let credential = check(&root, root.issued(Leaf::new(&id("web")))).unwrap();
    assert_eq!(credential.id, id("web"));
    assert_eq!(credential.trust.roots.len(), 1);
    let life = credential.not_after.duration_since(credential.not_before).unwrap().as_secs();
    assert!((3_659..=3_661).contains(&life), "{life} s");
    assert!(credential.serial.len() >= 16 && credential.serial.chars().all(|c| c.is_ascii_hexdigit()));
    assert!(credential.valid_at(SystemTime::now()) && !credential.valid_at(credential.not_after));
}

#[test]
fn a_chain_through_an_intermediate_lasts_as_long_as_its_shortest_part() {
    let root = Root::new("root");
    let middle = root.intermediate("middle");
    let leaf = Leaf::new(&id("web"));
    let key = secret(&leaf.key);
    let chain = vec![middle.sign(&leaf), middle.der()];
    let issued = Issued { chain, key: key.clone(), roots: vec![] };
    check(&root, issued).unwrap();
    let issued = Issued { chain: vec![middle.sign(&leaf)], key, roots: vec![] };
    assert!(matches!(check(&root, issued).unwrap_err(), Flaw::Untrusted(_)), "its intermediate is missing");
}

#[test]
fn names_that_are_not_exactly_the_identity_are_refused() {
    let root = Root::new("root");
    let issued = |uris: &[&str]| root.issued(Leaf::new(&id("web")).uris(uris));
    let web = id("web");
    assert_eq!(check(&root, issued(&[])).unwrap_err(), Flaw::NoUri);
    assert_eq!(check(&root, issued(&[web.as_str(), "spiffe://a/ns/b/sa/c"])).unwrap_err(), Flaw::ManyUris(2));
    assert_eq!(check(&root, issued(&[web.as_str(), web.as_str()])).unwrap_err(), Flaw::ManyUris(2));
    let other = "spiffe://cluster.local/ns/shop/sa/other";
    assert_eq!(check(&root, issued(&[other])).unwrap_err(), Flaw::WrongUri(other.into()));
}

#[test]
fn times_are_those_of_the_node() {
    let root = Root::new("root");
    let now = SystemTime::now();
    let hours = |n: u64| Duration::from_secs(n * 3_600);
    let past = Leaf::new(&id("web")).times(now - hours(2), now - hours(1));
    assert!(matches!(check(&root, root.issued(past)).unwrap_err(), Flaw::Expired(3_599..=3_661)));
    let future = Leaf::new(&id("web")).times(now + hours(1), now + hours(2));
    assert!(matches!(check(&root, root.issued(future)).unwrap_err(), Flaw::NotYetValid(3_500..=3_600)));
}

#[test]
fn chains_of_somebody_else_are_refused() {
    let root = Root::new("root");
    let same_name = Root::new("root");
    assert!(matches!(check(&root, same_name.issued(Leaf::new(&id("web")))).unwrap_err(), Flaw::Untrusted(_)));
    // Self-signed.
    let leaf = Leaf::new(&id("web"));
    let chain = vec![leaf.params.self_signed(&leaf.key).unwrap().into()];
    let issued = Issued { chain, key: secret(&leaf.key), roots: vec![] };
    assert!(matches!(check(&root, issued).unwrap_err(), Flaw::Untrusted(_)));
}

#[test]
fn usages_that_peers_would_refuse_are_refused_here() {
    let root = Root::new("root");
    let with = |change: &dyn Fn(&mut Leaf)| {
        let mut leaf = Leaf::new(&id("web"));
        change(&mut leaf);
        check(&root, root.issued(leaf))
    };
    let authority = with(&|leaf| leaf.params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    assert_eq!(authority.unwrap_err(), Flaw::IsAuthority);
    let signs = with(&|leaf| leaf.params.key_usages.push(KeyUsagePurpose::KeyCertSign));
    assert_eq!(signs.unwrap_err(), Flaw::IsAuthority);
    let agrees = with(&|leaf| leaf.params.key_usages = vec![KeyUsagePurpose::KeyAgreement]);
    assert_eq!(agrees.unwrap_err(), Flaw::Usage);
    let server = with(&|leaf| leaf.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    assert!(matches!(server.unwrap_err(), Flaw::Untrusted(_)), "it could not be a client");
    with(&|leaf| leaf.params.key_usages.clear()).unwrap();
}

#[test]
fn kinds_of_keys_are_chosen_deliberately() {
    let root = Root::new("root");
    let kind = |key: KeyPair| check(&root, root.issued(Leaf::with_key(&id("web"), key)));
    kind(KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap()).unwrap();
    kind(KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap()).unwrap();
    let p521 = kind(KeyPair::generate_for(&PKCS_ECDSA_P521_SHA512).unwrap());
    assert_eq!(p521.unwrap_err(), Flaw::KeyKind("on the curve 1.3.132.0.35".into()));
    let ed25519 = kind(KeyPair::generate_for(&PKCS_ED25519).unwrap());
    assert_eq!(ed25519.unwrap_err(), Flaw::KeyKind("of the kind 1.3.101.112".into()));
}

#[test]
fn a_key_that_is_another_or_none_is_refused() {
    let root = Root::new("root");
    let mut issued = root.issued(Leaf::new(&id("web")));
    issued.key = secret(&KeyPair::generate().unwrap());
    assert_eq!(check(&root, issued).unwrap_err(), Flaw::KeyMismatch);
    let mut issued = root.issued(Leaf::new(&id("web")));
    issued.key = rustls_pki_types::PrivateKeyDer::Pkcs8(vec![0x30, 0].into()).into();
    assert_eq!(check(&root, issued).unwrap_err(), Flaw::UnreadableKey);
}

#[test]
fn garbage_is_named() {
    let root = Root::new("root");
    let mut issued = root.issued(Leaf::new(&id("web")));
    issued.chain.push(CertificateDer::from(vec![1, 2, 3]));
    assert_eq!(check(&root, issued).unwrap_err(), Flaw::Malformed("certificate 2 of the chain".into()));
    let mut issued = root.issued(Leaf::new(&id("web")));
    issued.chain.clear();
    assert_eq!(check(&root, issued).unwrap_err(), Flaw::EmptyChain);
    let mut issued = root.issued(Leaf::new(&id("web")));
    issued.chain = vec![issued.chain[0].clone(); 11];
    assert_eq!(check(&root, issued).unwrap_err(), Flaw::LongChain);
    let mut trailing = root.issued(Leaf::new(&id("web")));
    trailing.chain[0] = [trailing.chain[0].as_ref(), b"x"].concat().into();
    assert_eq!(check(&root, trailing).unwrap_err(), Flaw::Malformed("the leaf".into()));
}

#[test]
fn roots_are_authorities_or_nothing() {
    let root = Root::new("root");
    let leaf = root.issued(Leaf::new(&id("web"))).chain.remove(0);
    assert_eq!(TrustBundle::new("d", vec![]).unwrap_err(), Flaw::NoRoots);
    assert_eq!(TrustBundle::new("d", vec![root.der(), leaf]).unwrap_err(), Flaw::BadRoot(2));
    assert_eq!(TrustBundle::new("d", vec![root.der(), vec![0].into()]).unwrap_err(), Flaw::BadRoot(2));
}

#[test]
fn keys_are_in_no_debug_output() {
    let root = Root::new("root");
    let leaf = Leaf::new(&id("web"));
    // What PKCS#8 has before the public key: the private one.
    let private = leaf.key.serialize_der()[36..68].to_vec();
    let issued = root.issued(leaf);
    let printed = [format!("{:?}", issued.key), format!("{:?}", check(&root, issued).unwrap())];
    let credential = check(&root, root.issued(Leaf::new(&id("web")))).unwrap();
    let key = format!("{:?}", credential.key.key);
    let listed = format!("{private:?}");
    let hex: String = private.iter().map(|byte| format!("{byte:02x}")).collect();
    for text in printed.iter().chain([&key]) {
        assert!(!text.contains(&listed[1..listed.len() - 1]) && !text.contains(&hex), "{text}");
    }
}
