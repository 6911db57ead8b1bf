//! Validation of objects with the texts clients know.

use serde_json::Value;

use crate::kinds::Kind;
use crate::status::FieldError;

/// Faults of an object to be created; empty if it may be stored.
pub fn validate_create(kind: &Kind, new: &Value) -> Vec<FieldError> {
    let _ = (kind, new);
    Vec::new()
}

/// Faults of a change; empty if it may be stored.
pub fn validate_update(kind: &Kind, new: &Value, old: &Value, subresource: Option<&str>) -> Vec<FieldError> {
    let _ = (kind, new, old, subresource);
    Vec::new()
}

/// Texts for `Warning` headers of an accepted write.
pub fn warnings(kind: &Kind, new: &Value, old: Option<&Value>) -> Vec<String> {
    let _ = (kind, new, old);
    Vec::new()
}
