//! A part of a long task: its heading, its commands, the time it took.

use std::{
    ffi::OsStr,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

/// Runs one part under a heading, and says how long it took.
pub fn section<T>(name: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("── {name}");
    let started = Instant::now();
    let result = run();
    let mark = if result.is_ok() { '✓' } else { '✗' };
    eprintln!("{mark}─ {name}: {:.1} s", started.elapsed().as_secs_f64());
    result.with_context(|| format!("{name} failed"))
}

/// Runs a command whose output is for people.
pub fn status(command: &mut Command) -> Result<()> {
    let status =
        command.stdin(Stdio::null()).status().with_context(|| format!("cannot start {}", describe(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", describe(command));
    }
    Ok(())
}

/// Program and arguments, as one would type them.
pub fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
