//! One stored object and its place.

use std::sync::Arc;

use bytes::Bytes;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;

/// Place of an object in its collection: namespace (empty for cluster-scoped objects) and name, ordered like that.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Namespace, empty for cluster-scoped objects.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl Key {
    /// The key of a namespace and a name.
    pub fn new(namespace: &str, name: &str) -> Key {
        Key { namespace: Arc::from(namespace), name: Arc::from(name) }
    }
}

/// An object as it was written at one revision.
#[derive(Debug)]
pub struct Object {
    /// The revision of the write; also in `metadata.resourceVersion`.
    pub revision: u64,
    /// The whole document in its stored form.
    pub value: Value,
    /// The document as JSON without `apiVersion` and `kind`: a list of built-in kinds shows it like this, and every
    /// version of the kind puts its own two fields in front. Serialised once, here.
    pub body: Bytes,
}

impl Object {
    /// Takes a document and stamps it with its revision.
    pub fn new(mut value: Value, revision: u64) -> Object {
        portolan_api::meta::set(&mut value, &["metadata", "resourceVersion"], Value::String(revision.to_string()));
        let body = Bytes::from(body_of(&value));
        Object { revision, value, body }
    }
}

/// A document as JSON without `apiVersion` and `kind`.
pub fn body_of(value: &Value) -> Vec<u8> {
    serde_json::to_vec(&Untyped(value)).expect("a JSON value has string keys only")
}

struct Untyped<'a>(&'a Value);

impl Serialize for Untyped<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Value::Object(fields) = self.0 else { return self.0.serialize(serializer) };
        let mut map = serializer.serialize_map(None)?;
        for (key, value) in fields {
            if key != "apiVersion" && key != "kind" {
                map.serialize_entry(key, value)?;
            }
        }
        map.end()
    }
}
