//! Choosing a backend: unbiased draws first, then the best of a bounded scan.
//!
//! A draw picks a slot uniformly and accepts it with probability weight / max weight and only if
//! the backend is live. Rejected draws are simply repeated (rejection sampling), so whatever was
//! skipped leaves the odds of the others in proportion to their weights; stepping to "the next
//! slot" would hand a dead backend's whole share to its neighbour. When [`DRAWS`] draws found
//! nothing, [`Best`] keeps a weighted reservoir sample of the best class seen in one scan.

use crate::health::Class;

/// Draws before the scan: with half of a service dead all of them miss once in 65,536 connects.
pub const DRAWS: u32 = 16;
/// Slots a scan looks at: services up to this size are scanned whole.
pub const SCAN: u32 = 64;

/// A slot index below `n` from 32 random bits, by multiplication (Lemire): no division in BPF.
#[inline(always)]
pub const fn pick(random: u32, n: u32) -> u32 {
    (((random as u64) * (n as u64)) >> 32) as u32
}

/// Accepts with probability `weight / max_weight`.
#[inline(always)]
pub const fn accept(random: u32, weight: u32, max_weight: u32) -> bool {
    weight >= max_weight || pick(random, max_weight) < weight
}

/// What a scan knows of the best slot so far: within the best class met, each slot replaces the
/// one before it so that in the end all had chances in proportion to their weights (reservoir
/// sampling, A-Chao). The slot itself is the caller's to keep.
#[derive(Clone, Copy, Debug)]
pub struct Best {
    pub class: Class,
    /// Sum over the slots of that class; at most [`SCAN`] weights of 16 bits.
    pub total_weight: u32,
}

impl Best {
    pub const NONE: Self = Self { class: Class::Stale, total_weight: 0 };

    /// Shows it one more slot. True: this is the best one now.
    #[inline(always)]
    pub const fn offer(&mut self, class: Class, weight: u32, random: u32) -> bool {
        if matches!(class, Class::Stale) || class as u8 > self.class as u8 {
            return false;
        }
        if (class as u8) < self.class as u8 {
            *self = Self { class, total_weight: 0 };
        }
        self.total_weight += weight;
        pick(random, self.total_weight) < weight
    }
}

/// May one client make another backend of a service with `ready` backends suspect, having
/// `marked` already? The floor that keeps one client's word from ejecting a whole service.
#[inline(always)]
pub const fn may_suspect(marked: u32, ready: u32, percent: u32) -> bool {
    (marked as u64 + 1) * 100 <= (ready as u64) * (percent as u64)
}
