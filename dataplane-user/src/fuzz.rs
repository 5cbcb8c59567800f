//! What fuzzers feed: each target takes any bytes, and panics where a promise is broken.
//!
//! `fuzz/` has an entry point per target; `tests/fuzz.rs` feeds the kept corpora to the same functions in every test run.

use std::{
    collections::BTreeMap,
    fmt::{Debug, Display},
    net::IpAddr,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prost::Message as _;

use serde_json::Value;

use crate::{
    hbone::headers::{Authority, Baggage, Forwarded, TraceParent},
    identity::{
        Credential, Issued, SpiffeId, TrustBundle, files, istio, pem,
        workload_api::{self, protocol::X509svidResponse},
    },
    policy::{
        Action, Authorization, Origin, Policies, ROOT_NAMESPACE, Request, Scope, Workload,
        file::contents,
        object::{Body, Kind, Parsed, Read, read, read_as},
    },
};

/// A target by its name, which is also that of its corpus.
pub type Target = (&'static str, fn(&[u8]));

/// All targets. A new one needs its function here, an entry point and a `[[bin]]` in `fuzz/`, and a corpus.
pub const TARGETS: &[Target] = &[
    ("authority", authority),
    ("baggage", baggage),
    ("certificates", certificates),
    ("forwarded", forwarded),
    ("policy_file", policy_file),
    ("policy_object", policy_object),
    ("traceparent", traceparent),
];

/// Where a CONNECT wants to go.
pub fn authority(bytes: &[u8]) {
    header::<Authority>(bytes);
}

/// What a peer says about its workload.
pub fn baggage(bytes: &[u8]) {
    header::<Baggage>(bytes);
}

/// Who asked the peer.
pub fn forwarded(bytes: &[u8]) {
    header::<Forwarded>(bytes);
}

pub fn traceparent(bytes: &[u8]) {
    header::<TraceParent>(bytes);
}

/// What was read is read again when it is written, and is the same then.
fn header<T: FromStr + Display + PartialEq + Debug>(bytes: &[u8]) {
    let Ok(Ok(read)) = std::str::from_utf8(bytes).map(T::from_str) else { return };
    let written = read.to_string();
    // A header that says nothing is not sent.
    if !written.is_empty() {
        assert_eq!(T::from_str(&written).ok(), Some(read), "{written:?}");
    }
}

/// The corpus' certificates are valid then.
fn then() -> SystemTime {
    // 2030-01-01
    UNIX_EPOCH + Duration::from_secs(1_893_456_000)
}

/// Between the files of one input.
const NEXT_FILE: &[u8] = b"\n%%\n";

/// Chains, keys and roots: as files (`tls.crt`, `tls.key`, `ca.crt`, with lines of `%%` between them), as istiod's answer
/// (texts with such lines between them), as a message of the Workload API, and as an identity.
pub fn certificates(bytes: &[u8]) {
    identities(bytes);
}

/// Whose certificates of the input are taken.
pub fn identities(bytes: &[u8]) -> Vec<SpiffeId> {
    let mut ids = Vec::new();
    let files = split(bytes);
    if let [chain, key, roots] = &files[..]
        && let Ok(chain) = pem::certificates(chain, &"tls.crt")
        && let Ok(key) = pem::key(key, &"tls.key")
        && let Ok(roots) = pem::certificates(roots, &"ca.crt")
    {
        let issued = Issued { chain, key, roots };
        if let Ok(credential) = files::whose(&issued, then()) {
            taken(&credential, &issued);
            ids.push(credential.id);
        }
    }
    let texts: Vec<String> = files.iter().filter_map(|text| String::from_utf8(text.to_vec()).ok()).collect();
    if let Ok((chain, roots)) = istio::split(&texts) {
        assert!(!chain.is_empty() && !roots.is_empty(), "half an answer is none");
        bundle(roots);
    }
    if let Ok(answer) = X509svidResponse::decode(bytes) {
        for (id, issued) in workload_api::given(answer) {
            let Ok(issued) = issued else { panic!("{id} is held and not given") };
            let Some(trust) = bundle(issued.roots.clone()) else { continue };
            let again = Issued { chain: issued.chain.clone(), key: issued.key.clone(), roots: issued.roots.clone() };
            if let Ok(credential) = Credential::check(&id, again, trust, then()) {
                taken(&credential, &issued);
                ids.push(id);
            }
        }
    }
    if let Ok(Ok(id)) = std::str::from_utf8(bytes).map(str::parse::<SpiffeId>) {
        assert_eq!(SpiffeId::new(id.trust_domain(), id.namespace(), id.service_account()).as_ref(), Ok(&id));
    }
    ids
}

fn split(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut files = Vec::new();
    while let Some(end) = bytes.windows(NEXT_FILE.len()).position(|window| window == NEXT_FILE) {
        files.push(&bytes[..end]);
        bytes = &bytes[end + NEXT_FILE.len()..];
    }
    files.push(bytes);
    files
}

fn bundle(roots: Vec<rustls_pki_types::CertificateDer<'static>>) -> Option<Arc<TrustBundle>> {
    let given = roots.clone();
    let trust = TrustBundle::new("cluster.local", roots).ok()?;
    assert!(given.iter().all(|root| trust.certificates().contains(root)), "a root is lost");
    Some(Arc::new(trust))
}

/// Whoever was taken is who its certificate says, now, to those with its roots, and nobody else.
fn taken(credential: &Credential, issued: &Issued) {
    let id = &credential.id;
    assert_eq!(id.as_str().parse().as_ref(), Ok(id));
    assert!(credential.valid_at(then()) && !credential.valid_at(credential.not_after));
    assert!(credential.trusted_by(&credential.trust, then()));
    let other = SpiffeId::new(id.trust_domain(), id.namespace(), "somebody-else").expect("it is one");
    let again = Issued { chain: issued.chain.clone(), key: issued.key.clone(), roots: issued.roots.clone() };
    if *id != other {
        assert!(Credential::check(&other, again, credential.trust.clone(), then()).is_err(), "{id} passes for {other}");
    }
}

/// A file of policies: YAML or JSON.
pub fn policy_file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(contents) = contents(text) {
        in_force(&contents.objects);
    }
}

/// One object, as the API server sends it.
pub fn policy_object(bytes: &[u8]) {
    let Ok(object) = serde_json::from_slice::<Value>(bytes) else { return };
    let kinds = [Kind::AuthorizationPolicy, Kind::PeerAuthentication];
    let all = std::iter::once(read(&object)).chain(kinds.map(|kind| read_as(kind, &object)));
    for read in all {
        if let Read::Policy(parsed) = read {
            in_force(&[*parsed]);
        }
    }
}

/// Whatever was read can be put in force, decided by and explained.
fn in_force(objects: &[Parsed]) {
    let kinds = [Kind::AuthorizationPolicy, Kind::PeerAuthentication];
    let mut policies = Policies::new(ROOT_NAMESPACE);
    policies.sync(Origin::File, &kinds, objects.to_vec());
    let again = policies.sync(Origin::File, &kinds, objects.to_vec());
    assert!(!again.changed, "the same again is no change");
    let standing = policies.standing();
    assert!(
        standing.iter().all(|one| one.in_force || one.refused.is_some() || !one.warnings.is_empty()),
        "silently not in force"
    );

    let id = SpiffeId::new("cluster.local", "shop", "web").expect("it is one");
    let addresses: [IpAddr; 2] = [[10, 0, 0, 1].into(), [0xfd00, 0, 0, 0, 0, 0, 0, 1].into()];
    let snapshot = policies.snapshot();
    for (index, object) in objects.iter().enumerate().take(4) {
        if objects[..index].iter().any(|earlier| earlier.key == object.key) {
            // Given twice: the first counts.
            continue;
        }
        let workload = workload(object);
        let selected = snapshot.select(&workload);
        for (source, port) in [(Some(&id), 80), (None, 80), (Some(&id), 65535), (None, 1)] {
            for address in addresses {
                let request = Request { source_ip: address, source, destination_ip: address, destination_port: port };
                let decision = selected.decide(&request);
                let explained = snapshot.explain(&workload, &request);
                assert_eq!(
                    (explained.allow, explained.reason, &explained.by),
                    (decision.allow, decision.reason, &decision.by)
                );
                assert_eq!(selected.admit(&request), decision, "counting changes nothing");
                assert!(!explained.to_string().is_empty());
                if refuses_all(object) {
                    assert!(!decision.allow, "a policy that nobody can read lets {request:?} in");
                }
            }
        }
    }
}

/// A workload that the policy is for.
fn workload(object: &Parsed) -> Workload {
    let namespace = object.key.name.split('/').next().unwrap_or_default();
    let labels = match enforced(object).map(|policy| &policy.scope) {
        Some(Scope::Labels(labels)) => labels.clone(),
        _ => BTreeMap::new(),
    };
    Workload { name: format!("{namespace}/pod").into(), namespace: namespace.into(), labels, policies: Vec::new() }
}

/// The authorization that is put in force for an object without an earlier version.
fn enforced(object: &Parsed) -> Option<&Authorization> {
    match &object.body {
        Body::Authorization(policy) => Some(policy),
        Body::Malformed { closed: Some(closed), .. } => match &**closed {
            Body::Authorization(policy) => Some(policy),
            _ => None,
        },
        _ => None,
    }
}

/// An ALLOW policy of which no rule can be understood whole.
fn refuses_all(object: &Parsed) -> bool {
    enforced(object).is_some_and(|policy| {
        let understood = policy.rules.iter().any(|rule| rule.unseen.is_empty());
        policy.action == Action::Allow && !policy.dry_run && !understood
    })
}
