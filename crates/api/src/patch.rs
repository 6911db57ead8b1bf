//! JSON patch (RFC 6902), JSON merge patch (RFC 7386) and strategic merge patch.

mod json;
mod strategic;

use serde_json::{Map, Value};

use crate::schema::DocumentType;
use crate::status::Status;
use crate::strict::{Admitted, FieldValidation, Node, Style, fit, go_print, parse_json, patch_invalid, with_type_meta};

/// How the body of a PATCH is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchType {
    /// `application/json-patch+json`.
    Json,
    /// `application/merge-patch+json`.
    Merge,
    /// `application/strategic-merge-patch+json`.
    Strategic,
    /// `application/apply-patch+yaml`; see [`crate::apply`].
    Apply,
}

impl PatchType {
    /// The patch type of a media type without parameters.
    pub fn from_media_type(media_type: &str) -> Option<PatchType> {
        match media_type {
            "application/json-patch+json" => Some(PatchType::Json),
            "application/merge-patch+json" => Some(PatchType::Merge),
            "application/strategic-merge-patch+json" => Some(PatchType::Strategic),
            "application/apply-patch+yaml" => Some(PatchType::Apply),
            _ => None,
        }
    }

    /// Media types that a PATCH of a kind accepts, as 415 lists them.
    pub fn accepted(custom: bool) -> &'static [&'static str] {
        if custom {
            &["application/json-patch+json", "application/merge-patch+json", "application/apply-patch+yaml"]
        } else {
            &[
                "application/json-patch+json",
                "application/merge-patch+json",
                "application/strategic-merge-patch+json",
                "application/apply-patch+yaml",
            ]
        }
    }
}

/// Applies `body` to the versioned form of the stored object and fits the result to `ty` (unknown fields dropped or
/// refused, wrong types refused). Identity, defaults and validation are the caller's next steps. `PatchType::Apply` is
/// refused here.
///
/// # Errors
/// 400 for a body that is no patch, 422 for a patch that cannot be applied or whose result does not fit, 500 without a
/// reason for strategic patches that contradict the type, all with the texts of the reference implementation.
pub fn patch(
    ty: &DocumentType,
    patch_type: PatchType,
    current: &Value,
    body: &[u8],
    validation: FieldValidation,
) -> Result<Admitted, Status> {
    match patch_type {
        PatchType::Json => {
            let operations = json::parse(body)?;
            let patched = json::apply(&operations, current).map_err(|_| rejected())?;
            admit_document(ty, patched, Vec::new(), validation)
        }
        PatchType::Merge => {
            let node = parse_json(body).map_err(|error| bad_patch(&error))?;
            if node == Node::Null {
                return Err(Status::bad_request("Invalid JSON Patch"));
            }
            if !matches!(node, Node::Object(_)) {
                return Err(bad_patch(&not_a_map(&node)));
            }
            let duplicates = duplicates(&node);
            let mut patched = current.clone();
            merge_patch(&mut patched, node.into_value());
            admit_document(ty, patched, duplicates, validation)
        }
        PatchType::Strategic if ty.is_custom() => Err(Status::unsupported_media_type(PatchType::accepted(true))),
        PatchType::Strategic => {
            let node = parse_json(body).map_err(Status::bad_request)?;
            let duplicates = duplicates(&node);
            let patch = match node {
                Node::Object(_) => node.into_value(),
                Node::Null => Value::Object(Map::new()),
                other => return Err(Status::bad_request(not_a_map(&other))),
            };
            let shown = go_print(&patch);
            let patched = strategic::merge(ty, current, patch)?;
            let fitted = fit(ty, Node::from(patched), Style::Unstructured);
            if let Some(error) = fitted.error {
                return Err(patch_invalid(&shown, &error));
            }
            let complaints: Vec<String> = duplicates.into_iter().chain(fitted.complaints).collect();
            finish(ty, fitted.value, complaints, validation, &shown)
        }
        PatchType::Apply => Err(Status::unsupported_media_type(PatchType::accepted(ty.is_custom()))),
    }
}

/// RFC 7386: members of the patch replace, null removes, objects merge.
pub fn merge_patch(target: &mut Value, patch: Value) {
    match patch {
        Value::Object(members) => {
            if !target.is_object() {
                *target = Value::Object(Map::new());
            }
            let Value::Object(object) = target else { return };
            for (name, value) in members {
                if value.is_null() {
                    object.remove(&name);
                } else {
                    merge_patch(object.entry(name).or_insert(Value::Null), value);
                }
            }
        }
        other => *target = other,
    }
}

/// Applies a JSON patch given as a value to a document.
///
/// # Errors
/// The reason why the first operation that fails cannot be applied.
pub fn json_patch(current: &Value, operations: &Value) -> Result<Value, String> {
    json::apply(&json::read(operations)?, current)
}

