//! The hitless agent: sources, registry, and the one writer of the kernel's maps.

pub mod admin;
pub mod agent;
pub mod cli;
pub mod config;
pub mod doctor;
mod few;
#[doc(hidden)]
pub mod fuzz;
pub mod hbone;
pub mod identity;
pub mod kernel;
pub mod mesh;
pub mod metrics;
pub mod model;
pub mod policy;
pub mod registry;
pub mod signal;
pub mod source;
#[cfg(test)]
mod testing;
pub mod tunnel;
