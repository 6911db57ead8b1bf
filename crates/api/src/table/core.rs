//! Rows of the remaining kinds.

use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::BTreeSet;

use super::{DATE, INTEGER, Layout, STRING, age, name, number, or_none, size};
use crate::meta;

/// Kinds without columns of their own.
pub(super) const DEFAULT: Layout = (&[("Name", STRING, 0), ("Age", STRING, 0)], |o, now| vec![name(o), age(o, now)]);

/// Kinds that show when they were made.
pub(super) const CREATED_AT: Layout = (&[("Name", STRING, 0), ("Created At", DATE, 0)], |o, _| {
    vec![name(o), json!(meta::text(o, &["metadata", "creationTimestamp"]))]
});

pub(super) const NAMESPACE: Layout = (&[("Name", STRING, 0), ("Status", STRING, 0), ("Age", STRING, 0)], |o, now| {
    vec![name(o), json!(meta::text(o, &["status", "phase"])), age(o, now)]
});

pub(super) const CONFIG_MAP: Layout = (&[("Name", STRING, 0), ("Data", STRING, 0), ("Age", STRING, 0)], |o, now| {
    vec![name(o), json!(size(o, "data") + size(o, "binaryData")), age(o, now)]
});

pub(super) const SECRET: Layout =
    (&[("Name", STRING, 0), ("Type", STRING, 0), ("Data", STRING, 0), ("Age", STRING, 0)], |o, now| {
        vec![name(o), json!(meta::text(o, &["type"])), json!(size(o, "data")), age(o, now)]
    });

pub(super) const LEASE: Layout = (&[("Name", STRING, 0), ("Holder", STRING, 0), ("Age", STRING, 0)], |o, now| {
    vec![name(o), json!(meta::text(o, &["spec", "holderIdentity"])), age(o, now)]
});

pub(super) const PRIORITY_CLASS: Layout = (
    &[
        ("Name", STRING, 0),
        ("Value", INTEGER, 0),
        ("Global-Default", "boolean", 0),
        ("Age", STRING, 0),
        ("PreemptionPolicy", STRING, 0),
    ],
    |o, now| {
        vec![
            name(o),
            json!(number(o, &["value"])),
            json!(meta::get(o, &["globalDefault"]) == true),
            age(o, now),
            json!(meta::text(o, &["preemptionPolicy"])),
        ]
    },
);

pub(super) const RUNTIME_CLASS: Layout =
    (&[("Name", STRING, 0), ("Handler", STRING, 0), ("Age", STRING, 0)], |o, now| {
        vec![name(o), json!(meta::text(o, &["handler"])), age(o, now)]
    });

pub(super) const NODE: Layout = (
    &[
        ("Name", STRING, 0),
        ("Status", STRING, 0),
        ("Roles", STRING, 0),
        ("Age", STRING, 0),
        ("Version", STRING, 0),
        ("Internal-IP", STRING, 1),
        ("External-IP", STRING, 1),
        ("OS-Image", STRING, 1),
        ("Kernel-Version", STRING, 1),
        ("Container-Runtime", STRING, 1),
    ],
    node,
);

