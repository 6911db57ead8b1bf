//! Rules of ConfigMaps, Secrets, Nodes, Events, Leases, RBAC and the kinds that are only kept.

use base64::Engine;
use serde_json::Value;

use super::{Faults, same, strings};
use crate::kinds::Kind;
use crate::meta;
use crate::status::FieldError;

/// Largest sum of the values of a ConfigMap or Secret.
const MAX_DATA_BYTES: usize = 1024 * 1024;

pub(super) fn config_map(faults: &mut Faults, new: &Value) {
    let (data, binary) = (meta::get(new, &["data"]), meta::get(new, &["binaryData"]));
    let mut bytes = 0;
    for (key, value) in data.as_object().into_iter().flatten() {
        faults.syntax(&format!("data[{key}]"), key, meta::config_map_key(key));
        if binary.get(key).is_some() {
            faults.invalid(format!("data[{key}]"), key.as_str(), "duplicate of key present in binaryData");
        }
        bytes += value.as_str().map_or(0, str::len);
    }
    for (key, value) in binary.as_object().into_iter().flatten() {
        faults.syntax(&format!("binaryData[{key}]"), key, meta::config_map_key(key));
        bytes += decoded(value).len();
    }
    if bytes > MAX_DATA_BYTES {
        faults.add(FieldError::too_long("", MAX_DATA_BYTES));
    }
}

pub(super) fn config_map_update(faults: &mut Faults, new: &Value, old: &Value) {
    frozen(faults, new, old, &["data", "binaryData"]);
}

/// The rule of `immutable: true`.
fn frozen(faults: &mut Faults, new: &Value, old: &Value, fields: &[&str]) {
    if meta::get(old, &["immutable"]) != true {
        return;
    }
    let text = "field is immutable when `immutable` is set";
    if meta::get(new, &["immutable"]) != true {
        faults.forbidden("immutable", text);
    }
    for field in fields {
        if !same(meta::get(new, &[field]), meta::get(old, &[field])) {
            faults.forbidden(*field, text);
        }
    }
}

fn decoded(value: &Value) -> Vec<u8> {
    base64::engine::general_purpose::STANDARD.decode(value.as_str().unwrap_or_default()).unwrap_or_default()
}

pub(super) fn secret(faults: &mut Faults, new: &Value) {
    let data = meta::get(new, &["data"]);
    let mut bytes = 0;
    for (key, value) in data.as_object().into_iter().flatten() {
        faults.syntax(&format!("data[{key}]"), key, meta::config_map_key(key));
        bytes += decoded(value).len();
    }
    if bytes > MAX_DATA_BYTES {
        faults.add(FieldError::too_long("data", MAX_DATA_BYTES));
    }
    let need = |faults: &mut Faults, key: &str| {
        if data.get(key).is_none() {
            faults.required(format!("data[{key}]"), "");
        }
    };
    match meta::text(new, &["type"]) {
        "kubernetes.io/service-account-token" => {
            let annotation = "kubernetes.io/service-account.name";
            if meta::annotation(new, annotation).is_none_or(str::is_empty) {
                faults.required(format!("metadata.annotations[{annotation}]"), "");
            }
        }
        "kubernetes.io/dockercfg" => json_key(faults, data, ".dockercfg"),
        "kubernetes.io/dockerconfigjson" => json_key(faults, data, ".dockerconfigjson"),
        "kubernetes.io/basic-auth" if data.get("username").is_none() && data.get("password").is_none() => {
            need(faults, "username");
            need(faults, "password");
        }
        "kubernetes.io/ssh-auth" => need(faults, "ssh-privatekey"),
        "kubernetes.io/tls" => {
            need(faults, "tls.crt");
            need(faults, "tls.key");
        }
        _ => {}
    }
}

/// A key that holds a JSON object with registry credentials.
fn json_key(faults: &mut Faults, data: &Value, key: &str) {
    let field = format!("data[{key}]");
    let Some(value) = data.get(key) else {
        faults.required(field, "");
        return;
    };
    let text = String::from_utf8_lossy(&decoded(value)).into_owned();
    if let Err(reason) = serde_json::from_str::<Value>(&text) {
        faults.invalid(field, "<secret contents redacted>", json_fault(&text, &reason));
    }
}

/// Why a text is no JSON object, in the words clients know where the cause is plain.
fn json_fault(text: &str, reason: &serde_json::Error) -> String {
    let mut open = text.trim_start().chars();
    match (open.next(), open.as_str().trim_start().chars().next()) {
        (None, _) | (Some('{'), None) => "unexpected end of JSON input".to_owned(),
        (Some('{'), Some(c)) if c != '"' && c != '}' => {
            format!("invalid character {} looking for beginning of object key string", go_char(c))
        }
        (Some(c), _) if !"{[\"-0123456789tfn".contains(c) => {
            format!("invalid character {} looking for beginning of value", go_char(c))
        }
        _ => reason.to_string(),
    }
}

