//! Types of custom resources, compiled from the `openAPIV3Schema` of a CustomResourceDefinition.
//!
//! Only structure is read here: which fields exist, which are kept although unknown, and how lists and maps merge.
//! Limits, patterns and rules are validation's business.

use serde_json::Value;

use super::{Field, ListType, Struct, StructId, Text, Type, Types};

/// Why the schema of a CustomResourceDefinition cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {message}")]
pub struct SchemaError {
    /// Path of the offending part inside `openAPIV3Schema`.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
}

/// Deepest nesting of a schema; the reference implementation has no fixed limit, object size bounds it there.
const MAX_DEPTH: usize = 200;

pub(super) fn compile(kind: &str, schema: &Value) -> Result<(Types, StructId), SchemaError> {
    let builtin = Types::builtin().clone();
    let meta = builtin
        .document("", "v1", "ConfigMap")
        .and_then(|id| builtin.get(id).field("metadata").map(|field| field.ty.clone()))
        .expect("the table has ConfigMap with metadata");
    let mut types = Types { base: Some(builtin), ..Types::default() };
    let mut root = object(&mut types, schema, kind, "openAPIV3Schema", 0)?;
    root.document = true;
    root.fields.retain(|field| !matches!(field.name.as_ref(), "apiVersion" | "kind" | "metadata"));
    root.fields.push(field("apiVersion", Type::String { go: None, values: Vec::new() }));
    root.fields.push(field("kind", Type::String { go: None, values: Vec::new() }));
    root.fields.push(field("metadata", meta));
    root.index();
    let id = types.push(root);
    Ok((types, id))
}

fn field(name: &str, ty: Type) -> Field {
    Field {
        name: name.to_owned().into(),
        ty,
        number: 0,
        omit_empty: true,
        omit_zero: false,
        required: false,
        nullable: false,
        list: ListType::Atomic,
        atomic: false,
        patch_merge: false,
        retain_keys: false,
        merge_key: None,
        default: None,
    }
}

fn flag(schema: &Value, name: &str) -> bool {
    schema.get(name).and_then(Value::as_bool).unwrap_or(false)
}

fn object(types: &mut Types, schema: &Value, name: &str, path: &str, depth: usize) -> Result<Struct, SchemaError> {
    let mut fields = Vec::new();
    let empty = serde_json::Map::new();
    let properties = schema.get("properties").and_then(Value::as_object).unwrap_or(&empty);
    for (key, schema) in properties {
        let path = format!("{path}.properties[{key}]");
        let mut made = field(key, compile_type(types, schema, key, &path, depth + 1)?);
        made.nullable = flag(schema, "nullable");
        made.default = schema.get("default").cloned();
        made.atomic = schema.get("x-kubernetes-map-type").and_then(Value::as_str) == Some("atomic");
        made.list = match schema.get("x-kubernetes-list-type").and_then(Value::as_str) {
            Some("set") => ListType::Set,
            Some("map") => {
                let keys = schema.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
                let keys: Vec<Text> = keys
                    .into_iter()
                    .flatten()
                    .filter_map(|key| key.as_str().map(|key| Text::from(key.to_owned())))
                    .collect();
                ListType::Map(keys)
            }
            _ => ListType::Atomic,
        };
        fields.push(made);
    }
    let mut made = Struct {
        name: name.to_owned().into(),
        fields,
        by_name: Vec::new(),
        inlined: Vec::new(),
        own: Vec::new(),
        atomic: false,
        document: false,
        open: flag(schema, "x-kubernetes-preserve-unknown-fields"),
        custom: true,
    };
    made.index();
    Ok(made)
}

fn compile_type(types: &mut Types, schema: &Value, name: &str, path: &str, depth: usize) -> Result<Type, SchemaError> {
    let error = |message: &str| SchemaError { path: path.to_owned(), message: message.to_owned() };
    if depth > MAX_DEPTH {
        return Err(error("schema is nested too deeply"));
    }
    if flag(schema, "x-kubernetes-int-or-string") {
        return Ok(Type::IntOrString);
    }
    Ok(match schema.get("type").and_then(Value::as_str) {
        Some("string") => Type::String { go: None, values: Vec::new() },
        Some("boolean") => Type::Bool,
        Some("integer") => Type::Int { bits: 64, signed: true },
        Some("number") => Type::Float,
        Some("array") => {
            let items = schema.get("items").ok_or_else(|| error("must specify items for array types"))?;
            let element = compile_type(types, items, name, &format!("{path}.items"), depth + 1)?;
            Type::List { element: Box::new(element), items: false }
        }
        Some("object") => match schema.get("additionalProperties") {
            Some(Value::Bool(true)) => Type::Map(Box::new(Type::Any)),
            Some(values @ Value::Object(_)) => Type::Map(Box::new(compile_type(
                types,
                values,
                name,
                &format!("{path}.additionalProperties"),
                depth + 1,
            )?)),
            _ => {
                let made = object(types, schema, name, path, depth)?;
                Type::Struct(types.push(made))
            }
        },
        Some(other) => return Err(error(&format!("unsupported type {other:?}"))),
        None if flag(schema, "x-kubernetes-preserve-unknown-fields") => Type::Any,
        None => return Err(error("must not be empty for specified object fields")),
    })
}
