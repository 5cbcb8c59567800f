//! `hitless ca init`: a root for meshes that have no authority yet.

use std::{
    fs::{DirBuilder, OpenOptions},
    io::{IsTerminal as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use serde_json::json;

use super::{Output, json, print};
use crate::identity::ca::Root;

#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Make a root certificate and its key: as files, or as a Kubernetes Secret on standard output
    #[command(after_help = "Examples:
  hitless ca init --trust-domain cluster.local --secret hitless-ca --namespace hitless-system | kubectl apply -f -
  hitless ca init --trust-domain cluster.local --directory /etc/hitless/ca

Whoever has the key can be any workload. It is written where you say and nowhere else, and never to a terminal.")]
    Init(InitArgs),
}

#[derive(Args, Debug)]
pub struct InitArgs {
    /// What the identities begin with: spiffe://<trust domain>/ns/…
    #[arg(long, default_value = "cluster.local", value_name = "NAME")]
    trust_domain: String,
    /// How long the root is valid
    #[arg(long, default_value_t = 3650, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=36_500))]
    days: u32,
    /// Write tls.crt, tls.key and ca.crt there; nothing is overwritten
    #[arg(long, value_name = "DIR", required_unless_present = "secret", conflicts_with = "secret")]
    directory: Option<PathBuf>,
    /// Print a Secret of this name for `kubectl apply -f -`
    #[arg(long, value_name = "NAME")]
    secret: Option<String>,
    /// The Secret's namespace
    #[arg(long, default_value = "hitless-system", value_name = "NAMESPACE", requires = "secret")]
    namespace: String,
    /// Of what was written; of the Secret: table is YAML
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Output,
}

pub fn run(command: &CaCommand) -> anyhow::Result<ExitCode> {
    let CaCommand::Init(args) = command;
    let life = Duration::from_secs(u64::from(args.days) * 86_400);
    if args.secret.is_some() && std::io::stdout().is_terminal() {
        bail!("the Secret holds the root's key, which does not belong on a terminal: pipe it to `kubectl apply -f -`");
    }
    let root = Root::new(&args.trust_domain, life, SystemTime::now()).context("the root cannot be made")?;
    match (&args.secret, &args.directory) {
        (Some(name), _) => secret(name, args, &root)?,
        (None, Some(directory)) => files(directory, args, &root)?,
        (None, None) => bail!("where to: give --directory or --secret"),
    }
    Ok(ExitCode::SUCCESS)
}

fn secret(name: &str, args: &InitArgs, root: &Root) -> anyhow::Result<()> {
    let secret = json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": { "name": name, "namespace": args.namespace },
        "type": "kubernetes.io/tls",
        "stringData": { "ca.crt": root.certificate, "tls.crt": root.certificate, "tls.key": root.key.as_str() },
    });
    match args.output {
        Output::Json => json(&secret),
        Output::Table => print(&serde_saphyr::to_string(&secret)?),
    }
}

fn files(directory: &Path, args: &InitArgs, root: &Root) -> anyhow::Result<()> {
    let files = [
        ("tls.key", root.key.as_str(), 0o600),
        ("tls.crt", &root.certificate, 0o644),
        ("ca.crt", &root.certificate, 0o644),
    ];
    for (name, ..) in files {
        let path = directory.join(name);
        if path.symlink_metadata().is_ok() {
            bail!("{} is there already: use another directory, or move the old root away", path.display());
        }
    }
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.with_context(|| format!("directory {}", directory.display()))?;
    for (name, text, mode) in files {
        let path = directory.join(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
        let written = file.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
        written.with_context(|| path.display().to_string())?;
    }
    let not_after = root.not_after.duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    match args.output {
        Output::Json => {
            json(&json!({ "directory": directory, "trustDomain": args.trust_domain, "notAfter": not_after }))
        }
        Output::Table => print(&format!(
            "made a root of {}, valid for {} days: tls.crt, ca.crt and tls.key (keep it secret) in {}\n",
            args.trust_domain,
            args.days,
            directory.display()
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;
    use crate::identity::{Authority as _, SpiffeId, ca};

    fn args(directory: &Path) -> InitArgs {
        InitArgs {
            trust_domain: "cluster.local".into(),
            days: 1,
            directory: Some(directory.to_owned()),
            secret: None,
            namespace: "n".into(),
            output: Output::Json,
        }
    }

    #[tokio::test]
    async fn the_files_are_an_authority_that_only_its_owner_can_read_and_that_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/ca");
        let init = CaCommand::Init(args(&path));
        run(&init).unwrap();
        assert_eq!(fs::metadata(path.join("tls.key")).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        let authority = ca::OwnCa::open(&path, ca::LIFE).unwrap();
        let id = SpiffeId::new("cluster.local", "shop", "web").unwrap();
        assert_eq!(authority.issue(&id).await.unwrap().chain.len(), 1);

        let before = fs::read(path.join("tls.key")).unwrap();
        let error = run(&init).unwrap_err().to_string();
        assert!(error.contains("tls.key is there already"), "{error}");
        assert_eq!(fs::read(path.join("tls.key")).unwrap(), before);
    }
}
