//! The annotations of `nginx.ingress.kubernetes.io/`, parsed once into typed settings.
//!
//! Three things can be wrong with an annotation. A value that ingress-nginx would ignore is ignored with an event. One that its
//! admission webhook would refuse closes the Ingress: every path answers 503 until it is fixed. One that guards something
//! (authentication, address lists, limits) and that we cannot honour closes it too, because an open route is worse than a closed
//! one.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

/// The prefix of ingress-nginx's annotations.
pub const PREFIX: &str = "nginx.ingress.kubernetes.io/";

/// Longest value that is looked at; snippets are refused anyway.
const MAX_VALUE_BYTES: usize = 4096;

/// Settings of one Ingress that apply to its paths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// `use-regex`: the host's paths are regular expressions.
    pub use_regex: bool,
    /// `rewrite-target`: replaces the whole path; `$1` to `$9` are groups of the rule's path.
    pub rewrite_target: Option<String>,
    /// `app-root`: where a request for `/` of the host is redirected.
    pub app_root: Option<String>,
    /// `temporal-redirect` or `permanent-redirect`: code and target for every path.
    pub redirect: Option<(u16, String)>,
    /// `ssl-redirect`: plain requests go to HTTPS when the host has TLS.
    pub ssl_redirect: bool,
    /// `force-ssl-redirect`: also when it has none.
    pub force_ssl_redirect: bool,
    /// `preserve-trailing-slash` in redirects to HTTPS.
    pub preserve_trailing_slash: bool,
    /// `from-to-www-redirect`: the host with or without `www.` redirects to this one.
    pub from_to_www: bool,
    /// `relative-redirects`: locations have no scheme and host.
    pub relative_redirects: bool,
    /// `use-port-in-redirects`: locations carry the listener's port.
    pub use_port_in_redirects: bool,
    /// `server-alias`: further names of the host.
    pub aliases: Vec<String>,
    /// `default-backend`: Service for requests whose own has no endpoint.
    pub default_backend: Option<String>,
    /// `x-forwarded-prefix`: value of that header, with groups.
    pub forwarded_prefix: Option<String>,
    /// `upstream-vhost`: value of `Host` sent upstream.
    pub upstream_vhost: Option<String>,
    /// `allowlist-source-range`: only these clients; `None` means all.
    pub allow: Option<Vec<IpNet>>,
    /// `denylist-source-range`: not these clients, whatever else allows them.
    pub deny: Vec<IpNet>,
    /// `proxy-connect-timeout`.
    pub connect_timeout: Duration,
    /// `proxy-read-timeout`: between two reads from upstream.
    pub read_timeout: Duration,
    /// `proxy-send-timeout`: between two writes to upstream.
    pub send_timeout: Duration,
    /// `proxy-body-size`: largest request body in bytes; `None` means any.
    pub body_limit_bytes: Option<u64>,
    /// `enable-access-log`.
    pub access_log: bool,
    /// Why every path answers 503.
    pub closed: Option<String>,
    /// Client certificates are demanded (`auth-tls-*`), which closes the whole host.
    pub closes_host: bool,
    /// `canary`: not a route of its own.
    pub canary: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            use_regex: false,
            rewrite_target: None,
            app_root: None,
            redirect: None,
            ssl_redirect: true,
            force_ssl_redirect: false,
            preserve_trailing_slash: false,
            from_to_www: false,
            relative_redirects: false,
            use_port_in_redirects: false,
            aliases: Vec::new(),
            default_backend: None,
            forwarded_prefix: None,
            upstream_vhost: None,
            allow: None,
            deny: Vec::new(),
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(60),
            send_timeout: Duration::from_secs(60),
            // 1 MiB: nginx's client_max_body_size.
            body_limit_bytes: Some(1 << 20),
            access_log: true,
            closed: None,
            closes_host: false,
            canary: false,
        }
    }
}

impl Policy {
    /// Whether a client's address may use the paths: the deny list wins.
    pub fn admits(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        !self.deny.iter().any(|net| net.contains(&client))
            && self.allow.as_ref().is_none_or(|nets| nets.iter().any(|net| net.contains(&client)))
    }
}

