//! What the kernel side and the agent share: the map ABI and the decisions, free of both BPF and std.
//!
//! Everything here is plain data and pure functions: it runs in the kernel, in the agent and under
//! `cargo test` on the host. The BPF entry points that call it are in `src/bpf/`.

#![cfg_attr(not(test), no_std)]
#![cfg_attr(not(feature = "user"), forbid(unsafe_code))]

pub mod abi;
pub mod choose;
pub mod flow;
pub mod health;
pub mod offsets;
pub mod packet;
