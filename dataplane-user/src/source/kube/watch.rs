//! One collection of the API server, listed once and then followed for as long as the agent runs.
//!
//! Follows "Efficient detection of changes" of the Kubernetes API concepts: list in pages, watch from the list's
//! resourceVersion with bookmarks, go on from the last one seen, list again when that is too old (410). Each line is
//! parsed where it is read: between the socket and the map is nothing that waits.

use std::{
    fmt,
    hash::BuildHasher,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::io::AsyncBufReadExt;
use http::StatusCode;
use kube::{
    Client, Error,
    api::{ListParams, WatchParams},
    core::{Request, Status},
};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::{sync::oneshot, task::JoinError};

use super::{
    ending::{Ending, ending},
    names::Names,
    object::{Meta, Object},
};
use crate::kernel::monotonic_ns;

/// Objects per page of a list.
const PAGE: u32 = 500;
/// How long one watch lasts; the API server then ends it.
const WATCH_SECONDS: u32 = 270;
/// Bookmarks come every minute: a connection that is silent for longer leads nowhere.
const SILENCE: Duration = Duration::from_secs(150);
/// An answer to a list.
const LIST_WITHIN: Duration = Duration::from_secs(60);
/// A watch that ends sooner came to nothing.
const SHORT: Duration = Duration::from_secs(1);
/// Before a kind that is not there is looked for again: nodes are many, and CRDs are installed once.
const ABSENT: Duration = Duration::from_secs(30);
/// The pause after a failure, doubling between these.
const PAUSE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

/// What is heard of a collection.
#[derive(Debug)]
pub enum Word<'a, T> {
    /// What the word says that comes next, early.
    Ends(Ending<'a>),
    /// Some of what there is.
    Page(Vec<Result<T, Malformed>>),
    /// All there is was told by pages; these are its names. Malformed objects are there too: their last good state
    /// stays.
    Listed(Names),
    Changed(T),
    Gone(T),
    Malformed(Malformed),
    /// Nothing new, from a server that is there.
    Confirmed,
    Failed(Failure),
}

/// An object that is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// namespace/name, as far as it can be read.
    pub name: Arc<str>,
    pub reason: String,
}

/// Why a collection can't be followed right now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub reason: String,
    /// Asking again is of no use until somebody grants it.
    pub forbidden: bool,
    /// The API server knows no such kind: its CRD is not installed.
    pub absent: bool,
}

/// Lists and follows; `fields` selects (`spec.nodeName=a`), empty for all. `tell` gets each word with the
/// `CLOCK_MONOTONIC` time at which its last byte was read.
pub async fn follow<T: Object>(client: Client, fields: String, mut tell: impl FnMut(Word<'_, T>, u64)) {
    let mut pause = Pause::default();
    loop {
        let from = match list::<T>(&client, &fields, &mut tell).await {
            Ok((named, from)) => {
                tell(Word::Listed(named), monotonic_ns());
                from
            }
            Err(error) => {
                let after = retry_after(&error);
                tell(Word::Failed(explain::<T>(&error)), monotonic_ns());
                pause.take(after).await;
                continue;
            }
        };
        let mut from = from;
        // Until what was seen last is too old to go on from.
        loop {
            let began = Instant::now();
            match watch(&client, &fields, &mut from, &mut pause, &mut tell).await {
                // Somebody on the way that ends every watch at once must not be asked in a busy loop.
                Ok(()) if began.elapsed() < SHORT => pause.take(None).await,
                Ok(()) => {}
                Err(error) if code(&error) == Some(StatusCode::GONE.as_u16()) => break,
                Err(error) => {
                    let after = retry_after(&error);
                    tell(Word::Failed(explain::<T>(&error)), monotonic_ns());
                    pause.take(after).await;
                }
            }
        }
    }
}

/// Doubles from failure to failure; a word from the server begins anew.
#[derive(Default)]
struct Pause(Option<Duration>);

impl Pause {
    async fn take(&mut self, at_least: Option<Duration>) {
        let [first, longest] = PAUSE;
        let now = self.0.map_or(first, |last| (last * 2).min(longest));
        self.0 = Some(now);
        // Agents that lost the same server do not come back in step.
        let jitter = std::hash::RandomState::new().hash_one(0) % 256;
        tokio::time::sleep(now.max(at_least.unwrap_or_default()) + now * jitter as u32 / 512).await;
    }

    fn reset(&mut self) {
        self.0 = None;
    }
}

#[derive(Deserialize)]
struct List<'a> {
    #[serde(default)]
    metadata: ListMeta,
    #[serde(borrow, default)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ListMeta {
    resource_version: String,
    #[serde(rename = "continue")]
    next: Option<String>,
}

