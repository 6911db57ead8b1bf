//! Syntax of names, labels and keys (RFC 1123, RFC 1035, RFC 6335 and the API machinery's additions).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const LABEL_MAX: usize = 63;
const SUBDOMAIN_MAX: usize = 253;

const LABEL_REGEX: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
const SUBDOMAIN_REGEX: &str = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*";
const NAME_PART_TEXT: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an \
                              alphanumeric character";
const NAME_PART_EXAMPLES: &str = "(e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
                                  '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";

fn lower_alnum(b: u8) -> bool {
    b.is_ascii_lowercase() || b.is_ascii_digit()
}

/// Whether every byte is inside the set and both ends are inside the edge set.
fn shaped(text: &str, inside: impl Fn(u8) -> bool, edge: impl Fn(u8) -> bool) -> bool {
    let bytes = text.as_bytes();
    match (bytes.first(), bytes.last()) {
        (Some(&first), Some(&last)) => edge(first) && edge(last) && bytes.iter().all(|&b| inside(b)),
        _ => false,
    }
}

fn label_shaped(text: &str) -> bool {
    shaped(text, |b| lower_alnum(b) || b == b'-', lower_alnum)
}

fn subdomain_shaped(text: &str) -> bool {
    text.split('.').all(label_shaped)
}

fn name_part_shaped(text: &str) -> bool {
    shaped(text, |b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'), |b| b.is_ascii_alphanumeric())
}

fn too_long_bytes(max: usize) -> String {
    format!("must be no more than {max} bytes")
}

fn too_long_characters(max: usize) -> String {
    format!("must be no more than {max} characters")
}

/// What is wrong with a DNS-1123 label; empty if nothing.
pub fn dns1123_label(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if text.len() > LABEL_MAX {
        faults.push(too_long_characters(LABEL_MAX));
    }
    if !label_shaped(text) && subdomain_shaped(text) {
        faults.push("must not contain dots".to_owned());
    } else if !label_shaped(text) {
        faults.push(format!(
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and \
             end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
             '{LABEL_REGEX}')"
        ));
    }
    faults
}

/// What is wrong with a DNS-1123 subdomain; empty if nothing.
pub fn dns1123_subdomain(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if text.len() > SUBDOMAIN_MAX {
        faults.push(too_long_characters(SUBDOMAIN_MAX));
    }
    if !subdomain_shaped(text) {
        faults.push(format!(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must \
             start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
             '{SUBDOMAIN_REGEX}')"
        ));
    }
    faults
}

/// What is wrong with a DNS search path: a subdomain whose labels may hold underscores; empty if nothing.
pub fn dns_search_path(text: &str) -> Vec<String> {
    let label = |label: &str| {
        let rest = label.strip_prefix('_').unwrap_or(label);
        shaped(rest, |b| lower_alnum(b) || matches!(b, b'-' | b'_'), lower_alnum)
    };
    let mut faults = Vec::new();
    if text.len() > SUBDOMAIN_MAX {
        faults.push(too_long_characters(SUBDOMAIN_MAX));
    }
    if !text.split('.').all(label) {
        faults.push(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '_', '-' or '.', and \
             must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
             '_?[a-z0-9]([-_a-z0-9]*[a-z0-9])?(\\._?[a-z0-9]([-_a-z0-9]*[a-z0-9])?)*')"
                .to_owned(),
        );
    }
    faults
}

/// What is wrong with a wildcard name such as `*.example.com`; empty if nothing.
pub fn wildcard_dns1123_subdomain(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if text.len() > SUBDOMAIN_MAX {
        faults.push(too_long_characters(SUBDOMAIN_MAX));
    }
    if !text.strip_prefix("*.").is_some_and(subdomain_shaped) {
        faults.push(format!(
            "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain, which must consist \
             of lower case alphanumeric characters, '-' or '.' and end with an alphanumeric character (e.g. \
             '*.example.com', regex used for validation is '\\*\\.{SUBDOMAIN_REGEX}')"
        ));
    }
    faults
}

/// What is wrong with a DNS-1035 label; empty if nothing.
pub fn dns1035_label(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if text.len() > LABEL_MAX {
        faults.push(too_long_characters(LABEL_MAX));
    }
    if !label_shaped(text) || !text.as_bytes()[0].is_ascii_lowercase() {
        faults.push(
            "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic \
             character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for \
             validation is '[a-z]([-a-z0-9]*[a-z0-9])?')"
                .to_owned(),
        );
    }
    faults
}

