//! Request bodies: from bytes to a typed document, with the complaints that `fieldValidation` asks for.
//!
//! Texts of errors and warnings are those of the reference implementation, because people and tests read them.

#[cfg(test)]
mod hostile;
mod scalars;
mod tree;
mod typed;
mod yaml;

use serde_json::Value;

use crate::protobuf;
use crate::schema::{DocumentType, join_api_version};
use crate::status::{FieldError, Status};

pub(crate) use scalars::{format_micros, format_seconds};
pub(crate) use tree::{Node, go_print, go_quote, parse_json};
pub(crate) use typed::{Style, fit};
pub(crate) use yaml::parse_yaml;

/// How a request body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `application/json`.
    Json,
    /// `application/yaml`.
    Yaml,
    /// `application/vnd.kubernetes.protobuf`.
    Protobuf,
}

/// The query parameter `fieldValidation`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FieldValidation {
    /// Unknown and duplicate fields are dropped silently.
    Ignore,
    /// They are dropped and reported as warnings (the default).
    #[default]
    Warn,
    /// They are an error.
    Strict,
}

impl FieldValidation {
    /// Reads the query parameter; an empty text is the default, `None` means unsupported.
    pub fn parse(text: &str) -> Option<FieldValidation> {
        match text {
            "" | "Warn" => Some(FieldValidation::Warn),
            "Ignore" => Some(FieldValidation::Ignore),
            "Strict" => Some(FieldValidation::Strict),
            _ => None,
        }
    }
}

/// A document that fits its type, and what the client should be warned about.
#[derive(Clone, Debug, PartialEq)]
pub struct Admitted {
    /// The document without unknown fields, in the form that decoding and encoding the typed object gives. Defaults are
    /// not filled in yet.
    pub value: Value,
    /// Texts for `Warning` headers.
    pub warnings: Vec<String>,
}

/// Decodes the body of a POST or PUT as a document of type `ty`.
///
/// An absent `apiVersion`/`kind` is filled in.
///
/// # Errors
/// 400 for a syntax error, another apiVersion or kind, a value of a wrong type, or a complaint under
/// [`FieldValidation::Strict`].
pub fn decode(ty: &DocumentType, format: Format, body: &[u8], validation: FieldValidation) -> Result<Admitted, Status> {
    let (node, mut complaints) = match format {
        Format::Protobuf => {
            let value = protobuf::decode(body, Some((ty.group(), ty.version(), ty.kind())))?;
            (Node::from(value), Vec::new())
        }
        Format::Json => (parse_json(body).map_err(|error| unrecognized(ty, body, &json_error(&error)))?, Vec::new()),
        Format::Yaml => {
            let parsed = match std::str::from_utf8(body) {
                Ok(text) => parse_yaml(text),
                Err(_) => Err("yaml: invalid leading UTF-8 octet".to_owned()),
            };
            let parsed = parsed.map_err(|error| {
                let error =
                    format!("couldn't get version/kind; json parse error: error converting YAML to JSON: {error}");
                unrecognized(ty, body, &error)
            })?;
            let complaint = yaml_complaint(&parsed.duplicates);
            (parsed.node, complaint.into_iter().collect())
        }
    };
    check_type_meta(ty, &node, body).map_err(|status| match validation {
        FieldValidation::Ignore => status,
        _ if format == Format::Protobuf => status,
        _ => removed_version(ty, &node, validation, status),
    })?;
    let fitted = fit(ty, node, Style::Json);
    if let Some(error) = fitted.error {
        return Err(not_handled(ty, &error));
    }
    if format != Format::Protobuf {
        complaints.extend(fitted.complaints);
    }
    let warnings = match validation {
        FieldValidation::Strict if !complaints.is_empty() => {
            return Err(not_handled(ty, &format!("strict decoding error: {}", complaints.join(", "))));
        }
        FieldValidation::Warn => complaints,
        _ => Vec::new(),
    };
    Ok(Admitted { value: with_type_meta(ty, fitted.value), warnings })
}

/// Fits an already decoded document to `ty`: drops unknown fields, checks types, canonicalises.
///
/// # Errors
/// As [`decode`], apart from syntax.
pub fn admit(ty: &DocumentType, value: Value, validation: FieldValidation) -> Result<Admitted, Status> {
    let fitted = fit(ty, Node::from(value), Style::Json);
    if let Some(error) = fitted.error {
        return Err(not_handled(ty, &error));
    }
    let warnings = match validation {
        FieldValidation::Strict if !fitted.complaints.is_empty() => {
            return Err(not_handled(ty, &format!("strict decoding error: {}", fitted.complaints.join(", "))));
        }
        FieldValidation::Warn => fitted.complaints,
        _ => Vec::new(),
    };
    Ok(Admitted { value: with_type_meta(ty, fitted.value), warnings })
}

