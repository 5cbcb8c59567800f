//! Buffers of 64 KiB come and go with every few packets: they must not go back to the kernel each time.

/// Keeps up to 16 MiB of freed memory per worker instead of unmapping it. glibc's default is 128 KiB, with which a
/// quarter of a bulk receiver's time goes into page faults. Call once, before the workers start.
pub fn keep_what_is_freed() {
    #[cfg(target_env = "gnu")]
    for (parameter, bytes) in [(libc::M_TRIM_THRESHOLD, KEPT), (libc::M_MMAP_THRESHOLD, MAPPED)] {
        // SAFETY: it sets a parameter of the allocator, under the allocator's own lock.
        unsafe { libc::mallopt(parameter, bytes) };
    }
}

#[cfg(target_env = "gnu")]
const KEPT: libc::c_int = 16 << 20;
/// Larger than any buffer here, 1 MiB frames of other proxies included.
#[cfg(target_env = "gnu")]
const MAPPED: libc::c_int = 4 << 20;
