//! Objects in the representation a client asked for.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use http::Response;
use http::header::{CONTENT_TYPE, HeaderValue};
use jiff::Timestamp;
use portolan_api::status::Status;
use portolan_api::table;
use serde_json::{Map, Value, json};

use super::Call;
use crate::catalog::Entry;
use crate::convert;
use crate::negotiate::{Encoding, Representation, Shape};
use crate::response::{Body, JSON, answer, full};
use crate::store::Object;

/// The document of a stored object in the form of `entry`'s kind and version.
pub fn value_in<'a>(entry: &Entry, object: &'a Object) -> Cow<'a, Value> {
    if entry.converts {
        return Cow::Owned(convert::from_storage(&entry.kind, object.value.clone()));
    }
    if object.value["apiVersion"] == entry.kind.api_version().as_str() {
        return Cow::Borrowed(&object.value);
    }
    let mut value = object.value.clone();
    value["apiVersion"] = json!(entry.kind.api_version());
    value["kind"] = json!(entry.kind.kind);
    Cow::Owned(value)
}

/// The whole document as JSON.
fn object_json(entry: &Entry, object: &Object) -> Bytes {
    if entry.converts {
        return Bytes::from(value_in(entry, object).to_string());
    }
    let mut out = Vec::with_capacity(entry.prefix.len() + object.body.len());
    out.extend_from_slice(entry.prefix.as_bytes());
    out.extend_from_slice(&object.body[1..]);
    Bytes::from(out)
}

fn meta_version(beta: bool) -> &'static str {
    if beta { "meta.k8s.io/v1beta1" } else { "meta.k8s.io/v1" }
}

/// Only the metadata of a document.
pub fn partial(value: &Value, beta: bool) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": meta_version(beta), "metadata": value["metadata"]})
}

/// What rows of a table carry of their objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Include {
    /// Nothing.
    None,
    /// The metadata.
    Metadata,
    /// The whole object.
    Object,
}

/// Reads `includeObject`.
pub fn include(call: &Call) -> Result<Include, Status> {
    match call.query.get("includeObject") {
        "" | "Metadata" => Ok(Include::Metadata),
        "None" => Ok(Include::None),
        "Object" => Ok(Include::Object),
        other => Err(Status::bad_request(format!(
            "Unable to convert to Table as requested: includeObject: Invalid value: {}: must be 'Metadata', 'Object', 'None', \
             or empty",
            portolan_api::status::quoted(other)
        ))),
    }
}

fn columns(entry: &Entry) -> Vec<table::Column> {
    match &entry.custom {
        Some(custom) => table::custom_columns(&custom.printer_columns),
        None => table::columns(&entry.kind),
    }
}

fn row(entry: &Entry, object: &Value, now: Timestamp) -> table::Row {
    match &entry.custom {
        Some(custom) => table::custom_row(&custom.printer_columns, object, now),
        None => table::row(&entry.kind, object, now),
    }
}

/// A table of some objects.
pub fn table<'a>(
    entry: &Entry,
    objects: impl Iterator<Item = Cow<'a, Value>>,
    metadata: Value,
    beta: bool,
    include: Include,
    with_columns: bool,
    now: Timestamp,
) -> Value {
    let columns: Value =
        if with_columns { columns(entry).iter().map(table::Column::to_value).collect() } else { Value::Null };
    let rows: Vec<Value> = objects
        .map(|object| {
            let row = row(entry, &object, now);
            let mut value = json!({"cells": row.cells});
            if !row.conditions.is_empty() {
                value["conditions"] = Value::Array(row.conditions);
            }
            value["object"] = match include {
                Include::None => Value::Null,
                Include::Metadata => partial(&object, beta),
                Include::Object => object.into_owned(),
            };
            value
        })
        .collect();
    json!({
        "kind": "Table",
        "apiVersion": meta_version(beta),
        "metadata": metadata,
        "columnDefinitions": columns,
        "rows": rows,
    })
}

/// Refuses shapes that do not go with one object or with a list.
pub fn check_shape(entry: &Entry, shape: Shape, list: bool) -> Result<(), Status> {
    let package = match entry.kind.group.split('.').next().unwrap_or_default() {
        "" => "core",
        first => first,
    };
    let message = match shape {
        Shape::Partial { .. } if list => {
            format!(
                "you requested PartialObjectMetadata, but the requested object is a list (*{package}.{})",
                entry.kind.list_kind
            )
        }
        Shape::PartialList { .. } if !list => format!(
            "you requested PartialObjectMetadataList, but the requested object is not a list (*{package}.{})",
            entry.kind.kind
        ),
        _ => return Ok(()),
    };
    Err(Status::new(406, "NotAcceptable", message))
}

/// Encodes a document.
pub fn encoded(code: u16, value: &Value, encoding: Encoding) -> Result<Response<Body>, Status> {
    match encoding {
        Encoding::Json => Ok(answer(code, JSON, full(value.to_string()))),
        Encoding::Yaml => {
            let text = serde_saphyr::to_string(value)
                .map_err(|error| Status::internal(format!("the object cannot be written as YAML: {error}")))?;
            let mut response = answer(code, JSON, full(text));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/yaml"));
            Ok(response)
        }
    }
}

