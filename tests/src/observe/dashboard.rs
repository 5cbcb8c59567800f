//! The Grafana dashboard: what its panels ask for, and the form that Grafana takes.

use serde::Deserialize;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Dashboard {
    pub uid: String,
    pub schema_version: u32,
    pub templating: Templating,
    pub panels: Vec<Panel>,
}

#[derive(Debug, Deserialize)]
pub struct Templating {
    pub list: Vec<Variable>,
}

#[derive(Debug, Deserialize)]
pub struct Variable {
    pub name: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub definition: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Panel {
    pub id: u32,
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    pub grid_pos: Place,
    pub datasource: Option<Source>,
    #[serde(default)]
    pub targets: Vec<Target>,
}

#[derive(Debug, Deserialize)]
pub struct Place {
    pub x: u32,
    pub y: u32,
    pub w: u32,
    pub h: u32,
}

#[derive(Debug, Deserialize, PartialEq, Eq)]
pub struct Source {
    #[serde(rename = "type")]
    pub kind: String,
    pub uid: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    pub ref_id: String,
    pub datasource: Source,
    pub expr: String,
    pub legend_format: String,
}

impl Dashboard {
    pub fn parse(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }

    /// Each panel's queries, with its title.
    pub fn queries(&self) -> impl Iterator<Item = (&str, &Target)> {
        self.panels.iter().flat_map(|panel| panel.targets.iter().map(|target| (&*panel.title, target)))
    }
}

impl Target {
    /// The query as Grafana would send it when everything is chosen.
    pub fn query(&self) -> String {
        self.expr.replace("$__rate_interval", "10s").replace("$job", ".*").replace("$instance", ".*")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::observe::{DASHBOARD, read};

    fn dashboard() -> Dashboard {
        Dashboard::parse(&read(DASHBOARD).unwrap()).unwrap()
    }

    #[test]
    fn every_panel_asks_the_data_source_that_was_chosen() {
        let dashboard = dashboard();
        let chosen = Source { kind: "prometheus".into(), uid: "${datasource}".into() };
        let names: Vec<_> =
            dashboard.templating.list.iter().map(|variable| (&*variable.name, &*variable.kind)).collect();
        assert_eq!(names, [("datasource", "datasource"), ("job", "query"), ("instance", "query")]);
        for panel in dashboard.panels.iter().filter(|panel| panel.kind != "row") {
            assert_eq!(panel.datasource.as_ref(), Some(&chosen), "{}", panel.title);
            assert!(!panel.targets.is_empty(), "{}", panel.title);
            let ids: BTreeSet<_> = panel.targets.iter().map(|target| &target.ref_id).collect();
            assert_eq!(ids.len(), panel.targets.len(), "{}: two queries of one name", panel.title);
            assert!(panel.targets.iter().all(|target| target.datasource == chosen), "{}", panel.title);
        }
        assert!(dashboard.queries().all(|(_, target)| !target.query().contains('$')), "a variable that nobody defines");
    }

    #[test]
    fn panels_have_numbers_of_their_own_and_do_not_overlap() {
        let dashboard = dashboard();
        let ids: BTreeSet<_> = dashboard.panels.iter().map(|panel| panel.id).collect();
        assert_eq!(ids.len(), dashboard.panels.len());
        let mut taken = BTreeSet::new();
        for Panel { title, grid_pos: Place { x, y, w, h }, .. } in &dashboard.panels {
            assert!(x + w <= 24, "{title} is wider than the page");
            for cell in (*x..x + w).flat_map(|x| (*y..y + h).map(move |y| (x, y))) {
                assert!(taken.insert(cell), "{title} lies on another panel");
            }
        }
    }
}
