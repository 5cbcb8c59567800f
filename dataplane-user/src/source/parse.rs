//! Text to model; a mistake is told with its line, column and field.

use std::{fmt, path::Path};

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::model::{Event, Key, Object, Snapshot};

/// Where a text is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    pub line: u64,
    pub column: u64,
    /// The key whose value is wrong; None when the reason names it.
    pub field: Option<String>,
    pub reason: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, "{}:{}: ", self.line, self.column)?;
        }
        if let Some(field) = &self.field {
            write!(f, "field {field}: ")?;
        }
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Mistake {}

/// The whole desired state as a file holds it: JSON by its name, else YAML.
pub fn snapshot(path: &Path, text: &str) -> Result<Snapshot, Mistake> {
    if path.extension().is_some_and(|extension| extension == "json") {
        return serde_json::from_str(text).map_err(|error| explain_json(text, &error));
    }
    if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
        // Far more often a file that is being written than the wish to delete everything.
        return Err(mistake("the file is empty; to say that there is nothing, write `services: []`".into()));
    }
    // The default budget is meant for small documents; 100,000 backends are a million nodes.
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_events: usize::MAX,
            max_nodes: usize::MAX,
            max_total_scalar_bytes: usize::MAX,
        },
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| explain(text, &error))
}

/// One event of the stream.
pub fn event(line: &[u8]) -> Result<Event, Mistake> {
    // Not serde's tagged enum: it would keep a copy of a whole relist before it knew the tag.
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Line<'a> {
        op: Op,
        #[serde(borrow)]
        object: Option<&'a RawValue>,
        state: Option<Snapshot>,
    }
    #[derive(Deserialize, Debug)]
    #[serde(rename_all = "camelCase")]
    enum Op {
        Upsert,
        Delete,
        Sync,
    }

    let text = std::str::from_utf8(line).map_err(|error| mistake(format!("not UTF-8: {error}")))?;
    let parsed: Line<'_> = serde_json::from_str(text).map_err(|error| explain_json(text, &error))?;
    let of = |object: &RawValue, error: &serde_json::Error| {
        // The object starts where the borrowed text does.
        let offset = object.get().as_ptr() as usize - text.as_ptr() as usize;
        let mut mistake = explain_json(object.get(), error);
        mistake.column += offset as u64;
        mistake
    };
    match (parsed.op, parsed.object, parsed.state) {
        (Op::Upsert, Some(object), None) => serde_json::from_str::<Object>(object.get())
            .map(|object| Event::Upsert { object })
            .map_err(|error| of(object, &error)),
        (Op::Delete, Some(object), None) => serde_json::from_str::<Key>(object.get())
            .map(|object| Event::Delete { object })
            .map_err(|error| of(object, &error)),
        (Op::Sync, None, Some(state)) => Ok(Event::Sync { state }),
        (Op::Sync, ..) => Err(mistake("op sync takes `state` (and no `object`)".into())),
        (op, ..) => Err(mistake(format!("op {op:?} takes `object` (and no `state`)").to_lowercase())),
    }
}

pub fn explain(text: &str, error: &serde_saphyr::Error) -> Mistake {
    let Some(at) = error.location() else {
        // Flattened structs lose the place of an unknown key: its name finds it again.
        let reason = error.without_snippet().to_string();
        let key = reason.split('`').nth(1).unwrap_or_default();
        let place = text.lines().enumerate().find_map(|(index, line)| {
            let key_at = line.find(&format!("{key}:")).filter(|_| !key.is_empty())?;
            Some((index as u64 + 1, key_at as u64 + 1))
        });
        let (line, column) = place.unwrap_or_default();
        return Mistake { line, column, field: None, reason };
    };
    let (line, column) = (at.line(), at.column());
    let reason = error.without_snippet().to_string();
    let reason = reason.strip_suffix(&format!(" at line {line}, column {column}")).unwrap_or(&reason);
    located(text, line, column, reason)
}

fn explain_json(text: &str, error: &serde_json::Error) -> Mistake {
    let (line, column) = (error.line() as u64, error.column() as u64);
    let reason = error.to_string();
    let reason = reason.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&reason);
    located(text, line, column, reason)
}

fn mistake(reason: String) -> Mistake {
    Mistake { line: 0, column: 0, field: None, reason }
}

fn located(text: &str, line: u64, column: u64, reason: &str) -> Mistake {
    let named = reason.contains("field `");
    let field = if named { None } else { key_before(text, line, column) };
    Mistake { line, column, field, reason: reason.to_owned() }
}

