//! Rules of Services.

use serde_json::{Value, json};
use std::collections::BTreeSet;

use super::{Faults, same, strings};
use crate::meta;
use crate::service as svc;
use crate::status::FieldError;

const SOURCE_RANGES_ANNOTATION: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
pub(super) const TOPOLOGY_MODE: &str = "service.kubernetes.io/topology-mode";
pub(super) const TOPOLOGY_HINTS: &str = "service.kubernetes.io/topology-aware-hints";
const ONLY_LOAD_BALANCER: &str = "may only be used when `type` is 'LoadBalancer'";

fn spec<'a>(service: &'a Value, field: &str) -> &'a Value {
    meta::get(service, &["spec", field])
}

/// Rules of a new Service.
pub(super) fn create(faults: &mut Faults, new: &Value) {
    rules(faults, new, None);
}

/// Rules of a changed Service.
pub(super) fn update(faults: &mut Faults, new: &Value, old: &Value) {
    let external = |service: &Value| svc::service_type(service) == "ExternalName";
    if !external(new) && !external(old) {
        addresses_unchanged(faults, new, old);
        families_unchanged(faults, new, old);
    }
    load_balancer_class(faults, new, Some(old));
    if svc::needs_health_check_node_port(new)
        && svc::needs_health_check_node_port(old)
        && svc::health_check_node_port(new) != svc::health_check_node_port(old)
    {
        faults.forbidden("spec.healthCheckNodePort", "field is immutable");
    }
    rules(faults, new, Some(old));
}

/// Addresses stay; the second one may come, and go with the policy SingleStack.
fn addresses_unchanged(faults: &mut Faults, new: &Value, old: &Value) {
    let (now, before) = (svc::cluster_ips(new), svc::cluster_ips(old));
    let changed =
        |i: usize| FieldError::invalid(format!("spec.clusterIPs[{i}]"), json!(now), "may not change once set");
    match (before.len(), now.len()) {
        (0, _) => {}
        (_, 0) => faults.invalid("spec.clusterIPs[0]", json!(now), "primary clusterIP can not be unset"),
        (a, b) if a == b => {
            for i in 0..a {
                if before[i] != now[i] {
                    faults.add(changed(i));
                }
            }
        }
        _ => {
            if before[0] != now[0] {
                faults.add(changed(0));
            }
            let policy = meta::text(new, &["spec", "ipFamilyPolicy"]);
            if now.len() < before.len() && policy != "SingleStack" {
                faults.invalid(
                    "spec.ipFamilyPolicy",
                    policy,
                    "must be set to 'SingleStack' when releasing the secondary clusterIP",
                );
            }
        }
    }
}

fn families_unchanged(faults: &mut Faults, new: &Value, old: &Value) {
    if svc::is_headless(new) || svc::is_headless(old) {
        return;
    }
    let (now, before) = (strings(new, &["spec", "ipFamilies"]), strings(old, &["spec", "ipFamilies"]));
    if before.is_empty() {
        return;
    }
    if now.is_empty() {
        faults.invalid("spec.ipFamilies[0]", json!(now), "primary ipFamily can not be unset");
        return;
    }
    // Whichever one changed, the first is named. When one is added or removed, the addresses are shown.
    if before.len() == now.len() {
        for _ in before.iter().zip(&now).filter(|(stored, family)| stored != family) {
            faults.invalid("spec.ipFamilies[0]", json!(now), "may not change once set");
        }
    } else if before[0] != now[0] {
        faults.invalid("spec.ipFamilies[0]", json!(svc::cluster_ips(new)), "may not change once set");
    }
    let policy = meta::text(new, &["spec", "ipFamilyPolicy"]);
    if before.len() == 2 && now.len() == 1 && policy != "SingleStack" {
        faults.invalid(
            "spec.ipFamilyPolicy",
            policy,
            "must be set to 'SingleStack' when releasing the secondary ipFamily",
        );
    }
}

