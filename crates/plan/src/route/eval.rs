//! What happens to a request, decided against the table alone.

use std::borrow::Cow;

use serde::Serialize;

use super::path::{self, PathError};
use super::{Host, Matcher, Name, Profile, RouteTable, Rule, host};

/// The part of a request that routing depends on.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// Whether it came over TLS.
    pub https: bool,
    /// The port of the listener, for redirects that name it.
    pub port: u16,
    /// `Host` or `:authority` as sent; `None` if absent.
    pub authority: Option<&'a str>,
    /// The raw path and query.
    pub target: &'a str,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Refusal {
    /// The host name is malformed.
    BadHost,
    /// The path is malformed.
    BadPath,
    /// The path means different things before and after decoding (strict profile).
    AmbiguousPath,
    /// The host demands client certificates that cannot be checked.
    HostClosed,
    /// Annotations of the Ingress could not be honoured.
    IngressClosed,
    /// No rule matches and there is no default backend.
    NoRoute,
}

impl Refusal {
    /// The status that answers it.
    pub fn status(self) -> u16 {
        match self {
            Refusal::BadHost | Refusal::BadPath | Refusal::AmbiguousPath => 400,
            Refusal::HostClosed => 403,
            Refusal::IngressClosed => 503,
            Refusal::NoRoute => 404,
        }
    }
}

/// A request that goes to a backend.
#[derive(Clone, Debug)]
pub struct Forward<'t, 'r> {
    /// The rule, as an index into [`RouteTable::rules`].
    pub index: usize,
    /// The rule.
    pub rule: &'t Rule,
    /// Path and query to send.
    pub target: Cow<'r, str>,
    /// Value for `X-Forwarded-Prefix`.
    pub forwarded_prefix: Option<String>,
}

/// What happens to a request.
#[derive(Clone, Debug)]
pub enum Decision<'t, 'r> {
    /// It is answered with an error.
    Refuse {
        /// Why.
        refusal: Refusal,
        /// The rule that it matched, if any.
        rule: Option<usize>,
    },
    /// It is redirected.
    Redirect {
        /// Status.
        status: u16,
        /// `Location`.
        location: String,
        /// The rule that it matched, if any.
        rule: Option<usize>,
    },
    /// It goes to a backend.
    Forward(Forward<'t, 'r>),
}