/// What is wrong with one annotation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issue {
    /// The whole key; empty when the issue concerns several.
    pub key: String,
    /// Event reason (ingress.md 1.11).
    pub reason: &'static str,
    /// What is wrong and what to do.
    pub message: String,
}

/// How an annotation's value may be wrong.
enum Fault {
    /// The default is used instead.
    Ignore(String),
    /// ingress-nginx's webhook would refuse the object.
    Reject(String),
}

/// Parses the annotations of one Ingress.
pub fn parse(annotations: &BTreeMap<String, String>) -> (Policy, Vec<Issue>) {
    let mut parser =
        Parser { policy: Policy::default(), issues: Vec::new(), temporal: None, permanent: None, codes: (302, 301) };
    let mut foreign: Vec<&str> = Vec::new();
    for (key, value) in annotations {
        if let Some(name) = key.strip_prefix(PREFIX) {
            parser.annotation(key, name, value, annotations);
        } else if ["ingress.kubernetes.io/", "nginx.org/", "nginx.com/"].iter().any(|p| key.starts_with(p)) {
            foreign.push(key);
        }
    }
    if !foreign.is_empty() {
        let message = format!("annotations of another product are not read by this controller: {}", foreign.join(", "));
        parser.issues.push(Issue { key: String::new(), reason: "UnsupportedAnnotation", message });
    }
    let (temporal_code, permanent_code) = parser.codes;
    // The temporary redirect wins when both are set.
    parser.policy.redirect = match (parser.temporal.take(), parser.permanent.take()) {
        (Some(target), _) => Some((temporal_code, target)),
        (None, Some(target)) => Some((permanent_code, target)),
        (None, None) => None,
    };
    (parser.policy, parser.issues)
}

struct Parser {
    policy: Policy,
    issues: Vec<Issue>,
    temporal: Option<String>,
    permanent: Option<String>,
    codes: (u16, u16),
}

impl Parser {
    fn annotation(&mut self, key: &str, name: &str, value: &str, all: &BTreeMap<String, String>) {
        let snippet = name.ends_with("-snippet");
        if !snippet && value.trim_end_matches('\n').contains(['\r', '\n']) {
            return self.reject(key, "annotation contains a line break".into());
        }
        if value.len() > MAX_VALUE_BYTES && !snippet {
            return self.reject(key, format!("annotation is longer than {MAX_VALUE_BYTES} bytes"));
        }
        let value = value.trim();
        if let Err(fault) = self.set(key, name, value, all) {
            match fault {
                Fault::Ignore(message) => self.issue(key, "InvalidAnnotation", message),
                Fault::Reject(message) => self.reject(key, message),
            }
        }
    }

    fn issue(&mut self, key: &str, reason: &'static str, message: String) {
        self.issues.push(Issue { key: key.to_string(), reason, message });
    }

    fn reject(&mut self, key: &str, message: String) {
        let message = format!("{key}: {message}; all paths answer 503 until it is fixed");
        self.policy.closed.get_or_insert_with(|| message.clone());
        self.issue(key, "Rejected", message);
    }

    /// Closes the Ingress because of an annotation that guards something.
    fn deny(&mut self, key: &str, message: String) {
        let message = format!("Error parsing annotations: {key}: {message}; all paths answer 503 until it is fixed");
        self.policy.closed.get_or_insert_with(|| message.clone());
        self.issue(key, "AnnotationParsingFailed", message);
    }

