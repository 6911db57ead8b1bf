//! Rows of Services, Endpoints, EndpointSlices, Ingresses and their relatives.

use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::BTreeSet;

use super::{Layout, STRING, age, at_most_three, labels, name, or_none, selector};
use crate::meta;
use crate::service as svc;

pub(super) const SERVICE: Layout = (
    &[
        ("Name", STRING, 0),
        ("Type", STRING, 0),
        ("Cluster-IP", STRING, 0),
        ("External-IP", STRING, 0),
        ("Port(s)", STRING, 0),
        ("Age", STRING, 0),
        ("Selector", STRING, 1),
    ],
    service,
);

fn service(object: &Value, now: Timestamp) -> Vec<Value> {
    let cluster_ip = svc::cluster_ips(object).first().copied().unwrap_or_default();
    let ports: Vec<String> = meta::list(object, &["spec", "ports"])
        .iter()
        .map(|port| {
            let number = |field: &str| port.get(field).and_then(Value::as_i64).unwrap_or(0);
            let protocol = meta::text(port, &["protocol"]);
            match number("nodePort") {
                0 => format!("{}/{protocol}", number("port")),
                node_port => format!("{}:{node_port}/{protocol}", number("port")),
            }
        })
        .collect();
    vec![
        name(object),
        json!(svc::service_type(object)),
        json!(or_none(cluster_ip)),
        json!(external_ip(object)),
        json!(or_none(&ports.join(","))),
        age(object, now),
        json!(labels(meta::get(object, &["spec", "selector"]))),
    ]
}

fn external_ip(object: &Value) -> String {
    let external: Vec<&str> = meta::list(object, &["spec", "externalIPs"]).iter().filter_map(Value::as_str).collect();
    match svc::service_type(object) {
        "LoadBalancer" => {
            let balancer = balancer_addresses(object);
            let all: Vec<&str> = balancer.iter().map(String::as_str).chain(external).collect();
            if all.is_empty() { "<pending>".to_owned() } else { all.join(",") }
        }
        "ExternalName" => meta::text(object, &["spec", "externalName"]).to_owned(),
        "ClusterIP" | "NodePort" => or_none(&external.join(",")).to_owned(),
        _ => "<unknown>".to_owned(),
    }
}

/// Addresses and names of `status.loadBalancer`, sorted and unique.
fn balancer_addresses(object: &Value) -> BTreeSet<String> {
    meta::list(object, &["status", "loadBalancer", "ingress"])
        .iter()
        .map(|entry| match meta::text(entry, &["ip"]) {
            "" => meta::text(entry, &["hostname"]),
            ip => ip,
        })
        .filter(|address| !address.is_empty())
        .map(str::to_owned)
        .collect()
}

pub(super) const ENDPOINTS: Layout = (&[("Name", STRING, 0), ("Endpoints", STRING, 0), ("Age", STRING, 0)], endpoints);

fn endpoints(object: &Value, now: Timestamp) -> Vec<Value> {
    let subsets = meta::list(object, &["subsets"]);
    let mut all = Vec::new();
    for subset in subsets {
        let ports = meta::list(subset, &["ports"]);
        let addresses = || meta::list(subset, &["addresses"]).iter().map(|a| meta::text(a, &["ip"]));
        if ports.is_empty() {
            all.extend(addresses().map(str::to_owned));
        }
        for port in ports {
            let number = port.get("port").and_then(Value::as_i64).unwrap_or(0);
            all.extend(
                addresses().map(
                    |ip| {
                        if ip.contains(':') { format!("[{ip}]:{number}") } else { format!("{ip}:{number}") }
                    },
                ),
            );
        }
    }
    let text = if subsets.is_empty() { "<none>".to_owned() } else { at_most_three(&all) };
    vec![name(object), json!(text), age(object, now)]
}

pub(super) const ENDPOINT_SLICE: Layout = (
    &[
        ("Name", STRING, 0),
        ("AddressType", STRING, 0),
        ("Ports", STRING, 0),
        ("Endpoints", STRING, 0),
        ("Age", STRING, 0),
    ],
    endpoint_slice,
);

fn endpoint_slice(object: &Value, now: Timestamp) -> Vec<Value> {
    let ports: Vec<String> = meta::list(object, &["ports"])
        .iter()
        .map(|port| match (port.get("port").and_then(Value::as_i64), meta::get(port, &["name"]).as_str()) {
            (Some(number), _) => number.to_string(),
            (None, Some(name)) => name.to_owned(),
            (None, None) => "*".to_owned(),
        })
        .collect();
    let addresses: Vec<String> = meta::list(object, &["endpoints"])
        .iter()
        .flat_map(|endpoint| meta::list(endpoint, &["addresses"]))
        .filter_map(|address| address.as_str().map(str::to_owned))
        .collect();
    let shown = |items: &[String]| match at_most_three(items).as_str() {
        "" => "<unset>".to_owned(),
        text => text.to_owned(),
    };
    vec![
        name(object),
        json!(meta::text(object, &["addressType"])),
        json!(shown(&ports)),
        json!(shown(&addresses)),
        age(object, now),
    ]
}

pub(super) const INGRESS: Layout = (
    &[
        ("Name", STRING, 0),
        ("Class", STRING, 0),
        ("Hosts", STRING, 0),
        ("Address", STRING, 0),
        ("Ports", STRING, 0),
        ("Age", STRING, 0),
    ],
    ingress,
);

