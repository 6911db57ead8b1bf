//! From Ingresses to the table. Total: a bad object loses its own part and gains a finding.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use k8s_openapi::api::networking::v1::{HTTPIngressPath, Ingress, IngressBackend, IngressClass};
use regex::bytes::{Regex, RegexBuilder};

use super::annotations::{self, PREFIX};
use super::upstream::{PortRef, UpstreamKey};
use super::{
    AppRoot, Certificate, Compiled, Host, HostTls, Input, Matcher, Name, Options, PathType, Policy, Profile,
    RouteTable, Rule, UpstreamId, host,
};
use crate::finding::{Finding, Severity};
use crate::origin::Origin;
use crate::world::ObjectKey;

/// The annotation that named the class before `spec.ingressClassName` existed.
const LEGACY_CLASS: &str = "kubernetes.io/ingress.class";
/// Certificates that expire within ten days are reported.
const EXPIRY_WARNING_SECONDS: i64 = 10 * 24 * 3600;
/// Compiled size of one path's regular expression; larger ones lose their path.
const REGEX_SIZE_BYTES: usize = 1 << 20;
/// Cache of one regular expression and thread. Small: most hosts are idle most of the time.
const REGEX_CACHE_BYTES: usize = 1 << 16;

/// Whether an Ingress is ours, and with which semantics (ingress.md 1.3): `spec.ingressClassName` decides alone when set, then
/// the legacy annotation, then the option for Ingresses without a class.
pub fn class_of<'a>(
    ingress: &Ingress,
    class: impl Fn(&str) -> Option<&'a IngressClass>,
    options: &Options,
) -> Option<Profile> {
    if let Some(name) = ingress.spec.as_ref().and_then(|s| s.ingress_class_name.as_deref()) {
        let controller = class(name)?.spec.as_ref()?.controller.as_deref()?;
        return options
            .controllers
            .iter()
            .find(|c| c.controller == controller || (options.ingress_class_by_name && c.ingress_class == name))
            .map(|c| c.profile);
    }
    match ingress.metadata.annotations.as_ref().and_then(|a| a.get(LEGACY_CLASS)) {
        Some(value) => options.controllers.iter().find(|c| c.ingress_class == *value).map(|c| c.profile),
        None if options.watch_ingress_without_class => options.controllers.first().map(|c| c.profile),
        None => None,
    }
}

/// Compiles all Ingresses. The same input gives the same table whatever the order of its lists.
pub fn compile(input: &Input, options: &Options) -> Compiled {
    let mut compiler =
        Compiler { input, options, findings: Vec::new(), table: RouteTable::default(), upstreams: HashMap::new() };
    let classes: BTreeMap<&str, &IngressClass> =
        input.classes.iter().filter_map(|c| Some((c.metadata.name.as_deref()?, c.as_ref()))).collect();
    let mut secrets = BTreeSet::new();
    let mut accepted = Vec::new();
    let mut owned = Vec::new();
    for ingress in &input.ingresses {
        let Some(profile) = class_of(ingress, |name| classes.get(name).copied(), options) else { continue };
        let source = compiler.source(ingress, profile);
        if options.disable_catch_all && source.spec().is_some_and(|s| s.default_backend.is_some()) {
            continue;
        }
        for tls in source.tls() {
            if let Some(name) = tls.secret_name.as_deref().filter(|n| !n.is_empty()) {
                secrets.insert(ObjectKey::new(&source.key.namespace, name));
            }
        }
        if source.policy.closed.is_none() {
            accepted.push(source.key.clone());
        }
        owned.push(source);
    }
    owned.sort_by(conflict_order);
    compiler.classes(&classes);
    compiler.hosts(&owned);
    compiler.fallback();
    accepted.sort();
    compiler.findings.sort();
    compiler.findings.dedup();
    compiler.table.redirect_code = options.redirect_code;
    Compiled { table: compiler.table, findings: compiler.findings, accepted, secrets: secrets.into_iter().collect() }
}

/// An Ingress of ours with what its annotations say.
struct Source<'a> {
    ingress: &'a Ingress,
    key: ObjectKey,
    profile: Profile,
    policy: Arc<Policy>,
}

