//! The command line: `hitless run` and what looks after it.

mod ca;
mod certificates;
mod config;
mod doctor;
mod endpoints;
mod events;
mod policies;
mod policy;
mod rollout;
mod status;
mod table;
mod ztunnel;

use std::{io::Write, path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum, parser::ValueSource};
use serde::Serialize;

use crate::{
    config::{
        Options, Place,
        in_force::{Origin, Origins},
    },
    kernel,
};

/// Rolling updates that lose no connection: the node dataplane.
#[derive(Debug, Parser)]
#[command(
    name = "hitless",
    version,
    arg_required_else_help = true,
    after_help = "Start with `hitless doctor`: it says what this machine lacks. Every command needs root.",
    long_about = "hitless keeps rolling updates from losing connections. eBPF programs on this node send connections to \
                  a service to a live backend, and move one that is refused or unanswered to another backend while the \
                  application still waits for its connect(). The agent (`hitless run`) tells them what services and \
                  backends there are; without it they go on with what they were told last."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent in the foreground
    #[command(after_help = RUN_HELP)]
    Run(Box<RunArgs>),
    /// Is it ready, is the kernel path in force, what did it count
    #[command(after_help = "Works without an agent too: then it reads what is pinned.\n\
                      Exit status: 0 ready; 1 an agent runs and is not ready; 2 nothing is installed; 3 no agent, kernel path in force.")]
    Status(LookArgs),
    /// Every backend of every service: what the control plane says, what the kernel knows
    #[command(after_help = "Example: hitless endpoints shop/web")]
    Endpoints {
        /// Only this service (namespace/name)
        service: Option<String>,
        #[command(flatten)]
        look: LookArgs,
    },
    /// What happened lately: refused, rebound, stop signals, listeners, suspects
    #[command(after_help = "Example: hitless events --follow   (during a rollout)")]
    Events {
        /// Go on with what happens from now on, until Ctrl-C
        #[arg(short, long)]
        follow: bool,
        #[command(flatten)]
        look: LookArgs,
    },
    /// Connections that live on another backend than they began with, and those that the tunnel carries (of very many the
    /// oldest)
    Connections(LookArgs),
    /// Pods that go: who knew when (deletion, stop signal, listener, control plane), what was rescued
    #[command(subcommand)]
    Drain(DrainCommand),
    /// Rollouts that the agent remembers
    #[command(subcommand)]
    Rollout(RolloutCommand),
    /// What a running agent was told
    #[command(subcommand)]
    Config(ConfigCommand),
    /// The certificates of the pods here: whose, how long still, what went wrong at the last renewal
    #[command(after_help = "Exit status: 0 every identity has a valid one; 1 one has expired or is not there yet.")]
    Certificates(LookArgs),
    /// The policies that the agent was told: in force or not, who told them, what they decided, what is wrong
    #[command(after_help = "Exit status: 0 none is malformed; 1 one is.")]
    Policies(LookArgs),
    /// Who may talk to whom: check policy files, explain a decision
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// The mesh's own certificate authority
    #[command(subcommand)]
    Ca(ca::CaCommand),
    /// Check this machine: kernel, BTF, cgroup2, bpffs, capabilities, limits; with the kube source the API server and
    /// the container runtime; each lack with its remedy
    #[command(after_help = "Exit status: 0 hitless works here; 1 it does not.")]
    Doctor(doctor::DoctorArgs),
    /// Remove all that hitless made on this node (programs, maps, pins, filters), and nothing else
    #[command(after_help = "Refused while an agent of this name runs: stop it first.")]
    Uninstall(LookArgs),
    /// Print a shell completion script
    Completions { shell: clap_complete::Shell },
    /// The child of the agent that proves the hooks
    #[command(hide = true)]
    Canary,
}

#[derive(Debug, Subcommand)]
enum DrainCommand {
    /// Print the drains that are remembered, then each as it comes and changes, until Ctrl-C
    Watch {
        /// Only what is remembered
        #[arg(long)]
        once: bool,
        #[command(flatten)]
        look: LookArgs,
    },
}

