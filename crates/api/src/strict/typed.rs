//! Fits a tree to its type, as decoding into the typed object and encoding it again does in the reference
//! implementation: unknown fields go, zero values of optional fields go, those of other fields appear, nulls become
//! zero values, and quantities, times and base64 take their canonical form.

use serde_json::{Map, Value};

use super::tree::{Node, number};
use super::{scalars, tree};
use crate::quantity;
use crate::schema::{DocumentType, Field, Struct, Type, Types};

/// Whose error texts are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// The JSON decoder's (`json: cannot unmarshal ...`).
    Json,
    /// The converter's for untyped maps, which strategic merge patches go through (`cannot restore ...`).
    Unstructured,
}

/// What fitting a document found.
#[derive(Debug)]
pub(crate) struct Fitted {
    pub(crate) value: Value,
    /// `unknown field "spec.foo"` and `duplicate field "a.b"`.
    pub(crate) complaints: Vec<String>,
    /// The first value that does not fit.
    pub(crate) error: Option<String>,
}

/// The reference implementation keeps this many complaints.
const MAX_COMPLAINTS: usize = 100;

/// Fits `node` to `ty`.
pub(crate) fn fit(ty: &DocumentType, node: Node, style: Style) -> Fitted {
    let types = ty.types();
    let mut walk =
        Walk { types, style, path: String::new(), fields: Vec::new(), owner: "", complaints: Vec::new(), error: None };
    let root = ty.root();
    let value = if root.custom { walk.prune_struct(root, node) } else { walk.structure(root, node) };
    let value = value.unwrap_or_else(|| if root.custom { Value::Object(Map::new()) } else { zero_struct(types, root) });
    let mut complaints = walk.complaints;
    if root.custom || style == Style::Unstructured {
        complaints.sort();
    }
    Fitted { value, complaints, error: walk.error }
}

struct Walk<'t> {
    types: &'t Types,
    style: Style,
    /// Path with indexes, for complaints.
    path: String,
    /// Field names without indexes, for type errors.
    fields: Vec<&'t str>,
    /// Name of the innermost struct.
    owner: &'t str,
    complaints: Vec<String>,
    error: Option<String>,
}

impl<'t> Walk<'t> {
    fn fail(&mut self, message: String) {
        self.error.get_or_insert(message);
    }

