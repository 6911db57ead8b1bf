//! Kinds that show another kind's stored objects: events of `events.k8s.io` and of the core group.
//!
//! The core form is stored; the table pairs each field of `events.k8s.io/v1` with its core name, as upstream's
//! conversion between the two does.

use portolan_api::kinds::{Kind, Storage};
use portolan_api::meta;
use serde_json::{Map, Value, json};

/// (name in `events.k8s.io/v1`, name in core `v1`)
const EVENT_FIELDS: &[(&str, &str)] = &[
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
];

/// Whether objects of this kind are stored in another form than they are shown in.
pub fn converts(kind: &Kind) -> bool {
    matches!(kind.storage, Storage::SharedWith { .. })
}

/// From the form of `kind` to the stored form.
pub fn to_storage(kind: &Kind, value: Value) -> Value {
    match &kind.storage {
        Storage::SharedWith { group, version, .. } => {
            let api_version = if group.is_empty() { version.clone() } else { format!("{group}/{version}") };
            rename(value, &api_version, |name| EVENT_FIELDS.iter().find(|(new, _)| *new == name).map(|(_, core)| *core))
        }
        Storage::Own | Storage::Virtual => value,
    }
}

/// From the stored form to the form of `kind`.
pub fn from_storage(kind: &Kind, value: Value) -> Value {
    match &kind.storage {
        Storage::SharedWith { .. } => rename(value, &kind.api_version(), |name| {
            EVENT_FIELDS.iter().find(|(_, core)| *core == name).map(|(new, _)| *new)
        }),
        Storage::Own | Storage::Virtual => value,
    }
}

/// Keeps fields in step that say one thing twice: the first of several addresses and the list of them. The single field
/// wins, because older clients know only that one (core/v1 conversion of PodStatus and NodeSpec).
pub fn synchronize(kind: &Kind, value: &mut Value) {
    if kind.is("networking.k8s.io", "Ingress") && !meta::get(value, &["spec", "defaultBackend"]).is_null() {
        // Decoding keeps an empty list for the sake of an error that cannot come now.
        if meta::get(value, &["spec", "rules"]).as_array().is_some_and(Vec::is_empty) {
            meta::remove(value, &["spec", "rules"]);
        }
        return;
    }
    let (parent, single, list, wrapped) = if kind.is("", "Pod") {
        ("status", "podIP", "podIPs", true)
    } else if kind.is("", "Node") {
        ("spec", "podCIDR", "podCIDRs", false)
    } else {
        return;
    };
    let one = meta::text(value, &[parent, single]).to_owned();
    let first = meta::list(value, &[parent, list]).first().map(|first| {
        let text = if wrapped { meta::text(first, &["ip"]) } else { first.as_str().unwrap_or_default() };
        text.to_owned()
    });
    match first {
        Some(first) if one.is_empty() => meta::set(value, &[parent, single], json!(first)),
        Some(first) if first == one => {}
        None if one.is_empty() => {}
        Some(_) | None => {
            let item = if wrapped { json!({"ip": one}) } else { json!(one) };
            meta::set(value, &[parent, list], json!([item]));
        }
    }
}

fn rename(value: Value, api_version: &str, name: impl Fn(&str) -> Option<&'static str>) -> Value {
    let Value::Object(fields) = value else { return value };
    let mut renamed: Map<String, Value> =
        fields.into_iter().map(|(key, value)| (name(&key).map_or(key, str::to_owned), value)).collect();
    renamed.insert("apiVersion".to_owned(), json!(api_version));
    Value::Object(renamed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_api::kinds::Registry;

    #[test]
    fn the_single_address_and_the_list_agree() {
        let registry = Registry::builtin();
        let pod = registry.by_type_meta("v1", "Pod").expect("built in");
        let rows = [
            (json!({"podIP": "1"}), json!({"podIP": "1", "podIPs": [{"ip": "1"}]})),
            (
                json!({"podIPs": [{"ip": "1"}, {"ip": "2"}]}),
                json!({"podIP": "1", "podIPs": [{"ip": "1"}, {"ip": "2"}]}),
            ),
            (json!({"podIP": "3", "podIPs": [{"ip": "1"}]}), json!({"podIP": "3", "podIPs": [{"ip": "3"}]})),
            (json!({}), json!({})),
        ];
        for (given, want) in rows {
            let mut object = json!({"status": given});
            synchronize(pod, &mut object);
            assert_eq!(object["status"], want);
        }
    }

    #[test]
    fn events_look_the_same_after_a_round_trip() {
        let registry = Registry::builtin();
        let kind = registry.by_gvr("events.k8s.io", "v1", "events").expect("built in");
        let event = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"},
            "regarding": {"kind": "Pod"}, "note": "text", "reportingController": "c", "deprecatedCount": 2});
        let stored = to_storage(kind, event.clone());
        assert_eq!(stored["involvedObject"]["kind"], "Pod");
        assert_eq!(
            (&stored["apiVersion"], &stored["message"], &stored["count"]),
            (&json!("v1"), &json!("text"), &json!(2))
        );
        assert_eq!(from_storage(kind, stored), event);
    }
}