/// The one complaint that stands for all duplicate keys of a YAML body.
pub(crate) fn yaml_complaint(duplicates: &[String]) -> Option<String> {
    if duplicates.is_empty() {
        return None;
    }
    Some(format!("yaml: unmarshal errors:\n  {}", duplicates.join("\n  ")))
}

/// 422 about a patched object that does not fit, with what the patch made as the value.
pub(crate) fn patch_invalid(value: &str, error: &str) -> Status {
    Status::invalid_kind("", "", "", &[FieldError::invalid("patch", value, error)])
}

/// The document with nothing set, in typed form.
pub(crate) fn empty(ty: &DocumentType) -> Value {
    with_type_meta(ty, fit(ty, Node::Null, Style::Json).value)
}

pub(crate) fn with_type_meta(ty: &DocumentType, mut value: Value) -> Value {
    if let Value::Object(map) = &mut value {
        map.insert("apiVersion".to_owned(), Value::from(ty.api_version()));
        map.insert("kind".to_owned(), Value::from(ty.kind()));
    }
    value
}

fn not_handled(ty: &DocumentType, error: &str) -> Status {
    Status::bad_request(format!(
        "{} in version {} cannot be handled as a {}: {error}",
        ty.kind(),
        go_quote(ty.version()),
        ty.kind()
    ))
}

fn json_error(error: &str) -> String {
    format!("couldn't get version/kind; json parse error: {error}")
}

fn unrecognized(ty: &DocumentType, body: &[u8], error: &str) -> Status {
    Status::bad_request(format!(
        "the object provided is unrecognized (must be of type {}): {error} ({})",
        ty.kind(),
        summary(body)
    ))
}

/// The beginning of a body as errors show it: text if it looks like JSON, else hex.
fn summary(body: &[u8]) -> String {
    const LIMIT: usize = 30;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    match body.first() {
        None => "<empty>".to_owned(),
        Some(b'{') if body.len() > LIMIT => format!("{} ...", String::from_utf8_lossy(&body[..LIMIT])),
        Some(b'{') => String::from_utf8_lossy(body).into_owned(),
        Some(_) if body.len() > LIMIT => format!("{} ...", hex(&body[..LIMIT])),
        Some(_) => hex(body),
    }
}

/// Go prints the anonymous struct it reads apiVersion and kind into.
const TYPE_META: &str = "struct { APIVersion string \"json:\\\"apiVersion,omitempty\\\"\"; Kind string \
                         \"json:\\\"kind,omitempty\\\"\" }";

fn check_type_meta(ty: &DocumentType, node: &Node, body: &[u8]) -> Result<(), Status> {
    if !matches!(node, Node::Object(_) | Node::Null) {
        let error = format!("json: cannot unmarshal {} into Go value of type {TYPE_META}", node.type_name());
        return Err(unrecognized(ty, body, &json_error(&error)));
    }
    let text = |key: &str| match node.get(key) {
        None | Some(Node::Null) => Ok(""),
        Some(Node::String(text)) => Ok(text.as_str()),
        Some(other) => {
            let error =
                format!("json: cannot unmarshal {} into Go struct field .{key} of type string", other.type_name());
            Err(unrecognized(ty, body, &json_error(&error)))
        }
    };
    let (api_version, kind) = (text("apiVersion")?, text("kind")?);
    if api_version.matches('/').count() > 1 {
        return Err(unrecognized(ty, body, &format!("unexpected GroupVersion string: {api_version}")));
    }
    let expected = ty.api_version();
    let other_version = !api_version.is_empty() && api_version != expected;
    if other_version && !options_of_any_group(ty, api_version, kind) && !older_eviction(ty, api_version) {
        return Err(Status::bad_request(format!(
            "the API version in the data ({api_version}) does not match the expected API version ({expected})"
        )));
    }
    if !kind.is_empty() && kind != ty.kind() {
        let version = ty.version();
        let why = if ty.is_custom() || DocumentType::builtin(ty.group(), version, kind).is_none() {
            format!("no kind {} is registered for version {}", go_quote(kind), go_quote(&expected))
        } else {
            let package = if ty.group().is_empty() { "core" } else { ty.group().split('.').next().unwrap_or_default() };
            format!("converting ({version}.{kind}) to ({package}.{}): unknown conversion", ty.kind())
        };
        return Err(Status::bad_request(format!(
            "{kind} in version {} cannot be handled as a {}: {why}",
            go_quote(version),
            ty.kind()
        )));
    }
    Ok(())
}

