//! Istio's policies in the Kubernetes API, watched with the machinery of the other kinds, when their CRDs are there.

use std::{io, sync::Arc};

use serde::{Deserialize, Deserializer};
use serde_json::Value;
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::change;
use crate::{
    policy::{
        Enforcement, Origin,
        object::{Body, Key, Kind, Parsed, Read, read_as},
    },
    source::kube::{
        object::{Labels, Meta, Object},
        watch::{Failure, Malformed, Word, follow},
    },
};

/// Follows both kinds for as long as the agent runs. From this call on, and not only from the first poll, nothing is
/// settled until both were listed, or are known not to be there.
pub fn serve(client: kube::Client, enforcement: Arc<Enforcement>) -> impl Future<Output = io::Result<()>> {
    let kinds = [Kind::AuthorizationPolicy, Kind::PeerAuthentication];
    enforcement.change(|policies| policies.await_source(Origin::Kube, &kinds));
    async move {
        let mut tasks = JoinSet::new();
        let mut heard = Collection::new(Kind::AuthorizationPolicy, enforcement.clone());
        tasks
            .spawn_local(follow::<AuthorizationPolicy>(client.clone(), String::new(), move |word, _| heard.hear(word)));
        let mut heard = Collection::new(Kind::PeerAuthentication, enforcement);
        tasks.spawn_local(follow::<PeerAuthentication>(client, String::new(), move |word, _| heard.hear(word)));
        tasks.join_all().await;
        Ok(())
    }
}

/// An object as it came: policies are read whole, unlike pods.
#[derive(Debug)]
pub struct Whole {
    metadata: Meta,
    object: Value,
}

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let object = Value::deserialize(deserializer)?;
        let metadata = object.get("metadata").unwrap_or(&Value::Null);
        let metadata = Meta::deserialize(metadata).map_err(serde::de::Error::custom)?;
        Ok(Self { metadata, object })
    }
}

macro_rules! policy {
    ($ty:ident, $kind:literal, $path:literal) => {
        #[derive(Debug, Deserialize)]
        #[serde(transparent)]
        struct $ty(Whole);

        impl Object for $ty {
            const KIND: &'static str = $kind;
            const PATH: &'static str = $path;

            type Labels = Labels;

            fn meta(&self) -> &Meta {
                &self.0.metadata
            }
        }

        impl AsRef<Value> for $ty {
            fn as_ref(&self) -> &Value {
                &self.0.object
            }
        }
    };
}

policy!(AuthorizationPolicy, "authorizationpolicy", "apis/security.istio.io/v1/authorizationpolicies");
policy!(PeerAuthentication, "peerauthentication", "apis/security.istio.io/v1/peerauthentications");

/// One of the kinds.
struct Collection {
    kind: Kind,
    enforcement: Arc<Enforcement>,
    /// Of a list that is under way.
    pages: Vec<Parsed>,
    listed: bool,
    /// What was told of it last.
    failure: Option<String>,
}

impl Collection {
    fn new(kind: Kind, enforcement: Arc<Enforcement>) -> Self {
        Self { kind, enforcement, pages: Vec::new(), listed: false, failure: None }
    }

    fn hear<T: Object + AsRef<Value>>(&mut self, word: Word<'_, T>) {
        match word {
            Word::Page(objects) => {
                for object in &objects {
                    let parsed = match object {
                        Ok(object) => self.parse(object.as_ref()),
                        Err(bad) => Some(self.malformed(bad)),
                    };
                    self.pages.extend(parsed);
                }
                return;
            }
            Word::Listed(_) => {
                let pages = std::mem::take(&mut self.pages);
                self.sync(pages);
                self.listed = true;
            }
            Word::Changed(object) => {
                if let Some(parsed) = self.parse(object.as_ref()) {
                    self.upsert(parsed);
                }
            }
            Word::Malformed(bad) => self.upsert(self.malformed(&bad)),
            Word::Gone(object) => {
                let key = Key { kind: self.kind, name: object.meta().full_name() };
                change(&self.enforcement, Origin::Kube, |policies| policies.delete(Origin::Kube, &key));
            }
            // `Ends` is of pods only.
            Word::Confirmed | Word::Ends(_) => {}
            Word::Failed(failure) => return self.failed(failure),
        }
        if self.failure.take().is_some() {
            info!(kind = self.kind.name(), "policies of the API are followed again");
        }
    }

    fn upsert(&self, parsed: Parsed) {
        change(&self.enforcement, Origin::Kube, |policies| policies.upsert(Origin::Kube, parsed));
    }

    fn sync(&self, parsed: Vec<Parsed>) {
        change(&self.enforcement, Origin::Kube, |policies| policies.sync(Origin::Kube, &[self.kind], parsed));
    }

    fn parse(&self, object: &Value) -> Option<Parsed> {
        match read_as(self.kind, object) {
            Read::Policy(parsed) => Some(*parsed),
            // The API server lets no such name through.
            Read::Unnamed(reason) => {
                warn!(reason, "policy refused");
                None
            }
            Read::Other(_) => None,
        }
    }

    fn malformed(&self, bad: &Malformed) -> Parsed {
        let key = Key { kind: self.kind, name: bad.name.clone() };
        Parsed { key, body: Body::Malformed { reason: bad.reason.clone(), closed: None }, warnings: Vec::new() }
    }

    /// What is in force stays, whatever happens to the API server or the CRDs.
    fn failed(&mut self, failure: Failure) {
        // A list that broke off begins anew.
        self.pages.clear();
        if failure.absent && !self.listed {
            // Nobody can have written one: known, and none.
            self.listed = true;
            self.sync(Vec::new());
        }
        if self.failure.as_ref() == Some(&failure.reason) {
            return;
        }
        let kind = self.kind.name();
        if failure.absent {
            info!(kind, "the cluster has no such CRD: no policies of this kind from the API until it is installed");
        } else {
            warn!(kind, reason = failure.reason, "policies of the API are not followed; what is in force stays");
        }
        self.failure = Some(failure.reason);
    }
}
