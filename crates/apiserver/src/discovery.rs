//! What is served, as clients discover it: the old documents and the aggregated ones.

use http::Response;
use portolan_api::kinds::{Kind, Registry};
use portolan_api::status::Status;
use serde_json::{Value, json};

use crate::catalog::Catalog;
use crate::negotiate;
use crate::response::{Body, failure, json, no_such_page};
use crate::server::cached_answer;

/// Answers `/api` and `/apis`.
pub fn groups(catalog: &Catalog, core: bool, accept: &str, headers: &http::HeaderMap, address: &str) -> Response<Body> {
    if let Some(version) = negotiate::aggregated_discovery(accept) {
        let name = format!("discovery/{version}/{core}");
        let document =
            catalog.document(&name, || aggregated(&catalog.registry, core, version).to_string().into_bytes());
        let content_type = format!("application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList");
        return cached_answer(&document, headers, &content_type, &format!("\"{}\"", document.hash));
    }
    if core {
        let servers = json!([{"clientCIDR": "0.0.0.0/0", "serverAddress": address}]);
        return json(200, &json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": servers}));
    }
    let groups: Vec<Value> =
        named_groups(&catalog.registry).map(|(name, versions)| group_value(&name, &versions)).collect();
    json(200, &json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}))
}

fn named_groups(registry: &Registry) -> impl Iterator<Item = (String, Vec<String>)> {
    registry.groups().into_iter().filter(|(name, _)| !name.is_empty())
}

fn group_value(name: &str, versions: &[String]) -> Value {
    let version = |version: &String| json!({"groupVersion": format!("{name}/{version}"), "version": version});
    json!({
        "name": name,
        "versions": versions.iter().map(version).collect::<Vec<_>>(),
        "preferredVersion": versions.first().map(version),
    })
}

/// Answers `/apis/GROUP`.
pub fn group(catalog: &Catalog, name: &str) -> Response<Body> {
    let Some((name, versions)) = named_groups(&catalog.registry).find(|(n, _)| n == name) else {
        return no_such_page();
    };
    let mut value = group_value(&name, &versions);
    value["kind"] = json!("APIGroup");
    value["apiVersion"] = json!("v1");
    json(200, &value)
}

/// Answers `/api/v1` and `/apis/GROUP/VERSION`.
pub fn version(catalog: &Catalog, group: &str, version: &str) -> Response<Body> {
    let groups = catalog.registry.groups();
    let Some((_, versions)) = groups.iter().find(|(name, _)| name == group) else { return no_such_page() };
    if !versions.iter().any(|v| v == version) {
        let custom = catalog.registry.iter().any(|kind| kind.group == group && kind.custom);
        return if custom { no_such_page() } else { failure(&Status::unknown_resource()) };
    }
    let mut resources = Vec::new();
    for kind in catalog.registry.in_version(group, version) {
        resources.push(resource_value(kind));
        resources.extend(kind.subresources.iter().map(|sub| {
            let mut value = json!({
                "name": format!("{}/{}", kind.plural, sub.name),
                "singularName": "",
                "namespaced": kind.namespaced,
                "kind": sub.kind,
                "verbs": sub.verbs,
            });
            if let Some((group, version)) = &sub.group_version {
                value["group"] = json!(group);
                value["version"] = json!(version);
            }
            value
        }));
    }
    let group_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    json(
        200,
        &json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}),
    )
}

fn resource_value(kind: &Kind) -> Value {
    let mut value = json!({
        "name": kind.plural,
        "singularName": kind.singular,
        "namespaced": kind.namespaced,
        "kind": kind.kind,
        "verbs": kind.verbs,
    });
    add_names(kind, &mut value);
    value
}

fn add_names(kind: &Kind, value: &mut Value) {
    if !kind.short_names.is_empty() {
        value["shortNames"] = json!(kind.short_names);
    }
    if !kind.categories.is_empty() {
        value["categories"] = json!(kind.categories);
    }
}

/// `APIGroupDiscoveryList` of the core group or of all others.
fn aggregated(registry: &Registry, core: bool, api_version: &str) -> Value {
    let groups = registry.groups().into_iter().filter(|(name, _)| name.is_empty() == core);
    let items: Vec<Value> = groups
        .map(|(name, versions)| {
            let versions: Vec<Value> = versions
                .iter()
                .map(|version| {
                    let resources: Vec<Value> = registry.in_version(&name, version).map(|k| discovered(k)).collect();
                    json!({"version": version, "freshness": "Current", "resources": resources})
                })
                .collect();
            let metadata = if name.is_empty() { json!({}) } else { json!({"name": name}) };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": format!("apidiscovery.k8s.io/{api_version}"),
        "metadata": {},
        "items": items,
    })
}

fn discovered(kind: &Kind) -> Value {
    let response_kind = |name: &str, group_version: Option<&(String, String)>| {
        let (group, version) = group_version.map_or(("", ""), |(group, version)| (group.as_str(), version.as_str()));
        json!({"group": group, "version": version, "kind": name})
    };
    let own = (kind.group.clone(), kind.version.clone());
    let mut value = json!({
        "resource": kind.plural,
        "responseKind": response_kind(&kind.kind, Some(&own)),
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": kind.singular,
        "verbs": kind.verbs,
    });
    add_names(kind, &mut value);
    if !kind.subresources.is_empty() {
        let subresources: Vec<Value> = kind
            .subresources
            .iter()
            .map(|sub| {
                let of = sub.group_version.as_ref().unwrap_or(&own);
                json!({"subresource": sub.name, "responseKind": response_kind(&sub.kind, Some(of)), "verbs": sub.verbs})
            })
            .collect();
        value["subresources"] = Value::Array(subresources);
    }
    value
}
