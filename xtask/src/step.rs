//! Runs one long command: progress while it runs, its whole output in a log, the end of it on failure.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, IsTerminal as _, Write as _, pipe, stderr},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// Without a terminal, a sign of life this often.
const QUIET: Duration = Duration::from_secs(30);

/// Runs `command`, named `what` for people, logging to `log`. Fails with the end of the log if the command fails.
pub fn run(what: &str, command: &mut Command, log: &Path) -> Result<()> {
    fs::create_dir_all(log.parent().context("a log has a directory")?)?;
    let mut file = File::create(log).with_context(|| format!("cannot write the log {}", log.display()))?;
    writeln!(file, "{command:?}")?;

    let (reader, writer) = pipe().context("cannot make a pipe")?;
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(std::process::Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    // The command still holds the write ends; the reader would never see the end of the output.
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());

    let progress = Progress::start(what);
    let mut lines = Vec::new();
    for line in BufReader::new(reader).split(b'\n') {
        let line = String::from_utf8_lossy(&line.context("cannot read the command's output")?).into_owned();
        writeln!(file, "{line}")?;
        progress.line(&line);
        lines.push(line);
    }
    let status = child.wait().with_context(|| format!("cannot wait for {program}"))?;
    progress.finish(status.success());
    if !status.success() {
        for line in lines.iter().skip(lines.len().saturating_sub(40)) {
            eprintln!("    {line}");
        }
        bail!("{what} failed ({status}); the whole output is in {}", log.display());
    }
    Ok(())
}

/// A spinner with the last line of output on a terminal; a line at the start, the end and every 30 s elsewhere.
struct Progress {
    what: String,
    started: Instant,
    spoke: std::cell::Cell<Instant>,
    bar: Option<ProgressBar>,
}

impl Progress {
    fn start(what: &str) -> Self {
        let started = Instant::now();
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner()
                .with_style(
                    ProgressStyle::with_template("{spinner} {prefix} [{elapsed}] {wide_msg}")
                        .expect("the template is a constant"),
                )
                .with_prefix(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        if bar.is_none() {
            eprintln!("  … {what}");
        }
        Self { what: what.to_owned(), started, spoke: started.into(), bar }
    }

    fn line(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(line.trim().to_owned()),
            None if self.spoke.get().elapsed() >= QUIET => {
                self.spoke.set(Instant::now());
                eprintln!("    {} s: {}", self.started.elapsed().as_secs(), line.trim());
            }
            None => {}
        }
    }

    fn finish(self, success: bool) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
        let mark = if success { '✓' } else { '✗' };
        eprintln!("  {mark} {} ({:.1} s)", self.what, self.started.elapsed().as_secs_f64());
    }
}
