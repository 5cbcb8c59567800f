//! What a PromQL expression asks for. Only as much of the language as our own expressions need: Prometheus parses them.

use std::collections::BTreeSet;

/// The metrics that an expression names.
pub fn names(expression: &str) -> BTreeSet<String> {
    selectors(expression)
        .into_iter()
        .map(|selector| selector.split('{').next().unwrap_or_default().to_owned())
        .collect()
}

/// Each metric with its matchers, without ranges: what must have series if the expression is ever to.
pub fn selectors(expression: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut rest = expression;
    while let Some(start) = rest.find(|c: char| c.is_ascii_alphabetic() || matches!(c, '_' | ':' | '"')) {
        rest = &rest[start..];
        if let Some(text) = rest.strip_prefix('"') {
            rest = text.split_once('"').map_or("", |(_, after)| after);
            continue;
        }
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | ':'))).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        rest = after;
        if !is_metric(word) {
            continue;
        }
        let matchers = after.strip_prefix('{').and_then(closing).unwrap_or_default();
        found.insert(if matchers.is_empty() { word.to_owned() } else { format!("{word}{{{matchers}}}") });
    }
    found
}

/// Ours, those of any process, and what Prometheus adds.
fn is_metric(word: &str) -> bool {
    word.starts_with("hitless_") || word.starts_with("process_") || word == "up"
}

/// Up to the brace that closes, which is not one in quotes.
fn closing(text: &str) -> Option<&str> {
    let mut quoted = false;
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            '}' if !quoted => return Some(&text[..at]),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_found_with_their_matchers_and_words_in_quotes_are_none() {
        let expression = r#"histogram_quantile(0.9, sum by (le) (rate(hitless_a_bucket{first="hitless_x}",b=~"c"}[5m])))
            / on (job) hitless_b > 0 and up{job="x"} == 0"#;
        let selectors: Vec<_> = selectors(expression).into_iter().collect();
        assert_eq!(selectors, [r#"hitless_a_bucket{first="hitless_x}",b=~"c"}"#, "hitless_b", r#"up{job="x"}"#]);
        let names: Vec<_> = names(expression).into_iter().collect();
        assert_eq!(names, ["hitless_a_bucket", "hitless_b", "up"]);
    }
}
