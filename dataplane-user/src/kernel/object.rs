//! The BPF object, embedded at build time.

/// The ELF file that `cargo xtask build-ebpf` made, aligned for parsing in place.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("HITLESS_BPF_OBJECT"));
