//! `/openapi/v3` and `/openapi/v2`, made once per catalog when first asked for.

use std::collections::BTreeMap;
use std::sync::Arc;

use http::header::{CACHE_CONTROL, HeaderMap, HeaderValue, LOCATION};
use http::{Response, StatusCode};
use portolan_api::openapi;

use crate::catalog::{Catalog, Document};
use crate::path::Query;
use crate::response::{Body, full, no_such_page};
use crate::server::cached_answer;

fn v3_documents(catalog: &Catalog) -> &BTreeMap<String, Arc<Document>> {
    catalog.openapi.get_or_init(|| {
        let mut documents = BTreeMap::new();
        for path in openapi::v3_paths(&catalog.registry) {
            let words: Vec<&str> = path.split('/').collect();
            let (group, version) = match words.as_slice() {
                ["api", version] => ("", *version),
                ["apis", group, version] => (*group, *version),
                _ => continue,
            };
            if let Some(document) = openapi::v3_document(&catalog.registry, group, version, &catalog.schemas) {
                documents.insert(path, Arc::new(Document::new(document.to_string().into_bytes())));
            }
        }
        documents
    })
}

/// Answers `/openapi/v3` and what is below it; `path` holds the segments after `v3`.
pub fn v3(catalog: &Catalog, path: &[String], query: &Query, headers: &HeaderMap) -> Response<Body> {
    let documents = v3_documents(catalog);
    if path.is_empty() {
        let index = catalog.document("openapi/v3", || {
            let pairs: Vec<(String, String)> =
                documents.iter().map(|(path, document)| (path.clone(), document.hash.clone())).collect();
            openapi::v3_index(&pairs).to_string().into_bytes()
        });
        return cached_answer(&index, headers, "application/json", &format!("\"{}\"", index.hash));
    }
    let name = path.join("/");
    let Some(document) = documents.get(&name) else { return no_such_page() };
    let hash = query.get("hash");
    if !hash.is_empty() && hash != document.hash {
        let mut response = Response::new(full(""));
        *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
        let location = format!("/openapi/v3/{name}?hash={}", document.hash);
        if let Ok(location) = HeaderValue::from_str(&location) {
            response.headers_mut().insert(LOCATION, location);
        }
        return response;
    }
    let mut response = cached_answer(document, headers, "application/json", &format!("\"{}\"", document.hash));
    if !hash.is_empty() {
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("public, immutable"));
    }
    response
}

/// Answers `/openapi/v2`: JSON, or the protobuf form that kubectl before 1.29 wants.
pub fn v2(catalog: &Catalog, accept: &str, headers: &HeaderMap) -> Response<Body> {
    let first = accept.split(',').next().unwrap_or_default();
    if first.contains("proto-openapi.spec.v2") {
        let document = catalog.document("openapi/v2.pb", || {
            openapi::v2_protobuf(&openapi::v2_document(&catalog.registry, &catalog.schemas))
        });
        let content_type = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";
        return cached_answer(&document, headers, content_type, &format!("\"{}\"", document.hash));
    }
    let document = catalog
        .document("openapi/v2", || openapi::v2_document(&catalog.registry, &catalog.schemas).to_string().into_bytes());
    cached_answer(&document, headers, "application/json", &format!("\"{}\"", document.hash))
}
