//! `cargo xtask verify`: how many instructions the verifier walks per program, against the committed table.
//!
//! The verifier gives up at a million. What grows here without a reason grows towards that on some kernel.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{EbpfLoader, VerifierLogLevel, programs::Program};
use dataplane_ebpf::offsets::OFFSETS;

use crate::{root, section::status, workspace::Workspace};

/// Growth beyond this fails.
const MARGIN_PERCENT: u32 = 10;

const HEAD: &str = "\
# Verified instructions

How many instructions the kernel's verifier walked to accept each program: with branches, many times the program's
length. The limit is 1,000,000. `cargo xtask verify` loads the programs and fails when one has grown by more than
10 %; `cargo xtask verify --update` writes this table when the growth is meant.

";

/// Loads every program of the object on the running kernel; compares, or writes the table when `update`.
pub fn run(workspace: &Workspace, update: bool) -> Result<()> {
    if !root::is_root() {
        let args: &[&str] = if update { &["verify", "--update"] } else { &["verify"] };
        return status(root::command(&std::env::current_exe()?)?.args(args));
    }
    let counts = load(&fs::read(workspace.object()).context("no BPF object: run `cargo xtask build-ebpf` first")?)?;
    let table = table(workspace);
    if update {
        fs::write(&table, render(&counts)?).with_context(|| format!("cannot write {}", table.display()))?;
        println!("{} programs written to {}", counts.len(), table.display());
        return Ok(());
    }
    let text = fs::read_to_string(&table).with_context(|| format!("cannot read {}", table.display()))?;
    let findings = compare(&parse(&text)?, &counts);
    for finding in &findings {
        eprintln!("{finding}");
    }
    ensure!(
        findings.is_empty(),
        "if that is meant, run `cargo xtask verify --update` and commit {} with the reason",
        table.display()
    );
    println!("{} programs within {MARGIN_PERCENT} % of the table", counts.len());
    Ok(())
}

fn table(workspace: &Workspace) -> PathBuf {
    workspace.root.join("docs/verified-instructions.md")
}

/// Program → verified instructions.
type Counts = BTreeMap<String, u32>;

fn load(object: &[u8]) -> Result<Counts> {
    let mut loader = EbpfLoader::new();
    loader.verifier_log_level(VerifierLogLevel::STATS);
    // The agent takes them from the kernel's BTF. Any value does here, the same on every kernel, but not 0: the
    // verifier knows the value and prunes what can't be reached.
    for global in OFFSETS {
        loader.override_global(global.name, &8_u32, false);
    }
    let mut ebpf = loader.load(object).context("cannot load the object")?;
    let mut counts = Counts::new();
    for (name, program) in ebpf.programs_mut() {
        load_program(program).with_context(|| format!("the verifier refuses {name}"))?;
        let verified = program
            .info()?
            .verified_instruction_count()
            .context("this kernel does not tell verified instructions (Linux 5.16 does)")?;
        counts.insert(name.to_owned(), verified);
    }
    Ok(counts)
}

fn load_program(program: &mut Program) -> Result<()> {
    match program {
        Program::CgroupSockAddr(program) => program.load()?,
        Program::SockOps(program) => program.load()?,
        Program::SkLookup(program) => program.load()?,
        Program::SchedClassifier(program) => program.load()?,
        Program::RawTracePoint(program) => program.load()?,
        other => bail!("xtask/src/verify.rs does not know how to load a {:?} program", other.prog_type()),
    }
    Ok(())
}

fn compare(table: &Counts, measured: &Counts) -> Vec<String> {
    let mut findings = Vec::new();
    for (name, &now) in measured {
        match table.get(name) {
            None => findings.push(format!("{name}: {now} verified instructions, not in the table")),
            Some(&then) if u64::from(now) * 100 > u64::from(then) * u64::from(100 + MARGIN_PERCENT) => {
                findings.push(format!(
                    "{name}: {now} verified instructions, {then} in the table: more than {MARGIN_PERCENT} % growth"
                ));
            }
            Some(_) => {}
        }
    }
    findings.extend(
        table
            .keys()
            .filter(|name| !measured.contains_key(*name))
            .map(|name| format!("{name}: in the table, not in the object")),
    );
    findings
}

fn render(counts: &Counts) -> Result<String> {
    let mut text = String::from(HEAD);
    writeln!(text, "Linux {}.\n", kernel())?;
    writeln!(text, "| program | verified instructions |\n|---|---:|")?;
    for (name, count) in counts {
        writeln!(text, "| `{name}` | {count} |")?;
    }
    Ok(text)
}

/// The release's first two numbers: the rest is of one machine.
fn kernel() -> String {
    let release = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    release.unwrap_or_default().split('.').take(2).collect::<Vec<_>>().join(".")
}

fn parse(text: &str) -> Result<Counts> {
    let mut counts = Counts::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let mut cells = line.trim_matches('|').split('|').map(str::trim);
        let (Some(name), Some(count)) = (cells.next(), cells.next()) else { bail!("no table row: {line}") };
        counts.insert(name.trim_matches('`').to_owned(), count.parse().with_context(|| format!("no number: {line}"))?);
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(of: &[(&str, u32)]) -> Counts {
        of.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    #[test]
    fn the_table_survives_being_written_and_read() {
        let table = counts(&[("hitless_connect4", 12_345), ("hitless_sockops", 7)]);
        assert_eq!(parse(&render(&table).unwrap()).unwrap(), table);
    }

    #[test]
    fn growth_within_the_margin_passes_and_beyond_it_fails() {
        let table = counts(&[("p", 1_000)]);
        assert_eq!(compare(&table, &counts(&[("p", 1_100)])), Vec::<String>::new());
        assert!(compare(&table, &counts(&[("p", 1_101)]))[0].contains("growth"));
    }

    #[test]
    fn a_program_that_is_new_or_gone_is_noticed() {
        let found = compare(&counts(&[("old", 1)]), &counts(&[("new", 1)]));
        assert!(found[0].contains("new") && found[1].contains("old"), "{found:?}");
    }
}