/// What is wrong with a qualified name (`example.com/name` or `name`), as label keys are; empty if nothing.
pub fn qualified_name(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let name = match text.split('/').collect::<Vec<_>>().as_slice() {
        [name] => *name,
        [prefix, name] => {
            if prefix.is_empty() {
                faults.push("prefix part must be non-empty".to_owned());
            } else {
                faults.extend(dns1123_subdomain(prefix).into_iter().map(|fault| format!("prefix part {fault}")));
            }
            *name
        }
        _ => {
            faults.push(format!(
                "a valid label key {NAME_PART_TEXT} {NAME_PART_EXAMPLES} with an optional DNS subdomain prefix and '/' \
                 (e.g. 'example.com/MyName')"
            ));
            return faults;
        }
    };
    if name.is_empty() {
        faults.push("name part must be non-empty".to_owned());
    } else if name.len() > LABEL_MAX {
        faults.push(format!("name part {}", too_long_bytes(LABEL_MAX)));
    }
    if !name_part_shaped(name) {
        faults.push(format!("name part {NAME_PART_TEXT} {NAME_PART_EXAMPLES}"));
    }
    faults
}

/// What is wrong with a label value; empty if nothing.
pub fn label_value(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if text.len() > LABEL_MAX {
        faults.push(too_long_bytes(LABEL_MAX));
    }
    if !text.is_empty() && !name_part_shaped(text) {
        faults.push(
            "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must \
             start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for \
             validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
                .to_owned(),
        );
    }
    faults
}

/// What is wrong with a name that only has to be one URL path segment; empty if nothing.
pub fn path_segment(text: &str) -> Vec<String> {
    if text == "." || text == ".." {
        return vec![format!("may not be '{text}'")];
    }
    ["/", "%"].iter().filter(|part| text.contains(**part)).map(|part| format!("may not contain '{part}'")).collect()
}

/// What is wrong with a port name (IANA service name, RFC 6335 section 5.1); empty if nothing.
pub fn port_name(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if text.len() > 15 {
        faults.push(too_long_characters(15));
    }
    if !text.bytes().all(|b| lower_alnum(b) || b == b'-') || text.is_empty() {
        faults.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned());
    }
    if !text.bytes().any(|b| b.is_ascii_lowercase()) {
        faults.push("must contain at least one letter (a-z)".to_owned());
    }
    if text.contains("--") {
        faults.push("must not contain consecutive hyphens".to_owned());
    }
    if text.starts_with('-') || text.ends_with('-') {
        faults.push("must not begin or end with a hyphen".to_owned());
    }
    faults
}

/// What is wrong with a port number; empty if nothing.
pub fn port_number(number: i64) -> Vec<String> {
    if (1..=65535).contains(&number) { Vec::new() } else { vec!["must be between 1 and 65535, inclusive".to_owned()] }
}

/// What is wrong with a key of a ConfigMap or Secret; empty if nothing.
pub fn config_map_key(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if text.len() > SUBDOMAIN_MAX {
        faults.push(too_long_characters(SUBDOMAIN_MAX));
    }
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.')) {
        faults.push(
            "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or \
             'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')"
                .to_owned(),
        );
    }
    if text == "." {
        faults.push("must not be '.'".to_owned());
    } else if text == ".." {
        faults.push("must not be '..'".to_owned());
    } else if text.starts_with("..") {
        faults.push("must not start with '..'".to_owned());
    }
    faults
}

/// What is wrong with the name of an environment variable; empty if nothing (printable ASCII except `=`).
pub fn env_var_name(text: &str) -> Vec<String> {
    if text.is_empty() || !text.bytes().all(|b| (0x20..=0x7e).contains(&b) && b != b'=') {
        return vec![
            "a valid environment variable name must consist only of printable ASCII characters other than '='"
                .to_owned(),
        ];
    }
    Vec::new()
}

/// What is wrong with the name of an HTTP header; empty if nothing.
pub fn http_header_name(text: &str) -> Vec<String> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        return vec![
            "a valid HTTP header must consist of alphanumeric characters or '-' (e.g. 'X-Header-Name', regex used for \
             validation is '[-A-Za-z0-9]+')"
                .to_owned(),
        ];
    }
    Vec::new()
}

/// What is wrong with a percentage such as `25%`; empty if nothing.
pub fn percent(text: &str) -> Vec<String> {
    let digits = text.strip_suffix('%').unwrap_or_default();
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return vec![
            "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex \
             used for validation is '[0-9]+%')"
                .to_owned(),
        ];
    }
    Vec::new()
}

