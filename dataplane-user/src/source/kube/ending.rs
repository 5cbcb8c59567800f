//! A pod's end, seen in the line of a watch before the line is parsed: the most urgent word there is.
//!
//! Reading a whole pod takes longer than taking it out of the maps. The API server writes `metadata` first and in it who
//! the pod is and its `deletionTimestamp` before anything that is large, so a look at the line's beginning is enough. It
//! only comes early: what it misses, the whole line says.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer as _, IgnoredAny, MapAccess, Visitor};

/// Which life of which pod ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ending<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub uid: &'a str,
}

/// What was seen so far.
#[derive(Default)]
struct Seen<'a> {
    pod: Ending<'a>,
    deleted: bool,
}

/// The pod that a line of a watch (`{"type":"MODIFIED","object":{…}}`) says ends, if its beginning says so.
pub fn ending(line: &[u8]) -> Option<Ending<'_>> {
    let mut seen = Seen::default();
    // It stops where enough is known, which the parser takes for an error.
    let _ = serde_json::Deserializer::from_slice(line).deserialize_map(Line(&mut seen));
    let Seen { pod, deleted } = seen;
    let known = ![pod.namespace, pod.name, pod.uid].contains(&"");
    (known && deleted).then_some(pod)
}

macro_rules! map {
    ($name:ident, $next:expr) => {
        struct $name<'s, 'a>(&'s mut Seen<'a>);

        impl<'a> DeserializeSeed<'a> for $name<'_, 'a> {
            type Value = ();

            fn deserialize<D: serde::Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
                deserializer.deserialize_map(self)
            }
        }

        impl<'a> Visitor<'a> for $name<'_, 'a> {
            type Value = ();

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
                let next: fn(&mut Seen<'a>, &str, &mut A) -> Result<bool, A::Error> = $next;
                while let Some(key) = map.next_key::<&str>()? {
                    if !next(self.0, key, &mut map)? {
                        break;
                    }
                }
                Ok(())
            }
        }
    };
}

map!(Line, |seen, key, map| {
    match key {
        // Its end was told before the object goes, but for a deletion without grace.
        "type" => Ok(map.next_value::<&str>()? == "MODIFIED"),
        "object" => map.next_value_seed(Pod(seen)).map(|()| false),
        _ => Ok(false),
    }
});

map!(Pod, |seen, key, map| {
    match key {
        "kind" | "apiVersion" => map.next_value::<IgnoredAny>().map(|_| true),
        "metadata" => map.next_value_seed(Metadata(seen)).map(|()| false),
        _ => Ok(false),
    }
});

map!(Metadata, |seen, key, map| {
    match key {
        "name" => seen.pod.name = map.next_value()?,
        "namespace" => seen.pod.namespace = map.next_value()?,
        "uid" => seen.pod.uid = map.next_value()?,
        "deletionTimestamp" => {
            seen.deleted = map.next_value::<Option<&str>>()?.is_some();
            // Who it is has come before.
            return Ok(false);
        }
        "generateName" | "selfLink" | "resourceVersion" | "generation" | "creationTimestamp" => {
            map.next_value::<IgnoredAny>()?;
        }
        // Large, and in the API server's order behind all of these.
        _ => return Ok(false),
    }
    Ok(true)
});

#[cfg(test)]
mod tests {
    use super::*;

    fn line(kind: &str, metadata: &str) -> String {
        format!(
            r#"{{"type":"{kind}","object":{{"kind":"Pod","apiVersion":"v1","metadata":{{"name":"a","generateName":"a-",
            "namespace":"n","uid":"u","resourceVersion":"9","generation":2,"creationTimestamp":"2026-01-01T00:00:00Z"{metadata}}},
            "spec":{{"nodeName":"x"}}}}}}"#
        )
    }

    const POD: Option<Ending<'_>> = Some(Ending { namespace: "n", name: "a", uid: "u" });

    #[test]
    fn an_end_is_seen_in_the_beginning_of_a_line() {
        let deleted = r#","deletionTimestamp":"2026-01-01T00:00:00Z","labels":{"a":"b"}"#;
        assert_eq!(ending(line("MODIFIED", deleted).as_bytes()), POD);
        let cut = line("MODIFIED", deleted);
        assert_eq!(ending(&cut.as_bytes()[..cut.len() - 40]), POD, "the rest does not matter");
    }

    #[test]
    fn whatever_else_is_said_is_no_end() {
        let deleted = r#","deletionTimestamp":"2026-01-01T00:00:00Z""#;
        for other in [
            line("MODIFIED", ""),
            line("MODIFIED", r#","deletionTimestamp":null"#),
            // Somebody's label of that name, and his annotation that quotes one.
            line("MODIFIED", r#","labels":{"deletionTimestamp":"x"}"#),
            line("MODIFIED", r#","annotations":{"a":"{\"deletionTimestamp\":\"x\"}"}"#),
            line("MODIFIED", &format!(r#","labels":{{}}{deleted}"#)),
            line("ADDED", deleted),
            line("DELETED", deleted),
            line("BOOKMARK", deleted),
            line("ERROR", deleted),
            r#"{"type":"MODIFIED","object":{"metadata":{"deletionTimestamp":"x"}}}"#.into(),
            r#"{"type":"MODIFIED","object":[{"metadata":{}}]}"#.into(),
            r#"{"type":"MODIFIED","object":{}}"#.into(),
            "[]".into(),
            String::new(),
        ] {
            assert_eq!(ending(other.as_bytes()), None, "{other}");
        }
    }
}
