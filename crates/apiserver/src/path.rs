//! From a URL to what is asked for.

use http::Method;

/// What a URL path names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Something that is not an API object: `/version`, `/healthz`, `/openapi/v3/...`.
    Other(Vec<String>),
    /// `/api` or `/apis`.
    Groups {
        /// Whether it is `/api`.
        core: bool,
    },
    /// `/apis/GROUP`.
    Group(String),
    /// `/api/v1` or `/apis/GROUP/VERSION`.
    Version {
        /// Group, empty for core.
        group: String,
        /// Version.
        version: String,
    },
    /// Objects.
    Resource(Target),
}

/// The objects a URL names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Group, empty for core.
    pub group: String,
    /// Version.
    pub version: String,
    /// Namespace, if the path has one.
    pub namespace: Option<String>,
    /// Plural resource name.
    pub resource: String,
    /// Object name.
    pub name: Option<String>,
    /// Subresource.
    pub subresource: Option<String>,
    /// What follows the subresource.
    pub rest: Vec<String>,
    /// The old `/watch/` prefix.
    pub watch_prefix: bool,
}

impl Route {
    /// Reads a path, as it stands in the request line.
    pub fn parse(path: &str) -> Route {
        let segments: Vec<String> = path.split('/').filter(|s| !s.is_empty()).map(decode_path).collect();
        let words: Vec<&str> = segments.iter().map(String::as_str).collect();
        match words.as_slice() {
            ["api"] => Route::Groups { core: true },
            ["apis"] => Route::Groups { core: false },
            ["apis", group] => Route::Group((*group).to_owned()),
            ["api", version] => Route::Version { group: String::new(), version: (*version).to_owned() },
            ["apis", group, version] => Route::Version { group: (*group).to_owned(), version: (*version).to_owned() },
            ["api", version, rest @ ..] => Route::Resource(Target::parse("", version, rest)),
            ["apis", group, version, rest @ ..] => Route::Resource(Target::parse(group, version, rest)),
            _ => Route::Other(segments),
        }
    }
}

impl Target {
    fn parse(group: &str, version: &str, rest: &[&str]) -> Target {
        let (watch_prefix, rest) = match rest {
            ["watch", rest @ ..] if !rest.is_empty() => (true, rest),
            rest => (false, rest),
        };
        let mut target = Target {
            group: group.to_owned(),
            version: version.to_owned(),
            namespace: None,
            resource: String::new(),
            name: None,
            subresource: None,
            rest: Vec::new(),
            watch_prefix,
        };
        // `namespaces/NS/status` and `/finalize` are about the Namespace, not resources in it (requestinfo.go).
        let rest = match rest {
            ["namespaces", _, "status" | "finalize"] => rest,
            ["namespaces", namespace, inner @ ..] if !inner.is_empty() => {
                target.namespace = Some((*namespace).to_owned());
                inner
            }
            rest => rest,
        };
        let mut words = rest.iter().map(|word| (*word).to_owned());
        target.resource = words.next().unwrap_or_default();
        target.name = words.next();
        target.subresource = words.next();
        target.rest = words.collect();
        target
    }
}

/// What is done to the objects, in the words of authorization rules.
pub fn verb(method: &Method, named: bool, watch: bool) -> Option<&'static str> {
    Some(match (method.as_str(), named) {
        ("GET" | "HEAD", _) if watch => "watch",
        ("GET" | "HEAD", true) => "get",
        ("GET" | "HEAD", false) => "list",
        ("POST", _) => "create",
        ("PUT", true) => "update",
        ("PATCH", true) => "patch",
        ("DELETE", true) => "delete",
        ("DELETE", false) => "deletecollection",
        _ => return None,
    })
}

/// The query of a URL, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query(Vec<(String, String)>);

