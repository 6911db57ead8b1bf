//! The registry of kinds: one table entry for every kind the API server serves.
//!
//! The table says what discovery tells clients (names, scope, verbs, subresources) and how the kind behaves in the
//! request pipeline (generation, create on update, what a deletion answers). What the fields of a kind look like is
//! the schema's business, what values they may have is [`crate::validation`]'s. Kinds that come from a
//! CustomResourceDefinition are added to a [`Registry`] at run time with [`Registry::insert`].

mod builtin;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// Everything the request pipeline and discovery need to know about one kind in one API version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kind {
    /// API group, empty for the core group.
    pub group: String,
    /// API version within the group, such as `v1`.
    pub version: String,
    /// Resource name in URLs, such as `endpointslices`.
    pub plural: String,
    /// Singular resource name, such as `endpointslice`.
    pub singular: String,
    /// Kind name, such as `EndpointSlice`.
    pub kind: String,
    /// Kind of a collection, such as `EndpointSliceList`.
    pub list_kind: String,
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// Short names kubectl resolves, such as `svc`.
    pub short_names: Vec<String>,
    /// Categories, such as `all` for `kubectl get all`.
    pub categories: Vec<String>,
    /// Verbs of the resource itself, sorted.
    pub verbs: Vec<String>,
    /// Subresources, sorted by name.
    pub subresources: Vec<Subresource>,
    /// Rule for `metadata.name`.
    pub name_rule: NameRule,
    /// When `metadata.generation` starts at 1 and grows.
    pub generation: Generation,
    /// A PUT to an absent name creates the object.
    pub create_on_update: bool,
    /// A PUT without `metadata.resourceVersion` overwrites whatever is stored.
    pub unconditional_update: bool,
    /// A completed deletion answers the deleted object instead of a Status.
    pub delete_returns_object: bool,
    /// What a deletion without a propagation policy does to dependents.
    pub default_propagation: Propagation,
    /// Where the objects are stored; reviews and bindings are answered and forgotten.
    pub storage: Storage,
    /// Whether the kind comes from a CustomResourceDefinition.
    pub custom: bool,
}

/// One subresource of a kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subresource {
    /// Last path segment, such as `status`.
    pub name: String,
    /// Kind of request and response bodies.
    pub kind: String,
    /// Group and version of that kind when they differ from the parent's.
    pub group_version: Option<(String, String)>,
    /// Verbs, sorted.
    pub verbs: Vec<String>,
}

/// Syntax that `metadata.name` must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameRule {
    /// DNS-1123 subdomain, at most 253 characters.
    Subdomain,
    /// DNS-1123 label, at most 63 characters.
    Label,
    /// Any single URL path segment (RBAC).
    PathSegment,
    /// Canonical text of an IP address (IPAddress).
    IpAddress,
}

/// When `metadata.generation` changes (Kubernetes API conventions, "Metadata").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// The server never touches the field.
    None,
    /// Starts at 1 and grows when anything outside `metadata` and `status` changes.
    Spec,
    /// As `Spec`, but labels count too (EndpointSlice).
    SpecAndLabels,
}

/// What happens to dependents when a deletion does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    /// Dependents are collected afterwards.
    Background,
    /// Dependents are kept and lose their owner reference.
    Orphan,
}

/// Where objects of a kind live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Storage {
    /// In the store, under their own group and plural.
    Own,
    /// In the store as another kind's objects, converted at the edge.
    SharedWith {
        /// Group of the kind that owns the storage.
        group: String,
        /// Version of the kind that owns the storage.
        version: String,
        /// Plural of the kind that owns the storage.
        plural: String,
    },
    /// Not stored: a request computes its answer.
    Virtual,
}

impl Kind {
    /// `v1` or `apps/v1`, as in `apiVersion`.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// `pods` or `deployments.apps`, as in the texts of errors.
    pub fn qualified_resource(&self) -> String {
        qualified(&self.plural, &self.group)
    }

    /// `Pod` or `Deployment.apps`, as in the texts of validation errors.
    pub fn qualified_kind(&self) -> String {
        qualified(&self.kind, &self.group)
    }

    /// Whether this is the built-in kind with this group and name.
    pub fn is(&self, group: &str, kind: &str) -> bool {
        !self.custom && self.group == group && self.kind == kind
    }

