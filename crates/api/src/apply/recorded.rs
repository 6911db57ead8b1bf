//! Replays the recorded conversations about patches and apply against the pure functions, without a server: what a
//! server adds (validation, allocation, watches) is left out, and so are the steps that need it.

use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

use super::{Manager, apply, decode, track_update};
use crate::defaulting;
use crate::kinds::Registry;
use crate::patch::{PatchType, patch};
use crate::schema::DocumentType;
use crate::status::Status;
use crate::strict::{self, FieldValidation, Format};

/// A store of documents that does what the request pipeline does between decoding and validation.
struct Pipeline {
    registry: Registry,
    objects: BTreeMap<(String, String), Value>,
    clock: u32,
}

struct Request<'a> {
    plural: String,
    name: Option<String>,
    subresource: Option<String>,
    ty: DocumentType,
    query: BTreeMap<&'a str, &'a str>,
}

impl Pipeline {
    fn new() -> Pipeline {
        Pipeline { registry: Registry::builtin(), objects: BTreeMap::new(), clock: 0 }
    }

    /// What the URL is about, `None` for what this pipeline does not play.
    fn request<'a>(&self, path: &'a str) -> Option<Request<'a>> {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let query: BTreeMap<&str, &str> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
        if query.contains_key("watch") || query.contains_key("dryRun") {
            return None;
        }
        let mut parts = path.trim_start_matches('/').split('/');
        let (group, version) = match parts.next()? {
            "api" => ("", parts.next()?),
            "apis" => (parts.next()?, parts.next()?),
            _ => return None,
        };
        let rest: Vec<&str> = parts.collect();
        let rest = if rest.first() == Some(&"namespaces") && rest.len() > 2 { &rest[2..] } else { &rest[..] };
        let (plural, rest) = rest.split_first()?;
        let kind = self.registry.by_gvr(group, version, plural)?;
        Some(Request {
            plural: (*plural).to_owned(),
            name: rest.first().map(|name| (*name).to_owned()),
            subresource: rest.get(1).map(|name| (*name).to_owned()),
            ty: DocumentType::of(kind)?,
            query,
        })
    }

    fn run(
        &mut self,
        request: &Request<'_>,
        method: &str,
        media_type: &str,
        body: &[u8],
    ) -> Option<Result<Value, Status>> {
        self.clock += 1;
        let now = format!("2024-01-01T00:00:{:02}Z", self.clock);
        let ty = &request.ty;
        let validation = FieldValidation::parse(request.query.get("fieldValidation").unwrap_or(&""))?;
        let name = request.name.clone();
        let subresource = request.subresource.as_deref();
        if subresource.is_some_and(|name| name != "status") {
            return None;
        }
        let manager =
            Manager { name: request.query.get("fieldManager").copied().unwrap_or_default(), subresource, now: &now };
        let key = |name: &str| (request.plural.clone(), name.to_owned());
        let live = name.as_ref().and_then(|name| self.objects.get(&key(name)).cloned());
        let patch_type = PatchType::from_media_type(media_type);
        let outcome = match (method, patch_type) {
            ("GET", _) => return live.map(Ok),
            ("DELETE", _) => {
                self.objects.remove(&key(&name?));
                return None;
            }
            ("POST" | "PUT", _) => {
                let format = if media_type == "application/yaml" { Format::Yaml } else { Format::Json };
                strict::decode(ty, format, body, validation).map(|admitted| admitted.value)
            }
            ("PATCH", Some(PatchType::Apply)) => {
                if !request.query.contains_key("fieldManager") || (live.is_none() && subresource.is_some()) {
                    return None;
                }
                let force = request.query.get("force") == Some(&"true");
                decode(ty, body, name.as_deref()?)
                    .and_then(|applied| apply(ty, live.as_ref(), &applied, manager, force))
            }
            ("PATCH", Some(patch_type)) => match &live {
                Some(live) => patch(ty, patch_type, live, body, validation).map(|admitted| admitted.value),
                None => return None,
            },
            _ => return None,
        };
        let mut value = match outcome {
            Ok(value) => value,
            Err(status) => return Some(Err(status)),
        };
        let stored_name = value.pointer("/metadata/name").and_then(Value::as_str)?.to_owned();
        self.keep_server_fields(ty, live.as_ref(), &mut value, subresource);
        defaulting::default(ty, &mut value);
        if patch_type != Some(PatchType::Apply) {
            track_update(ty, live.as_ref(), &mut value, manager);
        }
        self.objects.insert(key(&stored_name), value.clone());
        Some(Ok(value))
    }

    fn keep_server_fields(
        &self,
        ty: &DocumentType,
        live: Option<&Value>,
        value: &mut Value,
        subresource: Option<&str>,
    ) {
        if let Some(live) = live {
            if subresource == Some("status") {
                if let Some(spec) = live.get("spec") {
                    value["spec"] = spec.clone();
                }
            } else if let Some(status) = live.get("status") {
                value["status"] = status.clone();
            }
            return;
        }
        value["metadata"]["creationTimestamp"] = json!("2024-01-01T00:00:00Z");
        if ty.root().field("status").is_some() && ty.kind() != "Node" {
            value["status"] = ty.empty()["status"].clone();
        }
    }
}