    fn complain(&mut self, what: &str, name: &str) {
        let path = if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) };
        let complaint = format!("{what} field {}", tree::go_quote(&path));
        if self.complaints.len() < MAX_COMPLAINTS && !self.complaints.contains(&complaint) {
            self.complaints.push(complaint);
        }
    }

    /// Runs `inside` with the path extended by a member name.
    fn at_key<R>(&mut self, name: &str, inside: impl FnOnce(&mut Self) -> R) -> R {
        let length = self.path.len();
        if length > 0 {
            self.path.push('.');
        }
        self.path.push_str(name);
        let result = inside(self);
        self.path.truncate(length);
        result
    }

    fn at_index<R>(&mut self, index: usize, inside: impl FnOnce(&mut Self) -> R) -> R {
        let length = self.path.len();
        self.path.push_str(&format!("[{index}]"));
        let result = inside(self);
        self.path.truncate(length);
        result
    }

    /// The error for a value of the wrong JSON type.
    fn mismatch(&mut self, ty: &Type, node: &Node) {
        let target = ty.target();
        let message = match self.style {
            Style::Json => {
                let literal = match (node, target) {
                    (Node::Number(text), Type::Int { .. } | Type::Float) => format!("number {text}"),
                    _ => node.type_name().to_owned(),
                };
                let place = if self.fields.is_empty() {
                    "value".to_owned()
                } else {
                    format!("struct field {}.{}", self.owner, self.fields.join("."))
                };
                format!("json: cannot unmarshal {literal} into Go {place} of type {}", target.go_name(self.types))
            }
            Style::Unstructured => {
                let (kind, source) = match node {
                    Node::Null => ("invalid", "<nil>"),
                    Node::Bool(_) => ("bool", "bool"),
                    Node::Number(text) if text.parse::<i64>().is_ok() => ("int64", "int64"),
                    Node::Number(_) => ("float64", "float64"),
                    Node::String(_) => ("string", "string"),
                    Node::Array(_) => ("slice", "[]interface {}"),
                    Node::Object(_) => ("map", "map[string]interface {}"),
                };
                match target {
                    Type::Struct(_) => format!("cannot restore struct from: {kind}"),
                    Type::Map(_) => format!("cannot restore map from {kind}"),
                    Type::List { .. } | Type::Bytes => format!("cannot restore slice from {kind}"),
                    Type::String { .. } if source == "int64" => {
                        format!("cannot convert int64 to {}", target.go_name(self.types))
                    }
                    Type::Int { .. } if source == "float64" => {
                        format!("cannot convert float64 to {}", target.go_name(self.types))
                    }
                    Type::String { .. } => "unrecognized type: string".to_owned(),
                    other => format!("unrecognized type: {}", other.go_name(self.types)),
                }
            }
        };
        self.fail(message);
    }

    /// The value at a place of type `ty`; `None` stands for null and for what does not fit.
    fn value(&mut self, ty: &Type, node: Node) -> Option<Value> {
        if matches!(node, Node::Null) {
            return None;
        }
        match (ty, node) {
            (Type::Pointer(inner), node) => self.value(inner, node),
            (Type::String { .. }, Node::String(text)) => Some(Value::String(text)),
            (Type::Bool, Node::Bool(value)) => Some(Value::Bool(value)),
            (Type::Int { bits, signed }, Node::Number(text)) => {
                let value = match integer(&text, *bits, *signed) {
                    None if self.style == Style::Unstructured => whole(&text),
                    other => other,
                };
                if value.is_none() {
                    self.mismatch(ty, &Node::Number(text));
                }
                value
            }
            (Type::Float, Node::Number(text)) => Some(number(&text)),
            (Type::Bytes, Node::String(text)) => match scalars::canonical_base64(&text) {
                Ok(text) => Some(Value::String(text)),
                Err(message) => {
                    let prefix = if self.style == Style::Unstructured { "error decoding from json: " } else { "" };
                    self.fail(format!("{prefix}{message}"));
                    None
                }
            },
            (Type::Time, Node::String(text)) => self.scalar(scalars::canonical_time(&text)),
            (Type::MicroTime, Node::String(text)) => self.scalar(scalars::canonical_micro_time(&text)),
            (Type::Time | Type::MicroTime | Type::Duration, node) if !matches!(node, Node::String(_)) => {
                self.fail(format!("json: cannot unmarshal {} into Go value of type string", node.type_name()));
                None
            }
            (Type::Duration, Node::String(text)) => Some(Value::String(text)),
            (Type::Quantity, Node::String(text) | Node::Number(text)) => match quantity::canonical(text.trim()) {
                Some(text) => Some(Value::String(text)),
                None => {
                    self.fail(quantity::FORMAT_ERROR.to_owned());
                    None
                }
            },
            (Type::Quantity, _) => {
                self.fail(quantity::FORMAT_ERROR.to_owned());
                None
            }
            (Type::IntOrString, Node::String(text)) => Some(Value::String(text)),
            (Type::IntOrString, Node::Number(text)) => match integer(&text, 32, true) {
                Some(value) => Some(value),
                None => {
                    self.fail(format!("json: cannot unmarshal number {text} into Go value of type int32"));
                    None
                }
            },
            (Type::IntOrString, node) => {
                self.fail(format!("json: cannot unmarshal {} into Go value of type int32", node.type_name()));
                None
            }
            (Type::Fields | Type::Raw | Type::Any, node) => Some(node.into_value()),
            (Type::SchemaOrArray(id), Node::Array(items)) => {
                let element = Type::Struct(*id);
                Some(self.list(&element, items))
            }
            (Type::SchemaOrStrings(_), Node::Array(items)) => {
                let element = Type::String { go: None, values: Vec::new() };
                Some(self.list(&element, items))
            }
            (Type::SchemaOrBool(_), Node::Bool(value)) => Some(Value::Bool(value)),
            (Type::SchemaOrArray(id) | Type::SchemaOrBool(id) | Type::SchemaOrStrings(id) | Type::Struct(id), node) => {
                let types = self.types;
                self.structure(types.get(*id), node)
            }
            (Type::List { element, .. }, Node::Array(items)) => Some(self.list(element, items)),
            (Type::Map(element), Node::Object(members)) => {
                let mut map = Map::new();
                for (name, node) in members {
                    if map.contains_key(&name) {
                        self.complain("duplicate", &name);
                    }
                    let value = self.at_key(&name, |walk| walk.value(element, node));
                    map.insert(name, value.unwrap_or_else(|| zero(self.types, element)));
                }
                Some(Value::Object(map))
            }
            (ty, node) => {
                self.mismatch(ty, &node);
                None
            }
        }
    }

    fn scalar(&mut self, canonical: Result<Option<String>, String>) -> Option<Value> {
        match canonical {
            Ok(text) => text.map(Value::String),
            Err(message) => {
                self.fail(message);
                None
            }
        }
    }

    fn list(&mut self, element: &Type, items: Vec<Node>) -> Value {
        let mut values = Vec::with_capacity(items.len());
        for (index, node) in items.into_iter().enumerate() {
            let value = self.at_index(index, |walk| walk.value(element, node));
            values.push(value.unwrap_or_else(|| zero(self.types, element)));
        }
        Value::Array(values)
    }

    fn structure(&mut self, structure: &'t Struct, node: Node) -> Option<Value> {
        let members = match node {
            Node::Object(members) => members,
            Node::Null => return None,
            other => {
                let message_type = StructPlace(structure);
                message_type.mismatch(self, &other);
                return None;
            }
        };
        let owner = std::mem::replace(&mut self.owner, structure.short_name());
        let mut seen: Vec<&str> = Vec::with_capacity(members.len());
        let mut map = Map::new();
        for (name, node) in members {
            let Some(field) = structure.field(&name) else {
                self.complain("unknown", &name);
                continue;
            };
            if seen.contains(&field.name.as_ref()) {
                self.complain("duplicate", &name);
            }
            seen.push(&field.name);
            self.fields.push(&field.name);
            let value = self.at_key(&name, |walk| walk.value(&field.ty, node));
            self.fields.pop();
            match value {
                // An empty list of managedFields means something: it ends the tracking of an object. One of an
                // Ingress's rules is shown by the error about it.
                Some(value)
                    if name == "managedFields"
                        || (name == "rules" && structure.short_name() == "IngressSpec")
                        || !(field.omit_empty && is_empty(&field.ty, &value)) =>
                {
                    // Stored objects do not tell an empty list from none; a list that is always written is then null.
                    let lost = !field.omit_empty && matches!(field.ty, Type::List { .. } | Type::Map(_));
                    let value = if lost && is_empty(&field.ty, &value) { Value::Null } else { value };
                    map.insert(name, value)
                }
                _ => map.remove(&name),
            };
        }
        self.owner = owner;
        fill_zero(self.types, structure, &mut map);
        Some(Value::Object(map))
    }

    /// As [`Walk::structure`] for custom resources: only drops what is not declared.
    fn prune_struct(&mut self, structure: &'t Struct, node: Node) -> Option<Value> {
        let members = match node {
            Node::Object(members) => members,
            Node::Null => return None,
            other => return Some(other.into_value()),
        };
        let owner = std::mem::replace(&mut self.owner, structure.short_name());
        let mut map = Map::new();
        for (name, node) in members {
            let value = match structure.field(&name) {
                Some(field) => {
                    if map.contains_key(&name) {
                        self.complain("duplicate", &name);
                    }
                    self.fields.push(&field.name);
                    let value = self.at_key(&name, |walk| walk.prune(&field.ty, node));
                    self.fields.pop();
                    value
                }
                None if structure.open => self.at_key(&name, |walk| walk.untyped(node)),
                None => {
                    self.complain("unknown", &name);
                    continue;
                }
            };
            map.insert(name, value);
        }
        self.owner = owner;
        Some(Value::Object(map))
    }

    fn prune(&mut self, ty: &Type, node: Node) -> Value {
        match (ty, node) {
            (Type::Struct(id), node) => {
                let types = self.types;
                let structure = types.get(*id);
                let value =
                    if structure.custom { self.prune_struct(structure, node) } else { self.structure(structure, node) };
                value.unwrap_or(Value::Null)
            }
            (Type::List { element, .. }, Node::Array(items)) => Value::Array(
                items
                    .into_iter()
                    .enumerate()
                    .map(|(index, node)| self.at_index(index, |walk| walk.prune(element, node)))
                    .collect(),
            ),
            (Type::Map(element), Node::Object(members)) => {
                let mut map = Map::new();
                for (name, node) in members {
                    if map.contains_key(&name) {
                        self.complain("duplicate", &name);
                    }
                    let value = self.at_key(&name, |walk| walk.prune(element, node));
                    map.insert(name, value);
                }
                Value::Object(map)
            }
            (_, node) => self.untyped(node),
        }
    }

    /// Takes a value as it is, looking for duplicate members only.
    fn untyped(&mut self, node: Node) -> Value {
        match node {
            Node::Array(items) => Value::Array(
                items
                    .into_iter()
                    .enumerate()
                    .map(|(index, node)| self.at_index(index, |walk| walk.untyped(node)))
                    .collect(),
            ),
            Node::Object(members) => {
                let mut map = Map::new();
                for (name, node) in members {
                    if map.contains_key(&name) {
                        self.complain("duplicate", &name);
                    }
                    let value = self.at_key(&name, |walk| walk.untyped(node));
                    map.insert(name, value);
                }
                Value::Object(map)
            }
            other => other.into_value(),
        }
    }
}

