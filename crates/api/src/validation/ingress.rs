//! Rules of Ingresses and IngressClasses.

use serde_json::Value;

use super::{Faults, strings};
use crate::meta;

/// Parts that a path of type Exact or Prefix may not contain, and ends it may not have: they would be normalised away
/// by some clients and not by others.
const BAD_PATH_PARTS: [&str; 5] = ["//", "/./", "/../", "%2f", "%2F"];
const BAD_PATH_ENDS: [&str; 2] = ["/..", "/."];
const CLASS_ANNOTATION: &str = "kubernetes.io/ingress.class";
const MAX_CONTROLLER_LEN: usize = 250;

pub(super) fn ingress(faults: &mut Faults, new: &Value, old: Option<&Value>) {
    let class = meta::get(new, &["spec", "ingressClassName"]);
    if old.is_none()
        && let (Some(annotation), Some(name)) = (meta::annotation(new, CLASS_ANNOTATION), class.as_str())
        && annotation != name
    {
        let field = format!("metadata.annotations[{CLASS_ANNOTATION}]");
        faults.invalid(field, annotation, "must match `ingressClassName` when both are specified");
    }
    let rules = meta::get(new, &["spec", "rules"]);
    let backend = meta::get(new, &["spec", "defaultBackend"]);
    if rules.as_array().is_none_or(Vec::is_empty) && backend.is_null() {
        faults.invalid("spec", rules.clone(), "either `defaultBackend` or `rules` must be specified");
    }
    if !backend.is_null() {
        self::backend(faults, "spec.defaultBackend", backend);
    }
    for (i, rule) in meta::list(new, &["spec", "rules"]).iter().enumerate() {
        self::rule(faults, &format!("spec.rules[{i}]"), rule);
    }
    let stored = old.map(|old| meta::list(old, &["spec", "tls"])).unwrap_or_default();
    let bad_before = stored.iter().any(|tls| !secret_name_faults(tls).is_empty());
    for (i, tls) in meta::list(new, &["spec", "tls"]).iter().enumerate() {
        for (h, host) in strings(tls, &["hosts"]).into_iter().enumerate() {
            host_syntax(faults, &format!("spec.tls[{i}].hosts[{h}]"), host);
        }
        if !bad_before {
            let name = meta::text(tls, &["secretName"]);
            faults.syntax(&format!("spec.tls[{i}].secretName"), name, secret_name_faults(tls));
        }
    }
    if let Some(class) = class.as_str() {
        faults.syntax("spec.ingressClassName", class, meta::dns1123_subdomain(class));
    }
}

fn secret_name_faults(tls: &Value) -> Vec<String> {
    match meta::text(tls, &["secretName"]) {
        "" => Vec::new(),
        name => meta::dns1123_subdomain(name),
    }
}

fn host_syntax(faults: &mut Faults, field: &str, host: &str) {
    let rule = if host.contains('*') { meta::wildcard_dns1123_subdomain } else { meta::dns1123_subdomain };
    faults.syntax(field, host, rule(host));
}

fn rule(faults: &mut Faults, field: &str, rule: &Value) {
    let host = meta::text(rule, &["host"]);
    if !host.is_empty() {
        let at = format!("{field}.host");
        if host.parse::<std::net::IpAddr>().is_ok() {
            faults.invalid(at.as_str(), host, "must be a DNS name, not an IP address");
        }
        host_syntax(faults, &at, host);
    }
    let http = meta::get(rule, &["http"]);
    if http.is_null() {
        return;
    }
    let paths = meta::list(http, &["paths"]);
    if paths.is_empty() {
        faults.required(format!("{field}.http.paths"), "");
    }
    for (i, path) in paths.iter().enumerate() {
        let field = format!("{field}.http.paths[{i}]");
        self::path(faults, &field, path);
        backend(faults, &format!("{field}.backend"), meta::get(path, &["backend"]));
    }
}

fn path(faults: &mut Faults, field: &str, path: &Value) {
    let Some(path_type) = meta::get(path, &["pathType"]).as_str() else {
        faults.required(format!("{field}.pathType"), "pathType must be specified");
        return;
    };
    let text = meta::text(path, &["path"]);
    let at = format!("{field}.path");
    match path_type {
        "Exact" | "Prefix" => {
            if !text.starts_with('/') {
                faults.invalid(at.as_str(), text, "must be an absolute path");
            }
            for part in BAD_PATH_PARTS.iter().filter(|part| text.contains(**part)) {
                faults.invalid(at.as_str(), text, format!("must not contain '{part}'"));
            }
            for end in BAD_PATH_ENDS.iter().filter(|end| text.ends_with(**end)) {
                faults.invalid(at.as_str(), text, format!("cannot end with '{end}'"));
            }
        }
        "ImplementationSpecific" => {
            if !text.is_empty() && !text.starts_with('/') {
                faults.invalid(at, text, "must be an absolute path");
            }
        }
        other => faults.one_of(format!("{field}.pathType"), other, &["Exact", "ImplementationSpecific", "Prefix"]),
    }
}

