//! Compiles Ingresses to a table of hosts and rules, and evaluates requests against it.
//!
//! Input are Ingresses, IngressClasses and what is known of the certificates they name; output is a [`RouteTable`] that the gateway
//! and `portolan trace` share, and findings that become events. Backends are named, not resolved: [`upstream`] turns a Service and
//! its EndpointSlices into addresses, so that an endpoint that comes or goes never rebuilds a route.
//!
//! Two profiles exist. `NginxCompat` reproduces ingress-nginx, quirks included, for classes of its controller; `Strict` follows
//! the Ingress API alone.

pub mod annotations;
mod compile;
mod eval;
pub mod host;
pub mod path;
#[cfg(test)]
mod tests;
pub mod upstream;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use k8s_openapi::api::networking::v1::{Ingress, IngressClass};
use regex::bytes::Regex;
use serde::{Deserialize, Serialize};

pub use annotations::Policy;
pub use compile::{class_of, compile};
pub use eval::{Candidate, Decision, Explanation, Forward, Head, Refusal, decide, explain};
pub use upstream::{Absence, BackendService, BackendSlice, PortRef, Upstream, UpstreamKey};

use crate::finding::Finding;
use crate::origin::Origin;
use crate::world::ObjectKey;

/// Whose semantics an Ingress gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Profile {
    /// ingress-nginx, quirk for quirk.
    NginxCompat,
    /// The Ingress API and nothing else.
    Strict,
}

/// A controller name that is claimed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerClass {
    /// `spec.controller` of the IngressClasses that are ours.
    pub controller: String,
    /// Value of the annotation `kubernetes.io/ingress.class` that means the same.
    pub ingress_class: String,
    /// Semantics of its Ingresses.
    pub profile: Profile,
}

/// How to compile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The controllers that are claimed; the first one takes Ingresses without a class.
    pub controllers: Vec<ControllerClass>,
    /// An IngressClass named like a controller's `ingress_class` is ours whatever its controller.
    pub ingress_class_by_name: bool,
    /// Ingresses without any class are ours.
    pub watch_ingress_without_class: bool,
    /// Ingresses with `spec.defaultBackend` are ignored.
    pub disable_catch_all: bool,
    /// Service for requests that no rule matches.
    pub default_backend_service: Option<ObjectKey>,
    /// Status of redirects to HTTPS and between `www.` names.
    pub redirect_code: u16,
    /// The time, in seconds since 1970, for the expiry of certificates.
    pub now: i64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            controllers: vec![
                ControllerClass {
                    controller: "k8s.io/ingress-nginx".into(),
                    ingress_class: "nginx".into(),
                    profile: Profile::NginxCompat,
                },
                ControllerClass {
                    controller: "portolan.dev/ingress".into(),
                    ingress_class: "portolan".into(),
                    profile: Profile::Strict,
                },
            ],
            ingress_class_by_name: false,
            watch_ingress_without_class: false,
            disable_catch_all: false,
            default_backend_service: None,
            redirect_code: 308,
            now: 0,
        }
    }
}

/// What the compiler needs to know of a certificate; parsing and checking the key is its holder's work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// DNS names of the subject alternative name extension.
    pub dns_names: Vec<String>,
    /// The subject's common name: ingress-nginx still accepts it as a host.
    pub common_name: Option<String>,
    /// End of validity, in seconds since 1970.
    pub not_after: i64,
}

/// Everything the routes are compiled from.
#[derive(Clone, Debug, Default)]
pub struct Input {
    /// All Ingresses, ours or not.
    pub ingresses: Vec<Arc<Ingress>>,
    /// All IngressClasses.
    pub classes: Vec<Arc<IngressClass>>,
    /// Certificates of Secrets by name, or why a Secret holds none. A Secret that is not here does not exist.
    pub certificates: BTreeMap<ObjectKey, Result<Certificate, String>>,
}

/// The result of compiling.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// The routes.
    pub table: RouteTable,
    /// What is wrong with which object, sorted.
    pub findings: Vec<Finding>,
    /// Our Ingresses that deserve an address in their status, sorted.
    pub accepted: Vec<ObjectKey>,
    /// Secrets that our Ingresses name, whether they exist or not, sorted.
    pub secrets: Vec<ObjectKey>,
}

/// Index of a backend in [`RouteTable::upstreams`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct UpstreamId(pub usize);

/// Hosts and rules, ready for lookups.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    /// The hosts, sorted by name; the catch-all host has the empty name and is always there in a compiled table.
    pub hosts: Vec<Host>,
    /// Every rule of every host.
    pub rules: Vec<Rule>,
    /// The backends that rules refer to.
    pub upstreams: Vec<UpstreamKey>,
    /// The rule for requests that no other matches, if a default backend is configured.
    pub fallback: Option<usize>,
    /// Status of redirects to HTTPS and between `www.` names.
    pub redirect_code: u16,
    names: HashMap<Box<str>, Name>,
    wildcards: HashMap<Box<str>, usize>,
    catch_all: Option<usize>,
}

/// What a host name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    /// A host, by index.
    Host(usize),
    /// A redirect to this name.
    Redirect(String),
}