fn go_char(c: char) -> String {
    if c == '\'' { "'\\''".to_owned() } else { format!("'{c}'") }
}

pub(super) fn secret_update(faults: &mut Faults, new: &Value, old: &Value) {
    faults.unchanged("type", meta::get(new, &["type"]), meta::get(old, &["type"]));
    frozen(faults, new, old, &["data"]);
}

pub(super) fn node(faults: &mut Faults, new: &Value) {
    for (i, taint) in meta::list(new, &["spec", "taints"]).iter().enumerate() {
        let at = |part: &str| format!("spec.taints[{i}].{part}");
        let (key, value) = (meta::text(taint, &["key"]), meta::text(taint, &["value"]));
        faults.syntax(&at("key"), key, meta::qualified_name(key));
        faults.syntax(&at("value"), value, meta::label_value(value));
        match meta::text(taint, &["effect"]) {
            "" => faults.required(at("effect"), ""),
            effect => faults.one_of(at("effect"), effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]),
        }
    }
    let cidrs = strings(new, &["spec", "podCIDRs"]);
    for (i, cidr) in cidrs.iter().enumerate() {
        faults.syntax(&format!("spec.podCIDRs[{i}]"), cidr, meta::cidr_sloppy(cidr));
    }
    if cidrs.len() > 1 {
        let families: Vec<bool> =
            cidrs.iter().filter_map(|c| meta::parse_cidr_sloppy(c)).map(|(ip, _)| ip.is_ipv4()).collect();
        if cidrs.len() > 2 || families.windows(2).all(|pair| pair[0] == pair[1]) {
            faults.invalid(
                "spec.podCIDRs",
                serde_json::json!(cidrs),
                "may specify no more than one CIDR for each IP family",
            );
        }
    }
}

pub(super) fn node_update(faults: &mut Faults, new: &Value, old: &Value) {
    let stored = meta::get(old, &["spec", "podCIDRs"]);
    if !same(stored, &Value::Null) && !same(meta::get(new, &["spec", "podCIDRs"]), stored) {
        faults.forbidden("spec.podCIDRs", "node updates may not change podCIDR except from \"\" to valid");
    }
    let provider = meta::text(old, &["spec", "providerID"]);
    if !provider.is_empty() && meta::text(new, &["spec", "providerID"]) != provider {
        faults.forbidden("spec.providerID", "node updates may not change providerID except from \"\" to valid");
    }
}

/// An Event in its core form; objects that came through events.k8s.io have stricter rules when they are new.
pub(super) fn event(faults: &mut Faults, kind: &Kind, new: &Value, old: Option<&Value>) {
    let namespace = meta::namespace(new);
    let (involved, field) = match meta::get(new, &["involvedObject"]) {
        Value::Null => (meta::get(new, &["regarding"]), "regarding"),
        core => (core, "involvedObject"),
    };
    let about = meta::text(involved, &["namespace"]);
    let cluster_scoped = matches!(
        meta::text(involved, &["kind"]),
        "Node" | "Namespace" | "PersistentVolume" | "IngressClass" | "ServiceCIDR" | "IPAddress" | "StorageClass"
    );
    let right = if about.is_empty() { cluster_scoped && namespace == "default" } else { about == namespace };
    if !right {
        faults.invalid(format!("{field}.namespace"), about, "does not match event.namespace");
    }
    if kind.group != "events.k8s.io" || old.is_some() {
        return;
    }
    if meta::text(new, &["eventTime"]).is_empty() {
        faults.required("eventTime", "");
    }
    let type_ = meta::text(new, &["type"]);
    if !matches!(type_, "Normal" | "Warning") {
        faults.invalid("type", type_, format!("has invalid value: {type_}"));
    }
    if meta::text(new, &["eventTime"]).is_empty() {
        return;
    }
    let controller = match meta::text(new, &["reportingController"]) {
        "" => meta::text(new, &["reportingComponent"]),
        other => other,
    };
    if controller.is_empty() {
        faults.required("reportingController", "");
    } else {
        faults.syntax("reportingController", controller, meta::qualified_name(controller));
    }
    for (part, max) in [("reportingInstance", 128), ("action", 128), ("reason", 128)] {
        let text = meta::text(new, &[part]);
        if text.is_empty() {
            faults.required(part, "");
        } else if text.len() > max {
            faults.invalid(part, "", format!("can have at most {max} characters"));
        }
    }
}

pub(super) fn lease(faults: &mut Faults, new: &Value) {
    let spec = meta::get(new, &["spec"]);
    if let Some(seconds) = meta::get(spec, &["leaseDurationSeconds"]).as_i64()
        && seconds <= 0
    {
        faults.invalid("spec.leaseDurationSeconds", seconds, "must be greater than 0");
    }
    faults.non_negative("spec.leaseTransitions", meta::get(spec, &["leaseTransitions"]));
    if meta::get(spec, &["holderIdentity"]).as_str() == Some("") {
        faults.invalid("spec.holderIdentity", "", "must not be empty");
    }
}