impl<'a> Source<'a> {
    fn spec(&self) -> Option<&'a k8s_openapi::api::networking::v1::IngressSpec> {
        self.ingress.spec.as_ref()
    }

    fn rules(&self) -> &'a [k8s_openapi::api::networking::v1::IngressRule] {
        self.spec().and_then(|s| s.rules.as_deref()).unwrap_or_default()
    }

    fn tls(&self) -> &'a [k8s_openapi::api::networking::v1::IngressTLS] {
        self.spec().and_then(|s| s.tls.as_deref()).unwrap_or_default()
    }

    fn origin(&self, field: impl Into<String>) -> Origin {
        let meta = &self.ingress.metadata;
        Origin {
            kind: "Ingress".into(),
            namespace: self.key.namespace.clone(),
            name: self.key.name.clone(),
            uid: meta.uid.clone().unwrap_or_default(),
            generation: meta.generation.unwrap_or(0),
            field: field.into(),
        }
    }

    fn annotation(&self, name: &str) -> Origin {
        self.origin(format!("metadata.annotations[{PREFIX}{name}]"))
    }
}

/// Who wins a conflict: the older object. Among equally old ones ingress-nginx takes the last by name; we keep that for its own.
fn conflict_order(a: &Source, b: &Source) -> Ordering {
    let created = |s: &Source| s.ingress.metadata.creation_timestamp.as_ref().map(|t| t.0);
    created(a).cmp(&created(b)).then(a.profile.cmp(&b.profile)).then_with(|| match a.profile {
        Profile::NginxCompat => b.key.cmp(&a.key),
        Profile::Strict => a.key.cmp(&b.key),
    })
}

struct Compiler<'a> {
    input: &'a Input,
    options: &'a Options,
    findings: Vec<Finding>,
    table: RouteTable,
    upstreams: HashMap<UpstreamKey, UpstreamId>,
}

/// A path of some Ingress, before the host's mode is known.
struct Path<'a> {
    source: &'a Source<'a>,
    field: String,
    path: String,
    path_type: PathType,
    service: (String, PortRef),
}

/// What is gathered for one host before its rules are made.
#[derive(Default)]
struct Draft<'a> {
    paths: Vec<Path<'a>>,
    /// Ingresses with a rule for the host, in conflict order.
    sources: Vec<&'a Source<'a>>,
    default: Option<Path<'a>>,
}

impl<'a> Compiler<'a> {
    fn warn(&mut self, origin: Origin, reason: &str, message: impl Into<String>) {
        self.findings.push(Finding {
            origin,
            severity: Severity::Warning,
            reason: reason.into(),
            message: message.into(),
        });
    }

    fn source(&mut self, ingress: &'a Ingress, profile: Profile) -> Source<'a> {
        let empty = BTreeMap::new();
        let (mut policy, issues) = annotations::parse(ingress.metadata.annotations.as_ref().unwrap_or(&empty));
        let meta = &ingress.metadata;
        let key = ObjectKey::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default());
        let mut source = Source { ingress, key, profile, policy: Arc::default() };
        for issue in issues {
            let field = if issue.key.is_empty() {
                "metadata.annotations".into()
            } else {
                format!("metadata.annotations[{}]", issue.key)
            };
            self.warn(source.origin(field), issue.reason, issue.message);
        }
        if profile == Profile::NginxCompat
            && let Some((field, message)) = invalid_path(&source)
        {
            let message = format!("{message}; all paths answer 503 until it is fixed");
            policy.closed.get_or_insert_with(|| message.clone());
            self.warn(source.origin(field), "Rejected", message);
        }
        if policy.canary {
            let message = "canary Ingresses are not supported; the primary gets all requests";
            self.warn(source.annotation("canary"), "UnsupportedAnnotation", message);
        }
        source.policy = Arc::new(policy);
        source
    }

    fn classes(&mut self, classes: &BTreeMap<&str, &IngressClass>) {
        for (name, class) in classes {
            let Some(spec) = &class.spec else { continue };
            let ours = self.options.controllers.iter().any(|c| Some(&c.controller) == spec.controller.as_ref());
            if let Some(parameters) = spec.parameters.as_ref().filter(|_| ours) {
                let origin = Origin {
                    kind: "IngressClass".into(),
                    name: name.to_string(),
                    uid: class.metadata.uid.clone().unwrap_or_default(),
                    generation: class.metadata.generation.unwrap_or(0),
                    field: "spec.parameters".into(),
                    ..Default::default()
                };
                let message =
                    format!("parameters of kind {} are not known; the class is used with defaults", parameters.kind);
                self.warn(origin, "UnsupportedParameters", message);
            }
        }
    }