/// Decides, in the order that ingress-nginx's phases have (ingress.md 2.1): host, path, root redirect, rule, closed Ingress,
/// redirects, redirect to HTTPS. Whether the client's address is admitted is decided after the backend is known to exist, with
/// [`Policy::admits`](super::Policy::admits).
pub fn decide<'t, 'r>(table: &'t RouteTable, head: &Head<'r>) -> Decision<'t, 'r> {
    let refuse = |refusal, rule| Decision::Refuse { refusal, rule };
    let name = match head.authority {
        Some(authority) => match host::normalize(authority) {
            Some(name) => Some(name),
            None => return refuse(Refusal::BadHost, None),
        },
        None => None,
    };
    let (raw, query) = path::split_target(head.target);
    let normal = match path::normalize(raw) {
        Ok(path) => path,
        Err(PathError::NotAbsolute | PathError::BadEncoding | PathError::Nul | PathError::AboveRoot) => {
            return refuse(Refusal::BadPath, None);
        }
    };
    let place = Place { head, name: name.as_deref(), raw, query };
    let host = match name.as_deref() {
        Some(name) => match table.name(name) {
            Some(Name::Redirect(target)) => {
                let location = format!("{}{target}{}{query}", place.scheme(), trim_final_slash(raw));
                return Decision::Redirect { status: table.redirect_code, location, rule: None };
            }
            _ => table.host(name),
        },
        None => table.catch_all_host(),
    };
    let Some(host) = host else { return fallback(table, head.target, None) };
    if host.closed {
        return refuse(Refusal::HostClosed, None);
    }
    if let Some(root) = host.app_root.as_ref().filter(|_| &*normal == b"/") {
        let location = if root.relative { root.path.clone() } else { place.location(&root.path, false) };
        return Decision::Redirect { status: 302, location, rule: None };
    }
    let found = find(host, &table.rules, &normal);
    if host.strict && path::is_ambiguous(raw) && find(host, &table.rules, raw.as_bytes()) != found {
        return refuse(Refusal::AmbiguousPath, None);
    }
    if let Some(rule) = slash_redirect(host, &table.rules, &normal) {
        let location = place
            .location(&format!("{}/{query}", path::encode(&normal)), table.rules[rule].policy.use_port_in_redirects);
        return Decision::Redirect { status: 301, location, rule: Some(rule) };
    }
    let Some(index) = found.or(host.default) else { return fallback(table, head.target, Some(host)) };
    let rule = &table.rules[index];
    let policy = &rule.policy;
    if policy.closed.is_some() {
        return refuse(Refusal::IngressClosed, Some(index));
    }
    if let Some((status, target)) = &policy.redirect {
        let absolute = !target.starts_with('/') || policy.relative_redirects;
        let location = if absolute { target.clone() } else { place.location(target, policy.use_port_in_redirects) };
        return Decision::Redirect { status: *status, location, rule: Some(index) };
    }
    let secure = policy.force_ssl_redirect || (policy.ssl_redirect && host.tls.is_some());
    if secure && !head.https && !is_challenge(rule, &normal) {
        // ingress-nginx drops a final slash unless told otherwise.
        let keep = policy.preserve_trailing_slash || rule.profile == Profile::Strict || !query.is_empty();
        let uri = if keep { Cow::Borrowed(raw) } else { Cow::Borrowed(trim_final_slash(raw)) };
        let name = head.authority.and_then(host::strip_port).unwrap_or_default();
        return Decision::Redirect {
            status: table.redirect_code,
            location: format!("https://{name}{uri}{query}"),
            rule: Some(index),
        };
    }
    let (target, forwarded_prefix) = rewrite(rule, &normal, head.target, query);
    Decision::Forward(Forward { index, rule, target, forwarded_prefix })
}

fn fallback<'t, 'r>(table: &'t RouteTable, target: &'r str, host: Option<&Host>) -> Decision<'t, 'r> {
    match table.fallback.filter(|_| host.is_none_or(|h| !h.closed)) {
        Some(index) => {
            let rule = &table.rules[index];
            Decision::Forward(Forward { index, rule, target: Cow::Borrowed(target), forwarded_prefix: None })
        }
        None => Decision::Refuse { refusal: Refusal::NoRoute, rule: None },
    }
}

/// ACME challenges are answered over plain HTTP (`no-tls-redirect-locations`). ingress-nginx looks at the rule's path only; a
/// strict Ingress may also have the challenge under a shorter prefix.
fn is_challenge(rule: &Rule, path: &[u8]) -> bool {
    const CHALLENGE: &str = "/.well-known/acme-challenge";
    rule.path.starts_with(CHALLENGE) || (rule.profile == Profile::Strict && path.starts_with(CHALLENGE.as_bytes()))
}

fn trim_final_slash(path: &str) -> &str {
    path.strip_suffix('/').unwrap_or(path)
}

struct Place<'a> {
    head: &'a Head<'a>,
    name: Option<&'a str>,
    raw: &'a str,
    query: &'a str,
}

impl Place<'_> {
    fn scheme(&self) -> &'static str {
        if self.head.https { "https://" } else { "http://" }
    }

    /// An absolute location on the host that was asked for: never relative, so that a path of `//` cannot name another host.
    fn location(&self, path: &str, with_port: bool) -> String {
        debug_assert!(self.raw.starts_with('/') || self.query.is_empty());
        let authority = self.head.authority.unwrap_or_default();
        let name = self.name.unwrap_or_default();
        if with_port {
            format!("{}{name}:{}{path}", self.scheme(), self.head.port)
        } else {
            format!("{}{authority}{path}", self.scheme())
        }
    }
}