/// Whether `actual` has what was recorded. What other parts of the server fill in is left out.
fn matches(expected: &Value, actual: &Value, path: &str, faults: &mut Vec<String>) {
    const ELSEWHERE: [&str; 21] = [
        "/metadata/uid",
        "/metadata/resourceVersion",
        "/metadata/creationTimestamp",
        "/metadata/generation",
        "/metadata/namespace",
        "/spec/clusterIP",
        "/spec/clusterIPs",
        "/spec/ipFamilies",
        "/spec/ipFamilyPolicy",
        "/status/phase",
        "/status/qosClass",
        "/spec/tolerations",
        "/spec/priority",
        "/spec/preemptionPolicy",
        "/spec/serviceAccountName",
        "/spec/serviceAccount",
        "/status/observedGeneration",
        "/spec/taints",
        "/spec/finalizers",
        "/metadata/labels/kubernetes.io~1metadata.name",
        "/spec/volumes/kube-api-access",
    ];
    if ELSEWHERE.contains(&path) {
        return;
    }
    match (expected, actual) {
        (Value::String(text), _) if text == "<any>" => {}
        (Value::String(text), _) if text.starts_with('<') => {}
        (Value::String(text), Value::String(_)) if text.contains('{') => {}
        (Value::Object(members), Value::Object(present)) => {
            for (key, value) in members {
                let path = format!("{path}/{}", key.replace('/', "~1"));
                match (value.as_str(), present.get(key)) {
                    (Some("<absent>"), None) => {}
                    (Some("<absent>"), Some(found)) => faults.push(format!("{path}: unexpected {found}")),
                    (_, Some(found)) => matches(value, found, &path, faults),
                    (_, None) => matches(value, &Value::Null, &path, faults),
                }
            }
        }
        (Value::Array(items), Value::Array(found)) if items.len() == found.len() => {
            let (mut items, mut found) = (items.clone(), found.clone());
            if path == "/metadata/managedFields" {
                // Recorded in the order of names, because the order of times is chance.
                for list in [&mut items, &mut found] {
                    list.sort_by_cached_key(|entry| format!("{} {}", entry["manager"], entry["operation"]));
                }
            }
            for (at, (item, found)) in items.iter().zip(&found).enumerate() {
                matches(item, found, &format!("{path}/{at}"), faults);
            }
        }
        (expected, actual) if expected == actual => {}
        (expected, actual) => faults.push(format!("{path}: expected {expected}, found {actual}")),
    }
}

fn replay(file: &str, skipped: &[&str]) -> (usize, Vec<String>) {
    let path = format!("{}/../../conformance/golden/{file}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let (mut checked, mut failures) = (0, Vec::new());
    for line in text.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let id = case["id"].as_str().unwrap();
        if skipped.contains(&id) {
            continue;
        }
        let mut pipeline = Pipeline::new();
        for (at, step) in case["steps"].as_array().unwrap().iter().enumerate() {
            let expected = &step["expect"];
            let Some(request) = pipeline.request(step["path"].as_str().unwrap()) else { continue };
            let body = match &step["body"] {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            let body = body.replace("{ns}", "ns");
            let default_type = "application/json";
            let media_type = step["type"].as_str().unwrap_or(default_type);
            let method = step["method"].as_str().unwrap();
            let status = expected["status"].as_u64().unwrap();
            let place = format!("{id} step {at} ({method} {})", step["path"].as_str().unwrap());
            // Refusals of validation and of the store have no counterpart here.
            let reason = expected["body"]["message"].as_str().unwrap_or_default();
            let ours = matches!(status, 400 | 409 | 500)
                || reason.contains("patch: Invalid")
                || reason.starts_with("the server rejected");
            let before = pipeline.objects.clone();
            let Some(outcome) = pipeline.run(&request, method, media_type, body.as_bytes()) else { continue };
            match outcome {
                Ok(value) if status < 300 => {
                    let mut faults = Vec::new();
                    matches(&expected["body"], &value, "", &mut faults);
                    failures.extend(faults.into_iter().map(|fault| format!("{place}: {fault}")));
                    checked += 1;
                }
                Ok(_) if ours && !reason.contains("modified") && !reason.contains("does not match the name") => {
                    failures.push(format!("{place}: expected {status} {reason}"));
                    pipeline.objects = before;
                }
                Ok(_) => pipeline.objects = before,
                Err(found) => {
                    let mut faults = Vec::new();
                    if u64::from(found.code) != status {
                        faults.push(format!("expected {status}, found {}: {}", found.code, found.message));
                    } else {
                        let mut shown = Map::new();
                        for key in ["message", "reason", "details"] {
                            if let Some(value) = expected["body"].get(key) {
                                shown.insert(key.to_owned(), value.clone());
                            }
                        }
                        matches(&Value::Object(shown), &found.to_value(), "", &mut faults);
                    }
                    failures.extend(faults.into_iter().map(|fault| format!("{place}: {fault}")));
                    checked += 1;
                }
            }
        }
    }
    (checked, failures)
}

#[test]
fn recorded_apply_conversations() {
    // Scale goes through a kind of its own, which the server puts together.
    let (checked, failures) = replay("api-apply.jsonl", &["api-apply-scale"]);
    assert!(checked > 90, "only {checked} steps were checked");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn recorded_patch_conversations() {
    let (checked, failures) = replay("api-patch.jsonl", &[]);
    assert!(checked > 100, "only {checked} steps were checked");
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn applying_twice_changes_nothing() {
    let ty = DocumentType::builtin("apps", "v1", "Deployment").unwrap();
    let manager = |now| Manager { name: "one", subresource: None, now };
    let applied = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "labels": {"a": "b"}},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
            "spec": {"containers": [{"name": "c", "image": "x", "ports": [{"containerPort": 80}],
                "env": [{"name": "A", "value": "1"}]}]}}}});
    let mut first = apply(&ty, None, &applied, manager("2024-01-01T00:00:00Z"), false).unwrap();
    defaulting::default(&ty, &mut first);
    let mut second = apply(&ty, Some(&first), &applied, manager("2024-01-01T00:00:09Z"), false).unwrap();
    defaulting::default(&ty, &mut second);
    assert_eq!(first, second);
    assert!(!super::differs(&first, &second));
}