    fn hosts(&mut self, owned: &[Source<'_>]) {
        let mut drafts: BTreeMap<String, Draft> = BTreeMap::new();
        drafts.insert(String::new(), Draft::default());
        for source in owned.iter().filter(|s| !s.policy.canary) {
            let default_backend = source.spec().and_then(|s| s.default_backend.as_ref());
            let default = default_backend.and_then(|backend| self.default_path(source, backend));
            if source.rules().is_empty()
                && let Some(path) = default
            {
                let draft = drafts.entry(String::new()).or_default();
                draft.sources.push(source);
                if let Some(winner) = draft.default.as_ref().map(|d| d.source.key.clone()) {
                    let message = format!("the default backend of Ingress {winner} is older and is used instead");
                    self.warn(source.origin("spec.defaultBackend"), "PathConflict", message);
                } else {
                    draft.default = Some(path);
                }
                continue;
            }
            for (index, rule) in source.rules().iter().enumerate() {
                let name = rule.host.as_deref().unwrap_or_default().to_ascii_lowercase();
                let paths: Vec<Path> = rule
                    .http
                    .iter()
                    .flat_map(|http| http.paths.iter().enumerate())
                    .filter_map(|(n, path)| self.path(source, format!("spec.rules[{index}].http.paths[{n}]"), path))
                    .collect();
                let draft = drafts.entry(name).or_default();
                let first = draft.sources.is_empty();
                if !draft.sources.iter().any(|s| s.key == source.key) {
                    draft.sources.push(source);
                }
                draft.paths.extend(paths);
                // The Ingress that first claims a host answers for what no path matches.
                if first && draft.default.is_none() {
                    draft.default = default_backend.and_then(|backend| self.default_path(source, backend));
                }
            }
        }
        for (name, draft) in &drafts {
            let index = self.table.hosts.len();
            let host = self.host(name, draft);
            self.table.hosts.push(host);
            match name.strip_prefix("*.") {
                Some(parent) => {
                    self.table.wildcards.insert(parent.into(), index);
                }
                None if name.is_empty() => self.table.catch_all = Some(index),
                None => {
                    self.table.names.insert(name.as_str().into(), Name::Host(index));
                }
            }
        }
        self.aliases(owned, &drafts);
        self.www(&drafts);
    }

    fn default_path<'s>(&mut self, source: &'s Source<'s>, backend: &IngressBackend) -> Option<Path<'s>> {
        let field = "spec.defaultBackend".to_string();
        let service = self.backend(source, &field, backend)?;
        Some(Path { source, field, path: "/".into(), path_type: PathType::Prefix, service })
    }

    fn path<'s>(&mut self, source: &'s Source<'s>, field: String, path: &HTTPIngressPath) -> Option<Path<'s>> {
        let service = self.backend(source, &field, &path.backend)?;
        let path_type = match path.path_type.as_str() {
            "Exact" => PathType::Exact,
            "Prefix" => PathType::Prefix,
            // Objects older than the field have none; v1beta1 defaulted to this one.
            _ => PathType::ImplementationSpecific,
        };
        let text = path.path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/");
        if !text.starts_with('/') {
            self.warn(source.origin(field), "Rejected", format!("path {text:?} is not absolute; it is left out"));
            return None;
        }
        Some(Path { source, field, path: text.to_string(), path_type, service })
    }

    fn backend(&mut self, source: &Source, field: &str, backend: &IngressBackend) -> Option<(String, PortRef)> {
        let Some(service) = backend.service.as_ref().filter(|s| !s.name.is_empty()) else {
            let message = match &backend.resource {
                Some(resource) => {
                    format!("backends of kind {} are not supported; the default backend answers", resource.kind)
                }
                None => "the backend names no Service; the default backend answers".to_string(),
            };
            self.warn(source.origin(field), "UnsupportedResourceBackend", message);
            return None;
        };
        let port = service.port.as_ref();
        let number = port.and_then(|p| p.number).and_then(|n| u16::try_from(n).ok()).filter(|n| *n != 0);
        let reference = match (number, port.and_then(|p| p.name.clone()).filter(|n| !n.is_empty())) {
            (Some(number), _) => PortRef::Number(number),
            (None, Some(name)) => PortRef::Name(name),
            (None, None) => PortRef::First,
        };
        Some((service.name.clone(), reference))
    }

    fn upstream(&mut self, namespace: &str, service: &str, port: PortRef, profile: Profile) -> UpstreamId {
        let key = UpstreamKey { service: ObjectKey::new(namespace, service), port, profile };
        if let Some(id) = self.upstreams.get(&key) {
            return *id;
        }
        let id = UpstreamId(self.table.upstreams.len());
        self.table.upstreams.push(key.clone());
        self.upstreams.insert(key, id);
        id
    }

    fn host(&mut self, name: &str, draft: &Draft) -> Host {
        let regex_mode = self.regex_mode(name, draft);
        let mut host = Host {
            name: name.to_string(),
            regex_mode,
            strict: draft.sources.first().is_none_or(|s| s.profile == Profile::Strict),
            closed: draft.sources.iter().any(|s| s.policy.closes_host),
            tls: self.tls(name, draft),
            ..Default::default()
        };
        host.app_root = draft.sources.iter().find_map(|s| {
            let path = s.policy.app_root.clone()?;
            Some(AppRoot { path, relative: s.policy.relative_redirects, origin: s.annotation("app-root") })
        });
        let mut taken: BTreeMap<(String, bool), ObjectKey> = BTreeMap::new();
        for path in &draft.paths {
            let exact = path.path_type == PathType::Exact;
            let identity = match (path.source.profile, exact) {
                // `/foo` and `/foo/` are one prefix; ingress-nginx makes two locations of them.
                (Profile::Strict, false) => (trim_slash(&path.path).to_string(), false),
                _ => (path.path.clone(), exact),
            };
            if let Some(winner) = taken.get(&identity) {
                let shown = if name.is_empty() { "_" } else { name };
                let message = format!("host {shown:?} and path {:?} is already defined in ingress {winner}", path.path);
                self.warn(path.source.origin(&path.field), "PathConflict", message);
                continue;
            }
            let matcher = match matcher(path, regex_mode) {
                Ok(matcher) => matcher,
                Err(message) => {
                    self.warn(path.source.origin(&path.field), "Rejected", message);
                    continue;
                }
            };
            taken.insert(identity, path.source.key.clone());
            let rule = self.rule(name, path, matcher, path.source.policy.clone());
            let index = self.table.rules.len();
            self.table.rules.push(rule);
            host.order.push(index);
        }
        if let Some(path) = &draft.default {
            let mut policy = path.source.policy.clone();
            if name.is_empty() {
                // Redirects and rewrites of a catch-all Ingress do not concern its default backend (ingress-nginx).
                let policy = Arc::make_mut(&mut policy);
                (policy.redirect, policy.rewrite_target, policy.app_root) = (None, None, None);
            }
            let rule = self.rule(name, path, Matcher::Prefix(String::new(), true), policy);
            host.default = Some(self.table.rules.len());
            self.table.rules.push(rule);
        }
        let rules = &self.table.rules;
        host.order.sort_by(|a, b| precedence(&rules[*a].matcher, &rules[*a].path, &rules[*b].matcher, &rules[*b].path));
        index(&mut host, rules);
        host
    }

    fn rule(&mut self, host: &str, path: &Path, matcher: Matcher, policy: Arc<Policy>) -> Rule {
        let source = path.source;
        let (service, port) = path.service.clone();
        let upstream = self.upstream(&source.key.namespace, &service, port, source.profile);
        let default_backend = policy
            .default_backend
            .clone()
            .map(|service| self.upstream(&source.key.namespace, &service, PortRef::First, source.profile));
        Rule {
            origin: source.origin(&path.field),
            ingress: source.key.clone(),
            host: host.to_string(),
            path: path.path.clone(),
            path_type: path.path_type,
            matcher,
            rewrite: policy.rewrite_target.as_ref().is_some_and(|target| *target != path.path),
            policy,
            profile: source.profile,
            upstream,
            default_backend,
        }
    }

    /// Whether ingress-nginx would turn every path of the host into a regular expression, and a finding for each Ingress whose
    /// paths change their meaning because of another one.
    fn regex_mode(&mut self, name: &str, draft: &Draft) -> bool {
        let compat = |p: &&Path| p.source.profile == Profile::NginxCompat;
        let Some(trigger) = draft.paths.iter().filter(compat).find(|p| wants_regex(p)) else { return false };
        let mut changed: BTreeMap<&ObjectKey, (&Source, Vec<&str>)> = BTreeMap::new();
        for path in draft.paths.iter().filter(compat) {
            let own = draft.paths.iter().any(|p| p.source.key == path.source.key && wants_regex(p));
            if !own {
                changed.entry(&path.source.key).or_insert((path.source, Vec::new())).1.push(&path.path);
            }
        }
        for (source, paths) in changed.into_values() {
            let message = format!(
                "Ingress {} makes all paths of host {name:?} case-insensitive regular expressions that match from the start; \
                 these change their meaning: {}",
                trigger.source.key,
                paths.join(", ")
            );
            self.warn(source.origin("spec.rules"), "CompatQuirk", message);
        }
        true
    }

    fn tls(&mut self, name: &str, draft: &Draft) -> Option<HostTls> {
        let mut with_tls = draft.sources.iter().filter(|s| !s.tls().is_empty());
        let source = with_tls.next()?;
        let chosen = self.certificate(name, source);
        for loser in with_tls {
            let secret = self.named_secret(name, loser);
            if secret.is_some() && secret != self.named_secret(name, source) {
                let message = format!("TLS of host {name:?} comes from the older Ingress {}", source.key);
                self.warn(loser.origin("spec.tls"), "HostOptionConflict", message);
            }
        }
        Some(chosen)
    }

    /// The Secret of the TLS section that lists the host.
    fn named_secret(&self, name: &str, source: &Source) -> Option<(usize, ObjectKey)> {
        let (index, tls) = source.tls().iter().enumerate().find(|(_, tls)| {
            let hosts = tls.hosts.as_deref().unwrap_or_default();
            hosts.iter().any(|h| h.eq_ignore_ascii_case(name)) || (name.is_empty() && hosts.is_empty())
        })?;
        let secret = tls.secret_name.as_deref().filter(|n| !n.is_empty())?;
        Some((index, ObjectKey::new(&source.key.namespace, secret)))
    }

    fn certificate(&mut self, name: &str, source: &Source) -> HostTls {
        if let Some((index, key)) = self.named_secret(name, source) {
            let origin = source.origin(format!("spec.tls[{index}]"));
            let secret = self.usable(name, &key, source.profile, &origin).then_some(key);
            return HostTls { secret, origin };
        }
        // No section lists the host, or without a Secret: any certificate of the same Ingress that covers it will do.
        let listed = source.tls().iter().any(|t| t.hosts.iter().flatten().any(|h| h.eq_ignore_ascii_case(name)));
        for (index, tls) in source.tls().iter().enumerate().filter(|_| !listed && !name.is_empty()) {
            let Some(secret) = tls.secret_name.as_deref().filter(|n| !n.is_empty()) else { continue };
            let key = ObjectKey::new(&source.key.namespace, secret);
            if let Some(Ok(certificate)) = self.input.certificates.get(&key)
                && covers(certificate, name, source.profile)
            {
                let origin = source.origin(format!("spec.tls[{index}]"));
                self.expiry(certificate, &key, &origin);
                return HostTls { secret: Some(key), origin };
            }
        }
        HostTls { secret: None, origin: source.origin("spec.tls") }
    }

    /// Whether a certificate may be served for a host; says why not.
    fn usable(&mut self, name: &str, key: &ObjectKey, profile: Profile, origin: &Origin) -> bool {
        let input = self.input;
        let (reason, message) = match input.certificates.get(key) {
            None => ("TLSSecretInvalid", format!("Secret {key} does not exist; the default certificate is served")),
            Some(Err(why)) => ("TLSSecretInvalid", format!("Secret {key}: {why}; the default certificate is served")),
            Some(Ok(certificate)) if name.is_empty() || covers(certificate, name, profile) => {
                self.expiry(certificate, key, origin);
                return true;
            }
            Some(Ok(_)) => (
                "TLSCertificateMismatch",
                format!(
                    "the certificate of Secret {key} does not cover host {name:?}; the default certificate is served"
                ),
            ),
        };
        self.warn(origin.clone(), reason, message);
        false
    }

    fn expiry(&mut self, certificate: &Certificate, key: &ObjectKey, origin: &Origin) {
        let left = certificate.not_after - self.options.now;
        if left <= 0 {
            let message = format!("the certificate of Secret {key} has expired; it is served all the same");
            self.warn(origin.clone(), "TLSCertificateExpired", message);
        } else if left < EXPIRY_WARNING_SECONDS {
            let message = format!("the certificate of Secret {key} expires within ten days");
            self.warn(origin.clone(), "TLSCertificateExpiring", message);
        }
    }

    /// Adds `server-alias` names: they never displace a real host, and the oldest Ingress wins.
    fn aliases(&mut self, owned: &[Source], drafts: &BTreeMap<String, Draft>) {
        let mut taken: BTreeMap<String, ObjectKey> = BTreeMap::new();
        for source in owned.iter().filter(|s| !s.policy.canary && !s.policy.aliases.is_empty()) {
            let claimed = source.rules().iter().filter_map(|r| r.host.as_deref()).filter(|h| !h.is_empty());
            let Some(index) = claimed
                .map(str::to_ascii_lowercase)
                .filter(|h| drafts.get(h).and_then(|d| d.sources.first()).is_some_and(|s| s.key == source.key))
                .find_map(|h| self.table.hosts.iter().position(|host| host.name == h))
            else {
                continue;
            };
            for alias in &source.policy.aliases {
                let conflict = match taken.get(alias) {
                    Some(other) if *other != source.key => Some(format!("alias {alias:?} belongs to Ingress {other}")),
                    _ if drafts.contains_key(alias) => Some(format!("alias {alias:?} is the host of an Ingress")),
                    _ if alias.starts_with("*.") || !alias.contains('*') => None,
                    _ => Some(format!("alias {alias:?} is not a host name")),
                };
                if let Some(message) = conflict {
                    self.warn(source.annotation("server-alias"), "HostOptionConflict", message);
                    continue;
                }
                taken.insert(alias.clone(), source.key.clone());
                match alias.strip_prefix("*.") {
                    Some(parent) => {
                        self.table.wildcards.insert(parent.into(), index);
                    }
                    None => {
                        self.table.names.insert(alias.as_str().into(), Name::Host(index));
                    }
                }
            }
        }
    }

    /// Adds the redirects between `www.` names.
    fn www(&mut self, drafts: &BTreeMap<String, Draft>) {
        for (name, draft) in drafts.iter().filter(|(name, _)| !name.is_empty()) {
            let Some(source) = draft.sources.iter().find(|s| s.policy.from_to_www) else { continue };
            let origin = source.annotation("from-to-www-redirect");
            if name.starts_with("*.") {
                self.warn(
                    origin,
                    "UnsupportedAnnotation",
                    format!("host {name:?} is a wildcard and gets no www redirect"),
                );
                continue;
            }
            let other = name.strip_prefix("www.").map_or_else(|| format!("www.{name}"), str::to_string);
            self.table.names.entry(other.into()).or_insert_with(|| Name::Redirect(name.clone()));
        }
    }

    fn fallback(&mut self) {
        let Some(service) = &self.options.default_backend_service else { return };
        let upstream = self.upstream(&service.namespace, &service.name, PortRef::First, Profile::NginxCompat);
        self.table.fallback = Some(self.table.rules.len());
        self.table.rules.push(Rule {
            origin: Origin {
                kind: "Service".into(),
                namespace: service.namespace.clone(),
                name: service.name.clone(),
                ..Default::default()
            },
            ingress: ObjectKey::new("", ""),
            host: String::new(),
            path: "/".into(),
            path_type: PathType::Prefix,
            matcher: Matcher::Prefix(String::new(), true),
            policy: Arc::new(Policy { ssl_redirect: false, ..Policy::default() }),
            profile: Profile::NginxCompat,
            upstream,
            default_backend: None,
            rewrite: false,
        });
    }
}

/// The first path that `strict-validate-path-type` of ingress-nginx refuses.
fn invalid_path(source: &Source) -> Option<(String, String)> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/');
    for (index, rule) in source.rules().iter().enumerate() {
        for (n, path) in rule.http.iter().flat_map(|h| h.paths.iter().enumerate()) {
            let text = path.path.as_deref().unwrap_or_default();
            if matches!(path.path_type.as_str(), "Exact" | "Prefix")
                && !(text.starts_with('/') && text.bytes().all(allowed))
            {
                let message = format!(
                    "ingress contains invalid paths: path {text} cannot be used with pathType {}",
                    path.path_type
                );
                return Some((format!("spec.rules[{index}].http.paths[{n}].path"), message));
            }
        }
    }
    None
}