#[derive(Debug, Subcommand)]
enum RolloutCommand {
    /// A table: pods replaced, connections rescued, how late the control plane was, what failed
    Report(LookArgs),
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every option that is in force and where it was set; or the desired state
    #[command(after_help = "Examples:
  hitless config dump > config.yaml                   # hitless run --config config.yaml
  hitless config dump --state > services.yaml         # hitless run --source file:services.yaml")]
    Dump(config::DumpArgs),
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Read AuthorizationPolicy and PeerAuthentication files; each object with its mistakes, and what of it L4 cannot see
    #[command(after_help = "Needs no agent. Exit status: 0 all can be enforced; 1 something is malformed.")]
    Check(policy::CheckArgs),
    /// Why a connection would be let in or refused: every policy, rule and field that was looked at
    #[command(after_help = "Asks the running agent, or with --file nobody. Examples:
  hitless policy explain --from shop/web --to shop/db-0:5432    # by the policies in force, for a pod of this node
  hitless policy explain --file policies/ --from shop/web --to shop/app=db:5432
  hitless policy explain --file p.yaml --from spiffe://cluster.local/ns/shop/sa/web --to shop/db-0:5432 --state state.yaml
  hitless policy explain --file p.yaml --from 10.0.0.7 --to shop/app=db:5432   # plaintext")]
    Explain(Box<policy::ExplainArgs>),
}

const RUN_HELP: &str = "\
Examples:
  hitless run --source file:/etc/hitless/services.yaml
  hitless run --config /etc/hitless/config.yaml --layers l2,l3
  hitless run --source stream:/run/hitless/source.sock --ready-file /run/hitless/ready

A flag wins over its environment variable, that over the configuration file. The file has the same names:
  source: file:/etc/hitless/services.yaml
  layers: l1,l2,l3
SIGTERM stops the agent; the kernel path goes on (--on-exit uninstall removes it). SIGHUP reads the source again.";

#[derive(Args, Debug)]
struct RunArgs {
    /// Configuration file (YAML); its keys are the flags' names
    #[arg(short, long, env = "HITLESS_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
    /// How the last word is printed: with json, the reason of a failure is an object
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Output,
}

/// Which agent is meant.
#[derive(Args, Debug)]
struct AgentArgs {
    /// Configuration file that the agent was given, for the places below
    #[arg(short, long, env = "HITLESS_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
}

/// What the commands that look at an agent share.
#[derive(Args, Debug)]
struct LookArgs {
    #[command(flatten)]
    agent: AgentArgs,
    #[arg(
        short,
        long,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        help = "table for people, json for programs"
    )]
    output: Output,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    #[default]
    Table,
    Json,
}

impl AgentArgs {
    fn place(&self) -> anyhow::Result<Place> {
        Ok(match &self.config {
            Some(path) => self.place.clone().over(Options::read(path)?.place),
            None => self.place.clone(),
        })
    }

    fn socket(&self) -> anyhow::Result<PathBuf> {
        Ok(crate::admin::socket(&self.place()?.state_dir()))
    }

    fn kernel(&self) -> anyhow::Result<kernel::Config> {
        Ok(self.place()?.kernel())
    }
}

impl LookArgs {
    fn socket(&self) -> anyhow::Result<PathBuf> {
        self.agent.socket()
    }

