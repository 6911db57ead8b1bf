//! The OpenAPI documents that clients download for validation, apply and explain.
//!
//! Schemas come from the table of types, paths from the registry of kinds, descriptions from the `schemars` feature of the
//! client types at run time. kubectl from 1.29 reads version 3: it looks for PATCH operations that carry
//! `x-kubernetes-group-version-kind` and a `fieldValidation` parameter, and then leaves validation to the server. Older
//! ones read version 2 as protobuf.

mod descriptions;
mod gnostic;

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha512};
use std::collections::BTreeMap;

use crate::kinds::{Kind, Registry};
use crate::schema::{DocumentType, Field, ListType, Struct, Type, Types, join_api_version};

/// The schema of a custom kind, as in its CustomResourceDefinition.
#[derive(Clone, Debug)]
pub struct CustomSchema {
    /// API group.
    pub group: String,
    /// API version.
    pub version: String,
    /// Kind name.
    pub kind: String,
    /// `openAPIV3Schema` of the version.
    pub schema: Value,
}

/// Version of the API that the documents describe.
const API_VERSION: &str = "v1.36.0";

/// Group versions that have an OpenAPI v3 document, as in `api/v1` or `apis/apps/v1`.
pub fn v3_paths(registry: &Registry) -> Vec<String> {
    let groups = registry.groups();
    let versions = groups.iter().flat_map(|(group, versions)| versions.iter().map(move |version| (group, version)));
    versions.map(|(group, version)| root(group, version).trim_start_matches('/').to_owned()).collect()
}

/// The index `/openapi/v3` for documents given as `(path, hash)`.
pub fn v3_index(documents: &[(String, String)]) -> Value {
    let paths: Map<String, Value> = documents
        .iter()
        .map(|(path, hash)| (path.clone(), json!({ "serverRelativeURL": format!("/openapi/v3/{path}?hash={hash}") })))
        .collect();
    json!({ "paths": paths })
}

/// The OpenAPI v3 document of one group version, `None` if the registry has no kind in it.
pub fn v3_document(registry: &Registry, group: &str, version: &str, custom: &[CustomSchema]) -> Option<Value> {
    let mut builder = Builder { style: Style::V3, schemas: BTreeMap::new(), custom };
    let mut paths = Map::new();
    let mut any = false;
    for kind in registry.in_version(group, version) {
        any = true;
        builder.kind(kind);
        builder.paths(kind, &mut paths);
    }
    if !any && !registry.groups().iter().any(|(name, versions)| name == group && versions.iter().any(|v| v == version))
    {
        return None;
    }
    builder.meta_types();
    Some(json!({
        "openapi": "3.0.0",
        "info": { "title": "Kubernetes", "version": API_VERSION },
        "paths": paths,
        "components": { "schemas": builder.schemas },
    }))
}

/// Hash of a document for the index and the ETag: SHA-512 in upper case hex.
pub fn hash(document: &[u8]) -> String {
    Sha512::digest(document).iter().map(|byte| format!("{byte:02X}")).collect()
}

/// The OpenAPI v2 document `/openapi/v2` as JSON.
pub fn v2_document(registry: &Registry, custom: &[CustomSchema]) -> Value {
    let mut builder = Builder { style: Style::V2, schemas: BTreeMap::new(), custom };
    let mut paths = Map::new();
    for kind in registry.iter() {
        builder.kind(kind);
        builder.paths(kind, &mut paths);
    }
    builder.meta_types();
    json!({
        "swagger": "2.0",
        "info": { "title": "Kubernetes", "version": API_VERSION },
        "paths": paths,
        "definitions": builder.schemas,
    })
}

/// The OpenAPI v2 document as a gnostic `openapi.v2.Document` message.
pub fn v2_protobuf(document: &Value) -> Vec<u8> {
    gnostic::document(document)
}

/// `/api/v1` or `/apis/GROUP/VERSION`.
fn root(group: &str, version: &str) -> String {
    let prefix = if group.is_empty() { "/api" } else { "/apis" };
    format!("{prefix}/{}", join_api_version(group, version))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    V2,
    V3,
}

/// Name of the component that stands for any patch body.
const PATCH: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Patch";
const STATUS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Status";
const OBJECT_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
const LIST_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta";
const DELETE_OPTIONS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions";

struct Builder<'a> {
    style: Style,
    schemas: BTreeMap<String, Value>,
    custom: &'a [CustomSchema],
}

