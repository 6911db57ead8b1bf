//! Header fields: what a backend gets to see of a request, and a client of a response. Pure functions over header maps.

use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Version, request};

/// What is added to a request.
pub(crate) struct Forwarding {
    pub host: HeaderValue,
    /// The host as the client sent it.
    pub forwarded_host: HeaderValue,
    pub client: HeaderValue,
    pub scheme: HeaderValue,
    pub port: HeaderValue,
    pub id: HeaderValue,
    pub prefix: Option<HeaderValue>,
    /// The protocol to switch to.
    pub upgrade: Option<HeaderValue>,
    /// What a default backend is told about the request that it answers for.
    pub errors: Vec<(HeaderName, HeaderValue)>,
}

/// The host that a request is for: `:authority` or an absolute target before `Host`.
///
/// # Errors
/// More than one, none where one must be, or two that differ.
pub(crate) fn authority(parts: &request::Parts) -> Result<Option<&str>, ()> {
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = match hosts.next() {
        Some(value) => Some(value.to_str().map_err(|_| ())?),
        None => None,
    };
    if hosts.next().is_some() {
        return Err(());
    }
    let target = parts.uri.authority().map(|a| a.as_str());
    match (target, host) {
        // In HTTP/2 both say the same or somebody is lied to.
        (Some(target), Some(host)) if parts.version == Version::HTTP_2 && !target.eq_ignore_ascii_case(host) => Err(()),
        (Some(target), _) => Ok(Some(target)),
        (None, Some(host)) => Ok(Some(host)),
        (None, None) if parts.version <= Version::HTTP_10 => Ok(None),
        (None, None) => Err(()),
    }
}

/// The protocol that a request asks to switch to, if it may.
pub(crate) fn upgrade(parts: &request::Parts) -> Option<HeaderValue> {
    if parts.version != Version::HTTP_11
        || !items(&parts.headers, header::CONNECTION).any(|i| i.eq_ignore_ascii_case("upgrade"))
    {
        return None;
    }
    let wanted = parts.headers.get(header::UPGRADE)?;
    // HTTP/2 is not reached by an upgrade: the backend would speak it past our checks.
    let plain = wanted.to_str().is_ok_and(|v| !v.split(',').any(|i| i.trim().eq_ignore_ascii_case("h2c")));
    plain.then(|| wanted.clone())
}

fn items(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    headers.get_all(name).into_iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')).map(str::trim)
}

/// Whether a request may be sent twice without harm (RFC 9110 section 9.2.2).
pub(crate) fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::PUT | Method::DELETE)
}

/// Fields that only concern one connection (RFC 9110 section 7.6.1).
fn is_hop_by_hop(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "te"
            | "transfer-encoding"
            | "upgrade"
            | "http2-settings"
    )
}

/// Fields of a request that only a proxy may write, and those that we replace.
fn is_assertion(name: &str) -> bool {
    match name.as_bytes().first() {
        Some(b'x') => {
            name.starts_with("x-forwarded-")
                || name.starts_with("x-original-")
                || name.starts_with("x-service-")
                || matches!(
                    name,
                    "x-real-ip"
                        | "x-request-id"
                        | "x-scheme"
                        | "x-sent-from"
                        | "x-code"
                        | "x-format"
                        | "x-namespace"
                        | "x-ingress-name"
                        | "x-auth-request-redirect"
                )
        }
        Some(b's') => name.starts_with("ssl-client-"),
        Some(b'h') => name == "host",
        Some(b'p') => name == "proxy",
        Some(b'f') => name == "forwarded",
        Some(b'e') => matches!(name, "expect" | "early-data"),
        _ => false,
    }
}

/// Fields that `Connection` may not remove: a client must not take away what a proxy adds or what frames a message.
fn is_protected(name: &str) -> bool {
    name == "host"
        || name == "authorization"
        || name == "cookie"
        || name.starts_with("content-")
        || name.starts_with("x-forwarded-")
}

fn named_by_connection(headers: &HeaderMap) -> Vec<String> {
    items(headers, header::CONNECTION)
        .filter(|i| {
            !i.eq_ignore_ascii_case("close")
                && !i.eq_ignore_ascii_case("keep-alive")
                && !i.eq_ignore_ascii_case("upgrade")
        })
        .map(str::to_ascii_lowercase)
        .filter(|i| !is_protected(i))
        .collect()
}