    fn set(&mut self, key: &str, name: &str, value: &str, all: &BTreeMap<String, String>) -> Result<(), Fault> {
        let policy = &mut self.policy;
        match name {
            "use-regex" => policy.use_regex = boolean(value)?,
            "rewrite-target" => {
                let valid = |b: u8| b.is_ascii_alphanumeric() || b"-._~/:$".contains(&b);
                policy.rewrite_target = Some(text(value, valid).map_err(Fault::Ignore)?);
            }
            "app-root" => {
                let valid = |b: u8| b.is_ascii_alphanumeric() || b"-._~/:$".contains(&b);
                let root = text(value, valid).map_err(Fault::Ignore)?;
                if !root.starts_with('/') {
                    return Err(Fault::Ignore(format!("{root:?} is not an absolute path; ignored")));
                }
                policy.app_root = Some(root);
            }
            "permanent-redirect" => self.permanent = Some(url(value, false)?),
            "temporal-redirect" => self.temporal = Some(url(value, true)?),
            "permanent-redirect-code" => self.codes.1 = code(value, 300..=308, 301)?,
            "temporal-redirect-code" => self.codes.0 = code(value, 300..=307, 302)?,
            "ssl-redirect" => policy.ssl_redirect = boolean(value)?,
            "force-ssl-redirect" => policy.force_ssl_redirect = boolean(value)?,
            "preserve-trailing-slash" => policy.preserve_trailing_slash = boolean(value)?,
            "use-port-in-redirects" => policy.use_port_in_redirects = boolean(value)?,
            "relative-redirects" => policy.relative_redirects = boolean(value).map_err(strictly)?,
            "from-to-www-redirect" => policy.from_to_www = boolean(value).map_err(strictly)?,
            "enable-access-log" => policy.access_log = boolean(value)?,
            "server-alias" => {
                let mut aliases = Vec::new();
                let mut regexes = Vec::new();
                for alias in value.split(',').map(str::trim).filter(|a| !a.is_empty()) {
                    if alias.starts_with('~') {
                        regexes.push(alias);
                    } else if alias.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._*".contains(&b)) {
                        aliases.push(alias.to_ascii_lowercase());
                    } else {
                        return Err(Fault::Reject(format!("{alias:?} is not a host name")));
                    }
                }
                policy.aliases = aliases;
                if !regexes.is_empty() {
                    let message = format!("regular expressions as aliases are not supported: {}", regexes.join(", "));
                    self.issue(key, "UnsupportedAnnotation", message);
                }
            }
            "default-backend" => {
                let valid = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
                policy.default_backend = Some(text(value, valid).map_err(Fault::Reject)?);
            }
            "x-forwarded-prefix" => {
                let valid = |b: u8| b.is_ascii_alphanumeric() || b"-._~/:$".contains(&b);
                policy.forwarded_prefix = Some(text(value, valid).map_err(Fault::Reject)?);
            }
            "upstream-vhost" => {
                let valid = |b: u8| b.is_ascii_alphanumeric() || b"-._:".contains(&b);
                policy.upstream_vhost = Some(text(value, valid).map_err(Fault::Reject)?);
            }
            // The canonical name wins over its alias.
            "whitelist-source-range" if all.contains_key(&format!("{PREFIX}allowlist-source-range")) => {}
            "allowlist-source-range" | "whitelist-source-range" => match networks(value) {
                Ok(nets) => policy.allow = Some(nets),
                Err(message) => self.deny(key, message),
            },
            "denylist-source-range" => match networks(value) {
                Ok(nets) => policy.deny = nets,
                Err(message) => self.deny(key, message),
            },
            "proxy-connect-timeout" => policy.connect_timeout = seconds(value)?,
            "proxy-read-timeout" => policy.read_timeout = seconds(value)?,
            "proxy-send-timeout" => policy.send_timeout = seconds(value)?,
            "proxy-body-size" => {
                policy.body_limit_bytes = match size(value)? {
                    0 => None,
                    bytes => Some(bytes),
                }
            }
            "backend-protocol" => match value.to_ascii_uppercase().as_str() {
                "HTTP" => {}
                "HTTPS" | "AUTO_HTTP" | "GRPC" | "GRPCS" | "FCGI" | "H2C" | "HTTP2" => {
                    let message = format!("backend protocol {value} is not supported; HTTP is used");
                    self.issue(key, "UnsupportedAnnotation", message);
                }
                _ => return Err(Fault::Ignore(format!("{value:?} is not a backend protocol; HTTP is used"))),
            },
            "canary" => policy.canary = boolean(value)?,
            // These only switch off what is off anyway.
            "enable-global-auth" => {
                boolean(value)?;
            }
            "ssl-passthrough"
            | "enable-cors"
            | "service-upstream"
            | "http2-push-preload"
            | "enable-rewrite-log"
            | "enable-opentelemetry"
                if value.parse::<bool>() == Ok(false) => {}
            "auth-tls-verify-client" if value == "off" => {}
            "auth-tls-secret" => {
                policy.closes_host = true;
                self.deny(key, "client certificates are not supported; the whole host answers 403".into());
            }
            "secure-backends" | "grpc-backend" => self.replaced(key, "use backend-protocol instead"),
            "add-base-url" | "base-url-scheme" | "session-cookie-hash" => self.replaced(key, "it has no replacement"),
            "hsts" | "hsts-max-age" | "hsts-include-subdomains" | "hsts-preload" => {
                self.replaced(key, "use the key of the controller's ConfigMap instead");
            }
            "secure-verify-ca-secret" | "enable-influxdb" => self.deprecated(key),
            _ if name.starts_with("influxdb-") => self.deprecated(key),
            _ if name.starts_with("enable-opentracing") || name.starts_with("opentracing-") => {
                self.replaced(key, "use enable-opentelemetry instead");
            }
            _ if name.starts_with("global-rate-limit") => self.replaced(key, "use limit-rps or limit-rpm instead"),
            _ if name.ends_with("-snippet") => {
                let message = "annotation cannot be used. Snippet directives are disabled by the Ingress administrator";
                self.reject(key, message.into());
            }
            _ if guards(name) => self.deny(key, "not supported by this controller, and not safe to ignore".into()),
            _ if KNOWN.contains(&name) || name.starts_with("canary-") || name.starts_with("session-cookie-") => {
                self.issue(key, "UnsupportedAnnotation", format!("{key} is not supported and has no effect"));
            }
            _ => self.issue(
                key,
                "UnsupportedAnnotation",
                format!("{key} is not an annotation that this controller knows"),
            ),
        }
        Ok(())
    }

    fn replaced(&mut self, key: &str, advice: &str) {
        self.issue(key, "UnsupportedAnnotation", format!("annotation {key} was removed; {advice}"));
    }

    fn deprecated(&mut self, key: &str) {
        self.issue(key, "UnsupportedAnnotation", format!("annotation {key} is deprecated"));
    }
}