/// Answers with a document of the call's kind that is at hand as a value.
pub fn document(call: &Call, code: u16, value: &Value) -> Result<Response<Body>, Status> {
    let Representation { encoding, shape } = call.representation()?;
    check_shape(&call.entry, shape, false)?;
    shaped(call, code, value, encoding, shape)
}

fn shaped(call: &Call, code: u16, value: &Value, encoding: Encoding, shape: Shape) -> Result<Response<Body>, Status> {
    match shape {
        Shape::Object => encoded(code, value, encoding),
        Shape::Partial { beta } | Shape::PartialList { beta } => encoded(code, &partial(value, beta), encoding),
        Shape::Table { beta } => {
            let metadata = json!({"resourceVersion": value["metadata"]["resourceVersion"]});
            let objects = std::iter::once(Cow::Borrowed(value));
            let table = table(&call.entry, objects, metadata, beta, include(call)?, true, call.now);
            encoded(code, &table, encoding)
        }
    }
}

/// Answers with a stored object.
pub fn object(call: &Call, code: u16, object: &Object) -> Result<Response<Body>, Status> {
    let Representation { encoding, shape } = call.representation()?;
    check_shape(&call.entry, shape, false)?;
    if encoding == Encoding::Json && shape == Shape::Object {
        return Ok(answer(code, JSON, full(object_json(&call.entry, object))));
    }
    shaped(call, code, &value_in(&call.entry, object), encoding, shape)
}

/// Answers with a list of stored objects.
pub fn list(call: &Call, objects: &[Arc<Object>], metadata: Value) -> Result<Response<Body>, Status> {
    let Representation { encoding, shape } = call.representation()?;
    let entry = &call.entry;
    check_shape(entry, shape, true)?;
    let mut metadata = metadata;
    if entry.kind.custom && metadata.get("continue").is_none() {
        // Lists of custom objects always show the field.
        metadata["continue"] = json!("");
    }
    match shape {
        Shape::Object if encoding == Encoding::Json => {
            Ok(answer(200, JSON, full(list_json(entry, objects, &metadata))))
        }
        Shape::Object => {
            let items: Vec<Value> = objects
                .iter()
                .map(|object| {
                    let mut value = value_in(entry, object).into_owned();
                    if !entry.kind.custom
                        && let Some(fields) = value.as_object_mut()
                    {
                        fields.remove("apiVersion");
                        fields.remove("kind");
                    }
                    value
                })
                .collect();
            let value = json!({
                "kind": entry.kind.list_kind,
                "apiVersion": entry.kind.api_version(),
                "metadata": metadata,
                "items": items,
            });
            encoded(200, &value, encoding)
        }
        Shape::Partial { beta } | Shape::PartialList { beta } => {
            let items: Vec<Value> = objects.iter().map(|object| partial(&object.value, beta)).collect();
            let value = json!({
                "kind": "PartialObjectMetadataList",
                "apiVersion": meta_version(beta),
                "metadata": metadata,
                "items": items,
            });
            encoded(200, &value, encoding)
        }
        Shape::Table { beta } => {
            let values = objects.iter().map(|object| value_in(entry, object));
            encoded(200, &table(entry, values, metadata, beta, include(call)?, true, call.now), encoding)
        }
    }
}

/// A list of documents whose JSON is at hand.
fn list_json(entry: &Entry, objects: &[Arc<Object>], metadata: &Value) -> Vec<u8> {
    let size: usize = objects.iter().map(|object| object.body.len() + entry.prefix.len() + 1).sum();
    let mut out = Vec::with_capacity(size + 200);
    let head = format!(
        "{{\"kind\":\"{}\",\"apiVersion\":\"{}\",\"metadata\":{metadata},\"items\":[",
        entry.kind.list_kind,
        entry.kind.api_version()
    );
    out.extend_from_slice(head.as_bytes());
    for (i, object) in objects.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        if entry.converts {
            let value = value_in(entry, object);
            out.extend_from_slice(&crate::store::body_of(&value));
        } else if entry.kind.custom {
            out.extend_from_slice(entry.prefix.as_bytes());
            out.extend_from_slice(&object.body[1..]);
        } else {
            out.extend_from_slice(&object.body);
        }
    }
    out.extend_from_slice(b"]}");
    out
}

/// `metadata` of a list.
pub fn list_metadata(revision: u64, next: Option<String>, remaining: Option<usize>) -> Value {
    let mut metadata = Map::new();
    metadata.insert("resourceVersion".to_owned(), json!(revision.to_string()));
    if let Some(next) = next {
        metadata.insert("continue".to_owned(), json!(next));
    }
    if let Some(remaining) = remaining {
        metadata.insert("remainingItemCount".to_owned(), json!(remaining));
    }
    Value::Object(metadata)
}
