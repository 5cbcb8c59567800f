//! Mmapable array maps in the agent's memory: read and written without a system call.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use aya::Pod;

/// A whole mmapable array map in the agent's memory.
#[derive(Debug)]
pub struct MappedArray<T> {
    base: *mut T,
    entries: u32,
    bytes: usize,
}

// SAFETY: the mapping is plain shared memory of integers, unmapped on drop.
unsafe impl<T: Send> Send for MappedArray<T> {}
// SAFETY: elements are read and written as a whole by volatile accesses, or by atomics: programs on
// other CPUs do the same at any time, so another thread adds nothing new.
unsafe impl<T: Sync> Sync for MappedArray<T> {}

impl<T: Pod> MappedArray<T> {
    /// `T` must be a multiple of 8 bytes: array elements are padded to that.
    pub fn new(map: impl AsFd, entries: u32, writable: bool) -> io::Result<Self> {
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let page = 4096_usize.max(page_size());
        let bytes = (size_of::<T>() * entries as usize).next_multiple_of(page);
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: a fresh shared mapping of a map's descriptor, at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, map.as_fd().as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base: base.cast(), entries, bytes })
    }

    pub const fn entries(&self) -> u32 {
        self.entries
    }

    /// The element as it is now; it may be torn while a program writes it.
    pub fn get(&self, index: u32) -> Option<T> {
        // SAFETY: the index is in bounds of the mapping, and any bit pattern is a T (Pod).
        (index < self.entries).then(|| unsafe { std::ptr::read_volatile(self.base.add(index as usize)) })
    }

    /// Writes an element word by word. Programs that read meanwhile may see part of it: every type
    /// carries a generation or identifier that tells.
    pub fn set(&self, index: u32, value: T) -> bool {
        if index >= self.entries {
            return false;
        }
        // SAFETY: the index is in bounds of a writable mapping of Ts.
        unsafe { std::ptr::write_volatile(self.base.add(index as usize), value) };
        // The next write (the health word that makes it count) must not overtake this one.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        true
    }
}

impl MappedArray<u64> {
    pub fn word(&self, index: u32) -> Option<&std::sync::atomic::AtomicU64> {
        // SAFETY: in bounds, aligned to 8, valid as long as the mapping (&self); programs change the
        // word by atomic instructions only.
        (index < self.entries).then(|| unsafe { std::sync::atomic::AtomicU64::from_ptr(self.base.add(index as usize)) })
    }
}

impl<T> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: the very mapping made in `new`; no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}
