//! Whether the API server is there and lets the agent look: what the watches need, asked once.

use std::time::Duration;

use anyhow::Context as _;
use kube::{Client, api::ListParams, core::Request};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    Settings, configuration,
    object::{EndpointSlice, Namespace, Node, Object, Pod, Service},
    watch,
};

/// A server that is there answers sooner.
const PATIENCE: Duration = Duration::from_secs(5);

/// What an agent would meet.
#[derive(Debug)]
pub struct Reach {
    pub url: String,
    pub version: String,
    /// Collections that may not be listed: is there nothing to be done without it, and why not.
    pub refused: Vec<(bool, String)>,
    /// The API has a node of this one's name, as far as may be seen.
    pub node_known: bool,
}

/// As the agent would ask. An error: nobody that would answer it was found.
pub async fn reach(settings: &Settings) -> anyhow::Result<Reach> {
    let config = configuration(settings).await?;
    let url = config.cluster_url.to_string();
    let client = Client::try_from(config).with_context(|| format!("no client for the API server {url}"))?;
    let asked = tokio::time::timeout(PATIENCE, async {
        let version = client.apiserver_version().await.map_err(|error| anyhow::anyhow!(watch::causes(&error)))?;
        let this_node = ListParams::default().fields(&format!("metadata.name={}", settings.node));
        let one = || ListParams::default().limit(1);
        let answers = [
            (true, list::<Pod>(&client, one()).await),
            (true, list::<Service>(&client, one()).await),
            (true, list::<EndpointSlice>(&client, one()).await),
            (false, list::<Namespace>(&client, one()).await),
        ];
        let nodes = list::<Node>(&client, this_node).await;
        let node_known = nodes.as_ref().map_or(true, |count| *count > 0);
        let answers = answers.into_iter().chain([(false, nodes)]);
        let refused = answers.filter_map(|(needed, answer)| Some((needed, answer.err()?))).collect();
        anyhow::Ok(Reach { url: url.clone(), version: version.git_version, refused, node_known })
    });
    let silent = || format!("no answer within {} s", PATIENCE.as_secs());
    asked.await.with_context(silent).flatten().with_context(|| url.clone())
}

/// How many there are, at least.
async fn list<T: Object>(client: &Client, params: ListParams) -> Result<usize, String> {
    #[derive(Deserialize)]
    struct List<'a> {
        #[serde(borrow, default)]
        items: Option<Vec<&'a RawValue>>,
    }
    let request = Request::new(format!("/{}", T::PATH)).list(&params).map_err(|error| error.to_string())?;
    let text = client.request_text(request).await.map_err(|error| watch::explain::<T>(&error).reason)?;
    let list: List<'_> = serde_json::from_str(&text).map_err(|error| format!("{}s: {error}", T::KIND))?;
    Ok(list.items.map_or(0, |items| items.len()))
}
