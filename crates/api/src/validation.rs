//! Validation of objects with the field paths and texts that clients of Kubernetes know.
//!
//! Input is a document after decoding, defaulting, [`crate::service`] planning and [`crate::strategy`]; output is every
//! fault found, in the order in which the reference implementation reports them. What was stored under an older rule
//! stays acceptable where that implementation ratchets. Nothing here looks at other objects.

mod core;
mod endpoints;
mod extension;
mod ingress;
mod metadata;
mod network;
mod pod;
mod pod_text;
mod service;
mod warning;
mod workload;

use serde_json::Value;

use crate::kinds::Kind;
use crate::meta;
use crate::status::FieldError;

pub(crate) use service::cluster_ip_fields;
pub use warning::ENDPOINTS_DEPRECATED;

/// Faults of an object to be created; empty if it may be stored.
pub fn validate_create(kind: &Kind, new: &Value) -> Vec<FieldError> {
    let mut faults = Faults::default();
    metadata::create(&mut faults, kind, new);
    if kind.custom {
        return faults.list;
    }
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Pod") => pod::create(&mut faults, new),
        _ => spec(&mut faults, kind, new, None),
    }
    faults.list
}

/// Faults of a change; empty if it may be stored. `subresource` is the one written through, if any.
pub fn validate_update(kind: &Kind, new: &Value, old: &Value, subresource: Option<&str>) -> Vec<FieldError> {
    let mut faults = Faults::default();
    metadata::update(&mut faults, kind, new, old);
    if kind.custom {
        return faults.list;
    }
    match (kind.group.as_str(), kind.kind.as_str(), subresource) {
        ("", "Service", Some("status")) => service::status(&mut faults, new, old),
        ("networking.k8s.io", "Ingress", Some("status")) => ingress::status(&mut faults, new, old),
        ("", "Pod", Some("status")) => pod::status(&mut faults, new),
        (_, _, Some("status" | "finalize")) => {}
        ("", "Pod", Some("ephemeralcontainers")) => pod::ephemeral_containers(&mut faults, new, old),
        ("", "Pod", _) => pod::update(&mut faults, new, old),
        ("", "Service", _) => service::update(&mut faults, new, old),
        _ => {
            spec(&mut faults, kind, new, Some(old));
            immutable(&mut faults, kind, new, old);
        }
    }
    faults.list
}

/// Texts for `Warning` headers of an accepted write. `subresource` is the one written through, if any.
pub fn warnings(kind: &Kind, new: &Value, old: Option<&Value>, subresource: Option<&str>) -> Vec<String> {
    match subresource {
        _ if kind.custom => Vec::new(),
        Some("status") => warning::of_status(kind, new),
        Some(_) | None => warning::of(kind, new, old),
    }
}

/// Rules that hold for creation and change alike.
fn spec(faults: &mut Faults, kind: &Kind, new: &Value, old: Option<&Value>) {
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Service") => service::create(faults, new),
        ("", "Endpoints") => endpoints::endpoints(faults, new, old),
        ("", "ConfigMap") => core::config_map(faults, new),
        ("", "Secret") => core::secret(faults, new),
        ("", "Node") => core::node(faults, new),
        ("", "Event") => core::event(faults, kind, new, old),
        ("events.k8s.io", "Event") => core::event(faults, kind, new, old),
        ("", "ReplicationController") => workload::replication_controller(faults, new),
        ("", "PodTemplate") => workload::pod_template(faults, new),
        ("apps", "Deployment") => workload::deployment(faults, new),
        ("apps", "ReplicaSet") => workload::replica_set(faults, new),
        ("apps", "StatefulSet") => workload::stateful_set(faults, new),
        ("apps", "DaemonSet") => workload::daemon_set(faults, new),
        ("apps", "ControllerRevision") => workload::controller_revision(faults, new),
        ("batch", "Job") => workload::job(faults, new),
        ("batch", "CronJob") => workload::cron_job(faults, new),
        ("discovery.k8s.io", "EndpointSlice") => endpoints::slice(faults, new, old),
        ("networking.k8s.io", "Ingress") => ingress::ingress(faults, new, old),
        ("networking.k8s.io", "IngressClass") => ingress::class(faults, new),
        ("networking.k8s.io", "NetworkPolicy") => network::policy(faults, new, old),
        ("networking.k8s.io", "ServiceCIDR") => network::service_cidr(faults, new, old),
        ("networking.k8s.io", "IPAddress") => network::ip_address(faults, new),
        ("coordination.k8s.io", "Lease") => core::lease(faults, new),
        ("apiextensions.k8s.io", "CustomResourceDefinition") => extension::definition(faults, new, old),
        ("rbac.authorization.k8s.io", _) => core::rbac(faults, kind, new),
        ("policy", "PodDisruptionBudget") => core::disruption_budget(faults, new),
        ("scheduling.k8s.io", "PriorityClass") => core::priority_class(faults, new, old),
        ("storage.k8s.io", "StorageClass") => core::storage_class(faults, new),
        ("node.k8s.io", "RuntimeClass") => core::runtime_class(faults, new),
        _ => {}
    }
}

