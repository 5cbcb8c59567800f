//! How late the control plane is: `350ms`, `200..500ms`, `5s`, `never`.

use std::{fmt, str::FromStr, time::Duration};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delay {
    Within(Duration, Duration),
    Never,
}

impl Delay {
    /// For the n-th death: spread evenly over the range by the golden ratio, the same in every run.
    pub fn nth(self, n: usize) -> Option<Duration> {
        match self {
            Self::Never => None,
            Self::Within(least, most) => Some(least + (most - least).mul_f64((n as f64 * 0.618_034).fract())),
        }
    }
}

impl FromStr for Delay {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "never" {
            return Ok(Self::Never);
        }
        let unit_at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
        let unit = match &text[unit_at..] {
            "ms" => 0.001,
            "s" => 1.0,
            _ => return Err(format!("`{text}` has no unit: say for example 350ms, 200..500ms, 5s or never")),
        };
        let numbers = &text[..unit_at];
        let (least, most) = numbers.split_once("..").unwrap_or((numbers, numbers));
        let parse = |number: &str| {
            let seconds = number.parse::<f64>().ok().map(|number| number * unit);
            seconds
                .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
                .ok_or_else(|| format!("`{number}` in `{text}` is no length of time"))
        };
        let (least, most) = (parse(least)?, parse(most)?);
        if least > most {
            return Err(format!("`{text}` ends before it begins"));
        }
        Ok(Self::Within(least, most))
    }
}

impl fmt::Display for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::Within(least, most) if least == most => write!(f, "{least:?}"),
            Self::Within(least, most) => write!(f, "{least:?}..{most:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_delay_is_a_time_or_a_range_or_never() {
        assert_eq!("200..500ms".parse(), Ok(Delay::Within(ms(200), ms(500))));
        assert_eq!("350ms".parse(), Ok(Delay::Within(ms(350), ms(350))));
        assert_eq!("5s".parse(), Ok(Delay::Within(ms(5000), ms(5000))));
        assert_eq!("never".parse(), Ok(Delay::Never));
    }

    #[test]
    fn what_is_no_delay_is_refused() {
        for text in ["", "5", "ms", "500..200ms", "-1s", "1h", "nans"] {
            assert!(text.parse::<Delay>().is_err(), "{text}");
        }
    }

    #[test]
    fn delays_stay_in_their_range() {
        let delay = Delay::Within(ms(200), ms(500));
        assert!((0..100).all(|n| delay.nth(n).is_some_and(|delay| (ms(200)..=ms(500)).contains(&delay))));
        assert_eq!(Delay::Never.nth(3), None);
    }
}