impl Query {
    /// Reads a query; empty pairs are skipped, keys are case-sensitive.
    pub fn parse(query: &str) -> Query {
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (decode_form(key), decode_form(value))
        });
        Query(pairs.collect())
    }

    /// The first value of a key; empty if there is none.
    pub fn get(&self, key: &str) -> &str {
        self.0.iter().find(|(k, _)| k == key).map_or("", |(_, value)| value)
    }

    /// Whether the key occurs.
    pub fn has(&self, key: &str) -> bool {
        self.0.iter().any(|(k, _)| k == key)
    }

    /// All values of a key.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    /// A boolean as the reference implementation reads one from a query: present and not `false` or `0`.
    pub fn flag(&self, key: &str) -> bool {
        self.has(key) && !matches!(self.get(key), "false" | "0")
    }
}

/// Undoes the percent encoding of a path segment or header name.
pub fn decode_path(text: &str) -> String {
    decode(text, false)
}

fn decode_form(text: &str) -> String {
    decode(text, true)
}

/// Undoes percent encoding; what is no UTF-8 afterwards is replaced, a stray `%` stays.
fn decode(text: &str, plus_is_space: bool) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = |b: u8| (b as char).to_digit(16);
        match bytes[i] {
            b'%' => {
                let pair = bytes.get(i + 1).copied().and_then(hex).zip(bytes.get(i + 2).copied().and_then(hex));
                if let Some((high, low)) = pair {
                    out.push((high * 16 + low) as u8);
                    i += 2;
                } else {
                    out.push(b'%');
                }
            }
            b'+' if plus_is_space => out.push(b' '),
            byte => out.push(byte),
        }
        i += 1;
    }
    String::from_utf8(out).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
}

/// Percent-encodes a path segment or query value.
pub fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(path: &str) -> (String, String, String, Option<String>, Option<String>, Vec<String>, bool) {
        match Route::parse(path) {
            Route::Resource(t) => {
                (t.group, t.namespace.unwrap_or_default(), t.resource, t.name, t.subresource, t.rest, t.watch_prefix)
            }
            other => panic!("{path} is {other:?}"),
        }
    }

    #[test]
    fn paths_name_objects() {
        let some = |text: &str| Some(text.to_owned());
        let rows = [
            ("/api/v1/pods", ("", "", "pods", None, None, 0, false)),
            ("/api/v1/namespaces/a/pods/b/log", ("", "a", "pods", some("b"), some("log"), 0, false)),
            ("/api/v1/namespaces/a/status", ("", "", "namespaces", some("a"), some("status"), 0, false)),
            ("/api/v1/namespaces/a", ("", "", "namespaces", some("a"), None, 0, false)),
            (
                "/api/v1/namespaces/a/services/s:80/proxy/x/y",
                ("", "a", "services", some("s:80"), some("proxy"), 2, false),
            ),
            ("/api/v1/watch/namespaces/a/pods", ("", "a", "pods", None, None, 0, true)),
            ("/apis/apps/v1/namespaces/a/deployments/", ("apps", "a", "deployments", None, None, 0, false)),
            ("/apis/g/v1/nodes/a%2Fb", ("g", "", "nodes", some("a/b"), None, 0, false)),
        ];
        for (path, (group, namespace, resource, name, subresource, rest, watch)) in rows {
            let got = target(path);
            let want = (group.into(), namespace.into(), resource.into(), name, subresource);
            assert_eq!((got.0, got.1, got.2, got.3, got.4), want, "{path}");
            assert_eq!((got.5.len(), got.6), (rest, watch), "{path}");
        }
        assert_eq!(Route::parse("/apis/apps"), Route::Group("apps".to_owned()));
        assert_eq!(Route::parse("/"), Route::Other(Vec::new()));
    }

    #[test]
    fn queries_are_decoded_and_tolerate_empty_pairs() {
        let query = Query::parse("&watch=true&&labelSelector=a%3Db%2Cc+d&command=x&command=y&pct=100%");
        assert!(query.flag("watch"));
        assert_eq!(query.get("labelSelector"), "a=b,c d");
        assert_eq!(query.all("command").collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!(query.get("pct"), "100%");
        assert_eq!(query.get("none"), "");
    }
}
