//! The `hitless` binary.

fn main() {}