/// An Ingress of a version that is no longer served is still decoded in that version's form before it is refused, so
/// fields that came later are complained about, as the reference implementation does.
fn removed_version(ty: &DocumentType, node: &Node, validation: FieldValidation, mut status: Status) -> Status {
    let api_version = match node.get("apiVersion") {
        Some(Node::String(text)) if matches!(text.as_str(), "extensions/v1beta1" | "networking.k8s.io/v1beta1") => text,
        _ => return status,
    };
    let ingress = matches!(node.get("kind"), Some(Node::String(kind)) if kind == "Ingress");
    if !ingress || ty.kind() != "Ingress" {
        return status;
    }
    fn items<'a>(node: Option<&'a Node>, key: &str) -> &'a [Node] {
        match node.and_then(|node| node.get(key)) {
            Some(Node::Array(items)) => items,
            _ => &[],
        }
    }
    let spec = node.get("spec");
    let mut complaints = Vec::new();
    if spec.is_some_and(|spec| spec.get("defaultBackend").is_some()) {
        complaints.push("unknown field \"spec.defaultBackend\"".to_owned());
    }
    for (r, rule) in items(spec, "rules").iter().enumerate() {
        for (p, path) in items(rule.get("http"), "paths").iter().enumerate() {
            if path.get("backend").is_some_and(|backend| backend.get("service").is_some()) {
                complaints.push(format!("unknown field \"spec.rules[{r}].http.paths[{p}].backend.service\""));
            }
        }
    }
    if validation == FieldValidation::Strict && !complaints.is_empty() {
        let version = api_version.rsplit('/').next().unwrap_or_default();
        return Status::bad_request(format!(
            "Ingress in version {} cannot be handled as a Ingress: strict decoding error: {}",
            go_quote(version),
            complaints.join(", ")
        ));
    }
    status.warnings = complaints;
    status
}

/// DeleteOptions and its like may carry any group's version.
fn options_of_any_group(ty: &DocumentType, api_version: &str, kind: &str) -> bool {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    ty.kind().ends_with("Options")
        && (kind == ty.kind() || kind.is_empty())
        && (join_api_version("meta.k8s.io", "v1") == api_version
            || DocumentType::builtin(group, version, ty.kind()).is_some())
}

