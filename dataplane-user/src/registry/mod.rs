//! The registry: a pure state machine from source events to map changes.

pub mod change;
