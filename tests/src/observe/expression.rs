//! What a PromQL expression names. Only as much of the language as that needs: Prometheus parses it.

use std::collections::BTreeSet;

/// The metrics that an expression names: ours, those of any process, and what Prometheus adds.
pub fn names(expression: &str) -> BTreeSet<String> {
    let unquoted = expression.split('"').step_by(2);
    let words = unquoted.flat_map(|text| text.split(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | ':'))));
    let ours = |word: &&str| word.starts_with("hitless_") || word.starts_with("process_") || *word == "up";
    words.filter(ours).map(str::to_owned).collect()
}

/// What an alert's expression compares with a number: `x` of `x > 0.8`.
pub fn compared(expression: &str) -> Option<&str> {
    let ends = [" > ", " < ", " == "].into_iter().filter_map(|comparison| expression.rfind(comparison));
    ends.max().map(|end| &expression[..end])
}

/// The labels that a text is made of: `{{instance}}` of a legend, `{{ $labels.instance }}` of an alert.
pub fn labels(template: &str) -> BTreeSet<String> {
    let actions = template.split("{{").skip(1).filter_map(|rest| rest.split_once("}}"));
    let first = actions.filter_map(|(action, _)| action.split('|').next()).map(str::trim);
    let labels = first.filter(|word| *word != "$value");
    labels.map(|word| word.strip_prefix("$labels.").unwrap_or(word).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(words: &[&str]) -> BTreeSet<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn metrics_are_found_and_words_in_quotes_are_none() {
        let expression = r#"histogram_quantile(0.9, sum by (le) (rate(hitless_a_bucket{first="hitless_x}",b=~"c"}[5m])))
            / on (job) hitless_b > 0 and up{job="x"} == 0"#;
        assert_eq!(names(expression), sorted(&["hitless_a_bucket", "hitless_b", "up"]));
    }

    #[test]
    fn an_alert_is_taken_apart_at_its_last_comparison() {
        assert_eq!(compared("a == 0"), Some("a"));
        assert_eq!(compared("count (a > 0) > 0.001"), Some("count (a > 0)"));
        assert_eq!(compared("a < 900"), Some("a"));
        assert_eq!(compared("rate(a[5m])"), None);
    }

    #[test]
    fn labels_are_told_from_values_and_pipes() {
        let text = "{{ $labels.map }} on {{$labels.instance}}: {{ $value | humanize }}, p50 {{first}}";
        assert_eq!(labels(text), sorted(&["first", "instance", "map"]));
    }
}
