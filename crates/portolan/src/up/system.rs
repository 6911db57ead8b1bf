//! Applies the manifests of the system components: cluster DNS and the Ingress controller.

use anyhow::{Context, Result};
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::Value;

const DNS: &str = include_str!("../../system/dns.yaml");
const INGRESS: &str = include_str!("../../system/ingress.yaml");

/// Kinds in the system manifests: plural and whether namespaced. Written down so that applying needs no discovery round trip.
const PLURALS: &[(&str, &str, bool)] = &[
    ("Namespace", "namespaces", false),
    ("ServiceAccount", "serviceaccounts", true),
    ("ClusterRole", "clusterroles", false),
    ("ClusterRoleBinding", "clusterrolebindings", false),
    ("IngressClass", "ingressclasses", false),
    ("Deployment", "deployments", true),
    ("Service", "services", true),
];

/// Applies all system manifests. `dns_upstreams` are passed to the DNS server.
pub async fn apply(client: &kube::Client, dns_upstreams: &[std::net::SocketAddr]) -> Result<()> {
    for mut object in manifests()? {
        if object["kind"] == "Deployment" && object["metadata"]["name"] == "coredns" {
            let args = object.pointer_mut("/spec/template/spec/containers/0/args").and_then(Value::as_array_mut);
            if let Some(args) = args {
                args.extend(dns_upstreams.iter().map(|a| Value::String(format!("--upstream={a}"))));
            }
        }
        apply_one(client, object).await?;
    }
    Ok(())
}

fn manifests() -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    for (file, text) in [("dns.yaml", DNS), ("ingress.yaml", INGRESS)] {
        let parsed: Vec<Value> = serde_saphyr::from_multiple(text).with_context(|| format!("cannot parse {file}"))?;
        objects.extend(parsed);
    }
    Ok(objects)
}

async fn apply_one(client: &kube::Client, object: Value) -> Result<()> {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_string();
    let (kind, name, namespace) = (text("/kind"), text("/metadata/name"), text("/metadata/namespace"));
    let (plural, namespaced) = PLURALS
        .iter()
        .find(|(k, ..)| *k == kind)
        .map(|(_, plural, namespaced)| (*plural, *namespaced))
        .with_context(|| format!("system manifest of unknown kind {kind}"))?;
    let api_version = text("/apiVersion");
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", &api_version));
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, &kind), plural);
    let api: Api<DynamicObject> = if namespaced {
        Api::namespaced_with(client.clone(), &namespace, &resource)
    } else {
        Api::all_with(client.clone(), &resource)
    };
    let parameters = PatchParams::apply("portolan").force();
    api.patch(&name, &parameters, &Patch::Apply(&object))
        .await
        .with_context(|| format!("cannot apply system manifest {kind} {namespace}/{name}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_manifests_have_known_kinds_and_names() {
        let objects = manifests().unwrap();
        assert!(objects.len() > 10);
        for object in objects {
            let kind = object["kind"].as_str().unwrap();
            let (_, _, namespaced) = PLURALS.iter().find(|(k, ..)| *k == kind).unwrap();
            assert_eq!(object["metadata"]["namespace"].is_string(), *namespaced, "{object}");
            assert!(object["metadata"]["name"].is_string());
        }
    }
}
