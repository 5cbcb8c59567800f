//! `hitless completions`, in the shell that it is for.

use std::process::{Command, Output};

fn script(shell: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_hitless")).args(["completions", shell]).output().expect("it runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("a script is text")
}

/// What bash offers for the last of these words.
fn offered(words: &[&str]) -> Vec<String> {
    let last = words.len() - 1;
    let before = words[last.saturating_sub(1)];
    let ask = format!(
        "{}\nCOMP_WORDS=({}); COMP_CWORD={last}\n_hitless hitless '{}' '{before}'\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"",
        script("bash"),
        words.join(" "),
        words[last],
    );
    let Output { status, stdout, stderr } =
        Command::new("bash").args(["--norc", "-c", &ask]).output().expect("bash is there");
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    String::from_utf8_lossy(&stdout).lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_their_commands_and_values() {
    assert_eq!(offered(&["hitless", "con"]), ["connections", "config"]);
    assert_eq!(offered(&["hitless", "config", "du"]), ["dump"]);
    assert_eq!(offered(&["hitless", "config", "dump", "--st"]), ["--state", "--state-dir"]);
    assert_eq!(offered(&["hitless", "status", "--output", "j"]), ["json"]);
}

#[test]
fn zsh_and_fish_are_told_of_every_command() {
    let (zsh, fish) = (script("zsh"), script("fish"));
    assert!(zsh.starts_with("#compdef hitless"), "{zsh}");
    for command in ["run", "status", "endpoints", "events", "connections", "drain", "rollout", "config", "doctor"] {
        assert!(zsh.contains(&format!("'{command}:")), "zsh does not know {command}");
        assert!(fish.contains(&format!("-a \"{command}\"")), "fish does not know {command}");
    }
    // `canary` is the agent's own.
    assert!(!zsh.contains("'canary:") && !fish.contains("-a \"canary\""));
}
