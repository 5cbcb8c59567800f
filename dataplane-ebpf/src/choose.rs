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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// xorshift32 (Marsaglia 2003): the distributions below come out the same each time.
    struct Random(u32);

    impl Random {
        fn next(&mut self) -> u32 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 17;
            self.0 ^= self.0 << 5;
            self.0
        }
    }

    /// A slot of the model service.
    #[derive(Clone, Copy, Debug)]
    struct Slot {
        class: Class,
        weight: u32,
    }

    /// The choice as the programs make it, over a service that lies in memory.
    fn choose(slots: &[Slot], random: &mut Random) -> Option<usize> {
        let n = slots.len() as u32;
        let max_weight = slots.iter().map(|slot| slot.weight).max()?;
        for _ in 0..DRAWS {
            let at = pick(random.next(), n) as usize;
            if accept(random.next(), slots[at].weight, max_weight) && slots[at].class == Class::Live {
                return Some(at);
            }
        }
        scan(slots, random)
    }

    fn scan(slots: &[Slot], random: &mut Random) -> Option<usize> {
        let n = slots.len() as u32;
        let start = pick(random.next(), n);
        let mut best = Best::NONE;
        let mut chosen = None;
        for step in 0..n.min(SCAN) {
            let at = ((start + step) % n) as usize;
            if best.offer(slots[at].class, slots[at].weight, random.next()) {
                chosen = Some(at);
            }
        }
        chosen
    }

    /// Pearson's chi-square of `rounds` choices against the weights of the slots of `class`; nothing
    /// else may be chosen at all.
    fn chi_square(
        slots: &[Slot],
        class: Class,
        rounds: u32,
        choose: impl Fn(&[Slot], &mut Random) -> Option<usize>,
    ) -> f64 {
        let mut random = Random(0x9e37_79b9);
        let mut got = vec![0u32; slots.len()];
        for _ in 0..rounds {
            got[choose(slots, &mut random).expect("a choice")] += 1;
        }
        let fair: u32 = slots.iter().filter(|slot| slot.class == class).map(|slot| slot.weight).sum();
        slots
            .iter()
            .zip(got)
            .map(|(slot, got)| {
                if slot.class != class {
                    assert_eq!(got, 0, "{slot:?} was chosen");
                    return 0.0;
                }
                let wanted = f64::from(rounds) * f64::from(slot.weight) / f64::from(fair);
                (f64::from(got) - wanted).powi(2) / wanted
            })
            .sum()
    }

    fn slots(of: &[(Class, u32)]) -> Vec<Slot> {
        of.iter().map(|&(class, weight)| Slot { class, weight }).collect()
    }

    /// The 99.99th percentile of chi-square with three degrees of freedom.
    const FAIR: f64 = 21.1;

    #[test]
    fn skipped_slots_leave_the_others_shares_in_proportion_to_their_weights() {
        // Dead slots before, between and after; stepping on to the next slot would double the shares
        // of those that follow one.
        let slots = slots(&[
            (Class::Refusing, 9),
            (Class::Live, 1),
            (Class::Live, 9),
            (Class::Suspect, 9),
            (Class::Draining, 4),
            (Class::Live, 3),
            (Class::Stale, 9),
            (Class::Live, 3),
        ]);
        let measured = chi_square(&slots, Class::Live, 100_000, choose);
        assert!(measured < FAIR, "chi-square {measured}");
    }

    #[test]
    fn a_scan_samples_its_best_class_by_weight() {
        for best in [Class::Live, Class::Draining, Class::Suspect, Class::Refusing] {
            let mut of = vec![(best, 5), (best, 1), (best, 2), (best, 2)];
            of.extend((best as u32 + 1..=Class::Stale as u32).map(|worse| (Class::from_u32(worse), 9)));
            let measured = chi_square(&slots(&of), best, 100_000, scan);
            assert!(measured < FAIR, "{best:?}: chi-square {measured}");
        }
    }

    #[test]
    fn the_test_itself_sees_a_biased_choice() {
        let slots = slots(&[(Class::Refusing, 1), (Class::Live, 1), (Class::Live, 1)]);
        let stepping = |slots: &[Slot], random: &mut Random| {
            let at = pick(random.next(), slots.len() as u32) as usize;
            (at..slots.len()).find(|&at| slots[at].class == Class::Live)
        };
        assert!(chi_square(&slots, Class::Live, 100_000, stepping) > FAIR);
    }

    #[test]
    fn the_floor_leaves_half() {
        let marks = |ready| (0..ready).take_while(|&marked| may_suspect(marked, ready, 50)).count();
        assert_eq!([0, 1, 2, 3, 4, 5, 100].map(marks), [0, 0, 1, 1, 2, 2, 50]);
    }

    fn any_slot() -> impl Strategy<Value = Slot> {
        (0u32..=5, 1u32..=65_535).prop_map(|(class, weight)| Slot { class: Class::from_u32(class), weight })
    }

    proptest! {
        #[test]
        fn a_pick_is_in_range(random: u32, n in 1u32..) {
            prop_assert!(pick(random, n) < n);
        }

        #[test]
        fn the_heaviest_slot_is_always_accepted(random: u32, weight in 1u32..=65_535) {
            prop_assert!(accept(random, weight, weight));
        }

        #[test]
        fn a_scan_finds_the_best_class_there_is(of in prop::collection::vec(any_slot(), 1..=SCAN as usize), seed in 1u32..) {
            let best = of.iter().map(|slot| slot.class).min().filter(|&class| class != Class::Stale);
            let chosen = scan(&of, &mut Random(seed)).map(|at| of[at].class);
            prop_assert_eq!(chosen, best);
        }

        #[test]
        fn a_choice_is_live_if_anything_is(of in prop::collection::vec(any_slot(), 1..=SCAN as usize), seed in 1u32..) {
            let live = of.iter().any(|slot| slot.class == Class::Live);
            let chosen = choose(&of, &mut Random(seed)).map(|at| of[at].class);
            prop_assert_eq!(chosen == Some(Class::Live), live);
        }
    }
}
