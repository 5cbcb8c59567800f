//! Mmapable array maps in the agent's memory: read and written without a system call.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::OnceLock,
};

use aya::Pod;

/// Elements of a window. With elements of 8 bytes or a multiple, every window begins at a page (of up to 128 KiB).
const WINDOW: u32 = 16_384;

/// A mmapable array map in the agent's memory, window by window as they are used: mapped pages count as the agent's own
/// memory, and most of an array is there for a larger cluster.
#[derive(Debug)]
pub struct MappedArray<T> {
    map: OwnedFd,
    entries: u32,
    writable: bool,
    windows: Box<[OnceLock<Window<T>>]>,
}

/// A part of the array; unmapped on drop.
#[derive(Debug)]
struct Window<T> {
    base: *mut T,
    bytes: usize,
}

// SAFETY: the mapping is plain shared memory of integers, unmapped on drop.
unsafe impl<T: Send> Send for Window<T> {}
// SAFETY: elements are read and written as a whole by volatile accesses, or by atomics: programs on
// other CPUs do the same at any time, so another thread adds nothing new.
unsafe impl<T: Sync> Sync for Window<T> {}

impl<T: Pod> MappedArray<T> {
    /// `T` must be a multiple of 8 bytes: array elements are padded to that. Fails where the first window cannot be
    /// mapped; should a later one fail (no memory), its elements are as if they were out of range.
    pub fn new(map: OwnedFd, entries: u32, writable: bool) -> io::Result<Self> {
        const { assert!(size_of::<T>().is_multiple_of(8)) };
        let windows = (0..entries.div_ceil(WINDOW)).map(|_| OnceLock::new()).collect();
        let this = Self { map, entries, writable, windows };
        if let Some(first) = this.windows.first() {
            // It is empty: nobody else has it yet.
            let _ = first.set(this.open(0)?);
        }
        Ok(this)
    }

    pub const fn entries(&self) -> u32 {
        self.entries
    }

    /// Every element, as [`Self::get`] gives it. A window that nobody used is mapped only while it is read.
    pub fn iter(&self) -> impl Iterator<Item = (u32, T)> {
        (0_u32..).zip(&self.windows).flat_map(|(number, kept)| {
            let opened = if kept.get().is_some() { None } else { self.open(number).ok() };
            let elements = 0..(self.entries - number * WINDOW).min(WINDOW);
            elements.filter_map(move |element| {
                let window = kept.get().or(opened.as_ref())?;
                // SAFETY: the element is in bounds of the window, and any bit pattern is a T (Pod).
                let value = unsafe { std::ptr::read_volatile(window.base.add(element as usize)) };
                Some((number * WINDOW + element, value))
            })
        })
    }

    /// The element as it is now; it may be torn while a program writes it.
    pub fn get(&self, index: u32) -> Option<T> {
        // SAFETY: the element is in bounds of its window, and any bit pattern is a T (Pod).
        self.at(index).map(|element| unsafe { std::ptr::read_volatile(element) })
    }

    /// Writes an element word by word. Programs that read meanwhile may see part of it: every type
    /// carries a generation or identifier that tells.
    pub fn set(&self, index: u32, value: T) -> bool {
        let Some(element) = self.at(index) else { return false };
        // SAFETY: the element is in bounds of its window of a writable mapping.
        unsafe { std::ptr::write_volatile(element, value) };
        // The next write (the health word that makes it count) must not overtake this one.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        true
    }

    fn at(&self, index: u32) -> Option<*mut T> {
        if index >= self.entries {
            return None;
        }
        let window = &self.windows[(index / WINDOW) as usize];
        let window = match window.get() {
            Some(window) => window,
            None => {
                let opened = self.open(index / WINDOW).ok()?;
                window.get_or_init(|| opened)
            }
        };
        // SAFETY: below `entries` and within the window, which is mapped as far as the array goes.
        Some(unsafe { window.base.add((index % WINDOW) as usize) })
    }

    fn open(&self, window: u32) -> io::Result<Window<T>> {
        let first = window * WINDOW;
        let bytes = size_of::<T>() * (self.entries - first).min(WINDOW) as usize;
        let bytes = bytes.next_multiple_of(4096_usize.max(page_size()));
        let protection = if self.writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let offset = (size_of::<T>() * first as usize) as libc::off_t;
        // SAFETY: a fresh shared mapping of a map's descriptor, at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, self.map.as_raw_fd(), offset)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Window { base: base.cast(), bytes })
    }
}

impl MappedArray<u64> {
    pub fn word(&self, index: u32) -> Option<&std::sync::atomic::AtomicU64> {
        // SAFETY: in bounds, aligned to 8, valid as long as the mapping (&self); programs change the
        // word by atomic instructions only.
        self.at(index).map(|word| unsafe { std::sync::atomic::AtomicU64::from_ptr(word) })
    }
}

impl<T> Drop for Window<T> {
    fn drop(&mut self) {
        // SAFETY: the very mapping made in `open`; no reference into it outlives the array, which owns the window.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}

fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write, os::unix::fs::FileExt};

    use super::*;

    #[test]
    fn elements_of_every_window_are_those_of_the_map_and_only_used_windows_are_mapped() {
        const ENTRIES: u32 = 3 * WINDOW + 5;
        let mut file: File = tempfile::tempfile().unwrap();
        for index in 0..u64::from(ENTRIES) {
            file.write_all(&index.to_ne_bytes()).unwrap();
        }
        let array = MappedArray::<u64>::new(file.try_clone().unwrap().into(), ENTRIES, true).unwrap();
        let mapped = || array.windows.iter().map(|window| window.get().is_some()).collect::<Vec<_>>();
        assert!(array.iter().eq((0..ENTRIES).map(|index| (index, u64::from(index)))));
        assert_eq!(mapped(), [true, false, false, false]);
        for index in [0, WINDOW - 1, 3 * WINDOW, ENTRIES - 1] {
            assert_eq!(array.get(index), Some(u64::from(index)));
        }
        assert_eq!(mapped(), [true, false, false, true]);
        assert!(array.set(ENTRIES - 1, 7));
        array.word(WINDOW).unwrap().store(8, std::sync::atomic::Ordering::SeqCst);
        assert!(!array.set(ENTRIES, 9) && array.word(ENTRIES).is_none() && array.get(u32::MAX).is_none());
        drop(array);
        let read = |index: u32| {
            let mut word = [0; 8];
            file.read_exact_at(&mut word, u64::from(index) * 8).unwrap();
            u64::from_ne_bytes(word)
        };
        assert_eq!([ENTRIES - 1, WINDOW, WINDOW - 1].map(read), [7, 8, u64::from(WINDOW) - 1]);
    }
}
