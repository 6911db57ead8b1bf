//! Error answers of the API: the Status object and the field errors inside it.
//!
//! Texts and reasons are those that clients of Kubernetes print and match on (`metav1.Status`, `field.Error`).
//! A [`Status`] is also the error type of every decision in this crate that ends a request.

use serde_json::{Map, Value, json};
use std::fmt;

use crate::kinds::{Kind, Storage};

/// An outcome of a request as the `v1` Status object.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// HTTP status code; always equal to `code` in the body.
    pub code: u16,
    /// CamelCase reason, empty for errors that have none.
    pub reason: String,
    /// Text for people.
    pub message: String,
    /// What the message is about.
    pub details: Option<Box<Details>>,
    /// `metadata.continue` of an expired list (inconsistent continuation).
    pub continue_token: Option<String>,
    /// Seconds for a `Retry-After` header; also in the details.
    pub retry_after_seconds: Option<u32>,
    /// Texts for `Warning` headers; not in the body.
    pub warnings: Vec<String>,
}

/// `status.details`: the object concerned and the causes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Details {
    /// Name of the object.
    pub name: String,
    /// API group of the object.
    pub group: String,
    /// Plural resource name, or the kind for Invalid.
    pub kind: String,
    /// uid of the object.
    pub uid: String,
    /// Single reasons, one for each field.
    pub causes: Vec<Cause>,
}

/// One entry of `status.details.causes`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cause {
    /// CamelCase reason.
    pub reason: String,
    /// Text without the field path.
    pub message: String,
    /// Field path, empty if the cause is not about a field.
    pub field: String,
}

impl std::error::Error for Status {}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Status {
    /// A failure without details.
    pub fn new(code: u16, reason: &str, message: impl Into<String>) -> Status {
        Status {
            code,
            reason: reason.to_owned(),
            message: message.into(),
            details: None,
            continue_token: None,
            retry_after_seconds: None,
            warnings: Vec::new(),
        }
    }

    /// 400 with free text.
    pub fn bad_request(message: impl Into<String>) -> Status {
        Status::new(400, "BadRequest", message)
    }

