//! Resource quantities (`500m`, `1Gi`) and their canonical form.
//!
//! Source: the Quantity type of the Kubernetes API (`resource.Quantity`): the suffix family is kept, there are no
//! fractional digits, the exponent is as large as possible, and what is finer than nano is rounded up.

/// Error of the API for a text that is no quantity.
pub const FORMAT_ERROR: &str =
    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Decimal,
    Binary,
    Exponent,
}

/// A quantity as an exact number of nanos.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Quantity {
    nanos: i128,
    family: Family,
}

const NANO: i128 = 1_000_000_000;
const DECIMAL: [(&str, u32); 10] =
    [("n", 0), ("u", 3), ("m", 6), ("", 9), ("k", 12), ("M", 15), ("G", 18), ("T", 21), ("P", 24), ("E", 27)];
const BINARY: [&str; 6] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// The canonical text of a quantity, `None` if the text is not a quantity.
pub fn canonical(text: &str) -> Option<String> {
    parse(text).map(format)
}

/// A quantity rounded up to milli units, `None` if the text is not a quantity.
pub fn millis(text: &str) -> Option<i128> {
    parse(text).map(|quantity| ceil_div(quantity.nanos, 1_000_000))
}

/// Compares two quantities by value, `None` if one of them is not a quantity.
pub fn compare(a: &str, b: &str) -> Option<std::cmp::Ordering> {
    Some(parse(a)?.nanos.cmp(&parse(b)?.nanos))
}

/// Whether the quantity is zero, `None` if the text is not a quantity.
pub fn is_zero(text: &str) -> Option<bool> {
    parse(text).map(|quantity| quantity.nanos == 0)
}

/// Division that rounds away from zero.
fn ceil_div(value: i128, by: i128) -> i128 {
    let quotient = value / by;
    if value % by == 0 { quotient } else { quotient + value.signum() }
}

fn parse(text: &str) -> Option<Quantity> {
    let (negative, rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let end = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
    let (number, suffix) = rest.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let (family, power, multiplier) = parse_suffix(suffix)?;
    // Digits beyond what the largest quantity can have do not count; the value is capped below.
    let fraction = fraction.trim_end_matches('0');
    let digits: String = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    let scale = i64::from(power) - i64::try_from(fraction.len()).ok()?;
    let magnitude = if digits.is_empty() {
        0
    } else if digits.len() > 36 || i64::try_from(digits.len()).ok()? + scale > 36 {
        i128::MAX
    } else {
        let mantissa: i128 = digits.parse().ok()?;
        let mantissa = mantissa.checked_mul(multiplier).unwrap_or(i128::MAX);
        if scale >= 0 {
            mantissa.checked_mul(10i128.pow(u32::try_from(scale).ok()?)).unwrap_or(i128::MAX)
        } else if scale < -38 {
            1
        } else {
            ceil_div(mantissa, 10i128.pow(u32::try_from(-scale).ok()?))
        }
    };
    let magnitude = magnitude.min(i128::from(i64::MAX) * NANO);
    Some(Quantity { nanos: if negative { -magnitude } else { magnitude }, family })
}

/// Family, power of ten in nanos, and the binary multiplier.
fn parse_suffix(suffix: &str) -> Option<(Family, i32, i128)> {
    if let Some(at) = BINARY.iter().position(|name| *name == suffix) {
        return Some((Family::Binary, 9, 1i128 << (10 * (at + 1))));
    }
    if let Some((_, power)) = DECIMAL.iter().find(|(name, _)| *name == suffix) {
        return Some((Family::Decimal, i32::try_from(*power).ok()?, 1));
    }
    let exponent = suffix.strip_prefix(['e', 'E'])?;
    let power: i32 = exponent.parse().ok()?;
    (-100..=100).contains(&power).then_some((Family::Exponent, power + 9, 1))
}

fn format(quantity: Quantity) -> String {
    let Quantity { mut nanos, mut family } = quantity;
    if family == Family::Binary {
        if nanos.abs() < 1024 * NANO {
            family = Family::Decimal;
        } else {
            nanos = ceil_div(nanos, NANO);
            let mut at = 0;
            while at < BINARY.len() && nanos % 1024 == 0 {
                nanos /= 1024;
                at += 1;
            }
            let suffix = if at == 0 { "" } else { BINARY[at - 1] };
            return format!("{nanos}{suffix}");
        }
    }
    if nanos == 0 {
        return "0".to_owned();
    }
    let mut power = 0usize;
    while power + 1 < DECIMAL.len() && nanos % 1000 == 0 {
        nanos /= 1000;
        power += 1;
    }
    let (suffix, exponent) = DECIMAL[power];
    match family {
        Family::Exponent if exponent == 9 => nanos.to_string(),
        Family::Exponent => format!("{nanos}e{}", i64::from(exponent) - 9),
        _ => format!("{nanos}{suffix}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_forms() {
        for (text, expected) in [
            ("1", "1"),
            ("1000m", "1"),
            ("1500m", "1500m"),
            ("0.5", "500m"),
            ("1.5", "1500m"),
            ("1000", "1k"),
            ("1500", "1500"),
            ("0", "0"),
            ("0Mi", "0"),
            ("+3", "3"),
            ("-1", "-1"),
            ("1024Ki", "1Mi"),
            ("1.5Gi", "1536Mi"),
            ("100Mi", "100Mi"),
            ("0.5Ki", "512"),
            ("1025", "1025"),
            ("1e3", "1e3"),
            ("1E3", "1e3"),
            ("1500e-3", "1500e-3"),
            ("12e6", "12e6"),
            ("1E", "1E"),
            ("0.0000000001", "1n"),
            (".5", "500m"),
            ("5.", "5"),
            ("1000000", "1M"),
            ("9223372036854775807", "9223372036854775807"),
            ("99999999999999999999", "9223372036854775807"),
        ] {
            assert_eq!(canonical(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "x", "1x", "1 Mi", "1.2.3", "Mi", "--1", "1ee3", "1K", "1mi", "."] {
            assert_eq!(canonical(text), None, "{text}");
        }
    }

    #[test]
    fn canonical_is_idempotent_and_keeps_the_value() {
        for whole in [0u64, 1, 7, 10, 999, 1000, 1024, 1536, 1_048_576, 123_456_789] {
            for suffix in ["", "n", "u", "m", "k", "M", "G", "Ki", "Mi", "Gi", "e3", "e-3"] {
                let text = format!("{whole}{suffix}");
                let once = canonical(&text).unwrap();
                assert_eq!(canonical(&once).as_deref(), Some(once.as_str()), "{text}");
                assert_eq!(compare(&text, &once), Some(std::cmp::Ordering::Equal), "{text}");
            }
        }
    }
}
