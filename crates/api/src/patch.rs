//! JSON patch (RFC 6902), JSON merge patch (RFC 7386) and strategic merge patch.

use serde_json::Value;

use crate::schema::DocumentType;
use crate::status::Status;
use crate::strict::{Admitted, FieldValidation};

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
        let _ = media_type;
        todo!()
    }
}

/// Applies `body` to the versioned form of the stored object and fits the result to `ty` (unknown fields dropped or
/// refused, wrong types refused). Identity, defaults and validation are the caller's next steps. `PatchType::Apply` is
/// refused here.
pub fn patch(
    ty: &DocumentType,
    patch_type: PatchType,
    current: &Value,
    body: &[u8],
    validation: FieldValidation,
) -> Result<Admitted, Status> {
    let _ = (ty, patch_type, current, body, validation);
    todo!()
}