fn covers(certificate: &Certificate, name: &str, profile: Profile) -> bool {
    certificate.dns_names.iter().any(|n| host::covers(n, name))
        || (profile == Profile::NginxCompat
            && certificate.common_name.as_deref().is_some_and(|n| host::covers(n, name)))
}

fn wants_regex(path: &Path) -> bool {
    let policy = &path.source.policy;
    policy.use_regex || policy.rewrite_target.as_ref().is_some_and(|target| *target != path.path)
}

fn trim_slash(path: &str) -> &str {
    path.strip_suffix('/').unwrap_or(path)
}

/// How a path is compared. In the regex mode of ingress-nginx all paths of its Ingresses are case-insensitive expressions; in the
/// strict profile only `ImplementationSpecific` paths of the Ingress that asks for it are expressions.
fn matcher(path: &Path, regex_mode: bool) -> Result<Matcher, String> {
    let fold = path.source.profile == Profile::NginxCompat;
    let regex = if fold { regex_mode } else { wants_regex(path) && path.path_type == PathType::ImplementationSpecific };
    if regex {
        if !path.path.contains(['\\', '.', '+', '*', '?', '(', ')', '|', '[', ']', '{', '}', '^', '$'])
            && path.path.is_ascii()
        {
            return Ok(Matcher::Start(path.path.clone(), fold));
        }
        return expression(&path.path, fold).map(Matcher::Regex);
    }
    Ok(match path.path_type {
        PathType::Exact => Matcher::Exact(path.path.clone()),
        PathType::Prefix | PathType::ImplementationSpecific => {
            Matcher::Prefix(trim_slash(&path.path).to_string(), path.path.ends_with('/'))
        }
    })
}