/// The header of the request that is sent upstream.
pub(crate) fn request(original: &HeaderMap, forwarding: &Forwarding) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(original.len() + 12);
    headers.insert(header::HOST, forwarding.host.clone());
    let named = if original.contains_key(header::CONNECTION) { named_by_connection(original) } else { Vec::new() };
    let mut cookies: Vec<&[u8]> = Vec::new();
    for (name, value) in original {
        let text = name.as_str();
        // Names with an underscore look like others to CGI programs; nginx drops them and other odd names.
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if !plain || is_hop_by_hop(text) || is_assertion(text) || named.iter().any(|n| n == text) {
            continue;
        }
        if name == header::COOKIE {
            cookies.push(value.as_bytes());
            continue;
        }
        headers.append(name.clone(), value.clone());
    }
    match cookies.as_slice() {
        [] => {}
        // HTTP/2 may split the field; HTTP/1 knows only one (RFC 9113 section 8.2.3).
        crumbs => {
            if let Ok(value) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
                headers.insert(header::COOKIE, value);
            }
        }
    }
    if items(original, header::TE).any(|i| i.eq_ignore_ascii_case("trailers")) {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = &forwarding.upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol.clone());
    }
    let mut set = |name: &'static str, value: &HeaderValue| {
        headers.insert(HeaderName::from_static(name), value.clone());
    };
    set("x-request-id", &forwarding.id);
    set("x-real-ip", &forwarding.client);
    set("x-forwarded-for", &forwarding.client);
    set("x-forwarded-host", &forwarding.forwarded_host);
    set("x-forwarded-port", &forwarding.port);
    set("x-forwarded-proto", &forwarding.scheme);
    set("x-forwarded-scheme", &forwarding.scheme);
    set("x-scheme", &forwarding.scheme);
    if let Some(prefix) = &forwarding.prefix {
        set("x-forwarded-prefix", prefix);
    }
    for (from, to) in
        [("x-forwarded-for", "x-original-forwarded-for"), ("x-forwarded-host", "x-original-forwarded-host")]
    {
        if let Some(value) = original.get(from) {
            set(to, value);
        }
    }
    for (name, value) in &forwarding.errors {
        headers.insert(name.clone(), value.clone());
    }
    headers
}

/// Makes an upstream's response header fit for the client. `switching` keeps what a change of protocols needs.
pub(crate) fn response(headers: &mut HeaderMap, switching: bool) {
    let protocol = headers.get(header::UPGRADE).filter(|_| switching).cloned();
    for name in named_by_connection(headers) {
        headers.remove(name.as_str());
    }
    for name in [
        header::CONNECTION,
        header::UPGRADE,
        header::TRANSFER_ENCODING,
        header::TE,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
    ] {
        headers.remove(name);
    }
    if let Some(protocol) = protocol {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol);
    }
}

