//! Where the kernel keeps what the programs read: offsets that the agent takes from the running kernel's BTF.
//!
//! rustc has no CO-RE relocations. So each offset is a read-only global of the object, named here,
//! and the agent sets all of them before it loads (`aya::EbpfLoader::override_global`, `u32`).

/// What is to be found out about a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Its offset from the start of the struct, in bytes.
    Offset,
    /// A bitfield: the byte that holds it.
    BitfieldByte,
    /// A bitfield: its mask within that byte.
    BitfieldMask,
    /// The size of the struct itself, in bytes; `path` is empty.
    Size,
}

/// One global and how to find its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Global {
    pub name: &'static str,
    /// The struct's name in BTF.
    pub of: &'static str,
    /// Named members from there, each within the one before; anonymous structs and unions between
    /// them are to be searched.
    pub path: &'static [&'static str],
    pub wanted: Wanted,
}

const fn offset(name: &'static str, of: &'static str, path: &'static [&'static str]) -> Global {
    Global { name, of, path, wanted: Wanted::Offset }
}

const IPV6ONLY: &[&str] = &["__sk_common", "skc_ipv6only"];

/// Every global. All of them must be set: 0 would be read as the start of the struct.
pub const OFFSETS: &[Global] = &[
    offset("OFF_SK_ERR", "sock", &["sk_err"]),
    offset("OFF_SK_PROTOCOL", "sock", &["sk_protocol"]),
    offset("OFF_SK_FAMILY", "sock", &["__sk_common", "skc_family"]),
    offset("OFF_SK_NUM", "sock", &["__sk_common", "skc_num"]),
    offset("OFF_SK_NET", "sock", &["__sk_common", "skc_net", "net"]),
    offset("OFF_SK_RCV_SADDR", "sock", &["__sk_common", "skc_rcv_saddr"]),
    offset("OFF_SK_V6_RCV_SADDR", "sock", &["__sk_common", "skc_v6_rcv_saddr"]),
    Global { name: "OFF_SK_V6ONLY_BYTE", of: "sock", path: IPV6ONLY, wanted: Wanted::BitfieldByte },
    Global { name: "OFF_SK_V6ONLY_MASK", of: "sock", path: IPV6ONLY, wanted: Wanted::BitfieldMask },
    offset("OFF_NET_COOKIE", "net", &["net_cookie"]),
    offset("OFF_TASK_NSPROXY", "task_struct", &["nsproxy"]),
    offset("OFF_TASK_GROUP_LEADER", "task_struct", &["group_leader"]),
    offset("OFF_TASK_THREAD_PID", "task_struct", &["thread_pid"]),
    offset("OFF_NSPROXY_NET_NS", "nsproxy", &["net_ns"]),
    offset("OFF_PID_LEVEL", "pid", &["level"]),
    offset("OFF_PID_NUMBERS", "pid", &["numbers"]),
    offset("OFF_UPID_NR", "upid", &["nr"]),
    Global { name: "SIZE_UPID", of: "upid", path: &[], wanted: Wanted::Size },
];