fn rules(faults: &mut Faults, new: &Value, old: Option<&Value>) {
    let type_ = svc::service_type(new);
    let external_name = type_ == "ExternalName";
    let headless = svc::is_headless(new);
    let ports = meta::list(new, &["spec", "ports"]);

    topology_annotations(faults, new);
    if ports.is_empty() && !headless && !external_name {
        faults.required("spec.ports", "");
    }
    if headless && matches!(type_, "LoadBalancer" | "NodePort") {
        let text = format!("may not be set to 'None' for {type_} services");
        faults.invalid("spec.clusterIPs[0]", svc::NONE, text);
    }
    if external_name {
        for field in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            if !same(spec(new, field), &Value::Null) {
                faults.forbidden(format!("spec.{field}"), "may not be set for ExternalName services");
            }
        }
        let name = meta::text(new, &["spec", "externalName"]);
        let name = name.strip_suffix('.').unwrap_or(name);
        faults.required_syntax("spec.externalName", name, meta::dns1123_subdomain);
    }
    ports_one_by_one(faults, ports);
    faults.labels("spec.selector", spec(new, "selector"));
    session_affinity(faults, new);
    if !external_name {
        faults.list.extend(cluster_ip_fields(new, old));
    }

    let stored_ips: Vec<&str> = old.map(|old| strings(old, &["spec", "externalIPs"])).unwrap_or_default();
    for (i, ip) in strings(new, &["spec", "externalIPs"]).into_iter().enumerate() {
        let field = format!("spec.externalIPs[{i}]");
        let texts = if stored_ips.contains(&ip) { meta::ip_sloppy(ip) } else { meta::ip(ip) };
        if texts.is_empty() {
            faults.special_ip(&field, ip);
        } else {
            faults.syntax(&field, ip, texts);
        }
    }
    faults.one_of("spec.type", type_, &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
    if type_ == "ClusterIP" {
        for (i, port) in ports.iter().enumerate() {
            if port.get("nodePort").and_then(Value::as_i64).unwrap_or(0) != 0 {
                let field = format!("spec.ports[{i}].nodePort");
                faults.forbidden(field, "may not be used when `type` is 'ClusterIP'");
            }
        }
    }
    ports_together(faults, ports);
    source_ranges(faults, new, old);
    if type_ == "LoadBalancer" && spec(new, "allocateLoadBalancerNodePorts").is_null() {
        faults.required("spec.allocateLoadBalancerNodePorts", "");
    }
    if type_ != "LoadBalancer" && !spec(new, "allocateLoadBalancerNodePorts").is_null() {
        faults.forbidden("spec.allocateLoadBalancerNodePorts", ONLY_LOAD_BALANCER);
    }
    load_balancer_class(faults, new, None);
    traffic_policies(faults, new);
}

/// An update is judged with the stored object and then, as all objects are, without: what is wrong with the class shows
/// up twice among the causes.
fn load_balancer_class(faults: &mut Faults, new: &Value, old: Option<&Value>) {
    let field = "spec.loadBalancerClass";
    let class = spec(new, "loadBalancerClass");
    let balanced = |service: &Value| svc::service_type(service) == "LoadBalancer";
    if let Some(old) = old
        && balanced(new)
        && balanced(old)
        && !same(class, spec(old, "loadBalancerClass"))
    {
        faults.invalid(field, class.clone(), "may not change once set");
    }
    if !balanced(new) {
        if !class.is_null() {
            faults.forbidden(field, ONLY_LOAD_BALANCER);
        }
    } else if let Some(class) = class.as_str() {
        faults.syntax(field, class, meta::qualified_name(class));
    }
}

fn topology_annotations(faults: &mut Faults, new: &Value) {
    if let (Some(mode), Some(hints)) = (meta::annotation(new, TOPOLOGY_MODE), meta::annotation(new, TOPOLOGY_HINTS))
        && mode != hints
    {
        let text = format!("must match annotations[{TOPOLOGY_HINTS}] when both are specified");
        faults.invalid(format!("metadata.annotations[{TOPOLOGY_MODE}]"), mode, text);
    }
}

fn ports_one_by_one(faults: &mut Faults, ports: &[Value]) {
    let mut names: BTreeSet<&str> = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        let at = |part: &str| format!("spec.ports[{i}].{part}");
        let name = meta::text(port, &["name"]);
        if name.is_empty() {
            if ports.len() > 1 {
                faults.required(at("name"), "");
            }
        } else {
            faults.syntax(&at("name"), name, meta::dns1123_label(name));
            if !names.insert(name) {
                faults.add(FieldError::duplicate(at("name"), name));
            }
        }
        faults.port_number(at("port"), meta::get(port, &["port"]));
        match meta::text(port, &["protocol"]) {
            "" => faults.required(at("protocol"), ""),
            protocol => faults.one_of(at("protocol"), protocol, &["SCTP", "TCP", "UDP"]),
        }
        faults.port_number_or_name(&at("targetPort"), meta::get(port, &["targetPort"]));
        if let Some(protocol) = meta::get(port, &["appProtocol"]).as_str() {
            faults.syntax(&at("appProtocol"), protocol, meta::qualified_name(protocol));
        }
    }
}

fn ports_together(faults: &mut Faults, ports: &[Value]) {
    let number = |port: &Value, field: &str| port.get(field).and_then(Value::as_i64).unwrap_or(0);
    let mut node_ports = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        let node_port = number(port, "nodePort");
        if node_port != 0 && !node_ports.insert((meta::text(port, &["protocol"]), node_port)) {
            faults.add(FieldError::duplicate(format!("spec.ports[{i}].nodePort"), node_port));
        }
    }
    let mut seen = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        let key = (meta::text(port, &["protocol"]), number(port, "port"));
        if !seen.insert(key) {
            let text = format!(
                "{{\"Name\":\"\",\"Protocol\":{},\"AppProtocol\":null,\"Port\":{},\"TargetPort\":0,\"NodePort\":0}}",
                json!(key.0),
                key.1
            );
            faults.add(FieldError::duplicate_text(format!("spec.ports[{i}]"), text));
        }
    }
}