/// Tells it page by page, so that a large cluster is never in memory as a whole. The next page is asked for as soon as this
/// one says how: the API server works on it while this one is read.
async fn list<T: Object>(
    client: &Client,
    fields: &str,
    tell: &mut impl FnMut(Word<'_, T>, u64),
) -> Result<(Names, String), Error> {
    let mut params = ListParams::default().limit(PAGE);
    if !fields.is_empty() {
        params = params.fields(fields);
    }
    let ask = |params: &ListParams| tokio::spawn(page(client.clone(), T::PATH, params.clone()));
    let ended = |error: JoinError| Error::Service(error.into());
    let mut named = Names::default();
    let mut asked = ask(&params);
    loop {
        let text = asked.await.map_err(ended)??;
        let (said, meta) = oneshot::channel();
        // Megabytes: beside the agent's thread.
        let parsing = tokio::task::spawn_blocking(move || {
            parse_page::<T>(&text, |meta| {
                // Nobody listens to a list that was given up.
                let _ = said.send(meta);
            })
        });
        let meta = meta.await.unwrap_or_default();
        let next = meta.next.filter(|next| !next.is_empty()).map(|next| {
            params = params.clone().continue_token(&next);
            ask(&params)
        });
        let page = parsing.await.map_err(ended)?.map_err(Error::SerdeError)?;
        for object in &page {
            match object {
                Ok(object) => named.insert(&object.meta().full_name()),
                Err(bad) => named.insert(&bad.name),
            }
        }
        tell(Word::Page(page), monotonic_ns());
        match next {
            Some(next) => asked = next,
            None => return Ok((named, meta.resource_version)),
        }
    }
}

async fn page(client: Client, path: &'static str, params: ListParams) -> Result<String, Error> {
    let request = Request::new(format!("/{path}")).list(&params).map_err(Error::BuildRequest)?;
    within(LIST_WITHIN, client.request_text(request)).await?
}

/// One bad object costs only itself. `about` is told before the objects are read.
fn parse_page<T: Object>(text: &str, about: impl FnOnce(ListMeta)) -> serde_json::Result<Vec<Result<T, Malformed>>> {
    let list: List<'_> = serde_json::from_str(text)?;
    about(list.metadata);
    let items = list.items.unwrap_or_default().into_iter();
    let objects = items.map(|item| serde_json::from_str(item.get()).map_err(|error| malformed(item.get(), &error)));
    Ok(objects.collect())
}

/// A line of a watch: `{"type":"MODIFIED","object":{…}}`.
#[derive(Deserialize)]
struct Line<T> {
    #[serde(rename = "type")]
    kind: Kind,
    object: T,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "UPPERCASE")]
enum Kind {
    Added,
    Modified,
    Deleted,
    Bookmark,
    Error,
}

/// Ok: the server ended it; `from` is where to go on.
async fn watch<T: Object>(
    client: &Client,
    fields: &str,
    from: &mut String,
    pause: &mut Pause,
    tell: &mut impl FnMut(Word<'_, T>, u64),
) -> Result<(), Error> {
    let jitter = (std::hash::RandomState::new().hash_one(1) % 30) as u32;
    let mut params = WatchParams::default().timeout(WATCH_SECONDS - jitter);
    if !fields.is_empty() {
        params = params.fields(fields);
    }
    let request = Request::new(format!("/{}", T::PATH)).watch(&params, from).map_err(Error::BuildRequest)?;
    let mut lines = within(SILENCE, client.request_stream(request)).await??;
    tell(Word::Confirmed, monotonic_ns());
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = within(SILENCE, lines.read_until(b'\n', &mut line)).await?;
        let read_ns = monotonic_ns();
        if read.map_err(Error::ReadEvents)? == 0 {
            return Ok(());
        }
        if line.last() != Some(&b'\n') {
            // Cut off in the middle: it comes again.
            return Ok(());
        }
        pause.reset();
        if T::ENDS
            && let Some(pod) = ending(&line)
        {
            tell(Word::Ends(pod), read_ns);
        }
        if let Some(word) = parse_line::<T>(&line, from)? {
            tell(word, read_ns);
        }
    }
}