/// The rule for a normalised path, by the host's lookups.
fn find(host: &Host, rules: &[Rule], path: &[u8]) -> Option<usize> {
    if let Some(rule) = host.exact.get(path) {
        return Some(*rule);
    }
    if let Some(rule) = host.scanned.iter().find(|r| matches(&rules[**r], path)) {
        return Some(*rule);
    }
    if host.prefix.is_empty() {
        return None;
    }
    if let Some(entry) = host.prefix.get(path) {
        let served = entry.slash.filter(|r| rules[*r].profile == Profile::Strict);
        if let Some(rule) = entry.bare.or(served) {
            return Some(rule);
        }
    }
    let mut end = path.len();
    while let Some(slash) = path[..end].iter().rposition(|b| *b == b'/') {
        if let Some(entry) = host.prefix.get(&path[..slash])
            && let Some(rule) = entry.slash.or(entry.bare)
        {
            return Some(rule);
        }
        end = slash;
    }
    None
}

/// The rule `P/` of ingress-nginx's profile for a request of exactly `P`, when no rule is written `P`: nginx redirects there.
fn slash_redirect(host: &Host, rules: &[Rule], path: &[u8]) -> Option<usize> {
    if host.regex_mode || path.ends_with(b"/") || host.exact.contains_key(path) {
        return None;
    }
    let entry = host.prefix.get(path).copied().unwrap_or_default();
    if entry.bare.is_some() {
        return None;
    }
    let exact = || {
        let with_slash: Vec<u8> = path.iter().copied().chain([b'/']).collect();
        host.exact.get(with_slash.as_slice()).copied()
    };
    entry.slash.or_else(exact).filter(|r| rules[*r].profile == Profile::NginxCompat)
}

fn matches(rule: &Rule, path: &[u8]) -> bool {
    match &rule.matcher {
        Matcher::Exact(text) => path == text.as_bytes(),
        Matcher::Start(text, fold) => path.get(..text.len()).is_some_and(|start| {
            if *fold { start.eq_ignore_ascii_case(text.as_bytes()) } else { start == text.as_bytes() }
        }),
        Matcher::Regex(regex) => regex.is_match(path),
        Matcher::Prefix(text, slash) => match path.strip_prefix(text.as_bytes()) {
            Some([]) => !slash || rule.profile == Profile::Strict,
            Some(rest) => rest[0] == b'/',
            None => false,
        },
    }
}

/// What is sent upstream: the raw target, or the rewritten path with the query.
fn rewrite<'r>(rule: &Rule, normal: &[u8], target: &'r str, query: &str) -> (Cow<'r, str>, Option<String>) {
    let policy = &rule.policy;
    let prefix = |groups: &Groups| {
        policy.forwarded_prefix.as_ref().map(|p| String::from_utf8_lossy(&expand(p, groups)).into_owned())
    };
    let template = match &policy.rewrite_target {
        Some(template) if rule.rewrite => template,
        // ingress-nginx sets the header only together with a rewrite.
        _ if rule.profile == Profile::NginxCompat => return (without_fragment(target), None),
        _ => return (without_fragment(target), prefix(&Groups::default())),
    };
    let groups = match &rule.matcher {
        Matcher::Regex(regex) => match regex.captures(normal) {
            Some(captures) => Groups(captures.iter().map(|group| group.map(|g| g.as_bytes())).collect()),
            None => Groups::default(),
        },
        _ => Groups::default(),
    };
    let mut path = expand(template, &groups);
    if path.first() != Some(&b'/') {
        path.insert(0, b'/');
    }
    let mut rewritten = path::encode(&path);
    rewritten.push_str(query);
    (Cow::Owned(rewritten), prefix(&groups))
}

fn without_fragment(target: &str) -> Cow<'_, str> {
    Cow::Borrowed(target.split_once('#').map_or(target, |(before, _)| before))
}

#[derive(Default)]
struct Groups<'a>(Vec<Option<&'a [u8]>>);

/// Fills `$1` to `$9`; an absent group is empty, any other dollar sign is itself.
fn expand(template: &str, groups: &Groups) -> Vec<u8> {
    let mut out = Vec::with_capacity(template.len() + 32);
    let mut bytes = template.bytes().peekable();
    while let Some(byte) = bytes.next() {
        match bytes.peek() {
            Some(digit @ b'1'..=b'9') if byte == b'$' => {
                if let Some(Some(group)) = groups.0.get(usize::from(digit - b'0')) {
                    out.extend_from_slice(group);
                }
                bytes.next();
            }
            _ => out.push(byte),
        }
    }
    out
}