    /// The subresource with this name.
    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|s| s.name == name)
    }

    /// Whether the kind has a `/status` subresource, so that status and the rest are written separately.
    pub fn has_status(&self) -> bool {
        self.subresource("status").is_some()
    }

    /// Whether the resource itself allows this verb.
    pub fn allows(&self, verb: &str) -> bool {
        self.verbs.iter().any(|v| v == verb)
    }
}

fn qualified(name: &str, group: &str) -> String {
    if group.is_empty() { name.to_owned() } else { format!("{name}.{group}") }
}

impl fmt::Display for Kind {
    /// `/v1, Kind=Pod`, as Kubernetes prints a group, version and kind.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}, Kind={}", self.group, self.version, self.kind)
    }
}

/// All kinds served, findable by resource and by kind.
///
/// A value: the server keeps one behind a pointer it swaps when a CustomResourceDefinition changes.
#[derive(Clone, Debug, Default)]
pub struct Registry {
    /// By (group, version, plural), which is also the order of discovery within a version.
    by_resource: BTreeMap<(String, String, String), Arc<Kind>>,
    by_kind: BTreeMap<(String, String, String), Arc<Kind>>,
}

impl Registry {
    /// The registry of the built-in kinds.
    pub fn builtin() -> Registry {
        let mut registry = Registry::default();
        for kind in builtin::kinds() {
            registry.insert(kind);
        }
        registry
    }

    /// Adds a kind, replacing one with the same group, version and plural. Returns the shared entry.
    pub fn insert(&mut self, kind: Kind) -> Arc<Kind> {
        let kind = Arc::new(kind);
        let resource = (kind.group.clone(), kind.version.clone(), kind.plural.clone());
        let name = (kind.group.clone(), kind.version.clone(), kind.kind.clone());
        if let Some(old) = self.by_resource.insert(resource, kind.clone()) {
            self.by_kind.remove(&(old.group.clone(), old.version.clone(), old.kind.clone()));
        }
        self.by_kind.insert(name, kind.clone());
        kind
    }

    /// Removes a kind; nothing happens if it is not there.
    pub fn remove(&mut self, group: &str, version: &str, plural: &str) {
        let resource = (group.to_owned(), version.to_owned(), plural.to_owned());
        if let Some(old) = self.by_resource.remove(&resource) {
            self.by_kind.remove(&(old.group.clone(), old.version.clone(), old.kind.clone()));
        }
    }

    /// The kind served at this group, version and plural resource name.
    pub fn by_gvr(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Kind>> {
        self.by_resource.get(&(group.to_owned(), version.to_owned(), plural.to_owned()))
    }

    /// The kind with this group, version and kind name.
    pub fn by_gvk(&self, group: &str, version: &str, kind: &str) -> Option<&Arc<Kind>> {
        self.by_kind.get(&(group.to_owned(), version.to_owned(), kind.to_owned()))
    }

    /// The kind an object's `apiVersion` and `kind` name.
    pub fn by_type_meta(&self, api_version: &str, kind: &str) -> Option<&Arc<Kind>> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        self.by_gvk(group, version, kind)
    }

    /// The entry whose storage this kind uses: itself, or the one it shares with; `None` for a virtual kind.
    pub fn storage_of<'a>(&'a self, kind: &'a Arc<Kind>) -> Option<&'a Arc<Kind>> {
        match &kind.storage {
            Storage::Own => Some(kind),
            Storage::SharedWith { group, version, plural } => self.by_gvr(group, version, plural),
            Storage::Virtual => None,
        }
    }

    /// All kinds, ordered by group, version and plural.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Kind>> {
        self.by_resource.values()
    }

    /// The kinds of one group and version, ordered by plural.
    pub fn in_version<'a>(&'a self, group: &'a str, version: &'a str) -> impl Iterator<Item = &'a Arc<Kind>> {
        self.iter().filter(move |k| k.group == group && k.version == version)
    }

    /// The groups in the order of discovery, the core group (empty name) first, each with its versions, the preferred
    /// one first. A group version may have no resource of its own: `autoscaling/v1` only holds the Scale kind.
    pub fn groups(&self) -> Vec<(String, Vec<String>)> {
        let mut groups: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (group, version) in
            self.iter().map(|k| (k.group.as_str(), k.version.as_str())).chain(builtin::EXTRA_VERSIONS.iter().copied())
        {
            let versions = groups.entry(group).or_default();
            if !versions.iter().any(|v| v == version) {
                versions.push(version.to_owned());
            }
        }
        let mut ordered: Vec<(String, Vec<String>)> = groups
            .into_iter()
            .map(|(group, mut versions)| {
                versions.sort_by_key(|version| std::cmp::Reverse(version_rank(version)));
                (group.to_owned(), versions)
            })
            .collect();
        ordered.sort_by_key(|(group, _)| {
            let place = builtin::GROUP_ORDER.iter().position(|g| g == group);
            (place.unwrap_or(builtin::GROUP_ORDER.len()), group.clone())
        });
        ordered
    }

    /// Whether any served kind or subresource kind belongs to this group.
    pub fn has_group(&self, group: &str) -> bool {
        self.iter().any(|k| k.group == group) || builtin::EXTRA_VERSIONS.iter().any(|(g, _)| *g == group)
    }
}

