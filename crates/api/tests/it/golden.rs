//! Replays the recorded cases that concern one object at a time.

use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::server::Server;

/// Cases that this pipeline does not answer as recorded, with the reason.
const NOT_HERE: &[(&str, &str)] = &[
    ("api-errors-ownerrefs", "repeated owner references are taken out before this pipeline"),
    ("api-status-pod-patch", "podIP and podIPs are brought in step before this pipeline"),
    ("api-status-pod-ips", "as api-status-pod-patch"),
    ("api-status-node-podcidr", "as api-status-pod-patch, for podCIDR and podCIDRs"),
    ("api-list-field-namespaces", "the case's own namespace is not an object here"),
];

/// A difference between what was recorded and what was answered, as text.
fn differ(want: &Value, got: Option<&Value>, bound: &mut BTreeMap<String, Value>, at: &str) -> Option<String> {
    if want == "<absent>" {
        return got.map(|got| format!("{at}: should be absent, is {got}"));
    }
    let Some(got) = got else { return Some(format!("{at}: missing, want {want}")) };
    match want {
        Value::String(text) if text == "<any>" => None,
        Value::String(text)
            if text.starts_with('<') && text.ends_with('>') && text.contains(':') && !text.contains(' ') =>
        {
            let first = bound.entry(text.clone()).or_insert_with(|| got.clone());
            (first != got).then(|| format!("{at}: {text} was {first}, is {got}"))
        }
        Value::Object(map) => {
            if let (1, Some(wanted)) = (map.len(), map.get("<has>").and_then(Value::as_array)) {
                let list = got.as_array().map(Vec::as_slice).unwrap_or_default();
                return wanted
                    .iter()
                    .find(|w| list.iter().all(|g| differ(w, Some(g), &mut bound.clone(), at).is_some()))
                    .map(|w| format!("{at}: want a list with {w}"));
            }
            let Some(object) = got.as_object() else { return Some(format!("{at}: want an object, got {got}")) };
            map.iter().find_map(|(key, want)| differ(want, object.get(key), bound, &format!("{at}.{key}")))
        }
        Value::Array(list) => match got.as_array() {
            Some(items) if items.len() == list.len() => list
                .iter()
                .zip(items)
                .enumerate()
                .find_map(|(i, (want, got))| differ(want, Some(got), bound, &format!("{at}[{i}]"))),
            _ => Some(format!("{at}: want {} items, got {got}", list.len())),
        },
        _ => (want != got).then(|| format!("{at}: want {want}, got {got}")),
    }
}

fn fill(value: &Value, known: &BTreeMap<String, String>) -> Value {
    match value {
        Value::String(text) => json!(fill_text(text, known)),
        Value::Array(list) => Value::Array(list.iter().map(|v| fill(v, known)).collect()),
        Value::Object(map) => {
            Value::Object(map.iter().map(|(k, v)| (fill_text(k, known), fill(v, known))).collect::<Map<_, _>>())
        }
        other => other.clone(),
    }
}

