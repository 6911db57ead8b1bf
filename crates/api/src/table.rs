//! Server-side tables (`Accept: application/json;as=Table`): columns and cells of each kind, as `kubectl get` prints
//! them.
//!
//! The server always renders the wide form; columns of priority 1 are hidden by clients unless they ask for them. The
//! caller wraps rows into the Table object and attaches the object or its metadata to each.

mod core;
mod custom;
mod network;
mod pod;
mod workload;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::kinds::Kind;
use crate::meta;

pub use custom::{custom_columns, custom_row};

/// One column of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Heading.
    pub name: String,
    /// `string`, `integer`, `number`, `boolean` or `date`.
    pub type_: String,
    /// `name` marks the column that names the object.
    pub format: String,
    /// Text for people.
    pub description: String,
    /// 0 is always shown, greater only with `-o wide`.
    pub priority: i32,
}

impl Column {
    /// The entry of `columnDefinitions`.
    pub fn to_value(&self) -> Value {
        json!({
            "name": self.name, "type": self.type_, "format": self.format,
            "description": self.description, "priority": self.priority,
        })
    }
}

/// One row of a table, without the object that goes with it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// One value for each column.
    pub cells: Vec<Value>,
    /// Row conditions, such as `Completed`.
    pub conditions: Vec<Value>,
}

/// Cells of one object.
type Cells = fn(&Value, Timestamp) -> Vec<Value>;

/// Heading, type and priority of the columns of a kind, and how a row is filled.
type Layout = (&'static [(&'static str, &'static str, i32)], Cells);

const STRING: &str = "string";
const INTEGER: &str = "integer";
const DATE: &str = "date";

/// The columns of a kind. Of a custom kind these are the name and the age; see [`custom_columns`] for its own.
pub fn columns(kind: &Kind) -> Vec<Column> {
    layout(kind).0.iter().map(|(name, type_, priority)| column(name, type_, *priority)).collect()
}

fn column(name: &str, type_: &str, priority: i32) -> Column {
    Column {
        name: name.to_owned(),
        type_: type_.to_owned(),
        format: if name == "Name" { "name".to_owned() } else { String::new() },
        description: String::new(),
        priority,
    }
}

/// The row of an object.
pub fn row(kind: &Kind, object: &Value, now: Timestamp) -> Row {
    let conditions = if kind.is("", "Pod") { pod::conditions(object) } else { Vec::new() };
    Row { cells: (layout(kind).1)(object, now), conditions }
}

fn layout(kind: &Kind) -> Layout {
    if kind.custom {
        return core::DEFAULT;
    }
    match (kind.group.as_str(), kind.kind.as_str()) {
        ("", "Pod") => pod::POD,
        ("", "Service") => network::SERVICE,
        ("", "Endpoints") => network::ENDPOINTS,
        ("discovery.k8s.io", "EndpointSlice") => network::ENDPOINT_SLICE,
        ("networking.k8s.io", "Ingress") => network::INGRESS,
        ("networking.k8s.io", "IngressClass") => network::INGRESS_CLASS,
        ("networking.k8s.io", "NetworkPolicy") => network::NETWORK_POLICY,
        ("networking.k8s.io", "ServiceCIDR") => network::SERVICE_CIDR,
        ("networking.k8s.io", "IPAddress") => network::IP_ADDRESS,
        ("", "Namespace") => core::NAMESPACE,
        ("", "Node") => core::NODE,
        ("", "ConfigMap") => core::CONFIG_MAP,
        ("", "Secret") => core::SECRET,
        ("", "Event") | ("events.k8s.io", "Event") => core::EVENT,
        ("coordination.k8s.io", "Lease") => core::LEASE,
        ("apps", "Deployment") => workload::DEPLOYMENT,
        ("apps", "ReplicaSet") | ("", "ReplicationController") => workload::REPLICA_SET,
        ("apps", "StatefulSet") => workload::STATEFUL_SET,
        ("apps", "DaemonSet") => workload::DAEMON_SET,
        ("apps", "ControllerRevision") => workload::CONTROLLER_REVISION,
        ("batch", "Job") => workload::JOB,
        ("batch", "CronJob") => workload::CRON_JOB,
        ("policy", "PodDisruptionBudget") => workload::DISRUPTION_BUDGET,
        ("autoscaling", "HorizontalPodAutoscaler") => workload::AUTOSCALER,
        ("rbac.authorization.k8s.io", "Role" | "ClusterRole")
        | ("apiextensions.k8s.io", "CustomResourceDefinition")
        | ("", "LimitRange") => core::CREATED_AT,
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => core::ROLE_BINDING,
        ("", "PersistentVolumeClaim") => core::VOLUME_CLAIM,
        ("", "PersistentVolume") => core::VOLUME,
        ("", "ResourceQuota") => core::QUOTA,
        ("storage.k8s.io", "StorageClass") => core::STORAGE_CLASS,
        ("scheduling.k8s.io", "PriorityClass") => core::PRIORITY_CLASS,
        ("node.k8s.io", "RuntimeClass") => core::RUNTIME_CLASS,
        ("", "PodTemplate") => workload::POD_TEMPLATE,
        _ => core::DEFAULT,
    }
}

fn name(object: &Value) -> Value {
    json!(meta::name(object))
}

fn age(object: &Value, now: Timestamp) -> Value {
    json!(meta::age(meta::text(object, &["metadata", "creationTimestamp"]), now))
}

/// The text, or `<none>` when it is empty.
fn or_none(text: &str) -> &str {
    if text.is_empty() { "<none>" } else { text }
}

/// `a=b,c=d` in key order, or `<none>`.
fn labels(map: &Value) -> String {
    let pairs: Vec<String> = map
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    or_none(&pairs.join(",")).to_owned()
}

/// A LabelSelector object as text, or `<none>`.
fn selector(selector: &Value) -> String {
    let text = crate::selector::LabelSelector::from_object(selector).map(|s| s.to_text()).unwrap_or_default();
    or_none(&text).to_owned()
}

/// At most three, then how many more.
fn at_most_three(items: &[String]) -> String {
    let shown = items[..items.len().min(3)].join(",");
    if items.len() > 3 { format!("{shown} + {} more...", items.len() - 3) } else { shown }
}

fn number(object: &Value, path: &[&str]) -> i64 {
    meta::get(object, path).as_i64().unwrap_or(0)
}

/// Number of entries of a map.
fn size(object: &Value, field: &str) -> usize {
    meta::get(object, &[field]).as_object().map_or(0, serde_json::Map::len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::Registry;

    pub(super) fn now() -> Timestamp {
        meta::parse_time("2026-01-02T00:00:00Z").expect("valid")
    }

    /// The cells of an object of a built-in kind, joined.
    pub(super) fn cells(group: &str, plural: &str, object: Value) -> String {
        let registry = Registry::builtin();
        let kind = registry.by_gvr(group, "v1", plural).expect("built in");
        let cells = row(kind, &object, now()).cells;
        let texts: Vec<String> =
            cells.iter().map(|c| c.as_str().map_or_else(|| c.to_string(), str::to_owned)).collect();
        texts.join(" | ")
    }

    #[test]
    fn every_kind_fills_its_columns_from_an_empty_object() {
        for kind in Registry::builtin().iter() {
            let (columns, row) = (columns(kind), row(kind, &json!({}), now()));
            // An IPAddress has one cell more than columns; clients of the reference implementation see the same.
            let extra = usize::from(kind.is("networking.k8s.io", "IPAddress"));
            assert_eq!(columns.len() + extra, row.cells.len(), "{kind}");
        }
    }
}
