//! The `hitless` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    dataplane_user::cli::main()
}