/// Annotations that restrict access: never ignored.
fn guards(name: &str) -> bool {
    name.starts_with("auth-")
        || name.starts_with("limit-")
        || name.ends_with("-source-range")
        || name.starts_with("denylist")
        || name == "satisfy"
        || name.starts_with("modsecurity")
        || matches!(name, "enable-modsecurity" | "enable-owasp-core-rules")
}

/// ingress-nginx's annotations that are neither read nor guarding.
const KNOWN: &[&str] = &[
    "affinity",
    "affinity-canary-behavior",
    "affinity-mode",
    "client-body-buffer-size",
    "connection-proxy-header",
    "cors-allow-credentials",
    "cors-allow-headers",
    "cors-allow-methods",
    "cors-allow-origin",
    "cors-expose-headers",
    "cors-max-age",
    "custom-headers",
    "custom-http-errors",
    "disable-proxy-intercept-errors",
    "enable-cors",
    "enable-opentelemetry",
    "enable-rewrite-log",
    "fastcgi-index",
    "fastcgi-params-configmap",
    "http2-push-preload",
    "load-balance",
    "mirror-host",
    "mirror-request-body",
    "mirror-target",
    "opentelemetry-operation-name",
    "opentelemetry-trust-incoming-span",
    "proxy-buffer-size",
    "proxy-buffering",
    "proxy-buffers-number",
    "proxy-busy-buffers-size",
    "proxy-cookie-domain",
    "proxy-cookie-path",
    "proxy-http-version",
    "proxy-max-temp-file-size",
    "proxy-next-upstream",
    "proxy-next-upstream-timeout",
    "proxy-next-upstream-tries",
    "proxy-redirect-from",
    "proxy-redirect-to",
    "proxy-request-buffering",
    "proxy-ssl-ciphers",
    "proxy-ssl-name",
    "proxy-ssl-protocols",
    "proxy-ssl-secret",
    "proxy-ssl-server-name",
    "proxy-ssl-verify",
    "proxy-ssl-verify-depth",
    "service-upstream",
    "ssl-ciphers",
    "ssl-passthrough",
    "ssl-prefer-server-ciphers",
    "upstream-hash-by",
    "upstream-hash-by-subset",
    "upstream-hash-by-subset-size",
];

