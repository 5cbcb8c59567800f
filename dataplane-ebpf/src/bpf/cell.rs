//! Words that are shared with other CPUs and the agent (volatile reads, compare-and-exchange), and words hidden
//! from the verifier.

use core::arch::asm;
use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd, atomic_xsub};

/// Reads a value that others write; wider than 8 bytes it may be torn.
///
/// # Safety
/// `at` must be a pointer into a map element that the verifier has checked.
#[inline(always)]
pub unsafe fn read<T: Copy>(at: *const T) -> T {
    // SAFETY: the caller's promise.
    unsafe { core::ptr::read_volatile(at) }
}

/// Replaces `old` by `new`; false if it was not `old` any more.
///
/// # Safety
/// As [`read`].
#[inline(always)]
pub unsafe fn exchange(at: *mut u64, old: u64, new: u64) -> bool {
    // SAFETY: the caller's promise; BPF_CMPXCHG exists since 5.12.
    unsafe { atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(at, old, new).1 }
}

/// Adds one and returns what was there before.
///
/// # Safety
/// As [`read`].
#[inline(always)]
pub unsafe fn increment(at: *mut u32) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { atomic_xadd::<u32, u32, { AtomicOrdering::SeqCst }>(at, 1) }
}

/// Takes one away and returns what was there before.
///
/// # Safety
/// As [`read`].
#[inline(always)]
pub unsafe fn decrement(at: *mut u32) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { atomic_xsub::<u32, u32, { AtomicOrdering::SeqCst }>(at, 1) }
}

/// Gives `value` back as something the verifier knows nothing of; `mask` is any number it does not
/// know either.
///
/// The verifier follows every path for each constant that it knows a branch by. In a loop those
/// paths multiply; values that are all unknown make its states alike, and it follows one.
#[inline(always)]
pub fn hide(value: u32, mask: u32) -> u32 {
    let mut value = u64::from(value);
    // SAFETY: arithmetic on registers; the two instructions undo each other.
    unsafe {
        asm!(
            "{value} ^= {mask}",
            "{value} ^= {mask}",
            value = inout(reg) value,
            mask = in(reg) u64::from(mask),
            options(nostack)
        );
    }
    value as u32
}

/// `len` if it is 1 to `max`, in such words that any kernel's verifier sees it: it learns bounds from
/// `<` and `>`, but from `!= 0` only since 6.8, and the compiler turns one into the other.
#[inline(always)]
pub fn within(len: u32, max: u32) -> Option<u32> {
    let mut less_one = u64::from(len.wrapping_sub(1));
    // One instruction: without any, two lines of the source would claim the next one, and the kernel refuses that.
    // SAFETY: a register into itself; the compiler forgets where the value comes from.
    unsafe { asm!("{0} = {0}", inout(reg) less_one, options(nomem, nostack, preserves_flags)) };
    (less_one < u64::from(max)).then(|| less_one as u32 + 1)
}