/// One rule that was considered for a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Candidate {
    /// The Ingress and field, as text.
    pub origin: String,
    /// The rule's path and type.
    pub path: String,
    /// Whether it was taken.
    pub chosen: bool,
    /// Why it was taken or not.
    pub why: String,
}

/// The decision about a request with its reasons, for `portolan trace`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Which host was selected and why.
    pub host: String,
    /// The host's rules in the order in which they are tried.
    pub candidates: Vec<Candidate>,
    /// What happens.
    pub outcome: String,
    /// The status of a request that goes to no backend.
    pub status: Option<u16>,
    /// The backend's Service and port, and the path sent there.
    pub upstream: Option<(String, String)>,
}

/// Evaluates a request in the plainest way: every rule in order, no lookups. The result agrees with [`decide`].
pub fn explain(table: &RouteTable, head: &Head) -> Explanation {
    let name = head.authority.map_or(Some(String::new()), host::normalize);
    let host = name.as_deref().and_then(|n| if n.is_empty() { table.catch_all_host() } else { table.host(n) });
    let shown = name.as_deref().unwrap_or_default();
    let host_text = match host {
        None => format!("no host for {shown:?}"),
        Some(h) if h.name.is_empty() => format!("{shown:?} is the host of no rule: rules for all hosts apply"),
        Some(h) if h.name == shown => format!("{shown:?} is the host of a rule"),
        Some(h) => format!("{shown:?} belongs to host {:?}", h.name),
    };
    let (raw, _) = path::split_target(head.target);
    let mut candidates = Vec::new();
    if let (Some(host), Ok(normal)) = (host, path::normalize(raw)) {
        let mut chosen = None;
        for &index in &host.order {
            let rule = &table.rules[index];
            let hit = matches(rule, &normal);
            let (taken, why) = match (hit, chosen) {
                (true, None) => (true, how(rule)),
                (true, Some(_)) => (false, "matches too, but an earlier rule has precedence".to_string()),
                (false, _) => (false, "does not match".to_string()),
            };
            if taken {
                chosen = Some(index);
            }
            candidates.push(Candidate {
                origin: rule.origin.to_string(),
                path: format!("{} ({:?})", rule.path, rule.path_type),
                chosen: taken,
                why,
            });
        }
        debug_assert_eq!(chosen, find(host, &table.rules, &normal), "the lookups agree with the plain order");
        if let (None, Some(default)) = (chosen, host.default) {
            let rule = &table.rules[default];
            candidates.push(Candidate {
                origin: rule.origin.to_string(),
                path: "default backend".into(),
                chosen: true,
                why: "no path matches".into(),
            });
        }
    }
    let (outcome, status, upstream) = match decide(table, head) {
        Decision::Refuse { refusal, .. } => (format!("refused: {refusal:?}"), Some(refusal.status()), None),
        Decision::Redirect { status, location, .. } => (format!("redirected to {location}"), Some(status), None),
        Decision::Forward(forward) => {
            let upstream = &table.upstreams[forward.rule.upstream.0];
            let service = format!("{}:{}", upstream.service, upstream.port);
            (
                format!("forwarded to Service {service} as {}", forward.target),
                None,
                Some((service, forward.target.into_owned())),
            )
        }
    };
    Explanation { host: host_text, candidates, outcome, status, upstream }
}

fn how(rule: &Rule) -> String {
    match &rule.matcher {
        Matcher::Exact(_) => "equal to the path".into(),
        Matcher::Prefix(..) => "matches by path element, longest first".into(),
        Matcher::Start(_, true) | Matcher::Regex(_) if rule.profile == Profile::NginxCompat => {
            "matches as a case-insensitive regular expression, longest first".into()
        }
        Matcher::Start(..) | Matcher::Regex(_) => "matches as a regular expression, longest first".into(),
    }
}
