//! Host names of requests and rules.

/// The host that a request is for, without port and final dot, in lower case; `None` for one that is malformed.
pub fn normalize(authority: &str) -> Option<String> {
    let host = strip_port(authority)?;
    let bracketed = host.starts_with('[');
    let host = if bracketed { host } else { host.strip_suffix('.').unwrap_or(host) };
    if host.is_empty() || host.len() > 255 {
        return None;
    }
    let valid = |b: u8| match b {
        b'[' | b']' | b':' => bracketed,
        // Sub-delimiters are legal in a host (RFC 3986 section 3.2.2) but name nothing that a rule can name.
        b => b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~'),
    };
    host.bytes().all(valid).then(|| host.to_ascii_lowercase())
}

/// A request's authority without its port; `None` when the port is no number.
pub fn strip_port(authority: &str) -> Option<&str> {
    if authority.starts_with('[') {
        let end = authority.find(']')?;
        let (host, rest) = authority.split_at(end + 1);
        return match rest.strip_prefix(':') {
            Some(port) => is_port(port).then_some(host),
            None => rest.is_empty().then_some(host),
        };
    }
    match authority.split_once(':') {
        Some((host, port)) => is_port(port).then_some(host),
        None => Some(authority),
    }
}

fn is_port(text: &str) -> bool {
    text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit())
}

/// Whether a certificate's DNS name covers a host or a rule's host pattern: equality, or a wildcard for exactly one label
/// (RFC 6125 section 6.4.3).
pub fn covers(certificate: &str, host: &str) -> bool {
    if certificate.eq_ignore_ascii_case(host) {
        return true;
    }
    match (certificate.strip_prefix("*."), host.split_once('.')) {
        (Some(parent), Some((label, rest))) => !label.is_empty() && label != "*" && parent.eq_ignore_ascii_case(rest),
        _ => false,
    }
}

/// Whether a label may stand for the wildcard of a rule's host.
pub fn is_wildcard_label(label: &str) -> bool {
    !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_become_hosts() {
        let table = [
            ("Foo.Example.com", Some("foo.example.com")),
            ("foo.com:8080", Some("foo.com")),
            ("foo.com.", Some("foo.com")),
            ("foo.com.:80", Some("foo.com")),
            ("foo.com:", Some("foo.com")),
            ("[::1]:80", Some("[::1]")),
            ("[::1]", Some("[::1]")),
            ("10.0.0.1:80", Some("10.0.0.1")),
            ("", None),
            (":80", None),
            ("foo.com:x", None),
            ("a b", None),
            ("user@foo.com", None),
            ("foo/bar", None),
            ("::1", None),
        ];
        for (authority, expected) in table {
            assert_eq!(normalize(authority).as_deref(), expected, "{authority}");
        }
    }

    #[test]
    fn certificates_cover_hosts() {
        let table = [
            ("foo.com", "foo.com", true),
            ("FOO.com", "foo.com", true),
            ("*.foo.com", "a.foo.com", true),
            ("*.foo.com", "*.foo.com", true),
            ("*.foo.com", "foo.com", false),
            ("*.foo.com", "a.b.foo.com", false),
            ("*.com", "*.foo.com", false),
            ("a.foo.com", "*.foo.com", false),
        ];
        for (certificate, host, expected) in table {
            assert_eq!(covers(certificate, host), expected, "{certificate} {host}");
        }
    }
}