    fn kernel(&self) -> anyhow::Result<kernel::Config> {
        self.agent.kernel()
    }
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let output = match &cli.command {
        Command::Run(args) => args.output,
        Command::Status(look)
        | Command::Endpoints { look, .. }
        | Command::Events { look, .. }
        | Command::Connections(look)
        | Command::Certificates(look)
        | Command::Policies(look)
        | Command::Drain(DrainCommand::Watch { look, .. })
        | Command::Rollout(RolloutCommand::Report(look))
        | Command::Doctor(doctor::DoctorArgs { look, .. })
        | Command::Uninstall(look) => look.output,
        Command::Policy(PolicyCommand::Check(args)) => args.output,
        Command::Policy(PolicyCommand::Explain(args)) => args.look.output,
        Command::Ca(ca::CaCommand::Init(args)) => args.output,
        Command::Config(ConfigCommand::Dump(args)) if args.output == config::Format::Json => Output::Json,
        Command::Config(_) | Command::Completions { .. } | Command::Canary => Output::Table,
    };
    match run(cli.command, &matches) {
        Ok(code) => code,
        // Whoever read our output has left: `hitless events | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            match output {
                Output::Table => eprintln!("hitless: {error:#}"),
                Output::Json => println!("{}", serde_json::json!({ "error": format!("{error:#}") })),
            }
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command, matches: &ArgMatches) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(args) => {
            let file = args.config.as_deref().map(Options::read).transpose()?.unwrap_or_default();
            let given = args.options.over(file);
            let origins = origins(&given, matches);
            let mut config = given.resolve()?;
            config.origins = origins;
            crate::agent::run(config).map(|()| ExitCode::SUCCESS)
        }
        Command::Status(look) => status::run(&look),
        Command::Endpoints { service, look } => endpoints::run(service, &look),
        Command::Events { follow, look } => events::run(follow, &look),
        Command::Connections(look) => rollout::connections(&look),
        Command::Certificates(look) => certificates::run(&look),
        Command::Policies(look) => policies::run(&look),
        Command::Drain(DrainCommand::Watch { once, look }) => rollout::watch(!once, &look),
        Command::Rollout(RolloutCommand::Report(look)) => rollout::report(&look),
        Command::Config(ConfigCommand::Dump(args)) => config::dump(&args),
        Command::Policy(PolicyCommand::Check(args)) => policy::check(&args),
        Command::Policy(PolicyCommand::Explain(args)) => policy::explain(&args),
        Command::Ca(command) => ca::run(&command),
        Command::Doctor(args) => doctor::run(args),
        Command::Uninstall(look) => uninstall(&look),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut for_people(), "hitless", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Canary => Ok(kernel::canary::serve().map(|()| ExitCode::SUCCESS)?),
    }
}

/// The commands without the hidden ones, which completions would offer.
fn for_people() -> clap::Command {
    let all = Cli::command();
    let shown: Vec<_> = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect();
    clap::Command::new("hitless").version(env!("CARGO_PKG_VERSION")).subcommands(shown)
}

/// Where the options of `run` were set.
fn origins(given: &Options, matches: &ArgMatches) -> Origins {
    let run = matches.subcommand_matches("run");
    given.origins(|id| match run?.value_source(id)? {
        ValueSource::CommandLine => Some(Origin::Flag),
        ValueSource::EnvVariable => Some(Origin::Environment),
        _ => None,
    })
}

fn uninstall(look: &LookArgs) -> anyhow::Result<ExitCode> {
    let config = look.kernel()?;
    let removed = kernel::uninstall(&config).with_context(|| format!("uninstall {}", config.root().display()))?;
    match look.output {
        Output::Json => json(&removed)?,
        Output::Table => match &removed.directory {
            None => print(&format!("nothing is installed at {}\n", config.root().display()))?,
            Some(directory) => print(&format!(
                "removed {} links, {} hooks on interfaces, and {}\n",
                removed.links,
                removed.interface_hooks,
                directory.display()
            ))?,
        },
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints one JSON document.
fn json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    print(&text)
}

/// `print!` without its panic when the reader has left.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    /// The commands that do something and have no `--output json`.
    fn without_json(command: &clap::Command) -> Vec<&str> {
        let below: Vec<_> = command.get_subcommands().filter(|command| !command.is_hide_set()).collect();
        if !below.is_empty() {
            return below.into_iter().flat_map(without_json).collect();
        }
        let json = command
            .get_arguments()
            .filter(|argument| argument.get_long() == Some("output"))
            .any(|argument| argument.get_possible_values().iter().any(|value| value.get_name() == "json"));
        if json { Vec::new() } else { vec![command.get_name()] }
    }

    #[test]
    fn every_command_takes_output_json() {
        // A completion script is for a shell.
        assert_eq!(without_json(&Cli::command()), ["completions"]);
        Cli::try_parse_from(["hitless", "drain", "watch", "--once", "--output", "json"]).unwrap();
    }

    #[test]
    fn clap_tells_of_every_option_by_its_name_where_it_was_set() {
        let args = ["hitless", "run", "--source=file:/x", "--syn-limit=4", "--sizes=pods=7", "--host"];
        let matches = Cli::command().get_matches_from(args);
        let Command::Run(args) = Cli::from_arg_matches(&matches).unwrap().command else { panic!("it is run") };
        let file: Options = serde_saphyr::from_str("{syn-limit: 5, name: x}").unwrap();
        let origins = origins(&args.options.over(file), &matches);
        let told: Vec<_> = origins.iter().map(|(key, from)| format!("{key} {from}")).collect();
        assert_eq!(told, ["host flag", "name file", "sizes flag", "source flag", "syn-limit flag"]);
    }
}