fn node(object: &Value, now: Timestamp) -> Vec<Value> {
    let ready = meta::list(object, &["status", "conditions"])
        .iter()
        .find(|c| meta::text(c, &["type"]) == "Ready")
        .map(|c| meta::text(c, &["status"]) == "True");
    let mut status = match ready {
        Some(true) => "Ready",
        Some(false) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if meta::get(object, &["spec", "unschedulable"]) == true {
        status.push_str(",SchedulingDisabled");
    }
    let address = |type_: &str| {
        let found = meta::list(object, &["status", "addresses"])
            .iter()
            .find(|a| meta::text(a, &["type"]) == type_)
            .map_or("", |a| meta::text(a, &["address"]));
        json!(or_none(found))
    };
    let info = |field: &str| meta::text(object, &["status", "nodeInfo", field]);
    let or_unknown = |text: &str| if text.is_empty() { "<unknown>".to_owned() } else { text.to_owned() };
    let kernel = match (info("kernelVersion"), info("architecture")) {
        ("", _) => "<unknown>".to_owned(),
        (kernel, "") => kernel.to_owned(),
        (kernel, architecture) => format!("{kernel} ({architecture})"),
    };
    vec![
        name(object),
        json!(status),
        json!(roles(object)),
        age(object, now),
        json!(info("kubeletVersion")),
        address("InternalIP"),
        address("ExternalIP"),
        json!(or_unknown(info("osImage"))),
        json!(kernel),
        json!(or_unknown(info("containerRuntimeVersion"))),
    ]
}

/// Roles from labels, sorted.
fn roles(node: &Value) -> String {
    let roles: BTreeSet<&str> = meta::get(node, &["metadata", "labels"])
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) => Some(role),
            None if key == "kubernetes.io/role" => value.as_str(),
            None => None,
        })
        .filter(|role| !role.is_empty())
        .collect();
    or_none(&roles.into_iter().collect::<Vec<_>>().join(",")).to_owned()
}

pub(super) const EVENT: Layout = (
    &[
        ("Last Seen", STRING, 0),
        ("Type", STRING, 0),
        ("Reason", STRING, 0),
        ("Object", STRING, 0),
        ("Subobject", STRING, 1),
        ("Source", STRING, 1),
        ("Message", STRING, 0),
        ("First Seen", STRING, 1),
        ("Count", STRING, 1),
        ("Name", STRING, 1),
    ],
    event,
);

/// The first path that holds a text; events of both groups spell the same things differently.
fn first_text<'a>(object: &'a Value, paths: &[&[&str]]) -> &'a str {
    paths.iter().map(|path| meta::text(object, path)).find(|text| !text.is_empty()).unwrap_or_default()
}

fn event(object: &Value, now: Timestamp) -> Vec<Value> {
    let first = first_text(object, &[&["firstTimestamp"], &["deprecatedFirstTimestamp"], &["eventTime"]]);
    let last = match first_text(
        object,
        &[&["series", "lastObservedTime"], &["lastTimestamp"], &["deprecatedLastTimestamp"]],
    ) {
        "" => first,
        last => last,
    };
    let count = [
        meta::get(object, &["series", "count"]),
        meta::get(object, &["count"]),
        meta::get(object, &["deprecatedCount"]),
    ]
    .into_iter()
    .filter_map(Value::as_i64)
    .find(|count| *count != 0)
    .unwrap_or(1);
    let involved = match meta::get(object, &["involvedObject"]) {
        Value::Null => meta::get(object, &["regarding"]),
        core => core,
    };
    let kind = meta::text(involved, &["kind"]).to_lowercase();
    let about = match meta::text(involved, &["name"]) {
        "" => kind,
        name => format!("{kind}/{name}"),
    };
    let component = first_text(
        object,
        &[
            &["source", "component"],
            &["deprecatedSource", "component"],
            &["reportingComponent"],
            &["reportingController"],
        ],
    );
    let host = first_text(object, &[&["source", "host"], &["deprecatedSource", "host"], &["reportingInstance"]]);
    let source = if host.is_empty() { component.to_owned() } else { format!("{component}, {host}") };
    vec![
        json!(meta::age(last, now)),
        json!(meta::text(object, &["type"])),
        json!(meta::text(object, &["reason"])),
        json!(about),
        json!(meta::text(involved, &["fieldPath"])),
        json!(source),
        json!(first_text(object, &[&["message"], &["note"]]).trim()),
        json!(meta::age(first, now)),
        json!(count),
        name(object),
    ]
}

pub(super) const ROLE_BINDING: Layout = (
    &[
        ("Name", STRING, 0),
        ("Role", STRING, 0),
        ("Age", STRING, 0),
        ("Users", STRING, 1),
        ("Groups", STRING, 1),
        ("ServiceAccounts", STRING, 1),
    ],
    role_binding,
);