fn backend(faults: &mut Faults, field: &str, backend: &Value) {
    let (service, resource) = (meta::get(backend, &["service"]), meta::get(backend, &["resource"]));
    match (service.is_null(), resource.is_null()) {
        (false, false) => faults.invalid(field, "", "cannot set both resource and service backends"),
        (true, true) => faults.invalid(field, "", "resource or service backend is required"),
        (true, false) => {
            let at = format!("{field}.resource");
            if let Some(group) = meta::get(resource, &["apiGroup"]).as_str() {
                faults.syntax(&format!("{at}.apiGroup"), group, meta::dns1123_subdomain(group));
            }
            for part in ["kind", "name"] {
                faults.required_syntax(&format!("{at}.{part}"), meta::text(resource, &[part]), meta::path_segment);
            }
        }
        (false, true) => {
            let at = format!("{field}.service");
            faults.required_syntax(&format!("{at}.name"), meta::text(service, &["name"]), meta::dns1123_label);
            let name = meta::text(service, &["port", "name"]);
            let number = meta::get(service, &["port", "number"]);
            match (name.is_empty(), number.as_i64().unwrap_or(0)) {
                (false, 0) => faults.syntax(&format!("{at}.port.name"), name, meta::port_name(name)),
                (true, 0) => faults.required(field, "port name or number is required"),
                (true, _) => faults.port_number(format!("{at}.port.number"), number),
                (false, _) => faults.invalid(field, "", "cannot set both port name & port number"),
            }
        }
    }
}

/// Rules of `status.loadBalancer`.
pub(super) fn status(faults: &mut Faults, new: &Value, old: &Value) {
    let entries = |object: &'_ Value| meta::list(object, &["status", "loadBalancer", "ingress"]).to_vec();
    let stored: Vec<String> = entries(old).iter().map(|e| meta::text(e, &["ip"]).to_owned()).collect();
    for (i, entry) in entries(new).iter().enumerate() {
        let at = |part: &str| format!("status.loadBalancer.ingress[{i}].{part}");
        let ip = meta::text(entry, &["ip"]);
        if !ip.is_empty() {
            let texts = if stored.iter().any(|s| s == ip) { meta::ip_sloppy(ip) } else { meta::ip(ip) };
            faults.syntax(&at("ip"), ip, texts);
        }
        let hostname = meta::text(entry, &["hostname"]);
        if !hostname.is_empty() {
            faults.syntax(&at("hostname"), hostname, meta::dns1123_subdomain(hostname));
            if hostname.parse::<std::net::IpAddr>().is_ok() {
                faults.invalid(at("hostname"), hostname, "must be a DNS name, not an IP address");
            }
        }
    }
}

/// Rules of an IngressClass.
pub(super) fn class(faults: &mut Faults, new: &Value) {
    let controller = meta::text(new, &["spec", "controller"]);
    let field = "spec.controller";
    if controller.len() > MAX_CONTROLLER_LEN {
        faults.add(crate::status::FieldError::too_long(field, MAX_CONTROLLER_LEN));
    }
    if controller.is_empty() {
        faults.required(field, "");
    } else {
        faults.syntax(field, controller, meta::domain_prefixed_path(controller));
    }
    let parameters = meta::get(new, &["spec", "parameters"]);
    if parameters.is_null() {
        return;
    }
    let at = |part: &str| format!("spec.parameters.{part}");
    if let Some(group) = meta::get(parameters, &["apiGroup"]).as_str() {
        faults.syntax(&at("apiGroup"), group, meta::dns1123_subdomain(group));
    }
    for part in ["kind", "name"] {
        faults.required_syntax(&at(part), meta::text(parameters, &[part]), meta::path_segment);
    }
    let namespace = meta::get(parameters, &["namespace"]);
    match meta::get(parameters, &["scope"]).as_str() {
        None => faults.required(at("scope"), ""),
        Some("Namespace") => match namespace.as_str() {
            None | Some("") => faults.required(at("namespace"), "`parameters.scope` is set to 'Namespace'"),
            Some(namespace) => faults.syntax(&at("namespace"), namespace, meta::dns1123_label(namespace)),
        },
        Some("Cluster") => {
            if !namespace.is_null() {
                faults.forbidden(at("namespace"), "`parameters.scope` is set to 'Cluster'");
            }
        }
        Some(other) => faults.one_of(at("scope"), other, &["Cluster", "Namespace"]),
    }
}