fn session_affinity(faults: &mut Faults, new: &Value) {
    let affinity = meta::text(new, &["spec", "sessionAffinity"]);
    let config = spec(new, "sessionAffinityConfig");
    match affinity {
        "" => faults.required("spec.sessionAffinity", ""),
        "ClientIP" => {
            let client_ip = meta::get(config, &["clientIP"]);
            let timeout = meta::get(client_ip, &["timeoutSeconds"]);
            let needed = "when session affinity type is ClientIP";
            if config.is_null() {
                faults.required("spec.sessionAffinityConfig", needed);
            } else if client_ip.is_null() {
                faults.required("spec.sessionAffinityConfig.clientIP", needed);
            } else if timeout.is_null() {
                faults.required("spec.sessionAffinityConfig.clientIP.timeoutSeconds", needed);
            } else if !timeout.as_i64().is_some_and(|seconds| (1..=86400).contains(&seconds)) {
                let text = "must be greater than 0 and less than 86400";
                faults.invalid("spec.sessionAffinityConfig.clientIP.timeoutSeconds", timeout.clone(), text);
            }
        }
        "None" => {
            if !config.is_null() {
                faults.forbidden("spec.sessionAffinityConfig", "must not be set when session affinity is None");
            }
        }
        other => faults.one_of("spec.sessionAffinity", other, &["ClientIP", "None"]),
    }
}

/// The rules of `clusterIP`, `clusterIPs`, `ipFamilies` and `ipFamilyPolicy` that do not depend on the cluster. They
/// are judged before anything is allocated, too.
pub(crate) fn cluster_ip_fields(new: &Value, old: Option<&Value>) -> Vec<FieldError> {
    let mut faults = Faults::default();
    let single = meta::text(new, &["spec", "clusterIP"]);
    let ips = svc::cluster_ips(new);
    if single.is_empty() {
        if !ips.is_empty() {
            faults.invalid("spec.clusterIPs", json!(ips), "must be empty when `clusterIP` is not specified");
        }
    } else if ips.is_empty() {
        faults.required("spec.clusterIPs", "");
    } else if ips[0] != single {
        faults.invalid("spec.clusterIPs", json!(ips), "first value must match `clusterIP`");
    }

    let families = strings(new, &["spec", "ipFamilies"]);
    for (i, family) in families.iter().enumerate() {
        let field = format!("spec.ipFamilies[{i}]");
        faults.one_of(field.clone(), family, &["IPv4", "IPv6"]);
        if families[..i].contains(family) {
            faults.add(FieldError::duplicate(field, *family));
        }
    }
    if let Some(policy) = spec(new, "ipFamilyPolicy").as_str() {
        faults.one_of("spec.ipFamilyPolicy", policy, &["PreferDualStack", "RequireDualStack", "SingleStack"]);
    }

    let stored = old.map(svc::cluster_ips).unwrap_or_default();
    let mut readable = true;
    for (i, ip) in ips.iter().enumerate() {
        if i == 0 && *ip == svc::NONE {
            if ips.len() > 1 {
                readable = false;
                faults.invalid("spec.clusterIPs", json!(ips), "'None' must be the first and only value");
            }
            continue;
        }
        let texts = if stored.contains(ip) { meta::ip_sloppy(ip) } else { meta::ip(ip) };
        readable &= texts.is_empty();
        faults.syntax(&format!("spec.clusterIPs[{i}]"), ip, texts);
    }
    if ips.len() > 2 {
        faults.invalid("spec.clusterIPs", json!(ips), "may only hold up to 2 values");
    }
    if !readable {
        return faults.list;
    }
    let families_of_ips: Vec<svc::Family> =
        ips.iter().filter_map(|ip| meta::parse_ip_sloppy(ip)).map(svc::Family::of).collect();
    if ips.len() > 1 && families_of_ips.iter().all(|f| *f == families_of_ips[0]) {
        faults.invalid("spec.clusterIPs", json!(ips), "may specify no more than one IP for each IP family");
    }
    for (i, (ip, family)) in ips.iter().zip(&families).enumerate() {
        if let (Some(has), Some(wanted)) = (meta::parse_ip_sloppy(ip), svc::Family::parse(family))
            && svc::Family::of(has) != wanted
        {
            let text = format!("expected an {wanted} value as indicated by `ipFamilies[{i}]`");
            faults.invalid(format!("spec.clusterIPs[{i}]"), *ip, text);
        }
    }
    faults.list
}