/// A struct as the target of a mismatch, where no [`Type`] is at hand.
struct StructPlace<'t>(&'t Struct);

impl StructPlace<'_> {
    fn mismatch(&self, walk: &mut Walk<'_>, node: &Node) {
        let message = match walk.style {
            Style::Json => {
                let place = if walk.fields.is_empty() {
                    "value".to_owned()
                } else {
                    format!("struct field {}.{}", walk.owner, walk.fields.join("."))
                };
                format!("json: cannot unmarshal {} into Go {place} of type {}", node.type_name(), self.0.go_name())
            }
            Style::Unstructured => {
                let kind = match node {
                    Node::Null => "invalid",
                    Node::Bool(_) => "bool",
                    Node::Number(text) if text.parse::<i64>().is_ok() => "int64",
                    Node::Number(_) => "float64",
                    Node::String(_) => "string",
                    Node::Array(_) => "slice",
                    Node::Object(_) => "map",
                };
                format!("cannot restore struct from: {kind}")
            }
        };
        walk.fail(message);
    }
}

/// An integer literal that fits into so many bits (0 means 64).
fn integer(text: &str, bits: u8, signed: bool) -> Option<Value> {
    let bits = if bits == 0 { 64 } else { u32::from(bits) };
    if signed {
        let value: i64 = text.parse().ok()?;
        let limit = i64::MAX >> (64 - bits);
        (-limit - 1..=limit).contains(&value).then(|| Value::from(value))
    } else {
        let value: u64 = text.parse().ok()?;
        (value <= u64::MAX >> (64 - bits)).then(|| Value::from(value))
    }
}

