//! Rules of `metadata`.

use serde_json::{Value, json};

use super::{Faults, ordered_json, same};
use crate::kinds::{Kind, NameRule};
use crate::meta;

/// Longest sum of all keys and values of annotations.
const MAX_ANNOTATION_BYTES: usize = 256 * 1024;

/// Finalizers that the API server itself knows; others need a domain.
const STANDARD_FINALIZERS: [&str; 3] = ["kubernetes", "orphan", "foregroundDeletion"];

pub(super) fn create(faults: &mut Faults, kind: &Kind, new: &Value) {
    let generate = meta::text(new, &["metadata", "generateName"]);
    if !generate.is_empty() {
        // The base may end in a hyphen, because characters follow it.
        let masked = match generate.strip_suffix('-') {
            Some(rest) => format!("{rest}a"),
            None => generate.to_owned(),
        };
        for text in name_faults(kind.name_rule, &masked) {
            faults.invalid("metadata.generateName", generate, text);
        }
    }
    let name = meta::name(new);
    if name.is_empty() {
        faults.required("metadata.name", "name or generateName is required");
    } else {
        faults.syntax("metadata.name", name, name_faults(kind.name_rule, name));
    }
    if kind.namespaced && meta::namespace(new).is_empty() && !kind.is("", "Event") {
        faults.required("metadata.namespace", "");
    }
    common(faults, kind, new);
}

fn name_faults(rule: NameRule, name: &str) -> Vec<String> {
    match rule {
        NameRule::Subdomain => meta::dns1123_subdomain(name),
        NameRule::Label => meta::dns1123_label(name),
        NameRule::PathSegment => meta::path_segment(name),
        NameRule::IpAddress => match name.parse::<std::net::IpAddr>() {
            Ok(ip) if ip.to_string() == name => Vec::new(),
            Ok(ip) => vec![format!("must be in canonical form (\"{ip}\")")],
            Err(_) => vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".to_owned()],
        },
    }
}

fn common(faults: &mut Faults, kind: &Kind, new: &Value) {
    let metadata = meta::get(new, &["metadata"]);
    labels_and_owners(faults, metadata);
    finalizers(faults, kind, meta::list(metadata, &["finalizers"]));
}

fn labels_and_owners(faults: &mut Faults, metadata: &Value) {
    faults.labels("metadata.labels", meta::get(metadata, &["labels"]));
    annotations(faults, "metadata.annotations", meta::get(metadata, &["annotations"]));
    owner_references(faults, meta::list(metadata, &["ownerReferences"]));
}

/// Annotation keys are label keys of any case; values are free.
pub(super) fn annotations(faults: &mut Faults, field: &str, annotations: &Value) {
    let mut bytes = 0;
    for (key, value) in annotations.as_object().into_iter().flatten() {
        for text in meta::qualified_name(&key.to_lowercase()) {
            faults.invalid(field, key.as_str(), text);
        }
        bytes += key.len() + value.as_str().unwrap_or_default().len();
    }
    if bytes > MAX_ANNOTATION_BYTES {
        faults.add(crate::status::FieldError::too_long(field, MAX_ANNOTATION_BYTES));
    }
}

fn owner_references(faults: &mut Faults, references: &[Value]) {
    let keys = ["apiVersion", "kind", "name", "uid", "controller", "blockOwnerDeletion"];
    let field = "metadata.ownerReferences";
    let mut controller: Option<&Value> = None;
    for reference in references {
        let api_version = meta::text(reference, &["apiVersion"]);
        let version = api_version.rsplit('/').next().unwrap_or_default();
        if version.is_empty() {
            faults.invalid(format!("{field}.apiVersion"), api_version, "version must not be empty");
        }
        for part in ["kind", "name", "uid"] {
            if meta::text(reference, &[part]).is_empty() {
                faults.invalid(format!("{field}.{part}"), "", "must not be empty");
            }
        }
        if api_version == "v1" && meta::text(reference, &["kind"]) == "Event" {
            faults.add(crate::status::FieldError::invalid_text(
                field,
                ordered_json(reference, &keys),
                "/v1, Kind=Event is disallowed from being an owner",
            ));
        }
        if reference.get("controller").and_then(Value::as_bool) == Some(true) {
            if let Some(first) = controller {
                let all: Vec<String> = references.iter().map(|r| ordered_json(r, &keys)).collect();
                let id = |r: &Value| format!("{}/{}", meta::text(r, &["kind"]), meta::text(r, &["name"]));
                faults.add(crate::status::FieldError::invalid_text(
                    field,
                    format!("[{}]", all.join(",")),
                    format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references for {} and {}",
                        id(first),
                        id(reference)
                    ),
                ));
            } else {
                controller = Some(reference);
            }
        }
    }
}

fn finalizers(faults: &mut Faults, kind: &Kind, finalizers: &[Value]) {
    let field = "metadata.finalizers";
    let names: Vec<&str> = finalizers.iter().map(|f| f.as_str().unwrap_or_default()).collect();
    for name in &names {
        faults.syntax(field, name, meta::qualified_name(name));
    }
    if names.contains(&"orphan") && names.contains(&"foregroundDeletion") {
        faults.invalid(field, json!(names), "finalizers orphan and foregroundDeletion cannot be both set");
    }
    if !kind.custom {
        for (i, name) in names.iter().enumerate() {
            if !name.contains('/') && !STANDARD_FINALIZERS.contains(name) {
                let text = "name is neither a standard finalizer name nor is it fully qualified";
                faults.invalid(format!("{field}[{i}]"), *name, text);
            }
        }
    }
}

pub(super) fn update(faults: &mut Faults, kind: &Kind, new: &Value, old: &Value) {
    let get = |object: &'_ Value, field: &str| meta::get(object, &["metadata", field]).clone();
    if meta::is_deleting(old) {
        let before = meta::list(old, &["metadata", "finalizers"]);
        let added: Vec<String> = meta::list(new, &["metadata", "finalizers"])
            .iter()
            .filter(|f| !before.contains(f))
            .map(|f| crate::status::quoted(f.as_str().unwrap_or_default()))
            .collect();
        // Checked at two levels, so it is reported twice among the causes, as the uid below.
        for _ in 0..if added.is_empty() { 0 } else { 2 } {
            faults.forbidden(
                "metadata.finalizers",
                format!(
                    "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                    added.join(", ")
                ),
            );
        }
    }
    for field in ["name", "namespace", "uid", "creationTimestamp"] {
        let (new, old) = (get(new, field), get(old, field));
        if !same(&new, &old) {
            for _ in 0..if field == "uid" { 2 } else { 1 } {
                faults.invalid(format!("metadata.{field}"), new.clone(), "field is immutable");
            }
        }
    }
    common(faults, kind, new);
    // Each of the levels at which the reference implementation checks an update reports for itself.
    for _ in 1..levels(kind) {
        labels_and_owners(faults, meta::get(new, &["metadata"]));
    }
}

/// How many times metadata is checked on an update: twice for every kind, once by the kind's rules of change, and once
/// more where these apply the rules of creation as well.
fn levels(kind: &Kind) -> usize {
    let whole = ["ConfigMap", "Secret", "Service", "Endpoints", "Pod", "Namespace", "ServiceAccount"];
    if kind.group.is_empty() && whole.contains(&kind.kind.as_str()) { 4 } else { 3 }
}