    /// 401; clients print their own text about logging in.
    pub fn unauthorized() -> Status {
        Status::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403 about one object (`pods "x" is forbidden: why`); an empty name is left out of the text.
    pub fn forbidden(kind: &Kind, name: &str, why: impl fmt::Display) -> Status {
        let resource = kind.qualified_resource();
        let message = if name.is_empty() {
            format!("{resource} is forbidden: {why}")
        } else {
            format!("{resource} \"{name}\" is forbidden: {why}")
        };
        Status::new(403, "Forbidden", message).about(kind, name)
    }

    /// 403 for a create in a namespace that is going away.
    pub fn namespace_terminating(kind: &Kind, name: &str, namespace: &str) -> Status {
        let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
        Status::forbidden(kind, name, why).cause(
            "NamespaceTerminating",
            format!("namespace {namespace} is being terminated"),
            "metadata.namespace",
        )
    }

    /// 404 about one object.
    pub fn not_found(kind: &Kind, name: &str) -> Status {
        Status::new(404, "NotFound", format!("{} \"{name}\" not found", kind.qualified_resource())).about(kind, name)
    }

    /// 404 for a namespace that a request names.
    pub fn namespace_not_found(name: &str) -> Status {
        let mut status = Status::new(404, "NotFound", format!("namespaces \"{name}\" not found"));
        status.details =
            Some(Box::new(Details { name: name.to_owned(), kind: "namespaces".to_owned(), ..Details::default() }));
        status
    }

    /// 404 for a path in a known group that is no resource.
    pub fn unknown_resource() -> Status {
        let mut status = Status::new(404, "NotFound", "the server could not find the requested resource");
        status.details = Some(Box::default());
        status
    }

    /// 405.
    pub fn method_not_allowed() -> Status {
        let mut status =
            Status::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource");
        status.details = Some(Box::default());
        status
    }

    /// 406 when no representation the client accepts exists.
    pub fn not_acceptable(available: &[&str]) -> Status {
        let message = format!("406: Not Acceptable\n\nAvailable representations: {}", available.join(", "));
        let mut status = Status::new(406, "NotAcceptable", message);
        status.details = Some(Box::default());
        status
    }

    /// 409 on create.
    pub fn already_exists(kind: &Kind, name: &str) -> Status {
        Status::new(409, "AlreadyExists", format!("{} \"{name}\" already exists", kind.qualified_resource()))
            .about(kind, name)
    }

    /// 409 on create when no generated name was free.
    pub fn no_unique_name(kind: &Kind, name: &str) -> Status {
        let mut status = Status::already_exists(kind, name);
        status.message.push_str(", the server was not able to generate a unique name for the object");
        status.retry_after_seconds = Some(1);
        status
    }

    /// 409 `Operation cannot be fulfilled on <resource> "<name>": <why>`.
    pub fn conflict(kind: &Kind, name: &str, why: impl fmt::Display) -> Status {
        let message = format!("Operation cannot be fulfilled on {} \"{name}\": {why}", kind.qualified_resource());
        Status::new(409, "Conflict", message).about(kind, name)
    }

    /// 409 for a write that is based on an old resourceVersion.
    pub fn stale_write(kind: &Kind, name: &str) -> Status {
        Status::conflict(
            kind,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 410 when a revision is no longer available.
    pub fn expired(message: impl Into<String>) -> Status {
        Status::new(410, "Expired", message)
    }

    /// 413.
    pub fn too_large(limit_bytes: usize) -> Status {
        Status::new(413, "RequestEntityTooLarge", format!("Request entity too large: limit is {limit_bytes}"))
    }

    /// 415 naming the accepted media types.
    pub fn unsupported_media_type(accepted: &[&str]) -> Status {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            accepted.join(", ")
        );
        Status::new(415, "UnsupportedMediaType", message)
    }

    /// 422 from validation. `errors` must not be empty; equal texts are listed once in the message.
    pub fn invalid(kind: &Kind, name: &str, errors: &[FieldError]) -> Status {
        // A kind that is kept as another one is judged as that one.
        let group = match &kind.storage {
            Storage::SharedWith { group, .. } => group,
            Storage::Own | Storage::Virtual => &kind.group,
        };
        Status::invalid_kind(group, &kind.kind, name, errors)
    }

    /// As [`Status::invalid`] for kinds outside the registry (ListOptions, Scale).
    pub fn invalid_kind(group: &str, kind: &str, name: &str, errors: &[FieldError]) -> Status {
        let qualified = if group.is_empty() { kind.to_owned() } else { format!("{kind}.{group}") };
        let mut texts: Vec<String> = Vec::with_capacity(errors.len());
        for text in errors.iter().map(ToString::to_string) {
            if !texts.contains(&text) {
                texts.push(text);
            }
        }
        let joined = match texts.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let mut status = Status::new(422, "Invalid", format!("{qualified} \"{name}\" is invalid: {joined}"));
        status.details = Some(Box::new(Details {
            name: name.to_owned(),
            group: group.to_owned(),
            kind: kind.to_owned(),
            uid: String::new(),
            causes: errors.iter().map(FieldError::to_cause).collect(),
        }));
        status
    }

    /// 429 with a `Retry-After`.
    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Status {
        let mut status = Status::new(429, "TooManyRequests", message);
        status.details = Some(Box::default());
        status.retry_after_seconds = Some(retry_after_seconds);
        status
    }

    /// 500 `Internal error occurred: ...`.
    pub fn internal(why: impl fmt::Display) -> Status {
        let mut status = Status::new(500, "InternalError", format!("Internal error occurred: {why}"));
        status.details = Some(Box::new(Details {
            causes: vec![Cause { reason: String::new(), message: why.to_string(), field: String::new() }],
            ..Details::default()
        }));
        status
    }

    /// 500 without a reason, which is how plain errors of the reference implementation surface.
    pub fn plain_error(message: impl Into<String>) -> Status {
        Status::new(500, "", message)
    }

    /// 503, for proxies without a place to go.
    pub fn service_unavailable(message: impl Into<String>) -> Status {
        Status::new(503, "ServiceUnavailable", message)
    }

    /// 504 for a resourceVersion this server has not reached.
    pub fn too_large_resource_version(wanted: u64, current: u64) -> Status {
        let message = format!("Too large resource version: {wanted}, current: {current}");
        let mut status = Status::new(504, "Timeout", format!("Timeout: {message}"));
        status.details = Some(Box::new(Details {
            causes: vec![Cause {
                reason: "ResourceVersionTooLarge".to_owned(),
                message: "Too large resource version".to_owned(),
                field: String::new(),
            }],
            ..Details::default()
        }));
        status.retry_after_seconds = Some(1);
        status
    }

    /// Fills details with the object's name, group and plural resource name.
    pub fn about(mut self, kind: &Kind, name: &str) -> Status {
        let causes = self.details.take().map(|d| d.causes).unwrap_or_default();
        self.details = Some(Box::new(Details {
            name: name.to_owned(),
            group: kind.group.clone(),
            kind: kind.plural.clone(),
            uid: String::new(),
            causes,
        }));
        self
    }

    /// Adds a cause.
    pub fn cause(mut self, reason: &str, message: impl Into<String>, field: &str) -> Status {
        self.details.get_or_insert_default().causes.push(Cause {
            reason: reason.to_owned(),
            message: message.into(),
            field: field.to_owned(),
        });
        self
    }

    /// The Status document of a failure.
    pub fn to_value(&self) -> Value {
        let mut metadata = Map::new();
        if let Some(token) = &self.continue_token {
            metadata.insert("continue".to_owned(), json!(token));
        }
        let mut body = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": metadata,
            "status": "Failure",
            "message": self.message,
            "code": self.code,
        });
        if !self.reason.is_empty() {
            body["reason"] = json!(self.reason);
        }
        if let Some(details) = &self.details {
            body["details"] = details.to_value(self.retry_after_seconds);
        } else if let Some(seconds) = self.retry_after_seconds {
            body["details"] = json!({ "retryAfterSeconds": seconds });
        }
        body
    }
}

