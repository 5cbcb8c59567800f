//! `hitless config dump`: the options in force, or the desired state, each as a file that can be fed back.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value};

use super::{AgentArgs, json, print, table::table, ztunnel};
use crate::admin::{client::Client, protocol::Setting};

#[derive(Args, Debug)]
pub struct DumpArgs {
    /// Not the options but the services, backends, pods and nodes that the agent knows, as `--source file:` reads them
    #[arg(long)]
    state: bool,
    /// The mesh in the shape of ztunnel's /config_dump: workloads, services, policies, certificates, connections. Always
    /// JSON, for `istioctl ztunnel-config all --file`
    #[arg(long, conflicts_with = "state")]
    ztunnel: bool,
    #[command(flatten)]
    agent: AgentArgs,
    /// yaml and json can be fed back; the table is for reading
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Format,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    Yaml,
    Json,
    Table,
}

pub fn dump(args: &DumpArgs) -> anyhow::Result<ExitCode> {
    if args.state && args.output == Format::Table {
        anyhow::bail!("the state is printed as yaml or json; `hitless endpoints` shows it as a table");
    }
    let mut client = Client::connect(&args.agent.socket()?)?;
    if args.ztunnel {
        let settings = settings(client.config()?)?;
        let said = |key: &str| settings.iter().find(|setting| setting.0 == key).and_then(|setting| setting.1.as_str());
        let [node, cluster] = ["node-name", "cluster-id"].map(|key| said(key).unwrap_or_default());
        json(&ztunnel::dump(&client.mesh()?, &client.state()?, node, cluster)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.state {
        let state = without_nulls(serde_json::to_value(client.state()?)?);
        match args.output {
            Format::Json => json(&state)?,
            Format::Yaml | Format::Table => print(&serde_saphyr::to_string(&state)?)?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    let settings = settings(client.config()?)?;
    match args.output {
        Format::Yaml => print(&yaml(&settings)?)?,
        Format::Json => {
            let pick = |of: fn(&(String, Value, String)) -> Value| -> Map<String, Value> {
                settings.iter().map(|setting| (setting.0.clone(), of(setting))).collect()
            };
            let (config, from) = (pick(|setting| setting.1.clone()), pick(|setting| setting.2.clone().into()));
            json(&serde_json::json!({ "config": without_nulls(config.into()), "from": from }))?;
        }
        Format::Table => {
            let rows = settings.iter().map(|(key, value, from)| [key.clone(), plain(value), from.clone()]);
            print(&table(["OPTION", "VALUE", "FROM"], &rows.collect::<Vec<_>>()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn settings(settings: Vec<Setting>) -> anyhow::Result<Vec<(String, Value, String)>> {
    settings.into_iter().map(|s| Ok((s.key, serde_json::from_str(&s.value)?, s.from))).collect()
}

/// A configuration file; what is not set is a comment, and so is where each option comes from.
fn yaml(settings: &[(String, Value, String)]) -> anyhow::Result<String> {
    let mut text = String::new();
    for (key, value, from) in settings {
        if value.is_null() {
            text += &format!("# {key}: not set\n");
            continue;
        }
        let one = Map::from_iter([(key.clone(), value.clone())]);
        let lines = serde_saphyr::to_string(&one)?;
        let (first, rest) = lines.split_once('\n').unwrap_or((&lines, ""));
        text += &format!("{first}  # {from}\n{rest}");
    }
    Ok(text)
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        Value::Object(map) => map.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// Fields that are not set are left out, as a person would.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let set = map.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(set.map(|(key, value)| (key, without_nulls(value))).collect())
        }
        Value::Array(items) => items.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Options;

    #[test]
    fn what_is_dumped_is_a_configuration_file_that_says_the_same() {
        let given: Options = serde_saphyr::from_str(
            "{source: 'stream:/run/a: b', mark: '0x10', tcx: off, sizes: {pods: 7}, log-level: 'a=debug,info', name: 'on'}",
        )
        .unwrap();
        let config = given.resolve().unwrap();
        let shown = config.settings(Path::new("/sys/fs/cgroup"));
        let sent = shown.iter().cloned().map(Setting::from).collect();
        let text = yaml(&settings(sent).unwrap()).unwrap();
        assert!(text.contains("# ready-file: not set\n") && text.contains("  # default\n"), "{text}");
        let read: Options = serde_saphyr::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(read.place.cgroup.as_deref(), Some(Path::new("/sys/fs/cgroup")));
        assert_eq!(read.resolve().unwrap().settings(Path::new("/sys/fs/cgroup")), shown, "{text}");
    }

    #[test]
    fn what_is_not_set_is_left_out_at_any_depth() {
        let value = serde_json::json!({"pods": [{"name": "a/b", "pid": null}], "x": null});
        assert_eq!(without_nulls(value), serde_json::json!({"pods": [{"name": "a/b"}]}));
    }
}