fn fill_text(text: &str, known: &BTreeMap<String, String>) -> String {
    known.iter().fold(text.to_owned(), |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
}

/// The first difference of a case, or `None`.
fn replay(server: &mut Server, case: &Value, namespace: &str) -> Option<String> {
    let mut known = BTreeMap::from([("ns".to_owned(), namespace.to_owned())]);
    let mut bound = BTreeMap::new();
    let steps = case["steps"].as_array().expect("steps");
    for (i, step) in steps.iter().enumerate() {
        let text = |key: &str| step.get(key).and_then(Value::as_str).unwrap_or_default();
        let path = fill_text(text("path"), &known);
        let body = step.get("body").map_or(Value::Null, |body| fill(body, &known));
        let (code, got, warnings) = server.call(text("method"), &path, text("type"), text("accept"), body);
        for (name, pointer) in step.get("save").and_then(Value::as_object).into_iter().flatten() {
            let value = got.pointer(pointer.as_str().expect("a pointer")).cloned().unwrap_or_default();
            known.insert(name.clone(), value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        }
        let want = fill(&step["expect"], &known);
        let problem = if want["status"] != json!(code) {
            Some(format!("status: want {}, got {code} {got}", want["status"]))
        } else {
            want.get("body")
                .filter(|body| !body.is_null())
                .and_then(|body| differ(body, Some(&got), &mut bound, "body"))
                .or_else(|| match want.get("warnings").and_then(Value::as_u64) {
                    Some(0) if warnings > 0 => Some("warnings: want none".to_owned()),
                    Some(n) if n > 0 && warnings == 0 => Some("warnings: want some".to_owned()),
                    _ => None,
                })
        };
        if let Some(problem) = problem {
            return Some(format!("step {} {} {path}: {problem}", i + 1, text("method")));
        }
    }
    None
}

/// Whether a case is about one object at a time and needs no part of a server that is not here.
fn concerns_us(case: &Value) -> bool {
    case["steps"].as_array().expect("steps").iter().all(|step| {
        let text = |key: &str| step.get(key).and_then(Value::as_str).unwrap_or_default();
        let path = text("path");
        // Watches, pages, and what the store does by itself.
        let beyond = ["watch=", "/scale", "limit=", "includeObject", "fieldValidation=Strict", "/jobs"];
        let accept = text("accept");
        let whole_collection = text("method") == "DELETE" && path.contains("Selector");
        let lifecycle = text("method") == "DELETE" && (path.contains("/pods/") || path.matches('/').count() == 4);
        !beyond.iter().any(|part| path.contains(part))
            && !whole_collection
            && !lifecycle
            && !accept.contains("v1beta1")
            && !accept.contains("PartialObjectMetadata")
            && !text("type").contains("apply")
            && !text("type").contains("yaml")
            && step.get("wait").is_none()
            && step.get("repeat").is_none()
    })
}

fn run(file: &str, cidrs: &[&str], prefixes: &[&str]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../conformance/golden").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut failed = Vec::new();
    let mut passed = 0;
    for (n, line) in text.lines().filter(|line| !line.trim().is_empty()).enumerate() {
        let case: Value = serde_json::from_str(line).expect("a case");
        let id = case["id"].as_str().expect("an id");
        let wanted = prefixes.is_empty() || prefixes.iter().any(|prefix| id.starts_with(prefix));
        if !wanted || !concerns_us(&case) {
            continue;
        }
        // A fresh server each, so that what one case leaves behind does not meet the next.
        let mut server = Server::new(cidrs);
        let problem = replay(&mut server, &case, &format!("ns{n}"));
        let excused = NOT_HERE.iter().any(|(excused, _)| *excused == id);
        match (problem, excused) {
            (Some(problem), false) => failed.push(format!("{id}: {problem}")),
            (None, true) => failed.push(format!("{id}: passes now; take it off the list")),
            (Some(_), true) => {}
            (None, false) => passed += 1,
        }
    }
    assert!(failed.is_empty(), "{passed} passed, {} failed:\n{}", failed.len(), failed.join("\n"));
    assert!(passed > 0, "no case of {file} was replayed");
}

const V4: &[&str] = &["10.96.0.0/12"];
const BOTH: &[&str] = &["10.96.0.0/12", "fd00:10:96::/108"];

#[test]
fn services_answer_as_recorded() {
    run("services.jsonl", BOTH, &[]);
}

#[test]
fn dual_stack_services_answer_as_recorded() {
    run("services-dualstack.jsonl", BOTH, &[]);
}

#[test]
fn single_stack_services_answer_as_recorded() {
    run("services-singlestack.jsonl", V4, &[]);
}

#[test]
fn service_ranges_and_addresses_answer_as_recorded() {
    run("servicecidr.jsonl", BOTH, &[]);
}

#[test]
fn endpoints_and_slices_answer_as_recorded() {
    run("endpoints.jsonl", BOTH, &[]);
}

#[test]
fn objects_are_defaulted_and_validated_as_recorded() {
    run("api-objects.jsonl", BOTH, &[]);
}

#[test]
fn tables_are_filled_as_recorded() {
    run("api-tables.jsonl", BOTH, &[]);
}

#[test]
fn definitions_are_judged_as_recorded() {
    run("crd.jsonl", BOTH, &["crd-invalid"]);
}

#[test]
fn pod_changes_are_refused_as_recorded() {
    run("api-patch.jsonl", BOTH, &["api-patch-merge-pod"]);
}

#[test]
fn statuses_names_and_labels_are_judged_as_recorded() {
    run(
        "api-core.jsonl",
        BOTH,
        &[
            "api-errors-name",
            "api-errors-labels",
            "api-errors-annotations",
            "api-errors-finalizers",
            "api-errors-ownerrefs",
            "api-list-label",
            "api-list-field",
        ],
    );
}