/// The Status document of a completed deletion: `details` names what is gone.
pub fn deleted(kind: &Kind, name: &str, uid: &str) -> Value {
    let details = Details {
        name: name.to_owned(),
        group: kind.group.clone(),
        kind: kind.plural.clone(),
        uid: uid.to_owned(),
        causes: Vec::new(),
    };
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
        "details": details.to_value(None),
    })
}

/// The Status document of a success without details (bindings, evictions).
pub fn success(code: u16) -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": code })
}

impl Details {
    fn to_value(&self, retry_after_seconds: Option<u32>) -> Value {
        let mut details = Map::new();
        for (key, text) in [("name", &self.name), ("group", &self.group), ("kind", &self.kind), ("uid", &self.uid)] {
            if !text.is_empty() {
                details.insert(key.to_owned(), json!(text));
            }
        }
        if !self.causes.is_empty() {
            let causes: Vec<Value> = self
                .causes
                .iter()
                .map(|cause| {
                    let mut entry = Map::new();
                    for (key, text) in [("reason", &cause.reason), ("message", &cause.message), ("field", &cause.field)]
                    {
                        if !text.is_empty() {
                            entry.insert(key.to_owned(), json!(text));
                        }
                    }
                    Value::Object(entry)
                })
                .collect();
            details.insert("causes".to_owned(), Value::Array(causes));
        }
        if let Some(seconds) = retry_after_seconds {
            details.insert("retryAfterSeconds".to_owned(), json!(seconds));
        }
        Value::Object(details)
    }
}

/// What is wrong with one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// Path such as `spec.ports[0].nodePort`.
    pub field: String,
    /// What kind of fault.
    pub fault: Fault,
    /// Explanation; may be empty where the fault says enough.
    pub detail: String,
}

/// Kinds of field faults, with the value as it is printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The field must have a value.
    Required,
    /// The value breaks a rule.
    Invalid(String),
    /// The value is not one of the allowed ones, which the detail lists.
    NotSupported(String),
    /// The field may not be set or changed.
    Forbidden,
    /// The value occurs twice.
    Duplicate(String),
    /// The value names something that does not exist.
    NotFound(String),
    /// The value has too many bytes.
    TooLong,
    /// The list has too many items.
    TooMany(usize),
    /// The value has the wrong JSON type.
    TypeInvalid(String),
    /// The server failed to judge the value.
    Internal,
}

