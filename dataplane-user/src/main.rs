//! The `hitless` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The agent's own child: no arguments, no logs, nothing for people.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "canary") {
        return match dataplane_user::kernel::canary::serve() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("hitless canary: {error}");
                ExitCode::FAILURE
            }
        };
    }
    ExitCode::SUCCESS
}