fn strictly(fault: Fault) -> Fault {
    match fault {
        Fault::Ignore(message) | Fault::Reject(message) => Fault::Reject(message),
    }
}

/// Go's `strconv.ParseBool`.
fn boolean(value: &str) -> Result<bool, Fault> {
    match value {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
        _ => Err(Fault::Ignore(format!("{} is not true or false; ignored", shown(value)))),
    }
}

fn text(value: &str, valid: impl Fn(u8) -> bool) -> Result<String, String> {
    if value.is_empty() || !value.bytes().all(valid) {
        return Err(format!("{} is empty or has a character that is not allowed", shown(value)));
    }
    Ok(value.to_string())
}

fn url(value: &str, absolute: bool) -> Result<String, Fault> {
    let valid = |b: u8| b.is_ascii_alphanumeric() || b"-._~/:,?&=".contains(&b);
    let url = text(value, valid).map_err(Fault::Reject)?;
    if absolute && !url.starts_with("http") {
        return Err(Fault::Reject(format!("{} does not begin with http", shown(value))));
    }
    Ok(url)
}

fn code(value: &str, range: std::ops::RangeInclusive<u16>, default: u16) -> Result<u16, Fault> {
    let number: i64 = value.parse().map_err(|_| Fault::Reject(format!("{} is not a number", shown(value))))?;
    Ok(u16::try_from(number).ok().filter(|n| range.contains(n)).unwrap_or(default))
}

fn seconds(value: &str) -> Result<Duration, Fault> {
    match value.parse::<u32>() {
        Ok(seconds) if seconds > 0 => Ok(Duration::from_secs(u64::from(seconds))),
        _ => Err(Fault::Ignore(format!("{} is not a number of seconds; the default is used", shown(value)))),
    }
}

