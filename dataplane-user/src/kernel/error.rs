//! What can go wrong between the agent and the kernel; each names the object and the remedy.

use std::{io, path::PathBuf, sync::Arc};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "no cgroup2 hierarchy is mounted; mount one with `mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified`, or name the mount with --cgroup"
    )]
    NoCgroup2,
    #[error("cgroup {path}: {source}; --cgroup must name a directory of a cgroup2 mount")]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("{path} is not in a cgroup2 mount; --cgroup must name a directory of one")]
    NotCgroup2 { path: PathBuf },
    #[error("no BPF file system at {path}; mount it with `mount -t bpf bpf {path}`, or name another with --bpffs")]
    NoBpffs { path: PathBuf },
    #[error("not permitted to use BPF; run as root or with CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and CAP_SYS_ADMIN")]
    NotPermitted,
    #[error("another agent ({holder}) holds {path}; stop it first, or give this one another --name")]
    Locked { path: PathBuf, holder: String },
    #[error("{path}: {doing} failed: {source}")]
    Pin { path: PathBuf, doing: &'static str, source: io::Error },
    #[error("no BTF of the running kernel: {source}; hitless needs /sys/kernel/btf/vmlinux (CONFIG_DEBUG_INFO_BTF=y)")]
    NoBtf { source: io::Error },
    #[error(
        "the kernel's BTF has no {what} (for {global}); this kernel is not supported, please report it with `hitless doctor --output json`"
    )]
    BtfMember { what: String, global: &'static str },
    #[error("loading the BPF object: {message}; `hitless doctor` says what this kernel lacks")]
    Load { message: String },
    #[error("the kernel refused program {program}: {message}")]
    Program { program: String, message: String },
    #[error("the BPF object has no {what}; rebuild it with `cargo xtask build-ebpf`")]
    Missing { what: String },
    #[error("attaching {program} to {target}: {source}{}", attach_remedy(source))]
    Attach { program: String, target: String, source: io::Error },
    #[error(
        "map {map} has keys of {} and values of {} bytes, this agent takes them for {} and {}: its BPF object is of another \
         version; rebuild it with `cargo xtask build-ebpf`", found.0, found.1, expected.0, expected.1
    )]
    Layout { map: &'static str, found: (u32, u32), expected: (u32, u32) },
    #[error("map {map}: {doing} failed: {source}")]
    Map { map: &'static str, doing: &'static str, source: io::Error },
    #[error(
        "map {map} is full ({size} entries); raise it with --sizes {key}=N (`sizes` in the configuration file) and restart the agent"
    )]
    MapFull { map: &'static str, size: u32, key: &'static str },
    #[error(
        "{map} has no element {id}, its size is {size}; raise it with --sizes {key}=N (`sizes` in the configuration file) and restart the agent"
    )]
    OutOfRange { map: &'static str, id: u32, size: u32, key: &'static str },
    #[error("--sizes {key}={size}: {wanted} is needed")]
    Size { key: &'static str, size: u32, wanted: &'static str },
    #[error(
        "network namespace of pod {pod} ({path}): {source}; it left with its pod, or the source names the wrong path"
    )]
    Netns { pod: Arc<str>, path: PathBuf, source: io::Error },
    #[error("interface {interface} of pod {pod}: {doing} failed: {source}")]
    Interface { pod: Arc<str>, interface: String, doing: &'static str, source: io::Error },
    #[error("pod {pod}: {doing} failed: {source}")]
    Pod { pod: Arc<str>, doing: &'static str, source: io::Error },
    #[error("starting {what}: {source}")]
    Thread { what: &'static str, source: io::Error },
}

fn attach_remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EBUSY) => {
            "; another program holds the hook exclusively (BPF_F_ALLOW_OVERRIDE): `bpftool cgroup tree` names it"
        }
        Some(libc::ENOLINK) => "; the cgroup was removed: make it again, the agent attaches by itself",
        Some(libc::E2BIG) => "; 64 programs are on this hook already: `bpftool cgroup tree` names them",
        Some(libc::EPERM) => "; a program above in the hierarchy forbids it, or capabilities are missing",
        _ => "",
    }
}
