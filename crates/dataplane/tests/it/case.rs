//! Cases of `conformance/golden/traffic.jsonl`.

use std::collections::BTreeSet;
use std::path::PathBuf;

use portolan_dataplane::Change;
use portolan_plan::world::ObjectKey;
use serde_json::Value;

use crate::lab;

/// Namespace of the objects of every case; each case has the lab for itself.
pub const NAMESPACE: &str = "t";

#[derive(Clone, Debug)]
pub struct Case {
    pub id: String,
    pub topic: String,
    pub objects: Vec<Value>,
    pub steps: Vec<Value>,
}

pub fn conformance() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../conformance")
}

fn recorded() -> Vec<Value> {
    let text = std::fs::read_to_string(conformance().join("golden/traffic.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn load() -> Vec<Case> {
    cases(recorded())
}

/// The cases that are recorded over IPv4 alone, with every address replaced by its IPv6 counterpart.
pub fn load_over_ipv6(topics: &[&str]) -> Vec<Case> {
    let alone = |case: &Value| {
        let text = case.to_string();
        !text.contains(".6\"") && !text.contains("IPv6") && !text.contains("loadBalancerSourceRanges")
    };
    let chosen = recorded().into_iter().filter(|c| topics.contains(&c["topic"].as_str().unwrap()) && alone(c));
    cases(chosen.map(|case| over_ipv6(case, false)).collect())
}

fn over_ipv6(value: Value, is_place: bool) -> Value {
    match value {
        Value::String(text) if text == "IPv4" => "IPv6".into(),
        Value::String(text) if text.starts_with('$') && text != "$ns" || is_place => format!("{text}.6").into(),
        Value::Array(items) => items.into_iter().map(|v| over_ipv6(v, false)).collect(),
        Value::Object(map) => map
            .into_iter()
            .map(|(key, value)| {
                let is_place = key == "to" && value.is_string();
                (key, over_ipv6(value, is_place))
            })
            .collect(),
        other => other,
    }
}

fn cases(recorded: Vec<Value>) -> Vec<Case> {
    recorded
        .into_iter()
        .map(|value| {
            let list = |v: &Value| v.as_array().cloned().unwrap_or_default();
            let mut objects = list(&value["objects"]["services"]);
            objects.extend(list(&value["objects"]["endpointslices"]));
            Case {
                id: value["id"].as_str().unwrap().to_owned(),
                topic: value["topic"].as_str().unwrap().to_owned(),
                objects: objects.into_iter().map(resolve).collect(),
                steps: list(&value["probes"]),
            }
        })
        .collect()
}

/// The cases as recorded with pods recognised by their networks (upstream's `ClusterCIDR`) instead of by interface.
pub fn load_cluster_cidr() -> Vec<Case> {
    let mut cases = load();
    for step in cases.iter_mut().flat_map(|c| c.steps.iter_mut()) {
        if let Some(expect) = step.get("expectClusterCIDR").cloned() {
            step["expect"] = expect;
            step["byNetwork"] = true.into();
        }
    }
    cases
}

/// Names that are not passing yet, one a line.
pub fn known_failing() -> BTreeSet<String> {
    let text = std::fs::read_to_string(conformance().join("known-failing/traffic.txt")).unwrap_or_default();
    text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')).map(str::to_owned).collect()
}

/// Replaces names by addresses.
pub fn resolve(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(resolve_text(&text)),
        Value::Array(items) => items.into_iter().map(resolve).collect(),
        Value::Object(map) => map.into_iter().map(|(k, v)| (k, resolve(v))).collect(),
        other => other,
    }
}

fn resolve_text(text: &str) -> String {
    let Some(name) = text.strip_prefix('$') else { return text.to_owned() };
    if name == "ns" {
        return NAMESPACE.to_owned();
    }
    if let Some(net) = lab::network(name) {
        return net.to_owned();
    }
    match name.split_once('/') {
        Some((name, len)) => format!("{}/{len}", lab::address(name).unwrap()),
        None => lab::address(name).unwrap_or_else(|| panic!("unknown name {text}")).to_string(),
    }
}

/// The change that an object of a case is.
pub fn put(mut object: Value) -> Change {
    object["metadata"]["namespace"] = NAMESPACE.into();
    match object["kind"].as_str().unwrap() {
        "Service" => Change::service(&serde_json::from_value(object).unwrap()),
        "EndpointSlice" => Change::slice(&serde_json::from_value(object).unwrap()),
        other => panic!("unknown kind {other}"),
    }
}

/// The change that removing an object is.
pub fn delete(object: &Value) -> Change {
    let name = object["name"].as_str().or(object["metadata"]["name"].as_str()).unwrap();
    let key = ObjectKey::new(NAMESPACE, name);
    match object["kind"].as_str().unwrap() {
        "Service" => Change::service_gone(key),
        "EndpointSlice" => Change::slice_gone(key),
        other => panic!("unknown kind {other}"),
    }
}

/// The changes of a `change` step.
pub fn changes(step: &Value) -> Vec<Change> {
    let list = |v: &Value| v.as_array().cloned().unwrap_or_default();
    let puts = list(&step["put"]).into_iter().map(|o| put(resolve(o)));
    puts.chain(list(&step["delete"]).iter().map(delete)).collect()
}

/// The service ranges of the recording.
pub fn service_range() -> Change {
    Change::ServiceCidr("kubernetes".into(), vec!["10.96.0.0/12".parse().unwrap(), "fd00:10:96::/108".parse().unwrap()])
}

/// Expectations of a probe: the recorded one, and others that are right too.
pub fn expectations(probe: &Value) -> Vec<&Value> {
    let mut all = vec![&probe["expect"]];
    all.extend(probe["accept"].as_array().into_iter().flatten());
    all
}

pub fn names(value: &Value) -> BTreeSet<String> {
    value.as_array().into_iter().flatten().map(|v| v.as_str().unwrap().to_owned()).collect()
}
