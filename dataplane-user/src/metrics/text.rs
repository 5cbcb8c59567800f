//! The Prometheus text format, 0.0.4.

use std::fmt::Write;

use super::lag::{BOUNDS, Histogram};

#[derive(Clone, Copy, Debug)]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// Text that grows by whole families.
#[derive(Debug, Default)]
pub struct Exposition {
    text: String,
    name: String,
}

impl Exposition {
    /// The samples that follow are of this family.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        name.clone_into(&mut self.name);
        self.put(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    pub fn sample(&mut self, labels: &[(&str, &str)], value: f64) {
        let line = line(&self.name, labels, value);
        self.put(&line);
    }

    /// A family of one sample without labels.
    pub fn one(&mut self, name: &str, kind: Kind, help: &str, value: f64) {
        self.family(name, kind, help);
        self.sample(&[], value);
    }

    pub fn histogram(&mut self, labels: &[(&str, &str)], of: &Histogram) {
        let mut total = 0;
        for (nth, count) in of.counts.iter().enumerate() {
            total += count;
            let bound = BOUNDS.get(nth).map_or("+Inf".to_owned(), ToString::to_string);
            let labels = [labels, &[("le", bound.as_str())]].concat();
            let line = line(&format!("{}_bucket", self.name), &labels, total as f64);
            self.put(&line);
        }
        let (sum, count) = (format!("{}_sum", self.name), format!("{}_count", self.name));
        self.put(&line(&sum, labels, of.sum));
        self.put(&line(&count, labels, total as f64));
    }

    pub fn finish(self) -> String {
        self.text
    }

    fn put(&mut self, text: &str) {
        self.text.push_str(text);
    }
}

fn line(name: &str, labels: &[(&str, &str)], value: f64) -> String {
    let mut line = name.to_owned();
    for (nth, (label, value)) in labels.iter().enumerate() {
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        // Writing to a String cannot fail.
        let _ = write!(line, "{}{label}=\"{value}\"", if nth == 0 { '{' } else { ',' });
    }
    let end = if labels.is_empty() { "" } else { "}" };
    let _ = writeln!(line, "{end} {value}");
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_samples_and_histograms_are_as_prometheus_reads_them() {
        let mut out = Exposition::default();
        out.family("a_total", Kind::Counter, "Things.");
        out.sample(&[("x", "q\"\\\n"), ("y", "z")], 3.0);
        let mut histogram = Histogram::default();
        histogram.observe(0.0000015);
        histogram.observe(1e9);
        out.family("h_seconds", Kind::Histogram, "Lag.");
        out.histogram(&[("s", "api")], &histogram);
        let text = out.finish();
        assert!(
            text.starts_with("# HELP a_total Things.\n# TYPE a_total counter\na_total{x=\"q\\\"\\\\\\n\",y=\"z\"} 3\n")
        );
        assert!(text.contains("h_seconds_bucket{s=\"api\",le=\"0.000005\"} 1\n"), "{text}");
        assert!(text.contains("h_seconds_bucket{s=\"api\",le=\"+Inf\"} 2\n"), "{text}");
        assert!(text.ends_with("h_seconds_count{s=\"api\"} 2\n"), "{text}");
    }
}