impl Builder<'_> {
    fn reference(&self, name: &str) -> Value {
        match self.style {
            Style::V2 => json!({ "$ref": format!("#/definitions/{name}") }),
            Style::V3 => json!({ "$ref": format!("#/components/schemas/{name}") }),
        }
    }

    /// A reference that can stand beside other members.
    fn wrapped(&self, name: &str) -> Map<String, Value> {
        let reference = self.reference(name);
        match (self.style, reference) {
            (Style::V2, Value::Object(reference)) => reference,
            (_, reference) => Map::from_iter([("allOf".to_owned(), json!([reference]))]),
        }
    }

    /// Adds the schemas of a kind and its list.
    fn kind(&mut self, kind: &Kind) {
        if kind.custom {
            self.custom_kind(kind);
            return;
        }
        for name in [&kind.kind, &kind.list_kind] {
            if let Some(ty) = DocumentType::builtin(&kind.group, &kind.version, name) {
                self.structure(ty.types(), ty.root());
            }
        }
        for subresource in &kind.subresources {
            let (group, version) = match &subresource.group_version {
                Some((group, version)) => (group.as_str(), version.as_str()),
                None => (kind.group.as_str(), kind.version.as_str()),
            };
            if let Some(ty) = DocumentType::builtin(group, version, &subresource.kind) {
                self.structure(ty.types(), ty.root());
            }
        }
    }

    fn custom_kind(&mut self, kind: &Kind) {
        let declared = self
            .custom
            .iter()
            .find(|schema| schema.group == kind.group && schema.version == kind.version && schema.kind == kind.kind);
        let mut schema = match declared.map(|declared| declared.schema.clone()) {
            Some(Value::Object(schema)) => schema,
            _ => Map::from_iter([("type".to_owned(), json!("object"))]),
        };
        let mut properties = match schema.remove("properties") {
            Some(Value::Object(properties)) => properties,
            _ => Map::new(),
        };
        properties.insert("apiVersion".to_owned(), json!({ "type": "string" }));
        properties.insert("kind".to_owned(), json!({ "type": "string" }));
        properties.insert("metadata".to_owned(), Value::Object(self.wrapped(OBJECT_META)));
        schema.insert("properties".to_owned(), Value::Object(properties));
        schema.insert(GVK.to_owned(), json!([gvk(&kind.group, &kind.version, &kind.kind)]));
        let name = component(kind);
        let list = json!({
            "type": "object",
            "required": ["items"],
            "properties": {
                "apiVersion": { "type": "string" },
                "kind": { "type": "string" },
                "metadata": self.wrapped(LIST_META),
                "items": { "type": "array", "items": self.reference(&name) },
            },
            GVK: [gvk(&kind.group, &kind.version, &kind.list_kind)],
        });
        self.schemas.insert(format!("{name}List"), list);
        self.schemas.insert(name, Value::Object(schema));
    }

    /// Adds what every document refers to.
    fn meta_types(&mut self) {
        let types = Types::builtin();
        for kind in ["Status", "DeleteOptions"] {
            if let Some(id) = types.document("meta.k8s.io", "v1", kind) {
                self.structure(types, types.get(id));
            }
        }
        if let Some(ty) = DocumentType::builtin("", "v1", "ConfigMapList") {
            for field in ["metadata", "items"] {
                if let Some(field) = ty.root().field(field) {
                    self.nested(ty.types(), &field.ty);
                }
            }
        }
        self.schemas.insert(PATCH.to_owned(), json!({ "type": "object" }));
    }

    fn nested(&mut self, types: &Types, ty: &Type) {
        match ty.target() {
            Type::Struct(id) => self.structure(types, types.get(*id)),
            Type::List { element, .. } | Type::Map(element) => self.nested(types, element),
            _ => {}
        }
    }

    /// Adds a struct and what its fields refer to.
    fn structure(&mut self, types: &Types, structure: &Struct) {
        let name = structure.name.as_ref();
        if self.schemas.contains_key(name) {
            return;
        }
        // Taken first, because types may refer to themselves.
        self.schemas.insert(name.to_owned(), Value::Null);
        let mut schema = Map::new();
        let described = descriptions::of(name);
        if let Some(text) = described.and_then(|described| described.text.as_ref()) {
            schema.insert("description".to_owned(), json!(text));
        }
        schema.insert("type".to_owned(), json!("object"));
        let mut properties = Map::new();
        let mut required = Vec::new();
        for field in &structure.fields {
            let mut property = self.property(types, field);
            if let Some(text) = described.and_then(|described| described.fields.get(field.name.as_ref())) {
                property.insert("description".to_owned(), json!(text));
            }
            if field.required {
                required.push(json!(field.name));
            }
            properties.insert(field.name.clone().into_owned(), Value::Object(property));
        }
        if !required.is_empty() {
            schema.insert("required".to_owned(), Value::Array(required));
        }
        if !properties.is_empty() {
            schema.insert("properties".to_owned(), Value::Object(properties));
        }
        if structure.atomic {
            schema.insert("x-kubernetes-map-type".to_owned(), json!("atomic"));
        }
        if structure.document
            && let Some((group, version, kind)) = types
                .documents()
                .find(|(_, _, _, id)| std::ptr::eq(types.get(*id), structure))
                .map(|(group, version, kind, _)| (group, version, kind))
        {
            // Kinds of the meta group appear as kinds of the core group.
            let group = if group == "meta.k8s.io" { "" } else { group };
            schema.insert(GVK.to_owned(), json!([gvk(group, version, kind)]));
        }
        self.schemas.insert(name.to_owned(), Value::Object(schema));
    }

    fn property(&mut self, types: &Types, field: &Field) -> Map<String, Value> {
        let mut property = self.value(types, &field.ty);
        if let Some(default) = &field.default {
            property.insert("default".to_owned(), default.clone());
        }
        if let Type::List { .. } = field.ty.target() {
            let list = match &field.list {
                ListType::Atomic => "atomic",
                ListType::Set => "set",
                ListType::Map(keys) => {
                    property.insert("x-kubernetes-list-map-keys".to_owned(), json!(keys));
                    "map"
                }
            };
            property.insert("x-kubernetes-list-type".to_owned(), json!(list));
        } else if field.atomic {
            property.insert("x-kubernetes-map-type".to_owned(), json!("atomic"));
        }
        let strategy = match (field.patch_merge, field.retain_keys) {
            (true, true) => "merge,retainKeys",
            (true, false) => "merge",
            (false, true) => "retainKeys",
            (false, false) => "",
        };
        if !strategy.is_empty() {
            property.insert("x-kubernetes-patch-strategy".to_owned(), json!(strategy));
        }
        if let Some(key) = &field.merge_key {
            property.insert("x-kubernetes-patch-merge-key".to_owned(), json!(key));
        }
        property
    }

    fn value(&mut self, types: &Types, ty: &Type) -> Map<String, Value> {
        let simple = |schema: Value| match schema {
            Value::Object(schema) => schema,
            _ => Map::new(),
        };
        match ty.target() {
            Type::String { values, .. } if values.is_empty() => simple(json!({ "type": "string" })),
            Type::String { values, .. } => simple(json!({ "type": "string", "enum": values })),
            Type::Bool => simple(json!({ "type": "boolean" })),
            Type::Int { bits: 64, .. } => simple(json!({ "type": "integer", "format": "int64" })),
            Type::Int { .. } => simple(json!({ "type": "integer", "format": "int32" })),
            Type::Float => simple(json!({ "type": "number", "format": "double" })),
            Type::Bytes => simple(json!({ "type": "string", "format": "byte" })),
            Type::List { element, .. } => {
                let element = self.value(types, element);
                simple(json!({ "type": "array", "items": element }))
            }
            Type::Map(element) => {
                let element = self.value(types, element);
                simple(json!({ "type": "object", "additionalProperties": element }))
            }
            Type::Struct(id) => {
                let structure = types.get(*id);
                self.structure(types, structure);
                self.wrapped(&structure.name)
            }
            Type::SchemaOrArray(id) | Type::SchemaOrBool(id) | Type::SchemaOrStrings(id) => {
                self.structure(types, types.get(*id));
                self.leaf(ty.target())
            }
            leaf => self.leaf(leaf),
        }
    }

    /// A type with a component of its own that has no fields.
    fn leaf(&mut self, ty: &Type) -> Map<String, Value> {
        const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";
        const EXTENSIONS: &str = "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1";
        let v3 = self.style == Style::V3;
        let (name, schema) = match ty {
            Type::Time => (format!("{META}.Time"), json!({ "type": "string", "format": "date-time" })),
            Type::MicroTime => (format!("{META}.MicroTime"), json!({ "type": "string", "format": "date-time" })),
            Type::Duration => (format!("{META}.Duration"), json!({ "type": "string" })),
            Type::Fields => (format!("{META}.FieldsV1"), json!({ "type": "object" })),
            Type::Quantity if v3 => (
                "io.k8s.apimachinery.pkg.api.resource.Quantity".to_owned(),
                json!({ "oneOf": [{ "type": "string" }, { "type": "number" }] }),
            ),
            Type::Quantity => ("io.k8s.apimachinery.pkg.api.resource.Quantity".to_owned(), json!({ "type": "string" })),
            Type::IntOrString if v3 => (
                "io.k8s.apimachinery.pkg.util.intstr.IntOrString".to_owned(),
                json!({ "format": "int-or-string", "oneOf": [{ "type": "integer" }, { "type": "string" }] }),
            ),
            Type::IntOrString => (
                "io.k8s.apimachinery.pkg.util.intstr.IntOrString".to_owned(),
                json!({ "type": "string", "format": "int-or-string" }),
            ),
            Type::Raw => ("io.k8s.apimachinery.pkg.runtime.RawExtension".to_owned(), json!({ "type": "object" })),
            Type::SchemaOrArray(_) => (format!("{EXTENSIONS}.JSONSchemaPropsOrArray"), json!({})),
            Type::SchemaOrBool(_) => (format!("{EXTENSIONS}.JSONSchemaPropsOrBool"), json!({})),
            Type::SchemaOrStrings(_) => (format!("{EXTENSIONS}.JSONSchemaPropsOrStringArray"), json!({})),
            _ => (format!("{EXTENSIONS}.JSON"), json!({})),
        };
        let wrapped = self.wrapped(&name);
        self.schemas.entry(name.clone()).or_insert_with(|| {
            let mut schema = schema;
            if let (Value::Object(schema), Some(text)) =
                (&mut schema, descriptions::of(&name).and_then(|described| described.text.as_ref()))
            {
                schema.insert("description".to_owned(), json!(text));
            }
            schema
        });
        wrapped
    }

    /// Adds the operations on a kind.
    fn paths(&self, kind: &Kind, paths: &mut Map<String, Value>) {
        let root = root(&kind.group, &kind.version);
        let collection = if kind.namespaced {
            format!("{root}/namespaces/{{namespace}}/{}", kind.plural)
        } else {
            format!("{root}/{}", kind.plural)
        };
        let own = (component(kind), gvk(&kind.group, &kind.version, &kind.kind));
        let list = if kind.custom { format!("{}List", own.0) } else { list_component(kind) };
        let mut operations = Map::new();
        for (verb, method, action) in
            [("list", "get", "list"), ("create", "post", "post"), ("deletecollection", "delete", "deletecollection")]
        {
            if kind.allows(verb) {
                let body = match verb {
                    "create" => Some(own.0.as_str()),
                    "deletecollection" => Some(DELETE_OPTIONS),
                    _ => None,
                };
                let answer = match verb {
                    "list" => list.as_str(),
                    "create" => own.0.as_str(),
                    _ => STATUS,
                };
                operations.insert(method.to_owned(), self.operation(action, &own.1, body, answer, kind.custom));
            }
        }
        self.insert_path(paths, &collection, operations, kind.namespaced, false);
        if kind.namespaced && kind.allows("list") {
            let operation = self.operation("list", &own.1, None, &list, kind.custom);
            let operations = Map::from_iter([("get".to_owned(), operation)]);
            self.insert_path(paths, &format!("{root}/{}", kind.plural), operations, false, false);
        }
        let item = format!("{collection}/{{name}}");
        let mut operations = Map::new();
        for (verb, method) in [("get", "get"), ("update", "put"), ("patch", "patch"), ("delete", "delete")] {
            if kind.allows(verb) {
                let body = match verb {
                    "update" => Some(own.0.as_str()),
                    "patch" => Some(PATCH),
                    "delete" => Some(DELETE_OPTIONS),
                    _ => None,
                };
                let answer = if verb == "delete" { STATUS } else { own.0.as_str() };
                operations.insert(method.to_owned(), self.operation(method, &own.1, body, answer, kind.custom));
            }
        }
        self.insert_path(paths, &item, operations, kind.namespaced, true);
        for subresource in &kind.subresources {
            let (group, version) = match &subresource.group_version {
                Some((group, version)) => (group.as_str(), version.as_str()),
                None => (kind.group.as_str(), kind.version.as_str()),
            };
            let component = match DocumentType::builtin(group, version, &subresource.kind) {
                Some(ty) => ty.root().name.clone().into_owned(),
                None if kind.custom => own.0.clone(),
                None => continue,
            };
            let mut operations = Map::new();
            for (verb, method) in [("get", "get"), ("update", "put"), ("patch", "patch"), ("create", "post")] {
                if subresource.verbs.iter().any(|known| known == verb) {
                    let body = match verb {
                        "update" | "create" => Some(component.as_str()),
                        "patch" => Some(PATCH),
                        _ => None,
                    };
                    let gvk = gvk(group, version, &subresource.kind);
                    operations.insert(method.to_owned(), self.operation(method, &gvk, body, &component, kind.custom));
                }
            }
            self.insert_path(paths, &format!("{item}/{}", subresource.name), operations, kind.namespaced, true);
        }
    }

    fn insert_path(
        &self,
        paths: &mut Map<String, Value>,
        path: &str,
        mut operations: Map<String, Value>,
        namespaced: bool,
        named: bool,
    ) {
        if operations.is_empty() {
            return;
        }
        let mut parameters = Vec::new();
        if named {
            parameters.push(self.parameter("name", "path", "string"));
        }
        if namespaced {
            parameters.push(self.parameter("namespace", "path", "string"));
        }
        if !parameters.is_empty() {
            operations.insert("parameters".to_owned(), Value::Array(parameters));
        }
        paths.insert(path.to_owned(), Value::Object(operations));
    }

    fn parameter(&self, name: &str, place: &str, ty: &str) -> Value {
        let mut parameter = json!({ "name": name, "in": place, "uniqueItems": true });
        if place == "path" {
            parameter["required"] = json!(true);
        }
        match self.style {
            Style::V2 => parameter["type"] = json!(ty),
            Style::V3 => {
                parameter["schema"] = json!({ "type": ty, "uniqueItems": true });
                if let Value::Object(parameter) = &mut parameter {
                    parameter.remove("uniqueItems");
                }
            }
        }
        parameter
    }

    fn operation(&self, action: &str, gvk: &Value, body: Option<&str>, answer: &str, custom: bool) -> Value {
        let writes = matches!(action, "post" | "put" | "patch");
        let mut parameters = Vec::new();
        if writes || matches!(action, "delete" | "deletecollection") {
            parameters.push(self.parameter("dryRun", "query", "string"));
        }
        if writes {
            parameters.push(self.parameter("fieldManager", "query", "string"));
            parameters.push(self.parameter("fieldValidation", "query", "string"));
        }
        if action == "patch" {
            parameters.push(self.parameter("force", "query", "boolean"));
        }
        if matches!(action, "list" | "deletecollection") {
            for name in ["continue", "fieldSelector", "labelSelector", "resourceVersion", "resourceVersionMatch"] {
                parameters.push(self.parameter(name, "query", "string"));
            }
            parameters.push(self.parameter("limit", "query", "integer"));
            parameters.push(self.parameter("timeoutSeconds", "query", "integer"));
        }
        if action == "list" {
            parameters.push(self.parameter("watch", "query", "boolean"));
            parameters.push(self.parameter("allowWatchBookmarks", "query", "boolean"));
            parameters.push(self.parameter("sendInitialEvents", "query", "boolean"));
        }
        let media_types: &[&str] = if action == "patch" {
            crate::patch::PatchType::accepted(custom)
        } else {
            &["application/json", "application/yaml"]
        };
        let code = if action == "post" { "201" } else { "200" };
        let schema = self.reference(answer);
        let mut operation = json!({ "x-kubernetes-action": action, GVK: gvk });
        match self.style {
            Style::V3 => {
                if let Some(body) = body {
                    let content: Map<String, Value> = media_types
                        .iter()
                        .map(|media_type| ((*media_type).to_owned(), json!({ "schema": self.reference(body) })))
                        .collect();
                    let required = matches!(action, "post" | "put" | "patch");
                    operation["requestBody"] = json!({ "content": content, "required": required });
                }
                operation["responses"] = json!({
                    code: { "description": "OK", "content": { "application/json": { "schema": schema } } }
                });
            }
            Style::V2 => {
                if let Some(body) = body {
                    parameters.push(json!({ "name": "body", "in": "body", "schema": self.reference(body) }));
                }
                operation["consumes"] = json!(media_types);
                operation["produces"] = json!(["application/json", "application/yaml"]);
                operation["responses"] = json!({ code: { "description": "OK", "schema": schema } });
            }
        }
        operation["parameters"] = Value::Array(parameters);
        operation
    }
}

