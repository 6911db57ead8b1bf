//! Request paths: what is matched, and what is sent on after a rewrite.
//!
//! Security depends on the router and the backend agreeing on the path, so normalisation happens once, here.

use std::borrow::Cow;

/// Why a request target is refused with 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It does not begin with a slash.
    #[error("the request target is not an absolute path")]
    NotAbsolute,
    /// A percent sign is not followed by two hexadecimal digits.
    #[error("the path has a broken percent-encoding")]
    BadEncoding,
    /// A decoded byte is NUL.
    #[error("the path contains a NUL byte")]
    Nul,
    /// Dot segments lead above the root.
    #[error("the path leads above the root")]
    AboveRoot,
}

/// Splits a raw request target into path and query (with its question mark), cutting a fragment.
pub fn split_target(target: &str) -> (&str, &str) {
    let target = target.split_once('#').map_or(target, |(before, _)| before);
    match target.find('?') {
        Some(at) => target.split_at(at),
        None => (target, ""),
    }
}

/// The form of a raw path that rules are matched against: percent-decoded, then slashes merged and dot segments removed, as nginx
/// does. Decoded slashes separate segments too.
///
/// # Errors
/// Paths that nginx answers with 400.
pub fn normalize(raw: &str) -> Result<Cow<'_, [u8]>, PathError> {
    let bytes = raw.as_bytes();
    if bytes.first() != Some(&b'/') {
        return Err(PathError::NotAbsolute);
    }
    if is_normal(bytes) {
        return Ok(Cow::Borrowed(bytes));
    }
    Ok(Cow::Owned(remove_segments(&decode(bytes)?)?))
}

/// Whether nothing of [`normalize`] would change a path: the common case, decided without allocating.
fn is_normal(path: &[u8]) -> bool {
    let mut previous = 0u8;
    for &byte in path {
        match byte {
            b'%' | 0 => return false,
            b'/' | b'.' if previous == b'/' => return false,
            _ => {}
        }
        previous = byte;
    }
    true
}

fn decode(path: &[u8]) -> Result<Vec<u8>, PathError> {
    let hex = |b: Option<&u8>| b.and_then(|b| char::from(*b).to_digit(16)).ok_or(PathError::BadEncoding);
    let mut out = Vec::with_capacity(path.len());
    let mut at = 0;
    while let Some(&byte) = path.get(at) {
        let byte = if byte == b'%' {
            let value = hex(path.get(at + 1))? * 16 + hex(path.get(at + 2))?;
            at += 2;
            u8::try_from(value).map_err(|_| PathError::BadEncoding)?
        } else {
            byte
        };
        if byte == 0 {
            return Err(PathError::Nul);
        }
        out.push(byte);
        at += 1;
    }
    Ok(out)
}

fn remove_segments(path: &[u8]) -> Result<Vec<u8>, PathError> {
    let mut out: Vec<u8> = Vec::with_capacity(path.len());
    let mut segments = path[1..].split(|b| *b == b'/').peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            b".." => {
                let parent = out.iter().rposition(|b| *b == b'/').ok_or(PathError::AboveRoot)?;
                out.truncate(parent);
                if last {
                    out.push(b'/');
                }
            }
            b"" | b"." if !last => {}
            b"" | b"." => out.push(b'/'),
            segment => {
                out.push(b'/');
                out.extend_from_slice(segment);
            }
        }
    }
    if out.is_empty() {
        out.push(b'/');
    }
    Ok(out)
}

/// Whether a raw path has parts that a backend may read differently from us: encoded or literal separators and dot segments
/// (ingress.md 1.5, `path-normalization: strict`).
pub fn is_ambiguous(raw: &str) -> bool {
    let bytes = raw.as_bytes();
    bytes.contains(&b'\\')
        || bytes.windows(3).any(|w| {
            w[0] == b'%' && matches!((w[1], w[2].to_ascii_lowercase()), (b'2', b'f') | (b'5', b'c') | (b'2', b'e'))
        })
}

/// Encodes a decoded path for a request line, as nginx does after a rewrite.
pub fn encode(path: &[u8]) -> String {
    let mut out = String::with_capacity(path.len() + 8);
    for &byte in path {
        match byte {
            0..=0x20 | 0x7f.. | b'"' | b'#' | b'%' | b'<' | b'>' | b'?' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' => {
                out.push('%');
                for nibble in [byte >> 4, byte & 15] {
                    out.push(char::from_digit(u32::from(nibble), 16).map_or('0', |c| c.to_ascii_uppercase()));
                }
            }
            _ => out.push(char::from(byte)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_normalised_as_nginx_does() {
        let table: &[(&str, Result<&str, PathError>)] = &[
            ("/", Ok("/")),
            ("/a/b", Ok("/a/b")),
            ("/a//b", Ok("/a/b")),
            ("//", Ok("/")),
            ("/a/./b", Ok("/a/b")),
            ("/a/../b", Ok("/b")),
            ("/a/%2e%2e/b", Ok("/b")),
            ("/a%2Fb", Ok("/a/b")),
            ("/a%20b", Ok("/a b")),
            ("/a/..", Ok("/")),
            ("/a/b/..", Ok("/a/")),
            ("/a/.", Ok("/a/")),
            ("/a/", Ok("/a/")),
            ("/.well-known/x", Ok("/.well-known/x")),
            ("/a/...", Ok("/a/...")),
            ("/a%3Fb", Ok("/a?b")),
            ("/../x", Err(PathError::AboveRoot)),
            ("/a/../../x", Err(PathError::AboveRoot)),
            ("/%00", Err(PathError::Nul)),
            ("/%zz", Err(PathError::BadEncoding)),
            ("/%4", Err(PathError::BadEncoding)),
            ("*", Err(PathError::NotAbsolute)),
        ];
        for (raw, expected) in table {
            let got = normalize(raw);
            assert_eq!(got.as_deref().map_err(|e| *e), expected.map(str::as_bytes), "{raw}");
        }
    }

    #[test]
    fn targets_split_at_the_query_and_lose_the_fragment() {
        assert_eq!(split_target("/a?b=c?d"), ("/a", "?b=c?d"));
        assert_eq!(split_target("/a?"), ("/a", "?"));
        assert_eq!(split_target("/a#x?y"), ("/a", ""));
    }

    #[test]
    fn rewritten_paths_are_encoded_again() {
        assert_eq!(encode("/a b/é?#%".as_bytes()), "/a%20b/%C3%A9%3F%23%25");
        assert_eq!(encode(b"/plain-._~:@!$&'()*+,;=/x"), "/plain-._~:@!$&'()*+,;=/x");
    }

    #[test]
    fn ambiguous_paths_are_recognised() {
        for raw in ["/a%2fb", "/a%2Fb", "/a%5cb", "/%2e%2e/", "/a\\b"] {
            assert!(is_ambiguous(raw), "{raw}");
        }
        assert!(!is_ambiguous("/a%20b/.x"));
    }
}