/// A client's request id, if it may be passed on: up to 128 printable characters.
pub(crate) fn request_id(headers: &HeaderMap) -> Option<HeaderValue> {
    let value = headers.get("x-request-id")?;
    let bytes = value.as_bytes();
    (!bytes.is_empty() && bytes.len() <= 128 && bytes.iter().all(|b| (0x21..=0x7e).contains(b))).then(|| value.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(HeaderName::try_from(*name).expect("name"), HeaderValue::try_from(*value).expect("value"));
        }
        headers
    }

    fn forwarding() -> Forwarding {
        let value = HeaderValue::from_static;
        Forwarding {
            host: value("backend"),
            forwarded_host: value("shop.example:8080"),
            client: value("192.0.2.1"),
            scheme: value("http"),
            port: value("80"),
            id: value("id"),
            prefix: None,
            upgrade: None,
            errors: vec![],
        }
    }

    fn get<'a>(headers: &'a HeaderMap, name: &str) -> Vec<&'a str> {
        headers.get_all(name).iter().filter_map(|v| v.to_str().ok()).collect()
    }

    #[test]
    fn assertions_are_replaced_and_hop_by_hop_fields_removed() {
        let sent = request(
            &map(&[
                ("host", "shop.example:8080"),
                ("connection", "close, X-Drop, X-Forwarded-For, Authorization"),
                ("x-drop", "1"),
                ("keep-alive", "timeout=5"),
                ("te", "gzip, trailers"),
                ("transfer-encoding", "chunked"),
                ("upgrade", "h2c"),
                ("http2-settings", "x"),
                ("proxy", "http://evil"),
                ("proxy-authorization", "x"),
                ("authorization", "Bearer t"),
                ("x-forwarded-for", "203.0.113.9"),
                ("x-forwarded-proto", "https"),
                ("x-forwarded-prefix", "/evil"),
                ("x-real-ip", "203.0.113.9"),
                ("x-original-url", "/evil"),
                ("ssl-client-verify", "SUCCESS"),
                ("x-code", "500"),
                ("forwarded", "for=x"),
                ("expect", "100-continue"),
                ("x_forwarded_for", "203.0.113.9"),
                ("cookie", "a=1"),
                ("cookie", "b=2"),
                ("accept", "a"),
                ("accept", "b"),
                ("user-agent", "curl"),
            ]),
            &forwarding(),
        );
        for (name, expected) in [
            ("host", vec!["backend"]),
            ("x-drop", vec![]),
            ("connection", vec![]),
            ("keep-alive", vec![]),
            ("te", vec!["trailers"]),
            ("transfer-encoding", vec![]),
            ("upgrade", vec![]),
            ("http2-settings", vec![]),
            ("proxy", vec![]),
            ("proxy-authorization", vec![]),
            ("authorization", vec!["Bearer t"]),
            ("x-forwarded-for", vec!["192.0.2.1"]),
            ("x-original-forwarded-for", vec!["203.0.113.9"]),
            ("x-forwarded-proto", vec!["http"]),
            ("x-forwarded-host", vec!["shop.example:8080"]),
            ("x-forwarded-prefix", vec![]),
            ("x-real-ip", vec!["192.0.2.1"]),
            ("x-original-url", vec![]),
            ("ssl-client-verify", vec![]),
            ("x-code", vec![]),
            ("forwarded", vec![]),
            ("expect", vec![]),
            ("x_forwarded_for", vec![]),
            ("cookie", vec!["a=1; b=2"]),
            ("accept", vec!["a", "b"]),
            ("user-agent", vec!["curl"]),
        ] {
            assert_eq!(get(&sent, name), expected, "{name}");
        }
    }

    #[test]
    fn responses_lose_fields_of_the_upstream_connection() {
        let mut headers = map(&[
            ("connection", "close, x-hop"),
            ("x-hop", "1"),
            ("keep-alive", "x"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("trailer", "grpc-status"),
            ("content-type", "text/plain"),
        ]);
        let mut switching = headers.clone();
        response(&mut headers, false);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["trailer", "content-type"]);
        response(&mut switching, true);
        assert_eq!((get(&switching, "connection"), get(&switching, "upgrade")), (vec!["upgrade"], vec!["websocket"]));
    }

    #[test]
    fn request_ids_are_kept_when_harmless() {
        assert_eq!(request_id(&map(&[("x-request-id", "abc")])).as_ref().map(|v| v.as_bytes()), Some(&b"abc"[..]));
        assert_eq!(request_id(&map(&[("x-request-id", "a b")])), None);
        assert_eq!(request_id(&map(&[("x-request-id", &"x".repeat(129))])), None);
    }

    #[test]
    fn authorities_must_agree() {
        let parts = |version: Version, uri: &str, hosts: &[&str]| {
            let mut request = http::Request::builder().version(version).uri(uri);
            for host in hosts {
                request = request.header("host", *host);
            }
            request.body(()).expect("a request").into_parts().0
        };
        let table = [
            (parts(Version::HTTP_11, "/", &["a"]), Ok(Some("a"))),
            (parts(Version::HTTP_11, "http://b/", &["a"]), Ok(Some("b"))),
            (parts(Version::HTTP_11, "/", &[]), Err(())),
            (parts(Version::HTTP_10, "/", &[]), Ok(None)),
            (parts(Version::HTTP_11, "/", &["a", "a"]), Err(())),
            (parts(Version::HTTP_2, "http://b/", &["b"]), Ok(Some("b"))),
            (parts(Version::HTTP_2, "http://b/", &["a"]), Err(())),
        ];
        for (parts, expected) in &table {
            assert_eq!(authority(parts), *expected);
        }
    }
}
