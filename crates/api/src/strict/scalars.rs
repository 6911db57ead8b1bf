//! Texts with a form of their own: times and base64, with the error texts of Go's parsers.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

const SECONDS: &str = "2006-01-02T15:04:05Z07:00";
const MICROS: &str = "2006-01-02T15:04:05.000000Z07:00";

/// An RFC 3339 time in UTC with whole seconds; `None` for the zero time.
pub(crate) fn canonical_time(text: &str) -> Result<Option<String>, String> {
    let (seconds, _) = parse_time(text, SECONDS)?;
    Ok(format_seconds(seconds))
}

/// An RFC 3339 time in UTC with microseconds; `None` for the zero time.
pub(crate) fn canonical_micro_time(text: &str) -> Result<Option<String>, String> {
    let (seconds, nanos) = parse_time(text, MICROS)?;
    Ok(format_micros(seconds, nanos))
}

/// Seconds since 1970 of the year 1, Go's zero time.
const ZERO_TIME: i64 = -62_135_596_800;

/// `2024-01-02T03:04:05Z`, `None` for the zero time and for what no year from 0 to 9999 holds.
pub(crate) fn format_seconds(seconds: i64) -> Option<String> {
    let (year, month, day, rest) = civil(seconds)?;
    Some(format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60))
}

/// `2024-01-02T03:04:05.000006Z`, under the same conditions.
pub(crate) fn format_micros(seconds: i64, nanos: u32) -> Option<String> {
    let text = format_seconds(seconds)?;
    Some(format!("{}.{:06}Z", text.trim_end_matches('Z'), nanos / 1000))
}

/// Year, month, day and second of the day (proleptic Gregorian calendar).
fn civil(seconds: i64) -> Option<(i64, i64, i64, i64)> {
    if seconds == ZERO_TIME {
        return None;
    }
    let days = seconds.div_euclid(86_400) + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (0..=9999).contains(&year).then_some((year, month, day, seconds.rem_euclid(86_400)))
}

fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let shifted = if month > 2 { month - 3 } else { month + 9 };
    let day_of_year = (153 * shifted + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

struct Cursor<'a> {
    whole: &'a str,
    layout: &'static str,
    rest: &'a str,
}

impl<'a> Cursor<'a> {
    fn error(&self, element: &str) -> String {
        let quote = super::tree::go_quote;
        format!(
            "parsing time {} as {}: cannot parse {} as {}",
            quote(self.whole),
            quote(self.layout),
            quote(self.rest),
            quote(element)
        )
    }

    fn range(&self, what: &str) -> String {
        format!("parsing time {}: {what} out of range", super::tree::go_quote(self.whole))
    }

    fn digits(&mut self, count: usize, element: &str) -> Result<i64, String> {
        match self.rest.get(..count) {
            Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                self.rest = &self.rest[count..];
                digits.parse().map_err(|_| self.error(element))
            }
            _ => Err(self.error(element)),
        }
    }

    fn literal(&mut self, text: &str) -> Result<(), String> {
        self.rest = self.rest.strip_prefix(text).ok_or_else(|| self.error(text))?;
        Ok(())
    }
}

