//! What the server does to an object before it is validated: status and spec split, metadata the client may not set,
//! `metadata.generation`, fields that follow from others.

use serde_json::Value;

use crate::kinds::Kind;
use crate::status::Status;

/// Prepares a new object: server-owned metadata and status are reset.
pub fn prepare_create(kind: &Kind, new: &mut Value) -> Result<(), Status> {
    let _ = (kind, new);
    todo!()
}

/// Prepares a changed object from what is stored; `subresource` is the one written through, if any.
pub fn prepare_update(kind: &Kind, new: &mut Value, old: &Value, subresource: Option<&str>) -> Result<(), Status> {
    let _ = (kind, new, old, subresource);
    todo!()
}