const GVK: &str = "x-kubernetes-group-version-kind";

fn gvk(group: &str, version: &str, kind: &str) -> Value {
    json!({ "group": group, "version": version, "kind": kind })
}

/// Component name of a kind: that of its Go type, or the reversed group for custom ones.
fn component(kind: &Kind) -> String {
    if !kind.custom
        && let Some(ty) = DocumentType::of(kind)
    {
        return ty.root().name.clone().into_owned();
    }
    let group: Vec<&str> = kind.group.split('.').rev().collect();
    format!("{}.{}.{}", group.join("."), kind.version, kind.kind)
}

fn list_component(kind: &Kind) -> String {
    DocumentType::builtin(&kind.group, &kind.version, &kind.list_kind)
        .map_or_else(|| STATUS.to_owned(), |ty| ty.root().name.clone().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(members) => {
                if let Some(Value::String(target)) = members.get("$ref") {
                    found.push(target.clone());
                }
                members.values().for_each(|member| references(member, found));
            }
            Value::Array(items) => items.iter().for_each(|item| references(item, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_of_every_document_resolves() {
        let registry = Registry::builtin();
        for path in v3_paths(&registry) {
            let words: Vec<&str> = path.split('/').collect();
            let (group, version) = if words[0] == "api" { ("", words[1]) } else { (words[1], words[2]) };
            let document = v3_document(&registry, group, version, &[]).unwrap();
            let mut found = Vec::new();
            references(&document, &mut found);
            assert!(!found.is_empty(), "{path}");
            for target in found {
                let name = target.strip_prefix("#/components/schemas/").unwrap();
                assert!(document["components"]["schemas"][name].is_object(), "{path}: {target}");
            }
        }
        let document = v2_document(&registry, &[]);
        let mut found = Vec::new();
        references(&document, &mut found);
        for target in found {
            let name = target.strip_prefix("#/definitions/").unwrap();
            assert!(document["definitions"][name].is_object(), "{target}");
        }
        assert!(v3_document(&registry, "nope.example", "v1", &[]).is_none());
    }

    #[test]
    fn patch_operations_say_what_kubectl_looks_for() {
        let document = v3_document(&Registry::builtin(), "apps", "v1", &[]).unwrap();
        let patch = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments/{name}"]["patch"];
        assert_eq!(patch[GVK], json!({"group": "apps", "version": "v1", "kind": "Deployment"}));
        let parameters = patch["parameters"].as_array().unwrap();
        assert!(
            parameters.iter().any(|parameter| parameter["name"] == "fieldValidation" && parameter["in"] == "query")
        );
        let content = patch["requestBody"]["content"].as_object().unwrap();
        assert!(content.contains_key("application/strategic-merge-patch+json"));
        let schema = &document["components"]["schemas"]["io.k8s.api.apps.v1.Deployment"];
        assert_eq!(schema[GVK], json!([{"group": "apps", "version": "v1", "kind": "Deployment"}]));
        let containers = &document["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-list-map-keys"], json!(["name"]));
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        assert!(containers["description"].as_str().is_some_and(|text| text.contains("containers")));
    }

    #[test]
    fn custom_kinds_have_no_strategic_patch() {
        let mut registry = Registry::builtin();
        let mut kind = (**registry.by_gvk("", "v1", "ConfigMap").unwrap()).clone();
        kind.group = "example.com".into();
        kind.plural = "widgets".into();
        kind.kind = "Widget".into();
        kind.list_kind = "WidgetList".into();
        kind.custom = true;
        registry.insert(kind);
        let custom = CustomSchema {
            group: "example.com".into(),
            version: "v1".into(),
            kind: "Widget".into(),
            schema: json!({"type": "object", "properties": {"spec": {"type": "object", "description": "what it is like"}}}),
        };
        let document = v3_document(&registry, "example.com", "v1", &[custom]).unwrap();
        let patch = &document["paths"]["/apis/example.com/v1/namespaces/{namespace}/widgets/{name}"]["patch"];
        let content = patch["requestBody"]["content"].as_object().unwrap();
        assert!(!content.contains_key("application/strategic-merge-patch+json"));
        let schema = &document["components"]["schemas"]["com.example.v1.Widget"];
        assert_eq!(schema["properties"]["spec"]["description"], "what it is like");
        assert_eq!(schema[GVK][0]["kind"], "Widget");
        let mut found = Vec::new();
        references(&document, &mut found);
        for target in found {
            let name = target.strip_prefix("#/components/schemas/").unwrap();
            assert!(document["components"]["schemas"][name].is_object(), "{target}");
        }
    }
}