impl FieldError {
    fn new(field: impl Into<String>, fault: Fault, detail: impl Into<String>) -> FieldError {
        FieldError { field: field.into(), fault, detail: detail.into() }
    }

    /// `Required value` or `Required value: detail`.
    pub fn required(field: impl Into<String>, detail: impl Into<String>) -> FieldError {
        FieldError::new(field, Fault::Required, detail)
    }

    /// `Invalid value: <json of value>: detail`.
    pub fn invalid(field: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> FieldError {
        FieldError::new(field, Fault::Invalid(printed(&value.into())), detail)
    }

    /// As [`FieldError::invalid`] with a value that is printed as it is given, for structures whose key order matters.
    pub fn invalid_text(field: impl Into<String>, value: impl Into<String>, detail: impl Into<String>) -> FieldError {
        FieldError::new(field, Fault::Invalid(value.into()), detail)
    }

    /// `Unsupported value: "x": supported values: "A", "B"`, in the order given.
    pub fn not_supported(field: impl Into<String>, value: impl Into<Value>, supported: &[&str]) -> FieldError {
        let detail = if supported.is_empty() {
            String::new()
        } else {
            let quoted: Vec<String> = supported.iter().map(|s| quoted(s)).collect();
            format!("supported values: {}", quoted.join(", "))
        };
        FieldError::new(field, Fault::NotSupported(printed(&value.into())), detail)
    }

    /// `Forbidden: detail`.
    pub fn forbidden(field: impl Into<String>, detail: impl Into<String>) -> FieldError {
        FieldError::new(field, Fault::Forbidden, detail)
    }

    /// `Duplicate value: <json of value>`.
    pub fn duplicate(field: impl Into<String>, value: impl Into<Value>) -> FieldError {
        FieldError::new(field, Fault::Duplicate(printed(&value.into())), "")
    }

    /// As [`FieldError::duplicate`] with a value that is printed as it is given.
    pub fn duplicate_text(field: impl Into<String>, value: impl Into<String>) -> FieldError {
        FieldError::new(field, Fault::Duplicate(value.into()), "")
    }

    /// `Not found: <json of value>`.
    pub fn not_found(field: impl Into<String>, value: impl Into<Value>) -> FieldError {
        FieldError::new(field, Fault::NotFound(printed(&value.into())), "")
    }

    /// `Too long: may not be more than N bytes`.
    pub fn too_long(field: impl Into<String>, max_bytes: usize) -> FieldError {
        FieldError::new(field, Fault::TooLong, format!("may not be more than {max_bytes} bytes"))
    }

    /// `Too many: N: must have at most M items`.
    pub fn too_many(field: impl Into<String>, actual: usize, max: usize) -> FieldError {
        let unit = if max == 1 { "item" } else { "items" };
        FieldError::new(field, Fault::TooMany(actual), format!("must have at most {max} {unit}"))
    }

    /// `Invalid value: <json of value>: detail` with the reason FieldValueTypeInvalid.
    pub fn type_invalid(field: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> FieldError {
        FieldError::new(field, Fault::TypeInvalid(printed(&value.into())), detail)
    }

    /// `Internal error: detail`.
    pub fn internal(field: impl Into<String>, detail: impl Into<String>) -> FieldError {
        FieldError::new(field, Fault::Internal, detail)
    }

    /// The text without the field path, as in `details.causes[].message`.
    pub fn message(&self) -> String {
        let head = match &self.fault {
            Fault::Required => "Required value".to_owned(),
            Fault::Invalid(value) | Fault::TypeInvalid(value) => format!("Invalid value: {value}"),
            Fault::NotSupported(value) => format!("Unsupported value: {value}"),
            Fault::Forbidden => "Forbidden".to_owned(),
            Fault::Duplicate(value) => format!("Duplicate value: {value}"),
            Fault::NotFound(value) => format!("Not found: {value}"),
            Fault::TooLong => "Too long".to_owned(),
            Fault::TooMany(actual) => format!("Too many: {actual}"),
            Fault::Internal => "Internal error".to_owned(),
        };
        if self.detail.is_empty() { head } else { format!("{head}: {}", self.detail) }
    }

    /// The reason in `details.causes[]`.
    pub fn reason(&self) -> &'static str {
        match self.fault {
            Fault::Required => "FieldValueRequired",
            Fault::Invalid(_) => "FieldValueInvalid",
            Fault::NotSupported(_) => "FieldValueNotSupported",
            Fault::Forbidden => "FieldValueForbidden",
            Fault::Duplicate(_) => "FieldValueDuplicate",
            Fault::NotFound(_) => "FieldValueNotFound",
            Fault::TooLong => "FieldValueTooLong",
            Fault::TooMany(_) => "FieldValueTooMany",
            Fault::TypeInvalid(_) => "FieldValueTypeInvalid",
            Fault::Internal => "InternalError",
        }
    }

    /// The entry in `details.causes`.
    pub fn to_cause(&self) -> Cause {
        Cause { reason: self.reason().to_owned(), message: self.message(), field: self.field.clone() }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message())
    }
}

