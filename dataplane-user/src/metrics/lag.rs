//! How long things took, in histograms.

/// Upper bounds, in seconds: microseconds for our own part, minutes for a control plane's.
pub const BOUNDS: [f64; 23] = [
    0.000_005, 0.000_01, 0.000_015, 0.000_02, 0.000_03, 0.000_04, 0.000_06, 0.000_08, 0.000_1, 0.000_15, 0.000_25,
    0.000_5, 0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 30.0, 120.0,
];

/// Counts per bucket, the last one without a bound.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    pub counts: [u64; BOUNDS.len() + 1],
    pub sum: f64,
}

impl Histogram {
    pub fn observe(&mut self, seconds: f64) {
        self.counts[BOUNDS.partition_point(|bound| *bound < seconds)] += 1;
        self.sum += seconds;
    }

    pub fn observe_ns(&mut self, ns: u64) {
        self.observe(ns as f64 / 1e9);
    }
}

/// Every histogram of the agent, and drains by who said them first: api, sigterm, listener, control plane.
#[derive(Clone, Debug, Default)]
pub struct Lags {
    pub api: Histogram,
    pub sigterm: Histogram,
    pub listener: Histogram,
    pub late_api: Histogram,
    pub late_sigterm: Histogram,
    pub late_listener: Histogram,
    pub drains: [u64; 4],
}
