//! The read-only globals that the agent sets before loading; `dataplane_ebpf::offsets` says from what.

macro_rules! globals {
    ($($name:ident),* $(,)?) => { $(
        #[unsafe(no_mangle)]
        pub static $name: u32 = 0;
    )* };
}

globals! {
    OFF_SK_ERR,
    OFF_SK_PROTOCOL,
    OFF_SK_FAMILY,
    OFF_SK_NUM,
    OFF_SK_NET,
    OFF_SK_RCV_SADDR,
    OFF_SK_V6_RCV_SADDR,
    OFF_SK_V6ONLY_BYTE,
    OFF_SK_V6ONLY_MASK,
    OFF_NET_COOKIE,
    OFF_TASK_NSPROXY,
    OFF_TASK_GROUP_LEADER,
    OFF_TASK_THREAD_PID,
    OFF_NSPROXY_NET_NS,
    OFF_PID_LEVEL,
    OFF_PID_NUMBERS,
    OFF_UPID_NR,
    SIZE_UPID,
}

/// The value that the agent has set, which is not the one the compiler sees.
#[inline(always)]
pub fn get(global: &'static u32) -> usize {
    // SAFETY: a reference is valid for reads.
    unsafe { core::ptr::read_volatile(global) as usize }
}
