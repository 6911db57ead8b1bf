//! The kinds served at this moment, with everything requests need to know about each.
//!
//! A value behind a pointer: it is replaced as a whole when a CustomResourceDefinition changes, so that routing,
//! discovery and OpenAPI always agree.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use portolan_api::kinds::{Kind, Registry};
use portolan_api::openapi::CustomSchema;
use portolan_api::schema::DocumentType;
use serde_json::Value;
use sha2::Digest as _;

use crate::convert;

/// One kind in one version.
#[derive(Debug)]
pub struct Entry {
    /// The registry's entry.
    pub kind: Arc<Kind>,
    /// The type of its documents; `None` for the few kinds without one.
    pub ty: Option<DocumentType>,
    /// Name of the collection in the store; empty for kinds that are not stored.
    pub collection: Arc<str>,
    /// `{"apiVersion":"...","kind":"...",`: the beginning of every document.
    pub prefix: Arc<str>,
    /// The stored form is another one.
    pub converts: bool,
    /// Fields a custom kind offers to field selectors.
    pub selectable_fields: Vec<String>,
    /// What its definition says of a custom kind.
    pub custom: Option<Arc<Custom>>,
}

/// What a CustomResourceDefinition says about one version of its kind.
#[derive(Clone, Debug, Default)]
pub struct Custom {
    /// `openAPIV3Schema`.
    pub schema: Value,
    /// `additionalPrinterColumns`.
    pub printer_columns: Vec<Value>,
    /// Where the replicas are, if the scale subresource is served.
    pub scale: Option<crate::server::ScalePaths>,
    /// Fields for field selectors.
    pub selectable_fields: Vec<String>,
    /// The version in which objects are stored.
    pub storage_version: String,
    /// Text of the warning for a deprecated version.
    pub deprecation: Option<String>,
    /// The definition is going away: no new objects.
    pub terminating: bool,
}

/// A document that is made once and then sent again and again.
#[derive(Clone, Debug)]
pub struct Document {
    /// Its bytes.
    pub bytes: Bytes,
    /// The same, compressed.
    pub gzip: Bytes,
    /// SHA-512 in upper case hex.
    pub hash: String,
}

impl Document {
    /// Hashes and compresses a document.
    pub fn new(bytes: Vec<u8>) -> Document {
        let hash = sha2::Sha512::digest(&bytes).iter().map(|byte| format!("{byte:02X}")).collect();
        let gzip = crate::server::gzip(&bytes);
        Document { bytes: Bytes::from(bytes), gzip: Bytes::from(gzip), hash }
    }
}

/// All kinds.
#[derive(Debug)]
pub struct Catalog {
    /// The registry behind it.
    pub registry: Registry,
    /// Schemas of custom kinds, for OpenAPI.
    pub schemas: Vec<CustomSchema>,
    entries: BTreeMap<(String, String, String), Arc<Entry>>,
    documents: std::sync::Mutex<BTreeMap<String, Arc<Document>>>,
    /// OpenAPI v3 documents by path, made when the first client asks.
    pub openapi: OnceLock<BTreeMap<String, Arc<Document>>>,
}

impl Catalog {
    /// The built-in kinds.
    pub fn builtin() -> Catalog {
        Catalog::new(Registry::builtin(), &BTreeMap::new())
    }

    /// The kinds of a registry; `customs` has what definitions say of its custom kinds, by group, version and plural.
    pub fn new(registry: Registry, customs: &BTreeMap<(String, String, String), Arc<Custom>>) -> Catalog {
        let mut entries = BTreeMap::new();
        let mut schemas = Vec::new();
        for kind in registry.iter() {
            let key = (kind.group.clone(), kind.version.clone(), kind.plural.clone());
            let custom = customs.get(&key).cloned();
            let ty = match &custom {
                Some(custom) => {
                    schemas.push(CustomSchema {
                        group: kind.group.clone(),
                        version: kind.version.clone(),
                        kind: kind.kind.clone(),
                        schema: custom.schema.clone(),
                    });
                    DocumentType::custom(&kind.group, &kind.version, &kind.kind, &custom.schema).ok()
                }
                None => DocumentType::of(kind),
            };
            let collection = registry.storage_of(kind).map(|stored| stored.qualified_resource()).unwrap_or_default();
            let prefix = format!("{{\"apiVersion\":\"{}\",\"kind\":\"{}\",", kind.api_version(), kind.kind);
            let entry = Entry {
                kind: kind.clone(),
                ty,
                collection: Arc::from(collection),
                prefix: Arc::from(prefix),
                converts: convert::converts(kind),
                selectable_fields: custom.as_ref().map(|custom| custom.selectable_fields.clone()).unwrap_or_default(),
                custom,
            };
            entries.insert(key, Arc::new(entry));
        }
        Catalog { registry, schemas, entries, documents: std::sync::Mutex::default(), openapi: OnceLock::new() }
    }

    /// The kind at a group, version and plural resource name.
    pub fn entry(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Entry>> {
        self.entries.get(&(group.to_owned(), version.to_owned(), plural.to_owned()))
    }

    /// The built-in kind of a core or named group; they are always there.
    pub fn builtin_entry(&self, group: &str, version: &str, plural: &str) -> Arc<Entry> {
        self.entry(group, version, plural).cloned().expect("a built-in kind that the registry always has")
    }

    /// The document of this name, made by `make` when it is asked for the first time.
    pub fn document(&self, name: &str, make: impl FnOnce() -> Vec<u8>) -> Arc<Document> {
        let mut documents = self.documents.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(document) = documents.get(name) {
            return document.clone();
        }
        let document = Arc::new(Document::new(make()));
        documents.insert(name.to_owned(), document.clone());
        document
    }

    /// Where the replicas of a custom kind are, if its definition says.
    pub fn custom_scale(&self, kind: &Kind) -> Option<crate::server::ScalePaths> {
        self.entry(&kind.group, &kind.version, &kind.plural)?.custom.as_ref()?.scale.clone()
    }
}