/// The last `key:` before a place: what its value belongs to.
fn key_before(text: &str, line: u64, column: u64) -> Option<String> {
    let index = usize::try_from(line.checked_sub(1)?).ok()?;
    let lines: Vec<&str> = text.lines().take(index + 1).collect();
    let (here, above) = lines.split_last()?;
    let upto: String = here.chars().take(column as usize).collect();
    let mut candidates = std::iter::once(upto.as_str()).chain(above.iter().rev().copied());
    candidates.find_map(last_key)
}

fn last_key(text: &str) -> Option<String> {
    let mut rest = text;
    while let Some(colon) = rest.rfind(':') {
        let before = rest[..colon].trim_end().trim_end_matches(['"', '\'']);
        let start =
            before.rfind(|c: char| !(c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'))).map_or(0, |i| i + 1);
        let key = &before[start..];
        // A colon within a value (an IPv6 address, `file:/x`) has no space or quote after it.
        let ends = text[colon + 1..].chars().next().is_none_or(|c| c.is_whitespace() || matches!(c, '"' | '[' | '{'));
        let json = text[..colon].trim_end().ends_with('"');
        if (ends || json) && key.starts_with(|c: char| c.is_alphabetic()) {
            return Some(key.to_owned());
        }
        rest = &rest[..colon];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yaml(text: &str) -> String {
        snapshot(Path::new("x.yaml"), text).unwrap_err().to_string()
    }

    #[test]
    fn a_bad_file_is_told_by_line_column_and_field() {
        assert_eq!(yaml("services:\n- name: a/b\n  ports:\n  - port: 70000\n"), "4:11: field port: invalid u16");
        assert_eq!(
            yaml("services:\n- name: a/b\n  ports:\n  - port: 80\n    prot: TCP\n"),
            "5:5: unknown field `prot`, expected one of name, port, protocol, nodePort"
        );
        assert_eq!(
            yaml("services:\n- name: a/b\n  addresses: [10.0.0.999]\n  ports:\n  - port: 80\n"),
            "3:15: field addresses: invalid IP address syntax"
        );
        assert!(yaml("# nothing yet\n\n").contains("the file is empty"));
        assert_eq!(snapshot(Path::new("x.yaml"), "services: []"), Ok(Snapshot::default()));
        assert_eq!(yaml("services:\n- name: a/b\n"), "2:3: missing field `ports`");
        let json = "{\"services\":[\n{\"name\":\"a/b\",\"ports\":[{\"port\":\"x\"}]}]}";
        assert_eq!(
            snapshot(Path::new("x.json"), json).unwrap_err().to_string(),
            "2:34: field port: invalid type: string \"x\", expected u16"
        );
    }

    #[test]
    fn events_are_read_and_their_mistakes_told() {
        let upsert =
            br#"{"op":"upsert","object":{"kind":"backend","service":"a/b","address":"10.0.0.1","targetPort":80}}"#;
        assert!(matches!(event(upsert), Ok(Event::Upsert { object: Object::Backend(backend) }) if backend.ready));
        let delete = br#"{"op":"delete","object":{"kind":"pod","name":"a/b-1"}}"#;
        assert!(matches!(event(delete), Ok(Event::Delete { object: Key::Pod { .. } })));
        let sync = br#"{"op":"sync","state":{"services":[{"name":"a/b","ports":[{"port":80}]}]}}"#;
        assert!(matches!(event(sync), Ok(Event::Sync { state }) if state.services.len() == 1));
        assert!(matches!(event(br#"{"op":"sync","state":{}}"#), Ok(Event::Sync { .. })));

        let said = |line: &str| event(line.as_bytes()).unwrap_err().to_string();
        assert_eq!(said(r#"{"op":"sync"}"#), "op sync takes `state` (and no `object`)");
        assert!(said(r#"{"op":"erase"}"#).contains("expected one of `upsert`, `delete`, `sync`"));
        let unknown = r#"{"op":"upsert","object":{"kind":"pod","name":"a/b","nets":"/x"}}"#;
        assert!(said(unknown).contains("unknown field `nets`"), "{}", said(unknown));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let line = br#"{"op":"upsert","object":{"kind":"service","name":"a/b","addresses":["10.96.0.1"],"ports":[{"port":80}]}}"#;
        let read = event(line).unwrap();
        assert_eq!(event(&serde_json::to_vec(&read).unwrap()), Ok(read));
    }
}
