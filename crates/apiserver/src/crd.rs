//! Custom kinds: from stored CustomResourceDefinitions to entries of the catalog.

use std::sync::Arc;

use crate::server::Inner;

/// Builds the catalog from the stored definitions.
pub fn load(_inner: &Arc<Inner>) {}

/// Keeps definitions and catalog in step until shutdown.
pub async fn keep(inner: Arc<Inner>) {
    inner.shutdown.cancelled().await;
}