fn expression(path: &str, fold: bool) -> Result<Regex, String> {
    // ingress-nginx writes the anchor before the path and nothing around it, so a second alternative is not anchored; the strict
    // profile anchors all. The group must not count: `$1` is the path's first one.
    let pattern = if fold { format!("^{path}") } else { format!("^(?:{path})") };
    RegexBuilder::new(&pattern)
        .case_insensitive(fold)
        .unicode(false)
        .size_limit(REGEX_SIZE_BYTES)
        .dfa_size_limit(REGEX_CACHE_BYTES)
        .build()
        .map_err(|error| {
            let construct = match path {
                p if p.contains("(?=") || p.contains("(?!") || p.contains("(?<=") || p.contains("(?<!") => {
                    "look-around is not supported".to_string()
                }
                p if p.as_bytes().windows(2).any(|w| w[0] == b'\\' && matches!(w[1], b'1'..=b'9')) => {
                    "back-references are not supported".to_string()
                }
                _ => error.to_string().lines().last().unwrap_or("it cannot be parsed").trim().to_string(),
            };
            format!("path {path:?} is not a usable regular expression and is left out: {construct}")
        })
}

/// Which of two rules of one host is tried first: exact ones, then expressions by length, then prefixes by length.
fn precedence(a: &Matcher, a_path: &str, b: &Matcher, b_path: &str) -> Ordering {
    let class = |m: &Matcher| match m {
        Matcher::Exact(_) => 0,
        Matcher::Start(..) | Matcher::Regex(_) => 1,
        Matcher::Prefix(..) => 2,
    };
    class(a).cmp(&class(b)).then_with(|| match (a, b) {
        // A prefix written with its slash is tried before the same one without.
        (Matcher::Prefix(x, x_slash), Matcher::Prefix(y, y_slash)) => {
            y.len().cmp(&x.len()).then_with(|| x.cmp(y)).then(y_slash.cmp(x_slash))
        }
        _ => b_path.len().cmp(&a_path.len()).then_with(|| b_path.cmp(a_path)),
    })
}

/// Builds the lookups of a host from its order.
fn index(host: &mut Host, rules: &[Rule]) {
    for &rule in &host.order {
        match &rules[rule].matcher {
            Matcher::Exact(path) => {
                host.exact.entry(path.as_bytes().into()).or_insert(rule);
            }
            Matcher::Prefix(path, slash) => {
                let entry = host.prefix.entry(path.as_bytes().into()).or_default();
                let slot = if *slash { &mut entry.slash } else { &mut entry.bare };
                slot.get_or_insert(rule);
            }
            Matcher::Start(..) | Matcher::Regex(_) => host.scanned.push(rule),
        }
    }
}
