//! Timestamps of the API (RFC 3339 in UTC) and ages as tables print them.

use jiff::Timestamp;

/// `2026-01-02T03:04:05Z`: metav1.Time keeps whole seconds.
pub fn format_time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `2026-01-02T03:04:05.000006Z`: metav1.MicroTime keeps microseconds.
pub fn format_micro_time(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// Parses an RFC 3339 timestamp with any offset; `None` if it is none.
pub fn parse_time(text: &str) -> Option<Timestamp> {
    text.parse().ok()
}

/// A duration in whole seconds the way kubectl prints ages: two units while they matter, then one.
///
/// Up to one second in the future counts as zero, because clocks of two machines differ; more is `<invalid>`.
pub fn human_duration(seconds: i64) -> String {
    if seconds < -1 {
        return "<invalid>".to_owned();
    }
    let two = |big: i64, big_unit: char, small: i64, small_unit: char| {
        if small == 0 { format!("{big}{big_unit}") } else { format!("{big}{big_unit}{small}{small_unit}") }
    };
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        ..0 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        120..600 => two(minutes, 'm', seconds % 60, 's'),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => two(hours, 'h', minutes % 60, 'm'),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => two(days, 'd', hours % 24, 'h'),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => two(days / 365, 'y', days % 365, 'd'),
        _ => format!("{}y", days / 365),
    }
}

/// The age of a timestamp text; `<unknown>` if it is absent or unreadable.
pub fn age(since: &str, now: Timestamp) -> String {
    match parse_time(since) {
        Some(at) => human_duration(floor_seconds(now, at)),
        None => "<unknown>".to_owned(),
    }
}

/// Whole seconds from `at` to `now`, rounded toward zero.
fn floor_seconds(now: Timestamp, at: Timestamp) -> i64 {
    let nanos = now.as_nanosecond() - at.as_nanosecond();
    i64::try_from(nanos / 1_000_000_000).unwrap_or(if nanos < 0 { i64::MIN } else { i64::MAX })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_lose_units_as_they_grow() {
        let rows = [
            (-2, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (200, "3m20s"),
            (600, "10m"),
            (10_799, "179m"),
            (10_800, "3h"),
            (10_860, "3h1m"),
            (28_800, "8h"),
            (172_799, "47h"),
            (172_800, "2d"),
            (183_600, "2d3h"),
            (691_200, "8d"),
            (63_071_999, "729d"),
            (63_072_000, "2y"),
            (63_072_000 + 86_400 * 10, "2y10d"),
            (252_288_000, "8y"),
        ];
        for (seconds, text) in rows {
            assert_eq!(human_duration(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn times_are_read_with_any_offset_and_written_in_utc() {
        let at = parse_time("2026-01-02T05:04:05.678901+02:00").expect("valid");
        assert_eq!(format_time(at), "2026-01-02T03:04:05Z");
        assert_eq!(format_micro_time(at), "2026-01-02T03:04:05.678901Z");
        assert_eq!(age("2026-01-02T03:03:05Z", at), "60s");
        assert_eq!(age("", at), "<unknown>");
    }
}
