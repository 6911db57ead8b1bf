//! Defaults that clients observe in stored objects.

use serde_json::Value;

use crate::schema::DocumentType;

/// Fills in the static defaults of a document. Idempotent; run it on create, update, patch and apply, after decoding.
///
/// Values that need the state of the cluster (cluster IPs, node ports, the default IngressClass, service accounts) are
/// not set here.
pub fn default(ty: &DocumentType, value: &mut Value) {
    let _ = (ty, value);
    todo!()
}
