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
        let hash = portolan_api::openapi::hash(&bytes);
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
        Catalog::new(Registry::builtin(), Vec::new())
    }

    /// The kinds of a registry; `schemas` has those of its custom kinds.
    pub fn new(registry: Registry, schemas: Vec<CustomSchema>) -> Catalog {
        let mut entries = BTreeMap::new();
        for kind in registry.iter() {
            let ty = if kind.custom {
                schemas
                    .iter()
                    .find(|s| s.group == kind.group && s.version == kind.version && s.kind == kind.kind)
                    .and_then(|s| DocumentType::custom(&s.group, &s.version, &s.kind, &s.schema).ok())
            } else {
                DocumentType::of(kind)
            };
            let collection = registry.storage_of(kind).map(|stored| stored.qualified_resource()).unwrap_or_default();
            let prefix = format!("{{\"apiVersion\":\"{}\",\"kind\":\"{}\",", kind.api_version(), kind.kind);
            let entry = Entry {
                kind: kind.clone(),
                ty,
                collection: Arc::from(collection),
                prefix: Arc::from(prefix),
                converts: convert::converts(kind),
                selectable_fields: Vec::new(),
            };
            let key = (kind.group.clone(), kind.version.clone(), kind.plural.clone());
            entries.insert(key, Arc::new(entry));
        }
        Catalog {
            registry,
            schemas,
            entries,
            documents: std::sync::Mutex::default(),
            openapi: OnceLock::new(),
        }
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
        let _ = kind;
        None
    }
}
