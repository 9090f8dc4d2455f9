//! Times as people write them on the command line.

use std::time::Duration;

use jiff::{Span, SpanRelativeTo};

/// The longest time that is allowed: a year of 365 days.
const MAX: Duration = Duration::from_secs(365 * 86_400);

/// Reads a time: a number of seconds, or units like `30s`, `10m`, `1h30m`, `2d` (jiff's friendly format).
///
/// # Errors
/// A text that is no time; less than a second, or more than 365 days.
pub fn parse(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().map(Duration::from_secs);
    let time = seconds.or_else(|| {
        let span: Span = text.parse().ok()?;
        Duration::try_from(span.to_duration(SpanRelativeTo::days_are_24_hours()).ok()?).ok()
    });
    time.filter(|time| (Duration::from_secs(1)..=MAX).contains(time)).ok_or_else(|| {
        format!(
            "{text:?} is not allowed; allowed: 1 second to 365 days, as a number of seconds or like 30s, 10m, 1h30m, 2d"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        for (text, seconds) in [("10m", 600), ("90", 90), ("1h30m", 5400), ("2h", 7200), ("1d", 86_400), ("90s", 90)] {
            assert_eq!(parse(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["", "m", "0s", "-1s", "1mo", "500d", "99999999999999999999s"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