/// A float literal without a fraction as an integer.
#[expect(clippy::cast_possible_truncation, reason = "the range is checked before")]
fn whole(text: &str) -> Option<Value> {
    let value: f64 = text.parse().ok()?;
    (value == value.trunc() && value.abs() < 9e15).then(|| Value::from(value as i64))
}

/// Whether `omitempty` leaves a value of that type out.
fn is_empty(ty: &Type, value: &Value) -> bool {
    match (ty, value) {
        (Type::Pointer(_) | Type::Struct(_), _) => false,
        (Type::Quantity | Type::IntOrString | Type::Time | Type::MicroTime | Type::Raw | Type::Any, _) => false,
        (_, Value::Bool(value)) => !value,
        (_, Value::String(text)) => text.is_empty(),
        (_, Value::Number(number)) => number.as_f64() == Some(0.0),
        (_, Value::Array(items)) => items.is_empty(),
        (_, Value::Object(members)) => members.is_empty(),
        (_, Value::Null) => true,
    }
}

/// Inserts the zero values that encoding writes for absent fields.
pub(crate) fn fill_zero(types: &Types, structure: &Struct, map: &mut Map<String, Value>) {
    for field in &structure.fields {
        if !map.contains_key(field.name.as_ref())
            && let Some(value) = emitted_zero(types, field)
        {
            map.insert(field.name.clone().into_owned(), value);
        }
    }
}

fn emitted_zero(types: &Types, field: &Field) -> Option<Value> {
    if field.omit_zero {
        return None;
    }
    match &field.ty {
        // Structs are never empty for `omitempty`.
        Type::Struct(_)
        | Type::Time
        | Type::MicroTime
        | Type::Duration
        | Type::Quantity
        | Type::IntOrString
        | Type::Raw
        | Type::Any => Some(zero(types, &field.ty)),
        _ if field.omit_empty => None,
        other => Some(zero(types, other)),
    }
}

/// The zero value of a type as it is encoded.
pub(crate) fn zero(types: &Types, ty: &Type) -> Value {
    match ty {
        Type::String { .. } => Value::from(""),
        Type::Bool => Value::from(false),
        Type::Int { .. } | Type::Float | Type::IntOrString => Value::from(0),
        Type::Quantity => Value::from("0"),
        Type::Duration => Value::from("0s"),
        Type::Struct(id) => zero_struct(types, types.get(*id)),
        Type::Bytes
        | Type::Time
        | Type::MicroTime
        | Type::Fields
        | Type::Raw
        | Type::Any
        | Type::SchemaOrArray(_)
        | Type::SchemaOrBool(_)
        | Type::SchemaOrStrings(_)
        | Type::List { .. }
        | Type::Map(_)
        | Type::Pointer(_) => Value::Null,
    }
}

fn zero_struct(types: &Types, structure: &Struct) -> Value {
    let mut map = Map::new();
    fill_zero(types, structure, &mut map);
    Value::Object(map)
}