/// Fields that may not change.
fn immutable(faults: &mut Faults, kind: &Kind, new: &Value, old: &Value) {
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "ConfigMap") => core::config_map_update(faults, new, old),
        ("", "Secret") => core::secret_update(faults, new, old),
        ("", "Node") => core::node_update(faults, new, old),
        ("apps", "Deployment" | "ReplicaSet" | "DaemonSet") => workload::selector_unchanged(faults, new, old),
        ("apiextensions.k8s.io", "CustomResourceDefinition") => extension::definition_update(faults, new, old),
        ("apps", "StatefulSet") => workload::stateful_set_update(faults, new, old),
        ("apps", "ControllerRevision") => {
            faults.unchanged("data", meta::get(new, &["data"]), meta::get(old, &["data"]))
        }
        ("batch", "Job") => workload::job_update(faults, new, old),
        ("networking.k8s.io", "IngressClass") => {
            let path = ["spec", "controller"];
            faults.unchanged("spec.controller", meta::get(new, &path), meta::get(old, &path));
        }
        ("networking.k8s.io", "IPAddress") => {
            let path = ["spec", "parentRef"];
            faults.unchanged("spec.parentRef", meta::get(new, &path), meta::get(old, &path));
        }
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => {
            core::role_ref_unchanged(faults, new, old)
        }
        ("scheduling.k8s.io", "PriorityClass") => {
            faults.unchanged("value", meta::get(new, &["value"]), meta::get(old, &["value"]));
        }
        _ => {}
    }
}

/// The faults found so far.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    pub(crate) list: Vec<FieldError>,
}

impl Faults {
    pub(crate) fn add(&mut self, error: FieldError) {
        self.list.push(error);
    }

    fn required(&mut self, field: impl Into<String>, detail: &str) {
        self.add(FieldError::required(field, detail));
    }

    fn invalid(&mut self, field: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) {
        self.add(FieldError::invalid(field, value, detail));
    }

    fn forbidden(&mut self, field: impl Into<String>, detail: impl Into<String>) {
        self.add(FieldError::forbidden(field, detail));
    }

    /// One Invalid for each text a syntax rule returned.
    fn syntax(&mut self, field: &str, value: &str, texts: Vec<String>) {
        for text in texts {
            self.invalid(field, value, text);
        }
    }

    /// Required when empty, else judged by a syntax rule.
    fn required_syntax(&mut self, field: &str, value: &str, rule: impl Fn(&str) -> Vec<String>) {
        if value.is_empty() {
            self.required(field, "");
        } else {
            self.syntax(field, value, rule(value));
        }
    }

    /// NotSupported unless the value is one of these.
    fn one_of(&mut self, field: impl Into<String>, value: &str, supported: &[&str]) {
        if !supported.contains(&value) {
            self.add(FieldError::not_supported(field, value, supported));
        }
    }

    /// `must be greater than or equal to 0`; absent is fine.
    fn non_negative(&mut self, field: impl Into<String>, value: &Value) {
        if let Some(number) = value.as_i64().filter(|n| *n < 0) {
            self.invalid(field, number, "must be greater than or equal to 0");
        }
    }

    /// A port number that must be there and in range; absent counts as 0.
    fn port_number(&mut self, field: impl Into<String> + Clone, value: &Value) {
        let number = value.as_i64().unwrap_or(0);
        for text in meta::port_number(number) {
            self.invalid(field.clone(), number, text);
        }
    }

    /// A port as number or name; absent counts as 0.
    fn port_number_or_name(&mut self, field: &str, value: &Value) {
        match value.as_str() {
            Some(name) => self.syntax(field, name, meta::port_name(name)),
            None => self.port_number(field, value),
        }
    }

    /// `field is immutable` when the two differ; null and absent are equal.
    fn unchanged(&mut self, field: &str, new: &Value, old: &Value) {
        if !same(new, old) {
            self.invalid(field, new.clone(), "field is immutable");
        }
    }