fn admit_document(
    ty: &DocumentType,
    patched: Value,
    duplicates: Vec<String>,
    validation: FieldValidation,
) -> Result<Admitted, Status> {
    let shown = patched.to_string();
    let text = |key: &str| patched.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    if (!api_version.is_empty() && api_version != ty.api_version()) || (!kind.is_empty() && kind != ty.kind()) {
        let error = format!(
            "no kind {kind:?} is registered for version {api_version:?} in the place of {:?} {:?}",
            ty.api_version(),
            ty.kind()
        );
        return Err(patch_invalid(&shown, &error));
    }
    let fitted = fit(ty, Node::from(patched), Style::Json);
    if let Some(error) = fitted.error {
        return Err(patch_invalid(&shown, &error));
    }
    let complaints: Vec<String> = duplicates.into_iter().chain(fitted.complaints).collect();
    finish(ty, fitted.value, complaints, validation, &shown)
}

fn finish(
    ty: &DocumentType,
    value: Value,
    complaints: Vec<String>,
    validation: FieldValidation,
    shown: &str,
) -> Result<Admitted, Status> {
    let warnings = match validation {
        FieldValidation::Strict if !complaints.is_empty() => {
            return Err(patch_invalid(shown, &format!("strict decoding error: {}", complaints.join(", "))));
        }
        FieldValidation::Warn => complaints,
        _ => Vec::new(),
    };
    Ok(Admitted { value: with_type_meta(ty, value), warnings })
}

fn bad_patch(error: &str) -> Status {
    Status::bad_request(format!("error decoding patch: {error}"))
}

fn not_a_map(node: &Node) -> String {
    format!("json: cannot unmarshal {} into Go value of type map[string]interface {{}}", node.type_name())
}

/// 422 for a JSON patch that does not apply; the reference implementation hides why.
fn rejected() -> Status {
    let mut status = Status::new(422, "Invalid", "the server rejected our request due to an error in our request");
    status.details = Some(Box::default());
    status
}

/// Complaints about members that a patch has twice.
fn duplicates(node: &Node) -> Vec<String> {
    fn walk(node: &Node, path: &str, found: &mut Vec<String>) {
        match node {
            Node::Object(members) => {
                for (at, (name, value)) in members.iter().enumerate() {
                    let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                    if members[..at].iter().any(|(other, _)| other == name) {
                        found.push(format!("duplicate field {}", crate::strict::go_quote(&path)));
                    }
                    walk(value, &path, found);
                }
            }
            Node::Array(items) => {
                for (at, item) in items.iter().enumerate() {
                    walk(item, &format!("{path}[{at}]"), found);
                }
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk(node, "", &mut found);
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn merge_patch_examples_of_rfc_7386() {
        for (target, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
            (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a": "b"}), json!(["c"]), json!(["c"])),
            (json!({"a": "foo"}), json!(null), json!(null)),
            (json!({"a": "foo"}), json!("bar"), json!("bar")),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!([1, 2]), json!({"a": "b", "c": null}), json!({"a": "b"})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let mut patched = target.clone();
            merge_patch(&mut patched, patch.clone());
            assert_eq!(patched, result, "{target} + {patch}");
        }
    }

    #[test]
    fn errors_have_the_known_texts() {
        let ty = DocumentType::builtin("", "v1", "ConfigMap").unwrap();
        let current = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"a": "b"}});
        let fails = |patch_type, body: &str, validation| {
            let status = patch(&ty, patch_type, &current, body.as_bytes(), validation).unwrap_err();
            (status.code, status.message)
        };
        let warn = FieldValidation::Warn;
        assert_eq!(
            fails(PatchType::Merge, "[]", warn),
            (
                400,
                "error decoding patch: json: cannot unmarshal array into Go value of type map[string]interface {}"
                    .into()
            ),
        );
        assert_eq!(fails(PatchType::Merge, "null", warn), (400, "Invalid JSON Patch".into()));
        assert_eq!(
            fails(PatchType::Strategic, "{bad", warn),
            (400, "invalid character 'b' looking for beginning of object key string".into()),
        );
        assert_eq!(
            fails(PatchType::Strategic, r#"{"foo":1,"metadata":{"bar":1}}"#, FieldValidation::Strict),
            (
                422,
                " \"\" is invalid: patch: Invalid value: \"map[foo:1 metadata:map[bar:1]]\": strict decoding error: \
                 unknown field \"foo\", unknown field \"metadata.bar\""
                    .into()
            ),
        );
        assert_eq!(
            fails(PatchType::Strategic, r#"{"metadata":"x"}"#, warn),
            (
                422,
                " \"\" is invalid: patch: Invalid value: \"map[metadata:x]\": cannot restore struct from: string"
                    .into()
            ),
        );
        assert_eq!(fails(PatchType::Merge, r#"{"data":{"a":"1","a":"2"}}"#, FieldValidation::Strict).0, 422);
        assert_eq!(fails(PatchType::Merge, r#"{"data":{"a":5}}"#, warn).0, 422);
        assert_eq!(fails(PatchType::Json, r#"[{"op":"replace","path":"/kind","value":"Secret"}]"#, warn).0, 422);
        let ok = patch(&ty, PatchType::Merge, &current, br#"{"foo":1,"data":{"c":"d"}}"#, warn).unwrap();
        assert_eq!(ok.warnings, ["unknown field \"foo\""]);
        assert_eq!(ok.value["data"], json!({"a": "b", "c": "d"}));
    }
}
