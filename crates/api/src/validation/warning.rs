//! Warnings that accompany an accepted write.

use serde_json::Value;
use std::collections::BTreeSet;

use super::service::TOPOLOGY_HINTS;
use super::strings;
use crate::kinds::Kind;
use crate::meta;
use crate::service as svc;

/// The warning on every request about Endpoints objects.
pub const ENDPOINTS_DEPRECATED: &str = "v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice";

/// Reads a document before or after defaulting; what is not there is not warned of.
pub(super) fn of(kind: &Kind, new: &Value, old: Option<&Value>) -> Vec<String> {
    let mut texts = Vec::new();
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Service") => service(&mut texts, new),
        ("", "Endpoints") => {
            texts.push(ENDPOINTS_DEPRECATED.to_owned());
            endpoints(&mut texts, new);
        }
        ("", "Pod") => pod(&mut texts, "spec", meta::get(new, &["spec"])),
        ("", "ReplicationController") | ("apps", "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet") => {
            pod(&mut texts, "spec.template.spec", meta::get(new, &["spec", "template", "spec"]));
        }
        ("networking.k8s.io", "Ingress") => ingress(&mut texts, new, old),
        ("networking.k8s.io", "NetworkPolicy") => policy(&mut texts, new),
        ("discovery.k8s.io", "EndpointSlice") if meta::text(new, &["addressType"]) == "FQDN" => {
            texts.push("spec.addressType: FQDN endpoints are deprecated".to_owned());
        }
        _ => {}
    }
    texts
}

/// Warnings of a write to `/status`, which says nothing about the rest of the object.
pub(super) fn of_status(kind: &Kind, new: &Value) -> Vec<String> {
    let mut texts = Vec::new();
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Service") | ("networking.k8s.io", "Ingress") => {
            let field = "status.loadBalancer.ingress";
            for (i, entry) in meta::list(new, &["status", "loadBalancer", "ingress"]).iter().enumerate() {
                unusual_ip(&mut texts, &format!("{field}[{i}]"), meta::text(entry, &["ip"]));
            }
        }
        ("", "Endpoints") => texts.push(ENDPOINTS_DEPRECATED.to_owned()),
        _ => {}
    }
    texts
}

fn service(texts: &mut Vec<String>, new: &Value) {
    if meta::annotation(new, TOPOLOGY_HINTS).is_some() {
        texts.push(format!(
            "annotation {TOPOLOGY_HINTS} is deprecated, please use service.kubernetes.io/topology-mode instead"
        ));
    }
    let balancer_ip = meta::text(new, &["spec", "loadBalancerIP"]);
    let external_ips = strings(new, &["spec", "externalIPs"]);
    let headless = svc::is_headless(new) && svc::service_type(new) == "ClusterIP";
    let external_name = svc::service_type(new) == "ExternalName";
    let cluster_ips = match svc::cluster_ips(new) {
        none if none.is_empty() => vec![meta::text(new, &["spec", "clusterIP"])],
        ips => ips,
    };
    for (i, ip) in cluster_ips.into_iter().enumerate() {
        unusual_ip(texts, &format!("spec.clusterIPs[{i}]"), ip);
    }
    if headless {
        if !balancer_ip.is_empty() {
            texts.push("spec.loadBalancerIP is ignored for headless services".to_owned());
        }
        if !external_ips.is_empty() {
            texts.push("spec.externalIPs is ignored for headless services".to_owned());
        }
        if !matches!(meta::text(new, &["spec", "sessionAffinity"]), "" | "None") {
            texts.push("spec.SessionAffinity is ignored for headless services".to_owned());
        }
    }
    for (i, ip) in external_ips.iter().enumerate() {
        unusual_ip(texts, &format!("spec.externalIPs[{i}]"), ip);
    }
    if !external_ips.is_empty() && !headless && !external_name {
        texts.push("spec.externalIPs is deprecated and may no longer be implemented in some clusters".to_owned());
    }
    unusual_ip(texts, "spec.loadBalancerIP", balancer_ip);
    for (i, range) in strings(new, &["spec", "loadBalancerSourceRanges"]).into_iter().enumerate() {
        unusual_cidr(texts, &format!("spec.loadBalancerSourceRanges[{i}]"), range);
    }
    if external_name && !external_ips.is_empty() {
        texts.push("spec.externalIPs is ignored when spec.type is \"ExternalName\"".to_owned());
    }
    if !external_name && !meta::text(new, &["spec", "externalName"]).is_empty() {
        texts.push("spec.externalName is ignored when spec.type is not \"ExternalName\"".to_owned());
    }
    if meta::text(new, &["spec", "trafficDistribution"]) == "PreferClose" {
        texts.push("spec.trafficDistribution: \"PreferClose\" is deprecated; use \"PreferSameZone\"".to_owned());
    }
}

fn endpoints(texts: &mut Vec<String>, new: &Value) {
    // The endpoints controller writes addresses as they should be.
    if meta::label(new, "endpoints.kubernetes.io/managed-by") == Some("endpoint-controller") {
        return;
    }
    for (s, subset) in meta::list(new, &["subsets"]).iter().enumerate() {
        for list in ["addresses", "notReadyAddresses"] {
            for (i, address) in meta::list(subset, &[list]).iter().enumerate() {
                unusual_ip(texts, &format!("subsets[{s}].{list}[{i}].ip"), meta::text(address, &["ip"]));
            }
        }
    }
}