    /// Keys and values of a label map.
    fn labels(&mut self, field: &str, labels: &Value) {
        for (key, value) in labels.as_object().into_iter().flatten() {
            self.syntax(field, key, meta::qualified_name(key));
            let value = value.as_str().unwrap_or_default();
            self.syntax(field, value, meta::label_value(value));
        }
    }

    /// A LabelSelector object.
    fn label_selector(&mut self, field: &str, selector: &Value) {
        self.labels(&format!("{field}.matchLabels"), meta::get(selector, &["matchLabels"]));
        for (i, expression) in meta::list(selector, &["matchExpressions"]).iter().enumerate() {
            let at = |part: &str| format!("{field}.matchExpressions[{i}].{part}");
            let values = meta::list(expression, &["values"]);
            match meta::text(expression, &["operator"]) {
                "In" | "NotIn" if values.is_empty() => {
                    self.required(at("values"), "must be specified when `operator` is 'In' or 'NotIn'");
                }
                "Exists" | "DoesNotExist" if !values.is_empty() => {
                    self.forbidden(at("values"), "may not be specified when `operator` is 'Exists' or 'DoesNotExist'")
                }
                "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
                other => self.invalid(at("operator"), other, "not a valid selector operator"),
            }
            let key = meta::text(expression, &["key"]);
            self.syntax(&at("key"), key, meta::qualified_name(key));
            for (v, value) in values.iter().enumerate() {
                let value = value.as_str().unwrap_or_default();
                self.syntax(&format!("{}[{v}]", at("values")), value, meta::label_value(value));
            }
        }
    }

    /// Addresses that cannot be those of an endpoint or an external IP.
    fn special_ip(&mut self, field: &str, value: &str) {
        let Some(ip) = meta::parse_ip_sloppy(value) else { return };
        let (link_local, link_local_multicast) = match ip {
            std::net::IpAddr::V4(v4) => (v4.is_link_local(), v4.octets()[..3] == [224, 0, 0]),
            std::net::IpAddr::V6(v6) => (v6.is_unicast_link_local(), v6.segments()[0] & 0xff0f == 0xff02),
        };
        let text = if ip.is_unspecified() {
            format!("may not be unspecified ({value})")
        } else if ip.is_loopback() {
            "may not be in the loopback range (127.0.0.0/8, ::1/128)".to_owned()
        } else if link_local {
            "may not be in the link-local range (169.254.0.0/16, fe80::/10)".to_owned()
        } else if link_local_multicast {
            "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)".to_owned()
        } else {
            return;
        };
        self.invalid(field, value, text);
    }
}

/// Equality of two parts of documents: null, absent, and empty lists and objects are the same.
pub(crate) fn same(a: &Value, b: &Value) -> bool {
    fn empty(value: &Value) -> bool {
        match value {
            Value::Null => true,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.values().all(Value::is_null),
            Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
        }
    }
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            a.iter().all(|(key, value)| same(value, b.get(key).unwrap_or(&Value::Null)))
                && b.iter().all(|(key, value)| a.contains_key(key) || empty(value))
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => a == b || (empty(a) && empty(b)),
    }
}

/// An object as JSON with the given keys in this order, as the reference implementation prints its structures.
fn ordered_json(object: &Value, keys: &[&str]) -> String {
    let parts: Vec<String> = keys
        .iter()
        .filter_map(|key| {
            let value = object.get(*key).filter(|value| !value.is_null())?;
            Some(format!("\"{key}\":{value}"))
        })
        .collect();
    format!("{{{}}}", parts.join(","))
}

/// A LabelSelector as it is printed.
fn selector_text(selector: &Value) -> String {
    if selector.is_null() { "null".to_owned() } else { ordered_json(selector, &["matchLabels", "matchExpressions"]) }
}

/// The strings of a list.
fn strings<'a>(object: &'a Value, path: &[&str]) -> Vec<&'a str> {
    meta::list(object, path).iter().map(|v| v.as_str().unwrap_or_default()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn empty_and_absent_are_the_same() {
        let rows = [
            ("null_is_absent", json!({"a": null}), json!({}), true),
            ("an_empty_list_is_absent", json!({"a": []}), json!({}), true),
            ("an_empty_object_is_absent", json!({}), json!({"a": {}}), true),
            ("an_empty_text_is_a_value", json!({"a": ""}), json!({}), false),
            ("order_of_lists_counts", json!([1, 2]), json!([2, 1]), false),
            ("an_added_key_is_a_change", json!({"a": {"b": 1}}), json!({"a": {"b": 1, "c": 2}}), false),
        ];
        for (name, a, b, want) in rows {
            assert_eq!(same(&a, &b), want, "{name}");
            assert_eq!(same(&b, &a), want, "{name}, reversed");
        }
    }
}