/// Rank of a version name: stable before beta before alpha, then the higher number (Kubernetes "version priority").
fn version_rank(version: &str) -> (u8, u32, u32, std::cmp::Reverse<String>) {
    let digits = |text: &str| -> Option<(u32, usize)> {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        text[..end].parse().ok().map(|n| (n, end))
    };
    let unknown = (0, 0, 0, std::cmp::Reverse(version.to_owned()));
    let Some(rest) = version.strip_prefix('v') else { return unknown };
    let Some((major, end)) = digits(rest) else { return unknown };
    let tail = &rest[end..];
    if tail.is_empty() {
        return (3, major, 0, std::cmp::Reverse(String::new()));
    }
    for (prefix, class) in [("beta", 2), ("alpha", 1)] {
        if let Some((minor, used)) = tail.strip_prefix(prefix).and_then(|t| digits(t).map(|(n, e)| (n, e == t.len())))
            && used
        {
            return (class, major, minor, std::cmp::Reverse(String::new()));
        }
    }
    unknown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_is_findable_by_resource_and_by_kind() {
        let registry = Registry::builtin();
        assert!(registry.iter().count() > 40);
        for kind in registry.iter() {
            assert_eq!(registry.by_gvr(&kind.group, &kind.version, &kind.plural), Some(kind));
            assert_eq!(registry.by_gvk(&kind.group, &kind.version, &kind.kind), Some(kind));
            let mut sorted = kind.verbs.clone();
            sorted.sort();
            assert_eq!(kind.verbs, sorted, "{kind}");
            assert!(kind.subresources.is_sorted_by(|a, b| a.name < b.name), "{kind}");
        }
    }

    #[test]
    fn versions_are_ordered_stable_first_then_by_number() {
        let mut versions = vec!["v1alpha1", "v2", "v1", "v1beta2", "v1beta1", "v10", "foo"];
        versions.sort_by_key(|version| std::cmp::Reverse(version_rank(version)));
        assert_eq!(versions, ["v10", "v2", "v1", "v1beta2", "v1beta1", "v1alpha1", "foo"]);
    }

    #[test]
    fn names_in_errors_carry_the_group_unless_it_is_core() {
        let registry = Registry::builtin();
        let deployment = registry.by_gvr("apps", "v1", "deployments").expect("built in");
        assert_eq!(deployment.qualified_resource(), "deployments.apps");
        assert_eq!(deployment.qualified_kind(), "Deployment.apps");
        let pod = registry.by_type_meta("v1", "Pod").expect("built in");
        assert_eq!((pod.qualified_resource().as_str(), pod.to_string().as_str()), ("pods", "/v1, Kind=Pod"));
    }

    #[test]
    fn events_of_both_groups_share_one_storage() {
        let registry = Registry::builtin();
        let newer = registry.by_gvr("events.k8s.io", "v1", "events").expect("built in");
        let core = registry.by_gvr("", "v1", "events").expect("built in");
        assert_eq!(registry.storage_of(newer), Some(core));
        let review = registry.by_gvr("authentication.k8s.io", "v1", "tokenreviews").expect("built in");
        assert_eq!(registry.storage_of(review), None);
    }

    #[test]
    fn groups_come_in_discovery_order_with_core_first() {
        let groups = Registry::builtin().groups();
        assert_eq!(groups[0].0, "");
        assert_eq!(groups[1].0, "events.k8s.io");
        let autoscaling = groups.iter().find(|(g, _)| g == "autoscaling").expect("served for Scale");
        assert_eq!(autoscaling.1, ["v2", "v1"]);
    }
}