/// Evictions are also taken in the version that clients before 1.22 send; the fields are the same
/// (registry/core/pod/storage/eviction.go).
fn older_eviction(ty: &DocumentType, api_version: &str) -> bool {
    ty.group() == "policy" && ty.kind() == "Eviction" && api_version == "policy/v1beta1"
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ty(group: &str, kind: &str) -> DocumentType {
        DocumentType::builtin(group, "v1", kind).unwrap()
    }

    fn strict(group: &str, kind: &str, body: &str) -> String {
        decode(&ty(group, kind), Format::Json, body.as_bytes(), FieldValidation::Strict).unwrap_err().message
    }

    #[test]
    fn complaints_name_every_field_in_order() {
        assert_eq!(
            strict("", "ConfigMap", r#"{"metadata":{"name":"a","lables":{}},"data":{"k":"1","k":"2"},"dta":{}}"#),
            "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: strict decoding error: unknown field \
             \"metadata.lables\", duplicate field \"data.k\", unknown field \"dta\"",
        );
        let body = r#"{"spec":{"template":{"spec":{"containers":[{"name":"c","ports":[{"containerPort":1},{"prot":"x"}]}]}}}}"#;
        assert!(
            strict("apps", "Deployment", body)
                .ends_with("strict decoding error: unknown field \"spec.template.spec.containers[0].ports[1].prot\"")
        );
    }

    #[test]
    fn wrong_types_have_the_known_texts() {
        for (group, kind, body, text) in [
            (
                "",
                "ConfigMap",
                r#"{"data":{"a":1}}"#,
                "json: cannot unmarshal number into Go struct field ConfigMap.data of type string",
            ),
            (
                "apps",
                "Deployment",
                r#"{"spec":{"replicas":"3"}}"#,
                "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
            ),
            (
                "apps",
                "Deployment",
                r#"{"spec":{"replicas":1.5}}"#,
                "json: cannot unmarshal number 1.5 into Go struct field DeploymentSpec.spec.replicas of type int32",
            ),
            (
                "",
                "ConfigMap",
                r#"{"metadata":{"labels":["x"]}}"#,
                "json: cannot unmarshal array into Go struct field ObjectMeta.metadata.labels of type map[string]string",
            ),
            (
                "",
                "Service",
                r#"{"spec":{"ports":{"port":80}}}"#,
                "json: cannot unmarshal object into Go struct field ServiceSpec.spec.ports of type []v1.ServicePort",
            ),
            (
                "",
                "Service",
                r#"{"spec":{"ports":[{"port":"80"}]}}"#,
                "json: cannot unmarshal string into Go struct field ServicePort.spec.ports.port of type int32",
            ),
            ("", "Secret", r#"{"data":{"a":"%%%"}}"#, "illegal base64 data at input byte 0"),
            (
                "",
                "Pod",
                r#"{"spec":{"containers":[{"resources":{"limits":{"cpu":"x"}}}]}}"#,
                "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
            ),
        ] {
            let expected = format!("{kind} in version \"v1\" cannot be handled as a {kind}: {text}");
            assert_eq!(strict(group, kind, body), expected, "{body}");
        }
    }

    #[test]
    fn yaml_duplicates_come_first() {
        let body = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: a\ndta: {}\ndata:\n  k: '1'\n  k: '2'\n";
        let error = decode(&ty("", "ConfigMap"), Format::Yaml, body.as_bytes(), FieldValidation::Strict).unwrap_err();
        assert_eq!(
            error.message,
            "ConfigMap in version \"v1\" cannot be handled as a ConfigMap: strict decoding error: yaml: unmarshal \
             errors:\n  line 8: key \"k\" already set in map, unknown field \"dta\"",
        );
    }

    #[test]
    fn documents_take_the_form_of_the_typed_object() {
        let body = r#"{"metadata":{"name":"a","labels":{},"creationTimestamp":null},"spec":{"containers":[{"name":"c",
            "env":[],"stdin":false,"resources":{"limits":{"cpu":"1000m"}}},null],"nodeName":"","hostNetwork":false,
            "automountServiceAccountToken":false,"foo":1}}"#;
        let admitted = decode(&ty("", "Pod"), Format::Json, body.as_bytes(), FieldValidation::Warn).unwrap();
        assert_eq!(
            admitted.value,
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "status": {},
                "spec": {"automountServiceAccountToken": false, "containers": [
                    {"name": "c", "resources": {"limits": {"cpu": "1"}}}, {"name": "", "resources": {}}]}}),
        );
        assert_eq!(admitted.warnings, ["unknown field \"spec.foo\""]);
        let again = admit(&ty("", "Pod"), admitted.value.clone(), FieldValidation::Strict).unwrap();
        assert_eq!(again.value, admitted.value);
    }

    #[test]
    fn another_kind_or_version_is_refused() {
        let message = strict("", "ConfigMap", r#"{"apiVersion":"v1","kind":"Secret"}"#);
        assert!(message.ends_with("converting (v1.Secret) to (core.ConfigMap): unknown conversion"), "{message}");
        assert_eq!(
            strict("apps", "Deployment", r#"{"apiVersion":"apps/v1beta1","kind":"Deployment"}"#),
            "the API version in the data (apps/v1beta1) does not match the expected API version (apps/v1)",
        );
        let eviction = br#"{"apiVersion":"policy/v1beta1","kind":"Eviction","metadata":{"name":"a"}}"#;
        let taken = decode(&ty("policy", "Eviction"), Format::Json, eviction, FieldValidation::Strict).unwrap();
        assert_eq!(taken.value["metadata"]["name"], "a");
    }

    #[test]
    fn custom_resources_are_pruned() {
        let schema = json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "size": {"type": "integer"},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}}});
        let ty = DocumentType::custom("example.com", "v1", "Widget", &schema).unwrap();
        let body = br#"{"metadata":{"name":"x","zip":1},"spec":{"size":"1","foo":"x","free":{"a":{"b":1}}},"other":1}"#;
        let admitted = decode(&ty, Format::Json, body, FieldValidation::Warn).unwrap();
        assert_eq!(
            admitted.value,
            json!({"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "x"},
                "spec": {"size": "1", "free": {"a": {"b": 1}}}}),
        );
        assert_eq!(
            admitted.warnings,
            ["unknown field \"metadata.zip\"", "unknown field \"other\"", "unknown field \"spec.foo\""],
        );
    }
}