/// A value as error texts print it: compact JSON, absent values as `null`, strings with Go's quoting.
fn printed(value: &Value) -> String {
    match value {
        Value::String(text) => quoted(text),
        other => other.to_string(),
    }
}

/// A string in double quotes with the escapes of Go's `%q`.
pub fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => out.push_str(&format!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::Registry;

    #[test]
    fn field_errors_print_as_clients_know_them() {
        let rows = [
            ("a_required_value", FieldError::required("spec.ports", ""), "spec.ports: Required value"),
            (
                "an_invalid_number_is_not_quoted",
                FieldError::invalid("spec.ports[0].port", 0, "must be between 1 and 65535, inclusive"),
                "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
            ),
            (
                "a_list_is_compact_json",
                FieldError::invalid("spec.clusterIPs", json!(["10.96.0.9"]), "x"),
                "spec.clusterIPs: Invalid value: [\"10.96.0.9\"]: x",
            ),
            (
                "supported_values_are_quoted",
                FieldError::not_supported("spec.type", "X", &["A", "B"]),
                "spec.type: Unsupported value: \"X\": supported values: \"A\", \"B\"",
            ),
            ("a_duplicate", FieldError::duplicate("a[1]", "x"), "a[1]: Duplicate value: \"x\""),
            ("too_many", FieldError::too_many("e", 3, 2), "e: Too many: 3: must have at most 2 items"),
            (
                "control_characters_are_escaped",
                FieldError::invalid("m", "a\u{7}b", "bad"),
                "m: Invalid value: \"a\\ab\": bad",
            ),
        ];
        for (name, error, text) in rows {
            assert_eq!(error.to_string(), text, "{name}");
        }
    }

    #[test]
    fn an_invalid_status_lists_each_text_once_and_every_cause() {
        let registry = Registry::builtin();
        let service = registry.by_gvr("", "v1", "services").expect("built in");
        let error = FieldError::required("spec.ports", "");
        let one = Status::invalid(service, "a", std::slice::from_ref(&error));
        assert_eq!(one.message, "Service \"a\" is invalid: spec.ports: Required value");
        let two = Status::invalid(service, "a", &[error.clone(), error, FieldError::forbidden("x", "no")]);
        assert_eq!(two.message, "Service \"a\" is invalid: [spec.ports: Required value, x: Forbidden: no]");
        assert_eq!(two.details.as_ref().map(|d| d.causes.len()), Some(3));
        let deployment = registry.by_gvr("apps", "v1", "deployments").expect("built in");
        let grouped = Status::invalid(deployment, "web", &[FieldError::required("spec", "")]);
        assert_eq!(grouped.message, "Deployment.apps \"web\" is invalid: spec: Required value");
    }

    #[test]
    fn details_leave_empty_fields_out() {
        assert_eq!(
            Status::unknown_resource().to_value(),
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": "the server could not find the requested resource", "reason": "NotFound", "details": {}, "code": 404})
        );
    }
}
