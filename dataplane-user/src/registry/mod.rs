//! The registry: a pure state machine from source events to map changes.

pub mod change;
pub mod seed;

pub use seed::Seed;