/// Warns of an address that is accepted (in this field, or because it was stored long ago) but should be written
/// differently (KEP-4858).
fn unusual_ip(texts: &mut Vec<String>, field: &str, text: &str) {
    let Some(ip) = meta::parse_ip_sloppy(text) else { return };
    if !meta::ip(text).is_empty() {
        texts.push(format!(
            "{field}: non-standard IP address \"{text}\" will be considered invalid in a future Kubernetes release: use \"{ip}\""
        ));
    } else if ip.is_ipv6() && ip.to_string() != text {
        texts.push(format!("{field}: IPv6 address \"{text}\" should be in RFC 5952 canonical format (\"{ip}\")"));
    }
}

/// The same for a network.
fn unusual_cidr(texts: &mut Vec<String>, field: &str, text: &str) {
    let Some(net) = meta::parse_cidr_sloppy(text).and_then(|(ip, bits)| ipnet::IpNet::new(ip, bits).ok()) else {
        return;
    };
    let before = texts.len();
    let network = net.trunc();
    if network.addr() != net.addr() {
        let single = format!("{}/{}", net.addr(), net.max_prefix_len());
        texts.push(format!(
            "{field}: CIDR value \"{text}\" is ambiguous in this context (should be \"{network}\" or \"{single}\"?)"
        ));
    }
    if meta::cidr(text).iter().any(|fault| !fault.starts_with("must not have bits")) {
        texts.push(format!(
            "{field}: non-standard CIDR value \"{text}\" will be considered invalid in a future Kubernetes release: use \"{network}\""
        ));
    }
    if texts.len() == before && net.addr().is_ipv6() && net.to_string() != text {
        texts.push(format!("{field}: IPv6 CIDR value \"{text}\" should be in RFC 5952 canonical format (\"{net}\")"));
    }
}

fn pod(texts: &mut Vec<String>, field: &str, spec: &Value) {
    let mut ports: BTreeSet<(String, i64)> = BTreeSet::new();
    for list in ["initContainers", "containers"] {
        for (c, container) in meta::list(spec, &[list]).iter().enumerate() {
            let at = format!("{field}.{list}[{c}]");
            let mut names: BTreeSet<&str> = BTreeSet::new();
            for (i, variable) in meta::list(container, &["env"]).iter().enumerate() {
                let name = meta::text(variable, &["name"]);
                // A later definition that uses an earlier one is how variables are extended.
                let extends = meta::text(variable, &["value"]).contains(&format!("$({name})"));
                if !names.insert(name) && !extends {
                    texts.push(format!(
                        "{at}.env[{i}]: hides previous definition of \"{name}\", which may be dropped when using apply"
                    ));
                }
            }
            for (i, port) in meta::list(container, &["ports"]).iter().enumerate() {
                let number = port.get("containerPort").and_then(Value::as_i64).unwrap_or(0);
                let key = (meta::text(port, &["protocol"]).to_owned(), number);
                if number != 0 && !ports.insert(key.clone()) {
                    let (protocol, number) = key;
                    texts.push(format!(
                        "{at}.ports[{i}]: duplicate port definition with {at}.ports[0] ({number}/{protocol})"
                    ));
                }
            }
        }
    }
    for (i, constraint) in meta::list(spec, &["topologySpreadConstraints"]).iter().enumerate() {
        if meta::get(constraint, &["labelSelector"]).is_null() {
            texts.push(format!(
                "{field}.topologySpreadConstraints[{i}].labelSelector: a null labelSelector results in matching no pod"
            ));
        }
    }
    for (i, ip) in strings(spec, &["dnsConfig", "nameservers"]).into_iter().enumerate() {
        unusual_ip(texts, &format!("{field}.dnsConfig.nameservers[{i}]"), ip);
    }
    for (i, alias) in meta::list(spec, &["hostAliases"]).iter().enumerate() {
        unusual_ip(texts, &format!("{field}.hostAliases[{i}].ip"), meta::text(alias, &["ip"]));
    }
}

fn ingress(texts: &mut Vec<String>, new: &Value, old: Option<&Value>) {
    let annotation = "kubernetes.io/ingress.class";
    if old.is_none()
        && meta::annotation(new, annotation).is_some()
        && meta::get(new, &["spec", "ingressClassName"]).is_null()
    {
        texts.push(format!("annotation \"{annotation}\" is deprecated, please use 'spec.ingressClassName' instead"));
    }
}

fn policy(texts: &mut Vec<String>, new: &Value) {
    for (list, peers) in [("ingress", "from"), ("egress", "to")] {
        for (i, rule) in meta::list(new, &["spec", list]).iter().enumerate() {
            for (p, peer) in meta::list(rule, &[peers]).iter().enumerate() {
                let at = format!("spec.{list}[{i}].{peers}[{p}].ipBlock");
                unusual_cidr(texts, &format!("{at}.cidr"), meta::text(peer, &["ipBlock", "cidr"]));
                for (e, except) in strings(peer, &["ipBlock", "except"]).into_iter().enumerate() {
                    unusual_cidr(texts, &format!("{at}.except[{e}]"), except);
                }
            }
        }
    }
}
