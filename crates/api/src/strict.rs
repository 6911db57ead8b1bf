//! Request bodies: from bytes to a typed document, with the complaints that `fieldValidation` asks for.

use serde_json::Value;

use crate::schema::DocumentType;
use crate::status::Status;

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
        let _ = text;
        todo!()
    }
}

/// A document that fits its type, and what the client should be warned about.
#[derive(Clone, Debug, PartialEq)]
pub struct Admitted {
    /// The document without unknown fields and nulls, quantities in canonical form. Defaults are not filled in yet.
    pub value: Value,
    /// Texts for `Warning` headers.
    pub warnings: Vec<String>,
}

/// Decodes the body of a POST or PUT as a document of type `ty`.
///
/// An absent `apiVersion`/`kind` is filled in; another one than `ty`'s, a syntax error or a wrong type is a 400 with
/// the text of the reference implementation.
pub fn decode(ty: &DocumentType, format: Format, body: &[u8], validation: FieldValidation) -> Result<Admitted, Status> {
    let _ = (ty, format, body, validation);
    todo!()
}

/// Fits an already decoded document to `ty`: drops unknown fields, checks types, canonicalises.
pub fn admit(ty: &DocumentType, value: Value, validation: FieldValidation) -> Result<Admitted, Status> {
    let _ = (ty, value, validation);
    todo!()
}