/// TLS of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostTls {
    /// The Secret with a certificate that covers the host; `None` for the default certificate.
    pub secret: Option<ObjectKey>,
    /// The Ingress field that asks for TLS.
    pub origin: Origin,
}

/// One host and the order in which its rules are tried.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Host {
    /// The name as in the rule, in lower case: exact, `*.` and a parent, or empty for all others.
    pub name: String,
    /// Rules by precedence, as indices into [`RouteTable::rules`]: the first that matches wins.
    pub order: Vec<usize>,
    /// The rule for paths that none of `order` matches.
    pub default: Option<usize>,
    /// TLS, if any Ingress asks for it.
    pub tls: Option<HostTls>,
    /// Where `/` is redirected.
    pub app_root: Option<AppRoot>,
    /// The host answers 403: a demand for client certificates that cannot be met.
    pub closed: bool,
    /// Paths are regular expressions because of some Ingress.
    pub regex_mode: bool,
    /// Paths that a backend may read differently are refused, and no redirects add slashes.
    pub strict: bool,
    #[serde(skip)]
    exact: HashMap<Box<[u8]>, usize>,
    #[serde(skip)]
    prefix: HashMap<Box<[u8]>, PrefixRules>,
    /// Rules that must be tried one by one.
    #[serde(skip)]
    scanned: Vec<usize>,
}

/// A redirect of the host's root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AppRoot {
    /// Absolute path.
    pub path: String,
    /// Whether the location is sent without scheme and host.
    pub relative: bool,
    /// Who asks for it.
    pub origin: Origin,
}

/// The rules for one prefix without its final slash.
#[derive(Clone, Copy, Debug, Default)]
struct PrefixRules {
    /// Written without a final slash.
    bare: Option<usize>,
    /// Written with a final slash.
    slash: Option<usize>,
}

/// Path types of the Ingress API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum PathType {
    /// Equality.
    Exact,
    /// By path element.
    Prefix,
    /// Up to the class.
    ImplementationSpecific,
}

/// How a rule's path is compared with a normalised request path.
#[derive(Clone, Debug, Serialize)]
pub enum Matcher {
    /// Equal.
    Exact(String),
    /// Equal or followed by a slash; without its final slash, so that `/` is empty. The flag says whether it was written with one.
    Prefix(String, bool),
    /// Begins with this text: a regular expression without special characters. The flag says whether case is ignored.
    Start(String, bool),
    /// A regular expression anchored at the start.
    Regex(#[serde(serialize_with = "regex_text")] Regex),
}

fn regex_text<S: serde::Serializer>(regex: &Regex, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(regex.as_str())
}

/// One path of one Ingress.
#[derive(Clone, Debug, Serialize)]
pub struct Rule {
    /// The Ingress and field.
    pub origin: Origin,
    /// The Ingress.
    pub ingress: ObjectKey,
    /// The host as written; empty for all.
    pub host: String,
    /// The path as written.
    pub path: String,
    /// The path's type as written.
    pub path_type: PathType,
    /// How it is compared.
    pub matcher: Matcher,
    /// Settings from annotations.
    #[serde(skip)]
    pub policy: Arc<Policy>,
    /// Semantics.
    pub profile: Profile,
    /// The backend.
    pub upstream: UpstreamId,
    /// Backend for when that has no endpoint.
    pub default_backend: Option<UpstreamId>,
    /// The path is replaced by the policy's rewrite target.
    pub rewrite: bool,
}

impl RouteTable {
    /// The host for a normalised name: exact, then wildcard for one label, then the catch-all host.
    pub fn host(&self, name: &str) -> Option<&Host> {
        match self.name(name) {
            Some(Name::Host(index)) => self.hosts.get(*index),
            Some(Name::Redirect(_)) => None,
            None => self.wildcard(name).or(self.catch_all).and_then(|index| self.hosts.get(index)),
        }
    }

    /// The host that a TLS client means, for the choice of a certificate.
    pub fn host_by_server_name(&self, name: Option<&str>) -> Option<&Host> {
        let Some(name) = name else { return self.catch_all_host() };
        match self.name(name) {
            // The redirect uses the certificate of its target, which often covers both names.
            Some(Name::Redirect(target)) => self.host(target),
            _ => self.host(name),
        }
    }

    /// The host for requests that no other host takes.
    pub fn catch_all_host(&self) -> Option<&Host> {
        self.catch_all.and_then(|index| self.hosts.get(index))
    }

    fn name(&self, name: &str) -> Option<&Name> {
        self.names.get(name)
    }

    fn wildcard(&self, name: &str) -> Option<usize> {
        let (label, parent) = name.split_once('.')?;
        if !host::is_wildcard_label(label) {
            return None;
        }
        self.wildcards.get(parent).copied()
    }

    /// The rules that refer to each upstream, for findings about it.
    pub fn origins(&self, upstream: UpstreamId) -> Vec<Origin> {
        let mut origins: Vec<Origin> = self
            .rules
            .iter()
            .filter(|r| r.upstream == upstream && r.ingress != ObjectKey::new("", ""))
            .map(|r| r.origin.clone())
            .collect();
        origins.sort();
        origins.dedup();
        origins
    }
}
