//! Addresses in the status of Ingresses: where they come from, how they are written.

use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{ObjectReference, Service};
use k8s_openapi::api::networking::v1::{Ingress, IngressLoadBalancerIngress};
use kube::api::{Api, Patch, PatchParams};
use portolan_plan::world::ObjectKey;

/// Writes at once.
const PARALLEL: usize = 10;

/// The addresses under which a Service is reached from outside, sorted (ingress.md 1.10).
pub(crate) fn addresses(service: &Service) -> Vec<IngressLoadBalancerIngress> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let ip = |ip: &String| IngressLoadBalancerIngress { ip: Some(ip.clone()), ..Default::default() };
    let external = || spec.external_ips.iter().flatten().map(ip);
    let cluster = || spec.cluster_ip.iter().filter(|ip| !ip.is_empty() && *ip != "None").map(ip);
    let mut found: Vec<IngressLoadBalancerIngress> = match spec.type_.as_deref() {
        Some("ExternalName") => spec
            .external_name
            .iter()
            .map(|name| IngressLoadBalancerIngress { hostname: Some(name.clone()), ..Default::default() })
            .collect(),
        Some("LoadBalancer") => {
            let status = service.status.as_ref().and_then(|s| s.load_balancer.as_ref());
            status
                .and_then(|lb| lb.ingress.as_ref())
                .into_iter()
                .flatten()
                .map(|i| IngressLoadBalancerIngress { ip: i.ip.clone(), hostname: i.hostname.clone(), ports: None })
                .chain(external())
                .collect()
        }
        Some("NodePort") if spec.external_ips.iter().flatten().next().is_some() => external().collect(),
        _ => cluster().collect(),
    };
    sort(&mut found);
    found.dedup();
    found
}

fn sort(addresses: &mut [IngressLoadBalancerIngress]) {
    addresses.sort_by(|a, b| (&a.hostname, &a.ip).cmp(&(&b.hostname, &b.ip)));
}

/// The addresses that an Ingress has, sorted.
pub(crate) fn current(ingress: &Ingress) -> Vec<IngressLoadBalancerIngress> {
    let status = ingress.status.as_ref().and_then(|s| s.load_balancer.as_ref());
    let mut found: Vec<_> = status
        .and_then(|lb| lb.ingress.clone())
        .unwrap_or_default()
        .into_iter()
        .map(|i| IngressLoadBalancerIngress { ports: None, ..i })
        .collect();
    sort(&mut found);
    found
}

/// Writes the status of Ingresses. What fails is written at the next occasion.
pub(crate) async fn write(client: kube::Client, writes: Vec<(ObjectKey, Vec<IngressLoadBalancerIngress>)>) {
    let one = |(key, addresses): (ObjectKey, Vec<IngressLoadBalancerIngress>)| {
        let api: Api<Ingress> = Api::namespaced(client.clone(), &key.namespace);
        async move {
            let ingress = if addresses.is_empty() { serde_json::Value::Null } else { serde_json::json!(addresses) };
            let patch = serde_json::json!({"status": {"loadBalancer": {"ingress": ingress}}});
            let mut pause = Duration::from_millis(100);
            for attempt in 1.. {
                match api.patch_status(&key.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
                    Ok(_) => {
                        tracing::info!(ingress = %key, "status written");
                        break;
                    }
                    // Deleted meanwhile.
                    Err(kube::Error::Api(status)) if status.code == 404 => break,
                    Err(error) if attempt == 5 => {
                        tracing::warn!(ingress = %key, %error, "cannot write status");
                        break;
                    }
                    Err(_) => {
                        tokio::time::sleep(pause).await;
                        pause *= 3;
                    }
                }
            }
        }
    };
    futures::stream::iter(writes).map(one).buffer_unordered(PARALLEL).collect::<Vec<()>>().await;
}

/// The object of an event about an Ingress.
pub(crate) fn reference(ingress: &Ingress) -> ObjectReference {
    ObjectReference {
        api_version: Some("networking.k8s.io/v1".into()),
        kind: Some("Ingress".into()),
        namespace: ingress.metadata.namespace.clone(),
        name: ingress.metadata.name.clone(),
        uid: ingress.metadata.uid.clone(),
        resource_version: ingress.metadata.resource_version.clone(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_the_type_of_the_service() {
        let of = |spec: serde_json::Value, status: serde_json::Value| {
            let service: Service =
                serde_json::from_value(serde_json::json!({"spec": spec, "status": status})).expect("a Service");
            addresses(&service).into_iter().map(|a| a.ip.or(a.hostname).unwrap_or_default()).collect::<Vec<_>>()
        };
        let none = serde_json::json!({});
        let table = [
            (
                serde_json::json!({"type": "LoadBalancer", "clusterIP": "10.96.0.1", "externalIPs": ["192.0.2.9"]}),
                serde_json::json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.9"}, {"ip": "192.0.2.1", "ipMode": "VIP"}, {"hostname": "lb.example"}]}}),
                vec!["192.0.2.1", "192.0.2.9", "lb.example"],
            ),
            (serde_json::json!({"type": "LoadBalancer", "clusterIP": "10.96.0.1"}), none.clone(), vec![]),
            (serde_json::json!({"type": "NodePort", "clusterIP": "10.96.0.1"}), none.clone(), vec!["10.96.0.1"]),
            (
                serde_json::json!({"type": "NodePort", "clusterIP": "10.96.0.1", "externalIPs": ["192.0.2.9"]}),
                none.clone(),
                vec!["192.0.2.9"],
            ),
            (serde_json::json!({"clusterIP": "10.96.0.1"}), none.clone(), vec!["10.96.0.1"]),
            (serde_json::json!({"clusterIP": "None"}), none.clone(), vec![]),
            (serde_json::json!({"type": "ExternalName", "externalName": "lb.example"}), none, vec!["lb.example"]),
        ];
        for (spec, status, expected) in table {
            assert_eq!(of(spec.clone(), status), expected, "{spec}");
        }
    }
}