/// Seconds since 1970 and nanoseconds of an RFC 3339 text.
fn parse_time(text: &str, layout: &'static str) -> Result<(i64, u32), String> {
    let mut cursor = Cursor { whole: text, layout, rest: text };
    let year = cursor.digits(4, "2006")?;
    cursor.literal("-")?;
    let month = cursor.digits(2, "01")?;
    if !(1..=12).contains(&month) {
        return Err(cursor.range("month"));
    }
    cursor.literal("-")?;
    let day = cursor.digits(2, "02")?;
    cursor.literal("T")?;
    let hour = cursor.digits(2, "15")?;
    if hour > 23 {
        return Err(cursor.range("hour"));
    }
    cursor.literal(":")?;
    let minute = cursor.digits(2, "04")?;
    if minute > 59 {
        return Err(cursor.range("minute"));
    }
    cursor.literal(":")?;
    let second = cursor.digits(2, "05")?;
    if second > 59 {
        return Err(cursor.range("second"));
    }
    let mut nanos = 0;
    let fraction: &str = match cursor.rest.strip_prefix(['.', ',']) {
        Some(rest) => &rest[..rest.bytes().take_while(u8::is_ascii_digit).count()],
        None => "",
    };
    if layout == MICROS && fraction.len() != 6 {
        return Err(cursor.error(".000000"));
    }
    if !fraction.is_empty() {
        for (at, digit) in fraction.bytes().take(9).enumerate() {
            nanos += u32::from(digit - b'0') * 10u32.pow(8 - u32::try_from(at).unwrap_or(8));
        }
        cursor.rest = &cursor.rest[fraction.len() + 1..];
    }
    let offset = if let Some(rest) = cursor.rest.strip_prefix('Z') {
        cursor.rest = rest;
        0
    } else {
        let sign = match cursor.rest.bytes().next() {
            Some(b'+') => 1,
            Some(b'-') => -1,
            _ => return Err(cursor.error("Z07:00")),
        };
        let zone = cursor.rest;
        cursor.rest = &cursor.rest[1..];
        let hours =
            cursor.digits(2, "Z07:00").map_err(|_| Cursor { rest: zone, ..cursor_of(text, layout) }.error("Z07:00"))?;
        let part = cursor.literal(":").and_then(|()| cursor.digits(2, "Z07:00"));
        let minutes = part.map_err(|_| Cursor { rest: zone, ..cursor_of(text, layout) }.error("Z07:00"))?;
        sign * (hours * 3600 + minutes * 60)
    };
    if !cursor.rest.is_empty() {
        let quote = super::tree::go_quote;
        return Err(format!("parsing time {}: extra text: {}", quote(text), quote(cursor.rest)));
    }
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let length = match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    };
    if !(1..=length).contains(&day) {
        return Err(cursor.range("day"));
    }
    Ok((days_from_civil(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second - offset, nanos))
}

fn cursor_of<'a>(text: &'a str, layout: &'static str) -> Cursor<'a> {
    Cursor { whole: text, layout, rest: text }
}

/// Base64 with its canonical padding; line breaks are skipped as RFC 4648 decoders of Go do.
pub(crate) fn canonical_base64(text: &str) -> Result<String, String> {
    let compact: String = text.chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
    match STANDARD.decode(&compact) {
        Ok(bytes) => Ok(STANDARD.encode(bytes)),
        Err(error) => {
            // Go names the first byte that cannot be part of the text, or the start of an unfinished group.
            let offset = match error {
                base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol { offset: at, .. } => {
                    at
                }
                _ => compact.trim_end_matches('=').len() / 4 * 4,
            };
            Err(format!("illegal base64 data at input byte {offset}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_brought_to_utc() {
        for (text, expected) in [
            ("2024-02-29T23:59:59Z", "2024-02-29T23:59:59Z"),
            ("2024-03-01T01:30:00+02:00", "2024-02-29T23:30:00Z"),
            ("2024-03-01T01:30:00.999Z", "2024-03-01T01:30:00Z"),
            ("1969-12-31T23:59:59Z", "1969-12-31T23:59:59Z"),
        ] {
            assert_eq!(canonical_time(text), Ok(Some(expected.to_owned())), "{text}");
        }
        assert_eq!(canonical_time("0001-01-01T00:00:00Z"), Ok(None));
        assert_eq!(canonical_micro_time("2024-03-01T00:00:00.123456Z"), Ok(Some("2024-03-01T00:00:00.123456Z".into())));
    }

    #[test]
    fn bad_times_have_the_known_texts() {
        let text = |text: &str| canonical_time(text).unwrap_err();
        assert_eq!(
            text("yesterday"),
            "parsing time \"yesterday\" as \"2006-01-02T15:04:05Z07:00\": cannot parse \"yesterday\" as \"2006\"",
        );
        assert_eq!(text("2024-13-01T00:00:00Z"), "parsing time \"2024-13-01T00:00:00Z\": month out of range");
        assert_eq!(text("2023-02-29T00:00:00Z"), "parsing time \"2023-02-29T00:00:00Z\": day out of range");
        assert!(canonical_micro_time("yesterday").unwrap_err().contains("15:04:05.000000Z07:00"));
        assert!(canonical_micro_time("2024-03-01T00:00:00Z").is_err());
    }

    #[test]
    fn base64_is_checked() {
        assert_eq!(canonical_base64("YWJj\nZA=="), Ok("YWJjZA==".to_owned()));
        assert_eq!(canonical_base64("%%%"), Err("illegal base64 data at input byte 0".to_owned()));
        assert_eq!(canonical_base64("!!"), Err("illegal base64 data at input byte 0".to_owned()));
        assert!(canonical_base64("YWJ").is_err());
    }
}