fn source_ranges(faults: &mut Faults, new: &Value, old: Option<&Value>) {
    let ranges = strings(new, &["spec", "loadBalancerSourceRanges"]);
    let load_balancer = svc::service_type(new) == "LoadBalancer";
    // The capital letter is part of the known path.
    let field = "spec.LoadBalancerSourceRanges";
    if !ranges.is_empty() {
        if !load_balancer {
            faults.forbidden(field, ONLY_LOAD_BALANCER);
        }
        // Blanks around a range are left from the time when it was a part of an annotation.
        let stored: Vec<&str> = old.map(|old| strings(old, &["spec", "loadBalancerSourceRanges"])).unwrap_or_default();
        let stored: Vec<&str> = stored.into_iter().map(str::trim).collect();
        for (i, range) in ranges.into_iter().map(str::trim).enumerate() {
            if !stored.contains(&range) {
                faults.syntax(&format!("{field}[{i}]"), range, meta::cidr(range));
            }
        }
        return;
    }
    let Some(annotation) = meta::annotation(new, SOURCE_RANGES_ANNOTATION) else { return };
    if old.and_then(|old| meta::annotation(old, SOURCE_RANGES_ANNOTATION)) == Some(annotation) {
        return;
    }
    let field = format!("metadata.annotations[{SOURCE_RANGES_ANNOTATION}]");
    if !load_balancer {
        faults.forbidden(field.clone(), ONLY_LOAD_BALANCER);
    }
    if !annotation.trim().is_empty() {
        for range in annotation.split(',').map(str::trim) {
            faults.syntax(&field, range, meta::cidr(range));
        }
    }
}

fn traffic_policies(faults: &mut Faults, new: &Value) {
    let external = meta::text(new, &["spec", "externalTrafficPolicy"]);
    if svc::is_externally_accessible(new) {
        if external.is_empty() {
            faults.required("spec.externalTrafficPolicy", "");
        } else {
            faults.one_of("spec.externalTrafficPolicy", external, &["Cluster", "Local"]);
        }
    } else if !external.is_empty() {
        faults.invalid("spec.externalTrafficPolicy", external, "may only be set for externally-accessible services");
    }
    let health = svc::health_check_node_port(new);
    if svc::needs_health_check_node_port(new) {
        for text in meta::port_number(health) {
            faults.invalid("spec.healthCheckNodePort", health, text);
        }
    } else if health != 0 {
        let text = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
        faults.invalid("spec.healthCheckNodePort", health, text);
    }
    match spec(new, "internalTrafficPolicy").as_str() {
        Some(policy) => faults.one_of("spec.internalTrafficPolicy", policy, &["Cluster", "Local"]),
        None if svc::needs_cluster_ip(new) => faults.required("spec.internalTrafficPolicy", ""),
        None => {}
    }
    if let Some(distribution) = spec(new, "trafficDistribution").as_str() {
        let known = ["PreferClose", "PreferSameZone", "PreferSameNode"];
        faults.one_of("spec.trafficDistribution", distribution, &known);
    }
}

/// Rules of `status.loadBalancer`.
pub(super) fn status(faults: &mut Faults, new: &Value, old: &Value) {
    let ingress = meta::list(new, &["status", "loadBalancer", "ingress"]);
    let field = "status.loadBalancer.ingress";
    if svc::service_type(new) != "LoadBalancer" && !ingress.is_empty() {
        faults.forbidden(field, "may only be used when `spec.type` is 'LoadBalancer'");
        return;
    }
    let stored: Vec<&str> = meta::list(old, &["status", "loadBalancer", "ingress"])
        .iter()
        .map(|entry| meta::text(entry, &["ip"]))
        .collect();
    for (i, entry) in ingress.iter().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        let ip = meta::text(entry, &["ip"]);
        let mode = meta::get(entry, &["ipMode"]);
        if !ip.is_empty() {
            let texts = if stored.contains(&ip) { meta::ip_sloppy(ip) } else { meta::ip(ip) };
            faults.syntax(&at("ip"), ip, texts);
            if mode.is_null() {
                faults.required(at("ipMode"), "must be specified when `ip` is set");
            }
        } else if !mode.is_null() {
            faults.forbidden(at("ipMode"), "may not be specified when `ip` is not set");
        }
        if let Some(mode) = mode.as_str().filter(|_| !ip.is_empty()) {
            faults.one_of(at("ipMode"), mode, &["Proxy", "VIP"]);
        }
        let hostname = meta::text(entry, &["hostname"]);
        if !hostname.is_empty() {
            faults.syntax(&at("hostname"), hostname, meta::dns1123_subdomain(hostname));
            if meta::parse_ip_sloppy(hostname).is_some() {
                faults.invalid(at("hostname"), hostname, "must be a DNS name, not an IP address");
            }
        }
    }
}
