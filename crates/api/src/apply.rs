//! Server-side apply and the bookkeeping of `metadata.managedFields`.

use serde_json::Value;

use crate::schema::DocumentType;
use crate::status::Status;

/// Who writes, through which subresource, and when.
#[derive(Clone, Copy, Debug)]
pub struct Manager<'a> {
    /// `fieldManager`, or the first part of the User-Agent for writes that name none.
    pub name: &'a str,
    /// Subresource the write goes through, `None` for the object itself.
    pub subresource: Option<&'a str>,
    /// RFC 3339 time for changed entries.
    pub now: &'a str,
}

/// Decodes the body of an apply PATCH (YAML, of which JSON is a part) and checks that it is about the object of the URL.
pub fn decode(ty: &DocumentType, body: &[u8], name: &str) -> Result<Value, Status> {
    let _ = (ty, body, name);
    todo!()
}

/// Merges an applied configuration into the live object, managedFields included.
///
/// `live` is `None` when the object is to be created. A result equal to `live` means that nothing is to be written.
/// Conflicts with other managers are a 409 unless `force`. Defaults, admission and validation follow.
pub fn apply(
    ty: &DocumentType,
    live: Option<&Value>,
    applied: &Value,
    manager: Manager<'_>,
    force: bool,
) -> Result<Value, Status> {
    let _ = (ty, live, applied, manager, force);
    todo!()
}

/// Records in `new`'s managedFields what a write other than apply changed. Call it after defaulting and admission,
/// before the comparison that finds no-op writes.
pub fn track_update(ty: &DocumentType, old: Option<&Value>, new: &mut Value, manager: Manager<'_>) {
    let _ = (ty, old, new, manager);
    todo!()
}

/// Whether two versions of an object differ in anything but the times in managedFields, so that a write is needed.
pub fn differs(old: &Value, new: &Value) -> bool {
    let _ = (old, new);
    todo!()
}