/// A size in bytes with an optional `k`, `m` or `g`.
fn size(value: &str) -> Result<u64, Fault> {
    let invalid = || Fault::Ignore(format!("{} is not a size; the default is used", shown(value)));
    let (digits, shift) = match value.as_bytes().last().map(u8::to_ascii_lowercase) {
        Some(b'k') => (&value[..value.len() - 1], 10),
        Some(b'm') => (&value[..value.len() - 1], 20),
        Some(b'g') => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    let number: u64 = digits.parse().map_err(|_| invalid())?;
    number.checked_mul(1 << shift).ok_or_else(invalid)
}

fn networks(value: &str) -> Result<Vec<IpNet>, String> {
    let parse = |item: &str| {
        let item = item.trim();
        item.parse::<IpNet>()
            .map(|net| net.trunc())
            .or_else(|_| item.parse::<IpAddr>().map(IpNet::from))
            .map_err(|_| format!("{} is not an address or network", shown(item)))
    };
    value.split(',').map(parse).collect()
}

/// A value for a message: quoted, and cut because events are no place for long values.
fn shown(value: &str) -> String {
    if value.chars().count() > 64 {
        format!("{:?}…", value.chars().take(64).collect::<String>())
    } else {
        format!("{value:?}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(pairs: &[(&str, &str)]) -> (Policy, Vec<Issue>) {
        parse(&pairs.iter().map(|(k, v)| (format!("{PREFIX}{k}"), v.to_string())).collect())
    }

    #[test]
    fn values_that_ingress_nginx_ignores_are_ignored_with_an_event() {
        for (name, value) in [
            ("ssl-redirect", "yes"),
            ("use-regex", ""),
            ("rewrite-target", "/a b"),
            ("app-root", "relative"),
            ("proxy-read-timeout", "60s"),
            ("proxy-body-size", "8q"),
            ("backend-protocol", "SPDY"),
        ] {
            let (parsed, issues) = policy(&[(name, value)]);
            assert_eq!(parsed, Policy::default(), "{name}");
            assert_eq!(issues.len(), 1, "{name}");
            assert_eq!(issues[0].reason, "InvalidAnnotation", "{name}");
        }
    }

    #[test]
    fn values_that_the_webhook_refuses_close_the_ingress() {
        for (name, value) in [
            ("permanent-redirect", "https://x/$host"),
            ("temporal-redirect", "/relative"),
            ("permanent-redirect-code", "x"),
            ("upstream-vhost", "a b"),
            ("server-alias", "a;b"),
            ("from-to-www-redirect", "maybe"),
            ("configuration-snippet", "more_set_headers \"a: b\";"),
            ("app-root", "/a\nb"),
        ] {
            let (parsed, issues) = policy(&[(name, value)]);
            assert!(parsed.closed.is_some(), "{name}");
            assert_eq!(issues.last().map(|i| i.reason), Some("Rejected"), "{name}");
        }
    }

    #[test]
    fn guarding_annotations_fail_closed() {
        for (name, value) in [
            ("auth-type", "basic"),
            ("auth-url", "http://auth/"),
            ("auth-tls-secret", "ns/ca"),
            ("limit-rps", "5"),
            ("satisfy", "any"),
            ("enable-modsecurity", "true"),
            ("allowlist-source-range", "10.0.0.0/33"),
            ("whitelist-source-range", ""),
            ("denylist-source-range", "nobody"),
        ] {
            let (parsed, issues) = policy(&[(name, value)]);
            assert!(parsed.closed.is_some(), "{name}");
            assert_eq!(issues[0].reason, "AnnotationParsingFailed", "{name}");
            assert!(issues[0].message.starts_with("Error parsing annotations: "), "{name}");
        }
    }

    #[test]
    fn unknown_removed_and_foreign_annotations_are_named() {
        for (key, expected) in [
            ("nginx.ingress.kubernetes.io/rewrite-taget", "is not an annotation that this controller knows"),
            ("nginx.ingress.kubernetes.io/secure-backends", "use backend-protocol instead"),
            ("nginx.ingress.kubernetes.io/influxdb-host", "is deprecated"),
            ("nginx.ingress.kubernetes.io/global-rate-limit", "use limit-rps"),
            ("nginx.ingress.kubernetes.io/enable-cors", "has no effect"),
            ("nginx.org/rewrites", "another product"),
        ] {
            let (parsed, issues) = parse(&BTreeMap::from([(key.to_string(), "true".to_string())]));
            assert_eq!(parsed, Policy::default(), "{key}");
            assert_eq!(issues.len(), 1, "{key}");
            assert!(issues[0].message.contains(expected), "{key}: {}", issues[0].message);
        }
        assert_eq!(parse(&BTreeMap::from([("example.com/mine".into(), "x".into())])).1, vec![]);
    }

    #[test]
    fn values_are_typed() {
        let (parsed, issues) = policy(&[
            ("permanent-redirect", "https://example.com/a"),
            ("temporal-redirect", "https://example.com/b"),
            ("temporal-redirect-code", "307"),
            ("proxy-body-size", "8m"),
            ("proxy-read-timeout", "3600"),
            ("allowlist-source-range", "10.0.0.0/8, 2001:db8::1"),
            ("whitelist-source-range", "0.0.0.0/0"),
            ("denylist-source-range", "10.9.9.9"),
        ]);
        assert_eq!(issues, vec![]);
        assert_eq!(parsed.redirect, Some((307, "https://example.com/b".into())), "the temporary one wins");
        assert_eq!(parsed.body_limit_bytes, Some(8 << 20));
        assert_eq!(parsed.read_timeout, Duration::from_secs(3600));
        let admits = |address: &str| parsed.admits(address.parse().expect("address"));
        assert!(admits("10.1.2.3") && admits("2001:db8::1") && admits("::ffff:10.1.2.3"));
        assert!(!admits("192.0.2.1") && !admits("10.9.9.9"));
        assert_eq!(policy(&[("proxy-body-size", "0")]).0.body_limit_bytes, None);
        assert_eq!(
            policy(&[("permanent-redirect", "https://x/"), ("permanent-redirect-code", "400")]).0.redirect,
            Some((301, "https://x/".into()))
        );
    }
}