/// What is wrong with `domain.com/path`, as finalizers and IngressClass controllers are; empty if nothing.
pub fn domain_prefixed_path(text: &str) -> Vec<String> {
    if text.is_empty() {
        return vec!["must not be empty".to_owned()];
    }
    let Some((host, path)) = text.split_once('/').filter(|(host, path)| !host.is_empty() && !path.is_empty()) else {
        return vec!["must be a domain-prefixed path (such as \"acme.io/foo\")".to_owned()];
    };
    let mut faults = dns1123_subdomain(host);
    if !path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/-._~%!$&'()*+,;=:".contains(&b)) {
        faults.push("Invalid path (regex used for validation is '[A-Za-z0-9/\\-._~%!$&'()*+,;=:]+')".to_owned());
    }
    faults
}

/// Parses an address as lenient clients of old wrote it: leading zeros in IPv4 octets count as decimal digits.
///
/// Stored objects may hold such values for ever, so everything that reads addresses of API objects uses this.
pub fn parse_ip_sloppy(text: &str) -> Option<IpAddr> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(match ip {
            IpAddr::V6(v6) => unmapped(v6),
            v4 => v4,
        });
    }
    if let Some((head, tail)) = text.rsplit_once(':') {
        let v4 = sloppy_v4(tail)?;
        let joined = format!("{head}:{v4}");
        return joined.parse::<Ipv6Addr>().ok().map(unmapped);
    }
    sloppy_v4(text).map(IpAddr::V4)
}

fn sloppy_v4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0u8; 4];
    let mut count = 0;
    for part in text.split('.') {
        if count == 4 || part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let trimmed = part.trim_start_matches('0');
        octets[count] = if trimmed.is_empty() { 0 } else { trimmed.parse().ok()? };
        count += 1;
    }
    (count == 4).then(|| Ipv4Addr::from(octets))
}

/// An IPv4-mapped IPv6 address is the IPv4 address.
fn unmapped(v6: Ipv6Addr) -> IpAddr {
    v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
}

/// Whether an address text has an IPv4 octet with a leading zero.
pub fn has_leading_zeros(text: &str) -> bool {
    let tail = text.rsplit(':').next().unwrap_or(text);
    tail.contains('.') && tail.split('.').any(|part| part.len() > 1 && part.starts_with('0'))
}

/// What is wrong with an address that must be written strictly; empty if nothing.
pub fn ip(text: &str) -> Vec<String> {
    let Some(parsed) = parse_ip_sloppy(text) else {
        return vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".to_owned()];
    };
    let mut faults = Vec::new();
    if has_leading_zeros(text) {
        faults.push("must not have leading 0s".to_owned());
    }
    if parsed.is_ipv4() && text.contains(':') {
        faults.push("must not be an IPv4-mapped IPv6 address".to_owned());
    }
    faults
}

/// What is wrong with an address that was not written strictly but may have been stored long ago; empty if nothing.
pub fn ip_sloppy(text: &str) -> Vec<String> {
    if parse_ip_sloppy(text).is_some() {
        Vec::new()
    } else {
        vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".to_owned()]
    }
}

/// Parses a network leniently: address and prefix length, host bits allowed.
pub fn parse_cidr_sloppy(text: &str) -> Option<(IpAddr, u8)> {
    let (address, length) = text.split_once('/')?;
    if length.is_empty() || !length.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let bits: u8 = length.parse().ok()?;
    let ip = parse_ip_sloppy(address)?;
    // A mapped address keeps the 128-bit prefix length of its text.
    let (ip, bits) = if ip.is_ipv4() && address.contains(':') { (ip, bits.checked_sub(96)?) } else { (ip, bits) };
    (bits <= if ip.is_ipv4() { 32 } else { 128 }).then_some((ip, bits))
}

/// What is wrong with a network that must be written strictly; empty if nothing.
pub fn cidr(text: &str) -> Vec<String> {
    let Some((ip, bits)) = parse_cidr_sloppy(text) else {
        return cidr_sloppy(text);
    };
    let mut faults = Vec::new();
    let (address, length) = text.split_once('/').unwrap_or((text, ""));
    if has_leading_zeros(address) || (length.len() > 1 && length.starts_with('0')) {
        faults.push("must not have leading 0s in IP or prefix length".to_owned());
    }
    if ip.is_ipv4() && address.contains(':') {
        faults.push("must not have an IPv4-mapped IPv6 address".to_owned());
    }
    if let Ok(net) = ipnet::IpNet::new(ip, bits)
        && net.network() != ip
    {
        faults.push("must not have bits set beyond the prefix length".to_owned());
    }
    faults
}

