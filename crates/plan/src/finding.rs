//! What a compiler has to say about an object that it could not use as written.

use crate::origin::Origin;
use serde::{Deserialize, Serialize};

/// How serious a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Severity {
    /// Worth knowing; everything works as written.
    Normal,
    /// Part of the object has no effect.
    Warning,
}

/// A statement about one field of one object; becomes an event or a status condition, never an error that stops a compiler.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Finding {
    /// The object and field that the finding is about.
    pub origin: Origin,
    /// Severity; `Warning` becomes a Warning event.
    pub severity: Severity,
    /// CamelCase reason, as in API conditions and events.
    pub reason: String,
    /// One sentence for the user that says what is wrong and what to do.
    pub message: String,
}