fn ingress(object: &Value, now: Timestamp) -> Vec<Value> {
    let class = meta::get(object, &["spec", "ingressClassName"]).as_str().unwrap_or("<none>");
    let hosts: Vec<String> = meta::list(object, &["spec", "rules"])
        .iter()
        .map(|rule| meta::text(rule, &["host"]).to_owned())
        .filter(|host| !host.is_empty())
        .collect();
    let hosts = if hosts.is_empty() { "*".to_owned() } else { at_most_three(&hosts) };
    let addresses: Vec<String> = balancer_addresses(object).into_iter().collect();
    let tls = !meta::list(object, &["spec", "tls"]).is_empty();
    vec![
        name(object),
        json!(class),
        json!(hosts),
        json!(addresses.join(",")),
        json!(if tls { "80, 443" } else { "80" }),
        age(object, now),
    ]
}

pub(super) const INGRESS_CLASS: Layout =
    (&[("Name", STRING, 0), ("Controller", STRING, 0), ("Parameters", STRING, 0), ("Age", STRING, 0)], ingress_class);

fn ingress_class(object: &Value, now: Timestamp) -> Vec<Value> {
    let default = meta::annotation(object, "ingressclass.kubernetes.io/is-default-class") == Some("true");
    let shown = format!("{}{}", meta::name(object), if default { " (default)" } else { "" });
    let parameters = meta::get(object, &["spec", "parameters"]);
    let parameters_text = if parameters.is_null() {
        "<none>".to_owned()
    } else {
        let kind = meta::text(parameters, &["kind"]);
        match meta::text(parameters, &["apiGroup"]) {
            "" => format!("{kind}/{}", meta::text(parameters, &["name"])),
            group => format!("{kind}.{group}/{}", meta::text(parameters, &["name"])),
        }
    };
    vec![json!(shown), json!(meta::text(object, &["spec", "controller"])), json!(parameters_text), age(object, now)]
}

pub(super) const NETWORK_POLICY: Layout =
    (&[("Name", STRING, 0), ("Pod-Selector", STRING, 0), ("Age", STRING, 0)], network_policy);

fn network_policy(object: &Value, now: Timestamp) -> Vec<Value> {
    vec![name(object), json!(selector(meta::get(object, &["spec", "podSelector"]))), age(object, now)]
}

pub(super) const SERVICE_CIDR: Layout =
    (&[("Name", STRING, 0), ("CIDRs", STRING, 0), ("Age", STRING, 0)], service_cidr);

fn service_cidr(object: &Value, now: Timestamp) -> Vec<Value> {
    let cidrs: Vec<&str> = meta::list(object, &["spec", "cidrs"]).iter().filter_map(Value::as_str).collect();
    vec![name(object), json!(cidrs.join(",")), age(object, now)]
}

/// Two columns, but every row has the age as a third cell, as clients of the reference implementation see it.
pub(super) const IP_ADDRESS: Layout = (&[("Name", STRING, 0), ("ParentRef", STRING, 0)], ip_address);

fn ip_address(object: &Value, now: Timestamp) -> Vec<Value> {
    let parent = meta::get(object, &["spec", "parentRef"]);
    let text = if parent.is_null() {
        "<none>".to_owned()
    } else {
        let resource = meta::text(parent, &["resource"]);
        let resource = match meta::text(parent, &["group"]) {
            "" => resource.to_owned(),
            group => format!("{resource}.{group}"),
        };
        let parts = [resource.as_str(), meta::text(parent, &["namespace"]), meta::text(parent, &["name"])];
        parts.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join("/")
    };
    vec![name(object), json!(text), age(object, now)]
}

#[cfg(test)]
mod tests {
    use super::super::tests::cells;
    use serde_json::json;

    #[test]
    fn services_show_where_they_can_be_reached() {
        let rows = [
            (
                "a_node_port",
                json!({"metadata": {"name": "a"}, "spec": {"type": "NodePort", "clusterIPs": ["10.96.0.9"],
                    "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}], "selector": {"b": "2", "a": "1"}}}),
                "a | NodePort | 10.96.0.9 | <none> | 80:30080/TCP | <unknown> | a=1,b=2",
            ),
            (
                "a_load_balancer_lists_addresses_once",
                json!({"metadata": {"name": "a"}, "spec": {"type": "LoadBalancer", "externalIPs": ["198.51.100.1"]},
                    "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.2"}, {"hostname": "b.example"}, {"ip": "203.0.113.2"}]}}}),
                "a | LoadBalancer | <none> | 203.0.113.2,b.example,198.51.100.1 | <none> | <unknown> | <none>",
            ),
            (
                "a_load_balancer_waits",
                json!({"metadata": {"name": "a"}, "spec": {"type": "LoadBalancer"}}),
                "a | LoadBalancer | <none> | <pending> | <none> | <unknown> | <none>",
            ),
        ];
        for (name, object, want) in rows {
            assert_eq!(cells("", "services", object), want, "{name}");
        }
    }

    #[test]
    fn ingresses_show_hosts_and_ports() {
        let hosts = |names: &[&str]| names.iter().map(|h| json!({"host": h})).collect::<Vec<_>>();
        let object = json!({"metadata": {"name": "i", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"rules": hosts(&["a", "b", "c", "d"]), "tls": [{}], "ingressClassName": "nginx"},
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.2"}]}}});
        assert_eq!(
            cells("networking.k8s.io", "ingresses", object),
            "i | nginx | a,b,c + 1 more... | 203.0.113.2 | 80, 443 | 24h"
        );
        assert_eq!(
            cells("networking.k8s.io", "ingresses", json!({"metadata": {"name": "i"}})),
            "i | <none> | * |  | 80 | <unknown>"
        );
    }
}