pub(super) fn rbac(faults: &mut Faults, kind: &Kind, new: &Value) {
    match kind.kind.as_str() {
        "Role" | "ClusterRole" => {
            for (i, rule) in meta::list(new, &["rules"]).iter().enumerate() {
                policy_rule(faults, &format!("rules[{i}]"), rule, kind.namespaced);
            }
        }
        _ => {
            let role = meta::get(new, &["roleRef"]);
            let known: &[&str] = if kind.namespaced { &["ClusterRole", "Role"] } else { &["ClusterRole"] };
            faults.one_of("roleRef.apiGroup", meta::text(role, &["apiGroup"]), &["rbac.authorization.k8s.io"]);
            faults.one_of("roleRef.kind", meta::text(role, &["kind"]), known);
            faults.required_syntax("roleRef.name", meta::text(role, &["name"]), meta::path_segment);
            for (i, subject) in meta::list(new, &["subjects"]).iter().enumerate() {
                self::subject(faults, &format!("subjects[{i}]"), subject, kind.namespaced);
            }
        }
    }
}

fn policy_rule(faults: &mut Faults, field: &str, rule: &Value, namespaced: bool) {
    let has = |part: &str| !meta::list(rule, &[part]).is_empty();
    if !has("verbs") {
        faults.required(format!("{field}.verbs"), "verbs must contain at least one value");
    }
    if has("nonResourceURLs") {
        if namespaced {
            let text = "namespaced rules cannot apply to non-resource URLs";
            faults.invalid(format!("{field}.nonResourceURLs"), meta::get(rule, &["nonResourceURLs"]).clone(), text);
        }
        if has("apiGroups") || has("resources") || has("resourceNames") {
            let text = "rules cannot apply to both regular resources and non-resource URLs";
            faults.invalid(format!("{field}.nonResourceURLs"), meta::get(rule, &["nonResourceURLs"]).clone(), text);
        }
        return;
    }
    if !has("apiGroups") {
        faults.required(format!("{field}.apiGroups"), "resource rules must supply at least one api group");
    }
    if !has("resources") {
        faults.required(format!("{field}.resources"), "resource rules must supply at least one resource");
    }
}

fn subject(faults: &mut Faults, field: &str, subject: &Value, namespaced: bool) {
    let at = |part: &str| format!("{field}.{part}");
    let name = meta::text(subject, &["name"]);
    if name.is_empty() {
        faults.required(at("name"), "");
    }
    let group = meta::text(subject, &["apiGroup"]);
    match meta::text(subject, &["kind"]) {
        "ServiceAccount" => {
            if !name.is_empty() {
                faults.syntax(&at("name"), name, meta::dns1123_subdomain(name));
            }
            faults.one_of(at("apiGroup"), group, &[""]);
            if !namespaced && meta::text(subject, &["namespace"]).is_empty() {
                faults.required(at("namespace"), "");
            }
        }
        "User" | "Group" => faults.one_of(at("apiGroup"), group, &["rbac.authorization.k8s.io"]),
        other => faults.one_of(at("kind"), other, &["ServiceAccount", "User", "Group"]),
    }
}

pub(super) fn role_ref_unchanged(faults: &mut Faults, new: &Value, old: &Value) {
    if !same(meta::get(new, &["roleRef"]), meta::get(old, &["roleRef"])) {
        faults.invalid("roleRef", meta::get(new, &["roleRef"]).clone(), "cannot change roleRef");
    }
}

pub(super) fn disruption_budget(faults: &mut Faults, new: &Value) {
    let spec = meta::get(new, &["spec"]);
    let (least, most) = (meta::get(spec, &["minAvailable"]), meta::get(spec, &["maxUnavailable"]));
    if !least.is_null() && !most.is_null() {
        faults.invalid("spec", spec.clone(), "minAvailable and maxUnavailable cannot be both set");
    }
    for (field, value) in [("spec.minAvailable", least), ("spec.maxUnavailable", most)] {
        match value {
            Value::String(text) => faults.syntax(field, text, meta::percent(text)),
            other => faults.non_negative(field, other),
        }
    }
    faults.label_selector("spec.selector", meta::get(spec, &["selector"]));
}

pub(super) fn priority_class(faults: &mut Faults, new: &Value, old: Option<&Value>) {
    let value = meta::get(new, &["value"]).as_i64().unwrap_or(0);
    if old.is_none() && value > 1_000_000_000 && !meta::name(new).starts_with("system-") {
        faults.forbidden("value", "maximum allowed value of a user defined priority is 1000000000");
    }
}

pub(super) fn storage_class(faults: &mut Faults, new: &Value) {
    if meta::text(new, &["provisioner"]).is_empty() {
        faults.required("provisioner", "");
    }
}

pub(super) fn runtime_class(faults: &mut Faults, new: &Value) {
    let handler = meta::text(new, &["handler"]);
    faults.syntax("handler", handler, meta::dns1123_label(handler));
}
