//! Medians and percentiles of samples that are few enough to keep.

/// The `q`-th quantile (0 to 1), nearest rank. 0 of nothing.
pub fn quantile(samples: &[u64], q: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable();
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    sorted[((last as f64) * q).round() as usize] as f64
}

pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// Two things measured in turn, so that both saw the same machine.
#[derive(Clone, Debug, Default)]
pub struct Rounds {
    value: Vec<f64>,
    baseline: Vec<f64>,
}

impl Rounds {
    pub fn push(&mut self, value: f64, baseline: f64) {
        self.value.push(value);
        self.baseline.push(baseline);
    }

    pub fn value(&self) -> f64 {
        median(&self.value)
    }

    pub fn baseline(&self) -> f64 {
        median(&self.baseline)
    }

    /// The median of the rounds' ratios.
    pub fn ratio(&self) -> f64 {
        let ratios: Vec<_> = self.value.iter().zip(&self.baseline).map(|(value, baseline)| value / baseline).collect();
        median(&ratios)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let samples: Vec<u64> = (1..=101).rev().collect();
        assert_eq!(quantile(&samples, 0.5), 51.0);
        assert_eq!(quantile(&samples, 0.99), 100.0);
        assert_eq!(quantile(&samples, 1.0), 101.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn a_round_in_which_the_whole_machine_was_slow_leaves_the_ratio_alone() {
        let mut rounds = Rounds::default();
        for slow in [1.0, 1.0, 7.0] {
            rounds.push(11.0 * slow, 10.0 * slow);
        }
        assert!((rounds.ratio() - 1.1).abs() < 1e-9);
    }
}
