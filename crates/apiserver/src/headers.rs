//! Warning headers.

use http::header::{HeaderMap, HeaderValue, WARNING};

/// Most warnings sent with one answer, in bytes of text (the reference implementation cuts there too).
const MAX_WARNING_BYTES: usize = 4096;

/// Adds a `Warning: 299 - "text"` header for each text.
pub fn add_warnings(headers: &mut HeaderMap, warnings: &[String]) {
    let mut seen = std::collections::BTreeSet::new();
    let mut total = 0;
    for warning in warnings {
        if !seen.insert(warning) {
            continue;
        }
        total += warning.len();
        if total > MAX_WARNING_BYTES {
            return;
        }
        append(headers, warning);
    }
}

/// Adds a warning unless the answer has it already.
pub fn add_warning_once(headers: &mut HeaderMap, warning: &str) {
    let value = header_text(warning);
    if !headers.get_all(WARNING).iter().any(|present| present.as_bytes() == value.as_bytes()) {
        append(headers, warning);
    }
}

fn append(headers: &mut HeaderMap, warning: &str) {
    if let Ok(value) = HeaderValue::from_bytes(header_text(warning).as_bytes()) {
        headers.append(WARNING, value);
    }
}

fn header_text(warning: &str) -> String {
    let mut text = String::with_capacity(warning.len() + 10);
    text.push_str("299 - \"");
    for c in warning.chars() {
        match c {
            '"' | '\\' => {
                text.push('\\');
                text.push(c);
            }
            c if c.is_control() => text.push(' '),
            c => text.push(c),
        }
    }
    text.push('"');
    text
}
