//! A figure: what was measured, beside what, and whether it is good enough.

use std::fmt::Write as _;

use serde::{Serialize, Serializer};

/// One line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    pub name: &'static str,
    #[serde(serialize_with = "rounded")]
    pub value: f64,
    pub unit: &'static str,
    /// The same thing done without what the figure is about, measured in the same minutes.
    #[serde(serialize_with = "maybe_rounded")]
    pub baseline: Option<f64>,
    /// `value / baseline`.
    #[serde(serialize_with = "maybe_rounded")]
    pub ratio: Option<f64>,
    pub goal: Option<Goal>,
    /// What value and baseline are, for the table.
    #[serde(skip)]
    pub note: String,
}

/// What a figure is held to.
#[derive(Clone, Copy, Debug)]
pub enum Goal {
    ValueAtMost(f64),
    RatioAtMost(f64),
    RatioAtLeast(f64),
}

impl Serialize for Goal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text())
    }
}

impl Goal {
    pub fn text(&self) -> String {
        match self {
            Self::ValueAtMost(limit) => format!("value <= {}", round(*limit)),
            Self::RatioAtMost(limit) => format!("ratio <= {}", round(*limit)),
            Self::RatioAtLeast(limit) => format!("ratio >= {}", round(*limit)),
        }
    }
}

impl Figure {
    pub fn new(name: &'static str, value: f64, unit: &'static str) -> Self {
        Self { name, value, unit, baseline: None, ratio: None, goal: None, note: String::new() }
    }

    /// A baseline in the value's unit; the ratio is that of the two medians.
    pub fn against(self, baseline: f64) -> Self {
        let ratio = self.value / baseline;
        self.against_with_ratio(baseline, ratio)
    }

    /// When the ratio is the median over rounds, which drift between rounds leaves alone.
    pub fn against_with_ratio(mut self, baseline: f64, ratio: f64) -> Self {
        self.baseline = Some(baseline);
        self.ratio = ratio.is_finite().then_some(ratio);
        self
    }

    pub fn goal(mut self, goal: Goal) -> Self {
        self.goal = Some(goal);
        self
    }

    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    /// `None` when there is no goal.
    pub fn met(&self) -> Option<bool> {
        Some(match self.goal? {
            Goal::ValueAtMost(limit) => self.value <= limit,
            Goal::RatioAtMost(limit) => self.ratio? <= limit,
            Goal::RatioAtLeast(limit) => self.ratio? >= limit,
        })
    }
}

/// `{"figures":[…]}`
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub figures: Vec<Figure>,
}

impl Report {
    pub fn missed(&self) -> usize {
        self.figures.iter().filter(|figure| figure.met() == Some(false)).count()
    }

    /// A table of fixed columns, also good Markdown.
    pub fn table(&self) -> String {
        let mut rows = vec![["figure", "value", "unit", "baseline", "ratio", "goal", "", "what"].map(str::to_owned)];
        for figure in &self.figures {
            rows.push([
                figure.name.to_owned(),
                short(figure.value),
                figure.unit.to_owned(),
                figure.baseline.map_or_else(|| "-".to_owned(), short),
                figure.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}")),
                figure.goal.map_or_else(|| "-".to_owned(), |goal| goal.text()),
                figure.met().map_or("-", |met| if met { "ok" } else { "missed" }).to_owned(),
                figure.note.clone(),
            ]);
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..8).map(width).collect();
        let mut table = String::new();
        for (number, row) in rows.iter().enumerate() {
            for (cell, width) in row.iter().zip(&widths) {
                let _ = write!(table, "| {cell:<width$} ");
            }
            table.push_str("|\n");
            if number == 0 {
                for width in &widths {
                    let _ = write!(table, "|{}", "-".repeat(width + 2));
                }
                table.push_str("|\n");
            }
        }
        table
    }
}

/// Four significant digits: more would only be noise.
fn round(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10f64.powi(3 - value.abs().log10().floor() as i32);
    (value * scale).round() / scale
}

fn short(value: f64) -> String {
    let value = round(value);
    if value.abs() >= 1000.0 { format!("{value:.0}") } else { format!("{value}") }
}

fn rounded<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(round(*value))
}

fn maybe_rounded<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => rounded(value, serializer),
        None => serializer.serialize_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_exactly_the_promised_keys() {
        let figure = Figure::new("connect_hook", 123.456, "ns").against(100.0).goal(Goal::ValueAtMost(300.0)).note("x");
        let json = serde_json::to_value(Report { figures: vec![figure] }).unwrap();
        let expected = serde_json::json!({"figures": [{
            "name": "connect_hook", "value": 123.5, "unit": "ns", "baseline": 100.0, "ratio": 1.235,
            "goal": "value <= 300",
        }]});
        assert_eq!(json, expected);
    }

    #[test]
    fn a_goal_is_met_at_its_limit_and_missed_beyond() {
        let at = |value: f64, goal| Figure::new("f", value, "ns").against(100.0).goal(goal).met();
        assert_eq!(at(300.0, Goal::ValueAtMost(300.0)), Some(true));
        assert_eq!(at(300.1, Goal::ValueAtMost(300.0)), Some(false));
        assert_eq!(at(96.9, Goal::RatioAtLeast(0.97)), Some(false));
        assert_eq!(at(104.0, Goal::RatioAtMost(1.05)), Some(true));
        assert_eq!(Figure::new("f", 1.0, "ns").met(), None);
    }
}
