//! Policies in files: YAML of several documents, or JSON, as `kubectl get -o yaml` writes and `kubectl apply` reads them.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::object::{Parsed, Read, read};
use crate::source::parse::{self, Mistake};

/// A file that is larger is none of policies.
const MAX_BYTES: u64 = 64 << 20;

/// What a text holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    pub objects: Vec<Parsed>,
    /// Documents that are no policies: which kinds, or why not.
    pub passed_over: Vec<String>,
    /// Objects of our kinds without a usable name: they can't be in force.
    pub unnamed: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum BadFile {
    #[error("{}: {error}", path.display())]
    Unreadable { path: PathBuf, error: io::Error },
    #[error("{}: {bytes} bytes are too many for policies: at most {MAX_BYTES}", path.display())]
    TooLarge { path: PathBuf, bytes: u64 },
    #[error("{}:{mistake}", path.display())]
    Mistaken { path: PathBuf, mistake: Mistake },
}

/// The policies of one file.
pub fn read_file(path: &Path) -> Result<Contents, BadFile> {
    let unreadable = |error| BadFile::Unreadable { path: path.to_owned(), error };
    let bytes = fs::metadata(path).map_err(unreadable)?.len();
    if bytes > MAX_BYTES {
        return Err(BadFile::TooLarge { path: path.to_owned(), bytes });
    }
    let text = fs::read_to_string(path).map_err(unreadable)?;
    contents(&text).map_err(|mistake| BadFile::Mistaken { path: path.to_owned(), mistake })
}

/// The files that a path stands for: itself, or those of a directory that are named `.yaml`, `.yml` or `.json`, sorted.
pub fn files(path: &Path) -> Result<Vec<PathBuf>, BadFile> {
    let unreadable = |error| BadFile::Unreadable { path: path.to_owned(), error };
    let directory = fs::metadata(path).map_err(unreadable)?;
    if !directory.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let named =
            path.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|known| extension == *known));
        // A ConfigMap's files are symbolic links, its hidden directories are not files.
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if named && !hidden && path.is_file() {
            found.push(path);
        }
    }
    // Of a directory that is moved away in the middle of this, some files only seem to be gone.
    let now = fs::metadata(path).map_err(unreadable)?;
    if (now.dev(), now.ino()) != (directory.dev(), directory.ino()) {
        return Err(unreadable(io::Error::other("replaced while it was read")));
    }
    found.sort();
    Ok(found)
}

/// The policies of a text; a mistake in its syntax costs all of it.
pub fn contents(text: &str) -> Result<Contents, Mistake> {
    let mut contents = Contents::default();
    // JSON is YAML, too, but not within YAML's limits.
    let documents = match serde_json::from_str::<Value>(text) {
        Ok(document) => vec![document],
        Err(_) if is_blank(text) => Vec::new(),
        Err(_) => {
            let options = serde_saphyr::options! { with_snippet: false };
            serde_saphyr::from_multiple_with_options(text, options).map_err(|error| parse::explain(text, &error))?
        }
    };
    for document in &documents {
        take(document, &mut contents, 0);
    }
    Ok(contents)
}

fn is_blank(text: &str) -> bool {
    text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'))
}

fn take(document: &Value, contents: &mut Contents, depth: usize) {
    let kind = document.get("kind").and_then(Value::as_str).unwrap_or_default();
    if document.is_null() {
        return;
    }
    // What `kubectl get -o yaml` writes for several objects.
    if let (true, Some(Value::Array(items)), 0) = (kind.ends_with("List"), document.get("items"), depth) {
        return items.iter().for_each(|item| take(item, contents, depth + 1));
    }
    match read(document) {
        Read::Policy(parsed) => contents.objects.push(*parsed),
        Read::Other(kind) => contents.passed_over.push(kind),
        Read::Unnamed(reason) => contents.unnamed.push(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::object::Body;

    #[test]
    fn documents_and_lists_are_read_and_other_objects_passed_over() {
        let text = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: shop}
spec: {}
---
# nothing
---
apiVersion: v1
kind: List
items:
- apiVersion: security.istio.io/v1beta1
  kind: PeerAuthentication
  metadata: {name: b, namespace: shop}
  spec:
    selector: {matchLabels: {app: web}}
    mtls: {mode: STRICT}
    portLevelMtls:
      8080: {mode: DISABLE}
- {apiVersion: apps/v1, kind: Deployment, metadata: {name: c}}
- {apiVersion: security.istio.io/v1, kind: RequestAuthentication, metadata: {name: c}}
- {apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: c}}
";
        let contents = contents(text).unwrap();
        let names: Vec<_> = contents.objects.iter().map(|object| object.key.to_string()).collect();
        assert_eq!(names, ["AuthorizationPolicy shop/a", "PeerAuthentication shop/b"]);
        assert_eq!(contents.passed_over, ["apps/v1 Deployment", "security.istio.io/v1 RequestAuthentication"]);
        assert_eq!(contents.unnamed, ["PeerAuthentication: metadata.namespace is missing"]);
        let Body::Peer(peer) = &contents.objects[1].body else { panic!("{:?}", contents.objects[1]) };
        assert_eq!(peer.ports.keys().collect::<Vec<_>>(), [&8080]);
    }

    #[test]
    fn a_mistake_in_the_syntax_is_told_by_line_and_column() {
        let mistake = contents("kind: a\nspec: [1, 2\nb: c\n").unwrap_err();
        assert!(mistake.line >= 2, "{mistake}");
        assert_eq!(contents("# nothing yet\n").unwrap(), Contents::default());
        // Anchors that expand without end cost nothing but themselves.
        let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n\
                    d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e]\n";
        assert!(contents(bomb).is_err());
        assert!(contents(&"[".repeat(100_000)).is_err());
    }
}
