//! When to ask for a certificate: pure times, no clock and no dice; both are arguments.

use std::time::{Duration, SystemTime};

use super::IssueErrorKind;

/// How patient the store is.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// After the first failure in a row; doubles from there.
    pub retry: Duration,
    pub longest_retry: Duration,
    /// The same after a refusal. istiod refuses identities of pods that it has not seen yet, so it is not the last word.
    pub refused_retry: Duration,
    pub longest_refused_retry: Duration,
    /// How long `Store::fetch` lets a caller wait.
    pub fetch_wait: Duration,
    /// An authority that does not answer for so long has failed.
    pub answer_wait: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            retry: Duration::from_secs(1),
            longest_retry: Duration::from_secs(60),
            refused_retry: Duration::from_secs(2),
            longest_refused_retry: Duration::from_secs(300),
            fetch_wait: Duration::from_secs(5),
            answer_wait: Duration::from_secs(10),
        }
    }
}

/// Of the lifetime, before and after its half: nodes that started together do not renew together.
const JITTER: f64 = 0.05;

/// One identity's next question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    due: SystemTime,
    failures: u32,
}

impl Schedule {
    /// Nothing is there: due at once.
    pub fn new(now: SystemTime) -> Self {
        Self { due: now, failures: 0 }
    }

    pub fn due(&self) -> SystemTime {
        self.due
    }

    /// In a row, since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// A certificate came: the next is due at half of its life, and when that has passed (a source that hands out what
    /// it has, whatever its age) at half of what remains. `dice` is from 0 to 1.
    pub fn succeeded(
        &mut self,
        not_before: SystemTime,
        not_after: SystemTime,
        now: SystemTime,
        dice: f64,
        timing: &Timing,
    ) {
        self.failures = 0;
        let life = not_after.duration_since(not_before).unwrap_or_default();
        let half = not_before + life.mul_f64(0.5 + JITTER * (2.0 * dice - 1.0));
        let left = not_after.duration_since(now).unwrap_or_default();
        self.due = if half > now { half } else { now + (left / 2).clamp(timing.retry, timing.longest_refused_retry) };
    }

    /// Nothing usable came: later, and later still each time. `dice` is from 0 to 1.
    pub fn failed(&mut self, kind: IssueErrorKind, now: SystemTime, dice: f64, timing: &Timing) {
        let (first, longest) = match kind {
            IssueErrorKind::Temporary => (timing.retry, timing.longest_retry),
            IssueErrorKind::Refused => (timing.refused_retry, timing.longest_refused_retry),
        };
        let wait = first.saturating_mul(1 << self.failures.min(20)).min(longest);
        self.failures = self.failures.saturating_add(1);
        // Between half of it and all of it.
        self.due = now + wait.mul_f64(0.5 + 0.5 * dice);
    }

    /// There is a reason to ask now, whatever was planned.
    pub fn hurry(&mut self, now: SystemTime) {
        self.due = self.due.min(now);
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
    }

    #[test]
    fn a_certificate_of_a_day_is_renewed_around_noon() {
        let timing = Timing::default();
        let mut schedule = Schedule::new(at(0));
        assert_eq!(schedule.due(), at(0));
        for (dice, hours) in [(0.0, 10.8), (0.5, 12.0), (1.0, 13.2)] {
            schedule.succeeded(at(0), at(86_400), at(60), dice, &timing);
            let due = schedule.due().duration_since(at(0)).unwrap().as_secs_f64() / 3_600.0;
            assert!((due - hours).abs() < 1e-6, "{due} h");
        }
    }

    #[test]
    fn an_authority_that_fails_is_asked_less_and_less_but_never_given_up() {
        let timing = Timing::default();
        let mut schedule = Schedule::new(at(0));
        let mut now = at(0);
        let waits: Vec<_> = (0..9)
            .map(|_| {
                schedule.failed(IssueErrorKind::Temporary, now, 1.0, &timing);
                let wait = schedule.due().duration_since(now).unwrap().as_secs();
                now = schedule.due();
                wait
            })
            .collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        schedule.succeeded(now, now + Duration::from_secs(100), now, 0.5, &timing);
        schedule.failed(IssueErrorKind::Temporary, now, 1.0, &timing);
        assert_eq!(schedule.due(), now + Duration::from_secs(1), "a success starts the count again");
    }

    proptest! {
        /// Whatever the answers are: the next question lies in the future, and after a success with room for retries.
        #[test]
        fn the_next_question_is_ahead_and_leaves_time_for_retries(
            life in 20u64..10_000_000, age in 0.0f64..1.0, dice in 0.0f64..=1.0, failures in 0usize..70, refused: bool,
        ) {
            let timing = Timing::default();
            let (from, to) = (at(0), at(life));
            let now = at(0) + (to.duration_since(from).unwrap()).mul_f64(age);
            let mut schedule = Schedule::new(now);
            schedule.succeeded(from, to, now, dice, &timing);
            prop_assert!(schedule.due() > now);
            let left = to.duration_since(now).unwrap();
            if left > timing.retry * 4 {
                // At least 40 % of a life that is still young, half of the rest of an old one.
                let spare = to.duration_since(schedule.due()).unwrap();
                prop_assert!(spare >= left.mul_f64(0.4), "{spare:?} of {left:?}");
            }
            let kind = if refused { IssueErrorKind::Refused } else { IssueErrorKind::Temporary };
            for _ in 0..failures {
                let now = schedule.due();
                schedule.failed(kind, now, dice, &timing);
                let wait = schedule.due().duration_since(now).unwrap();
                prop_assert!(wait >= timing.retry / 2 && wait <= timing.longest_refused_retry);
            }
            let now = schedule.due() - Duration::from_millis(1);
            schedule.hurry(now);
            prop_assert_eq!(schedule.due(), now);
        }
    }
}
