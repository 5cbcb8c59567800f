//! The kernel side of the agent: the only module that makes BPF system calls.

pub mod object;