fn role_binding(object: &Value, now: Timestamp) -> Vec<Value> {
    let subjects = |kind: &str| {
        meta::list(object, &["subjects"])
            .iter()
            .filter(|subject| meta::text(subject, &["kind"]) == kind)
            .map(|subject| match (kind, meta::text(subject, &["namespace"])) {
                ("ServiceAccount", namespace) => format!("{namespace}/{}", meta::text(subject, &["name"])),
                _ => meta::text(subject, &["name"]).to_owned(),
            })
            .collect::<Vec<_>>()
            .join(", ")
    };
    let role = meta::get(object, &["roleRef"]);
    vec![
        name(object),
        json!(format!("{}/{}", meta::text(role, &["kind"]), meta::text(role, &["name"]))),
        age(object, now),
        json!(subjects("User")),
        json!(subjects("Group")),
        json!(subjects("ServiceAccount")),
    ]
}

/// `RWO,ROX` for access modes.
fn access_modes(modes: &[Value]) -> String {
    let short = |mode: &Value| match mode.as_str().unwrap_or_default() {
        "ReadWriteOnce" => "RWO",
        "ReadOnlyMany" => "ROX",
        "ReadWriteMany" => "RWX",
        "ReadWriteOncePod" => "RWOP",
        _ => "",
    };
    modes.iter().map(short).filter(|mode| !mode.is_empty()).collect::<Vec<_>>().join(",")
}

pub(super) const VOLUME_CLAIM: Layout = (
    &[
        ("Name", STRING, 0),
        ("Status", STRING, 0),
        ("Volume", STRING, 0),
        ("Capacity", STRING, 0),
        ("Access Modes", STRING, 0),
        ("StorageClass", STRING, 0),
        ("VolumeAttributesClass", STRING, 0),
        ("Age", STRING, 0),
        ("VolumeMode", STRING, 1),
    ],
    |o, now| {
        let phase = if meta::is_deleting(o) { "Terminating" } else { meta::text(o, &["status", "phase"]) };
        vec![
            name(o),
            json!(phase),
            json!(meta::text(o, &["spec", "volumeName"])),
            json!(meta::text(o, &["status", "capacity", "storage"])),
            json!(access_modes(meta::list(o, &["status", "accessModes"]))),
            json!(meta::text(o, &["spec", "storageClassName"])),
            json!(match meta::text(o, &["spec", "volumeAttributesClassName"]) {
                "" => "<unset>",
                class => class,
            }),
            age(o, now),
            json!(match meta::text(o, &["spec", "volumeMode"]) {
                "" => "<unset>",
                mode => mode,
            }),
        ]
    },
);

pub(super) const VOLUME: Layout = (
    &[
        ("Name", STRING, 0),
        ("Capacity", STRING, 0),
        ("Access Modes", STRING, 0),
        ("Reclaim Policy", STRING, 0),
        ("Status", STRING, 0),
        ("Claim", STRING, 0),
        ("StorageClass", STRING, 0),
        ("Reason", STRING, 0),
        ("Age", STRING, 0),
        ("VolumeMode", STRING, 1),
    ],
    |o, now| {
        let claim = meta::get(o, &["spec", "claimRef"]);
        let claim = if claim.is_null() {
            String::new()
        } else {
            format!("{}/{}", meta::text(claim, &["namespace"]), meta::text(claim, &["name"]))
        };
        let phase = if meta::is_deleting(o) { "Terminating" } else { meta::text(o, &["status", "phase"]) };
        vec![
            name(o),
            json!(meta::text(o, &["spec", "capacity", "storage"])),
            json!(access_modes(meta::list(o, &["spec", "accessModes"]))),
            json!(meta::text(o, &["spec", "persistentVolumeReclaimPolicy"])),
            json!(phase),
            json!(claim),
            json!(meta::text(o, &["spec", "storageClassName"])),
            json!(meta::text(o, &["status", "reason"])),
            age(o, now),
            json!(match meta::text(o, &["spec", "volumeMode"]) {
                "" => "<unset>",
                mode => mode,
            }),
        ]
    },
);