/// Takes the line's resourceVersion over. None: an empty line.
fn parse_line<T: Object>(line: &[u8], from: &mut String) -> Result<Option<Word<'static, T>>, Error> {
    let Line { kind, object } = match serde_json::from_slice::<Line<T>>(line) {
        Ok(parsed) => parsed,
        Err(_) if line.iter().all(u8::is_ascii_whitespace) => return Ok(None),
        Err(error) => return parse_bad_line(line, from, error).map(Some),
    };
    if kind == Kind::Error {
        return Err(status_of(line));
    }
    from.clone_from(&object.meta().resource_version);
    Ok(Some(match kind {
        Kind::Added | Kind::Modified => Word::Changed(object),
        Kind::Deleted => Word::Gone(object),
        Kind::Bookmark | Kind::Error => Word::Confirmed,
    }))
}

fn parse_bad_line<T: Object>(
    line: &[u8],
    from: &mut String,
    error: serde_json::Error,
) -> Result<Word<'static, T>, Error> {
    #[derive(Deserialize)]
    struct Named {
        metadata: Meta,
    }
    if let Ok(Line { kind: Kind::Error, .. }) = serde_json::from_slice::<Line<serde::de::IgnoredAny>>(line) {
        return Err(status_of(line));
    }
    let Ok(Line { kind, object: Named { metadata } }) = serde_json::from_slice::<Line<Named>>(line) else {
        // No line of a watch at all: asked again from where it was whole.
        return Err(Error::SerdeError(error));
    };
    from.clone_from(&metadata.resource_version);
    let name = metadata.full_name();
    if kind == Kind::Deleted {
        // Whatever it was: it is gone.
        let gone = format!(
            r#"{{"metadata":{{"name":{:?},"namespace":{:?},"uid":{:?}}}}}"#,
            metadata.name, metadata.namespace, metadata.uid
        );
        return serde_json::from_str(&gone).map(Word::Gone).map_err(Error::SerdeError);
    }
    Ok(Word::Malformed(Malformed { name, reason: error.to_string() }))
}

fn status_of(line: &[u8]) -> Error {
    match serde_json::from_slice::<Line<Status>>(line) {
        Ok(line) => Error::Api(line.object.boxed()),
        Err(error) => Error::SerdeError(error),
    }
}

fn malformed(object: &str, error: &serde_json::Error) -> Malformed {
    #[derive(Deserialize)]
    struct Named {
        metadata: Meta,
    }
    let name = serde_json::from_str::<Named>(object).map(|named| named.metadata.full_name());
    Malformed { name: name.unwrap_or_else(|_| "(without a name)".into()), reason: error.to_string() }
}

async fn within<T>(time: Duration, work: impl Future<Output = T>) -> Result<T, Error> {
    tokio::time::timeout(time, work)
        .await
        .map_err(|_| Error::ReadEvents(std::io::Error::other(format!("no answer within {} s", time.as_secs()))))
}