/// What is wrong with a network that may have been stored long ago; empty if nothing.
pub fn cidr_sloppy(text: &str) -> Vec<String> {
    if parse_cidr_sloppy(text).is_some() {
        Vec::new()
    } else {
        vec!["must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)".to_owned()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_judged_by_their_rule() {
        type Rule = fn(&str) -> Vec<String>;
        let rows: &[(&str, Rule, &str, bool)] = &[
            ("a_label_may_start_with_a_digit", dns1123_label, "9a", true),
            ("a_1035_label_may_not", dns1035_label, "9a", false),
            ("a_1035_label_may_not_be_empty", dns1035_label, "", false),
            ("a_label_has_no_dot", dns1123_label, "a.b", false),
            ("a_label_has_no_upper_case", dns1123_label, "A", false),
            ("a_label_has_no_edge_hyphen", dns1123_label, "a-", false),
            ("a_label_has_63_characters_at_most", dns1123_label, &"a".repeat(64), false),
            ("a_subdomain_has_dots", dns1123_subdomain, "a.b-c.9", true),
            ("a_subdomain_has_no_empty_label", dns1123_subdomain, "a..b", false),
            ("a_subdomain_has_no_leading_dot", dns1123_subdomain, ".a", false),
            ("a_search_path_with_underscores", dns_search_path, "_tcp.a_b.local", true),
            ("a_search_path_has_no_upper_case", dns_search_path, "A.local", false),
            ("a_wildcard_needs_its_star", wildcard_dns1123_subdomain, "example.com", false),
            ("a_wildcard_has_one_star", wildcard_dns1123_subdomain, "*.*.com", false),
            ("a_wildcard_name", wildcard_dns1123_subdomain, "*.example.com", true),
            ("a_key_with_prefix", qualified_name, "example.com/My_Name.1", true),
            ("a_key_with_two_slashes", qualified_name, "a/b/c", false),
            ("a_key_with_an_empty_prefix", qualified_name, "/a", false),
            ("a_label_value_may_be_empty", label_value, "", true),
            ("a_label_value_has_no_blank", label_value, "a b", false),
            ("a_path_segment_may_hold_colons", path_segment, "system:admin", true),
            ("a_path_segment_has_no_slash", path_segment, "a/b", false),
            ("a_port_name_needs_a_letter", port_name, "80", false),
            ("a_port_name_has_single_hyphens", port_name, "a--b", false),
            ("a_port_name_is_short", port_name, "a234567890123456", false),
            ("a_port_name", port_name, "http-1", true),
            ("a_config_key_with_dots", config_map_key, ".a..b", true),
            ("a_config_key_does_not_climb", config_map_key, "..a", false),
            ("a_percentage", percent, "25%", true),
            ("a_bare_percent_sign", percent, "%", false),
            ("a_controller_path", domain_prefixed_path, "k8s.io/ingress-nginx", true),
            ("a_controller_without_a_path", domain_prefixed_path, "k8s.io", false),
            ("an_address", ip, "10.0.0.1", true),
            ("an_address_with_leading_zeros", ip, "10.00.0.1", false),
            ("a_mapped_address", ip, "::ffff:10.0.0.1", false),
            ("a_network", cidr, "10.0.0.0/8", true),
            ("a_network_with_host_bits", cidr, "10.0.0.1/8", false),
            ("a_network_with_a_zero_in_front", cidr, "10.0.0.0/08", false),
            ("a_network_that_is_too_long", cidr, "10.0.0.0/33", false),
            ("a_mapped_network", cidr, "::ffff:10.0.0.0/104", false),
        ];
        for (name, rule, text, good) in rows {
            assert_eq!(rule(text).is_empty(), *good, "{name}: {:?}", rule(text));
        }
    }

    #[test]
    fn sloppy_addresses_have_one_meaning() {
        let rows = [
            ("010.0.000.001", Some("10.0.0.1")),
            ("::ffff:10.0.0.1", Some("10.0.0.1")),
            ("2001:DB8::1", Some("2001:db8::1")),
            ("10.0.0", None),
            ("10.0.0.256", None),
            ("1.2.3.4.5", None),
            ("", None),
            ("é", None),
        ];
        for (text, want) in rows {
            assert_eq!(parse_ip_sloppy(text).map(|ip| ip.to_string()).as_deref(), want, "{text}");
        }
    }
}