pub(super) const QUOTA: Layout =
    (&[("Name", STRING, 0), ("Request", STRING, 0), ("Limit", STRING, 0), ("Age", STRING, 0)], |o, now| {
        let used = |limits: bool| {
            meta::get(o, &["status", "hard"])
                .as_object()
                .into_iter()
                .flatten()
                .filter(|(name, _)| name.starts_with("limits.") == limits)
                .map(|(name, hard)| {
                    let used = meta::text(o, &["status", "used", name]);
                    format!("{name}: {used}/{}", hard.as_str().unwrap_or_default())
                })
                .collect::<Vec<_>>()
                .join(", ")
        };
        vec![name(o), json!(used(false)), json!(used(true)), age(o, now)]
    });

pub(super) const STORAGE_CLASS: Layout = (
    &[
        ("Name", STRING, 0),
        ("Provisioner", STRING, 0),
        ("ReclaimPolicy", STRING, 0),
        ("VolumeBindingMode", STRING, 0),
        ("AllowVolumeExpansion", STRING, 0),
        ("Age", STRING, 0),
    ],
    |o, now| {
        let default = meta::annotation(o, "storageclass.kubernetes.io/is-default-class") == Some("true");
        vec![
            json!(format!("{}{}", meta::name(o), if default { " (default)" } else { "" })),
            json!(meta::text(o, &["provisioner"])),
            json!(match meta::text(o, &["reclaimPolicy"]) {
                "" => "Delete",
                policy => policy,
            }),
            json!(match meta::text(o, &["volumeBindingMode"]) {
                "" => "<unset>",
                mode => mode,
            }),
            json!(meta::get(o, &["allowVolumeExpansion"]) == true),
            age(o, now),
        ]
    },
);

#[cfg(test)]
mod tests {
    use super::super::tests::cells;
    use serde_json::json;

    #[test]
    fn nodes_show_state_and_roles() {
        let object = json!({
            "metadata": {"name": "n", "labels": {"node-role.kubernetes.io/worker": "", "kubernetes.io/role": "edge"}},
            "spec": {"unschedulable": true},
            "status": {"conditions": [{"type": "Ready", "status": "True"}],
                "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
                "nodeInfo": {"kubeletVersion": "v1", "kernelVersion": "6.1", "architecture": "amd64"}},
        });
        assert_eq!(
            cells("", "nodes", object),
            "n | Ready,SchedulingDisabled | edge,worker | <unknown> | v1 | 192.0.2.1 | <none> | <unknown> | 6.1 (amd64) | <unknown>"
        );
    }

    #[test]
    fn events_of_both_groups_read_alike() {
        let core = json!({"metadata": {"name": "e"}, "type": "Warning", "reason": "Bad", "count": 4,
            "message": "it broke\n", "source": {"component": "kubelet", "host": "n1"}, "lastTimestamp": "2026-01-01T23:59:30Z",
            "involvedObject": {"kind": "Pod", "name": "a", "fieldPath": "x"}});
        assert_eq!(
            cells("", "events", core),
            "30s | Warning | Bad | pod/a | x | kubelet, n1 | it broke | <unknown> | 4 | e"
        );
        let newer = json!({"metadata": {"name": "e"}, "type": "Normal", "reason": "Done", "note": "well",
            "eventTime": "2026-01-01T23:59:30.000000Z", "reportingController": "c", "reportingInstance": "i",
            "regarding": {"kind": "Pod", "name": "a"}});
        assert_eq!(
            cells("events.k8s.io", "events", newer),
            "30s | Normal | Done | pod/a |  | c, i | well | 30s | 1 | e"
        );
    }
}