fn code(error: &Error) -> Option<u16> {
    match error {
        Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// What the server asks for when it is asked too much (429, 503), or what is due to it.
fn retry_after(error: &Error) -> Option<Duration> {
    let Error::Api(status) = error else { return None };
    if status.code == StatusCode::NOT_FOUND.as_u16() {
        return Some(ABSENT);
    }
    let seconds = status.details.as_ref()?.retry_after_seconds;
    (seconds > 0).then(|| Duration::from_secs(u64::from(seconds).min(60)))
}

pub(super) fn explain<T: Object>(error: &Error) -> Failure {
    // As the API names the collection.
    let kinds = T::PATH.rsplit('/').next().unwrap_or(T::PATH);
    let reason = match error {
        Error::Api(status) => match status.code {
            401 => format!("{kinds}: not accepted by the API server: its token or certificate is not valid (any more)"),
            403 => format!(
                "{kinds}: {}: grant list and watch of {kinds} (the chart's ClusterRole does)",
                status.message.trim_end_matches('.')
            ),
            404 => format!("{kinds}: the API server serves no /{}: its CRD is not installed", T::PATH),
            429 => format!("{kinds}: the API server asks for patience: {}", status.message),
            _ => format!("{kinds}: {}", status.message),
        },
        error => format!("{kinds}: {}: is the API server reachable from this node?", Causes(error)),
    };
    let is = |status: StatusCode| code(error) == Some(status.as_u16());
    Failure { reason, forbidden: is(StatusCode::FORBIDDEN), absent: is(StatusCode::NOT_FOUND) }
}

/// An error with what is behind it, each part said once.
pub(super) fn causes(error: &Error) -> String {
    Causes(error).to_string()
}

struct Causes<'a>(&'a dyn std::error::Error);

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(&said)?;
        let mut next = self.0.source();
        while let Some(cause) = next {
            let text = cause.to_string();
            if !said.contains(&text) {
                write!(f, ": {text}")?;
                said = text;
            }
            next = cause.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::object::Pod, *};

    fn line(text: &str) -> (Result<Option<Word<'static, Pod>>, Error>, String) {
        let mut from = "7".to_owned();
        let word = parse_line(text.as_bytes(), &mut from);
        (word, from)
    }

    #[test]
    fn lines_of_a_watch_are_told_apart_and_move_its_place() {
        let object = r#"{"metadata":{"name":"a","namespace":"n","resourceVersion":"9"},"spec":{"unknown":[{"x":1}]}}"#;
        let (word, from) = line(&format!(r#"{{"type":"ADDED","object":{object}}}"#));
        assert!(matches!(word, Ok(Some(Word::Changed(pod))) if &*pod.metadata.full_name() == "n/a"));
        assert_eq!(from, "9");
        let (word, _) = line(&format!(r#"{{"type":"DELETED","object":{object}}}"#));
        assert!(matches!(word, Ok(Some(Word::Gone(_)))));
        let (word, from) = line(r#"{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"12"}}}"#);
        assert!(matches!(word, Ok(Some(Word::Confirmed))));
        assert_eq!(from, "12");
    }

    #[test]
    fn a_malformed_object_is_named_and_the_watch_goes_on_behind_it() {
        let object = r#"{"metadata":{"name":"a","namespace":"n","resourceVersion":"9"},"spec":{"nodeName":5}}"#;
        let (word, from) = line(&format!(r#"{{"type":"MODIFIED","object":{object}}}"#));
        let Ok(Some(Word::Malformed(bad))) = word else { panic!("{word:?}") };
        assert_eq!((&*bad.name, from.as_str()), ("n/a", "9"));
        assert!(bad.reason.contains("invalid type: integer `5`"), "{}", bad.reason);
        let (word, _) = line(&format!(r#"{{"type":"DELETED","object":{object}}}"#));
        assert!(matches!(word, Ok(Some(Word::Gone(pod))) if &*pod.metadata.full_name() == "n/a"));
        let (word, from) = line("{\"type\":\"ADDED\",\"object\":{\"metadata\"");
        assert!(word.is_err());
        assert_eq!(from, "7", "a line that is cut off does not move it");
    }

    #[test]
    fn an_expired_version_is_an_error_of_that_code() {
        let text = r#"{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired","message":"too old","status":"Failure"}}"#;
        let (word, _) = line(text);
        assert_eq!(code(&word.unwrap_err()), Some(410));
    }

    #[test]
    fn one_bad_object_of_a_list_costs_only_itself() {
        let text = r#"{"metadata":{"resourceVersion":"5","continue":""},"items":[
            {"metadata":{"name":"good","namespace":"n"}},{"metadata":{"name":"bad","namespace":"n"},"status":5}]}"#;
        let mut version = String::new();
        let objects = parse_page::<Pod>(text, |meta| version = meta.resource_version).unwrap();
        assert_eq!(version, "5");
        assert!(objects[0].is_ok());
        assert_eq!(&*objects[1].as_ref().unwrap_err().name, "n/bad");
        let objects = parse_page::<Pod>(r#"{"metadata":{"resourceVersion":"5"},"items":null}"#, |_| {}).unwrap();
        assert!(objects.is_empty());
    }
}
