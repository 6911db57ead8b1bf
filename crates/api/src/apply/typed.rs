//! Documents seen through their type: which paths they hold, how two differ, how one merges into another.
//!
//! The type says which lists and maps are one value and which are owned element by element (KEP-555, structured merge).
//! A null is a value here: it is present, and different from absent.

use serde_json::{Map, Value};

use super::fieldset::{self, Set};
use crate::schema::{Field, ListType, Struct, Type, Types};

/// What the type says about a place.
#[derive(Clone, Copy)]
pub(super) enum Atom<'t> {
    String,
    Boolean,
    Numeric,
    /// A scalar of any kind (times, quantities).
    Scalar,
    /// Anything; maps are owned member by member, lists as one value.
    Untyped,
    List {
        element: &'t Type,
        relation: &'t ListType,
    },
    Map {
        element: &'t Type,
        atomic: bool,
    },
    Struct {
        structure: &'t Struct,
        atomic: bool,
    },
}

static ATOMIC: ListType = ListType::Atomic;

/// The atom of a type; `field` is where a list or map says how it merges.
pub(super) fn atom<'t>(types: &'t Types, ty: &'t Type, field: Option<&'t Field>) -> Atom<'t> {
    let atomic = field.is_some_and(|field| field.atomic);
    match ty.target() {
        Type::String { .. } | Type::Bytes => Atom::String,
        Type::Bool => Atom::Boolean,
        Type::Int { .. } | Type::Float => Atom::Numeric,
        Type::Time | Type::MicroTime | Type::Duration | Type::Quantity | Type::IntOrString => Atom::Scalar,
        Type::Fields
        | Type::Raw
        | Type::Any
        | Type::SchemaOrArray(_)
        | Type::SchemaOrBool(_)
        | Type::SchemaOrStrings(_) => Atom::Untyped,
        Type::List { element, .. } => Atom::List { element, relation: field.map_or(&ATOMIC, |field| &field.list) },
        Type::Map(element) => Atom::Map { element, atomic },
        Type::Struct(id) => {
            let structure = types.get(*id);
            Atom::Struct { structure, atomic: atomic || structure.atomic }
        }
        Type::Pointer(_) => Atom::Untyped,
    }
}

static ANY: Type = Type::Any;

/// Atom of a member of a map-like place, `None` if the type declares no such member.
fn member<'t>(types: &'t Types, place: Atom<'t>, key: &str) -> Option<Atom<'t>> {
    match place {
        Atom::Struct { structure, .. } => match structure.field(key) {
            Some(field) => Some(atom(types, &field.ty, Some(field))),
            None if structure.open => Some(atom(types, &ANY, None)),
            None => None,
        },
        Atom::Map { element, .. } => Some(atom(types, element, None)),
        _ => Some(Atom::Untyped),
    }
}

/// Whether the member is a declared field rather than a key of a map.
fn declared(place: Atom<'_>, key: &str) -> bool {
    matches!(place, Atom::Struct { structure, .. } if structure.field(key).is_some())
}

/// How a place looks once the value is known.
enum Shape<'t> {
    Leaf,
    /// Members, each with its atom.
    Map,
    List(&'t Type, &'t ListType),
}

fn shape<'t>(place: Atom<'t>, value: &Value) -> Shape<'t> {
    match place {
        Atom::String | Atom::Boolean | Atom::Numeric | Atom::Scalar => Shape::Leaf,
        Atom::Untyped if value.is_object() => Shape::Map,
        Atom::Untyped => Shape::Leaf,
        Atom::List { relation: ListType::Atomic, .. } => Shape::Leaf,
        Atom::List { element, relation } => Shape::List(element, relation),
        Atom::Map { atomic: true, .. } | Atom::Struct { atomic: true, .. } => Shape::Leaf,
        Atom::Map { .. } | Atom::Struct { .. } => Shape::Map,
    }
}

/// The path element of a list element.
fn element_path(types: &Types, element: &Type, relation: &ListType, item: &Value) -> Result<String, String> {
    match relation {
        ListType::Map(names) => {
            let Value::Object(members) = item else {
                let kind = if item.is_null() { "a null element" } else { "non-map elements" };
                return Err(format!("associative list with keys may not have {kind}"));
            };
            let mut keys = Map::new();
            for name in names {
                if let Some(value) = members.get(name.as_ref()) {
                    keys.insert(name.clone().into_owned(), value.clone());
                } else if let Some(default) = key_default(types, element, name) {
                    keys.insert(name.clone().into_owned(), default);
                }
            }
            if keys.is_empty() {
                let names: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
                return Err(format!(
                    "associative list with keys has an element that omits all key fields [{}] (and doesn't have default \
                     values for any key fields)",
                    names.join(" ")
                ));
            }
            Ok(fieldset::keys(&keys))
        }
        _ => match item {
            Value::Object(_) => Err("associative list without keys has an element that's a map type".to_owned()),
            Value::Array(_) => Err("not supported: associative list with lists as elements".to_owned()),
            Value::Null => Err("associative list without keys has an element that's an explicit null".to_owned()),
            scalar => Ok(fieldset::value(scalar)),
        },
    }
}

/// Default of a key field: the declared one, or the zero value of a field that is always written.
fn key_default(types: &Types, element: &Type, name: &str) -> Option<Value> {
    let Type::Struct(id) = element.target() else { return None };
    let structure = types.get(*id);
    let field = structure.field(name)?;
    if let Some(default) = &field.default {
        return Some(default.clone());
    }
    if structure.custom || field.omit_empty {
        return None;
    }
    match &field.ty {
        Type::String { .. } => Some(Value::from("")),
        Type::Int { .. } => Some(Value::from(0)),
        Type::Bool => Some(Value::from(false)),
        _ => None,
    }
}

/// Elements of a list with their path; elements without one are left out.
fn indexed<'v>(types: &Types, element: &Type, relation: &ListType, items: &'v [Value]) -> Vec<(String, &'v Value)> {
    items.iter().filter_map(|item| element_path(types, element, relation, item).ok().map(|path| (path, item))).collect()
}

/// The faults of an applied document: undeclared fields, wrong types, double keys. Each is `path: message`.
pub(super) fn validate(types: &Types, place: Atom<'_>, value: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    check(types, place, value, "", &mut faults);
    faults
}

fn check(types: &Types, place: Atom<'_>, value: &Value, path: &str, faults: &mut Vec<String>) {
    if value.is_null() {
        return;
    }
    let mut fault = |message: String| faults.push(if path.is_empty() { message } else { format!("{path}: {message}") });
    match (place, value) {
        (Atom::String, Value::String(_)) | (Atom::Boolean, Value::Bool(_)) | (Atom::Numeric, Value::Number(_)) => {}
        (Atom::Scalar, Value::String(_) | Value::Bool(_) | Value::Number(_)) => {}
        (Atom::String, other) => {
            fault(format!("expected string, got &value.valueUnstructured{{Value:{}}}", go_value(other)))
        }
        (Atom::Numeric, other) => fault(format!("expected numeric (int or float), got {}", go_type(other))),
        (Atom::Boolean, other) => fault(format!("expected boolean, got &{{{}}}", crate::strict::go_print(other))),
        (Atom::Scalar, other) => fault(format!("expected any scalar, got &{{{}}}", crate::strict::go_print(other))),
        (Atom::Untyped, Value::Object(members)) => {
            for (key, value) in members {
                check(types, Atom::Untyped, value, &format!("{path}.{key}"), faults);
            }
        }
        (Atom::Untyped, _) => {}
        (Atom::List { element, relation }, Value::Array(items)) => {
            let mut seen: Vec<String> = Vec::with_capacity(items.len());
            for (at, item) in items.iter().enumerate() {
                let here = if *relation == ListType::Atomic {
                    format!("i:{at}")
                } else {
                    match element_path(types, element, relation, item) {
                        Ok(here) => here,
                        Err(message) => {
                            faults.push(format!("{path}: element {at}: {message}"));
                            return;
                        }
                    }
                };
                if seen.contains(&here) {
                    faults.push(format!("{path}: duplicate entries for key {}", fieldset::show(&here)));
                }
                check(types, atom(types, element, None), item, &format!("{path}{}", fieldset::show(&here)), faults);
                seen.push(here);
            }
        }
        (Atom::List { .. }, other) => fault(format!("expected list, got &{{{}}}", crate::strict::go_print(other))),
        (Atom::Map { .. } | Atom::Struct { .. }, Value::Object(members)) => {
            for (key, value) in members {
                match member(types, place, key) {
                    Some(inner) => check(types, inner, value, &format!("{path}.{key}"), faults),
                    None => {
                        faults.push(format!("{path}.{key}: field not declared in schema"));
                        return;
                    }
                }
            }
        }
        (Atom::Map { .. } | Atom::Struct { .. }, other) => {
            fault(format!("expected map, got &{{{}}}", crate::strict::go_print(other)));
        }
    }
}

/// A value as Go prints it with `%#v`.
fn go_value(value: &Value) -> String {
    match value {
        Value::Object(_) => "map[string]interface {}{...}".to_owned(),
        Value::Array(_) => "[]interface {}{...}".to_owned(),
        other => other.to_string(),
    }
}

fn go_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "<nil>",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "[]interface {}",
        Value::Object(_) => "map[string]interface {}",
    }
}

/// The paths that a document holds.
pub(super) fn field_set(types: &Types, place: Atom<'_>, value: &Value) -> Set {
    let mut set = Set::default();
    collect(types, place, value, &mut Vec::new(), &mut set);
    set
}

fn collect(types: &Types, place: Atom<'_>, value: &Value, path: &mut Vec<String>, set: &mut Set) {
    match (shape(place, value), value) {
        (Shape::Leaf, _) => set.insert(path),
        (Shape::Map, Value::Object(members)) => {
            for (key, inner) in members {
                path.push(fieldset::field(key));
                collect(types, member(types, place, key).unwrap_or(Atom::Untyped), inner, path, set);
                let empty = inner.is_null() || inner.as_object().is_some_and(Map::is_empty);
                if empty || !declared(place, key) {
                    set.insert(path);
                }
                path.pop();
            }
        }
        (Shape::List(element, relation), Value::Array(items)) => {
            let indexed = indexed(types, element, relation, items);
            for (here, item) in &indexed {
                path.push(here.clone());
                // Elements with the same keys are owned as one.
                if indexed.iter().filter(|(other, _)| other == here).count() == 1 {
                    collect(types, atom(types, element, None), item, path, set);
                }
                set.insert(path);
                path.pop();
            }
        }
        _ => {}
    }
}

/// How a new document differs from an old one.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    pub(super) added: Set,
    pub(super) modified: Set,
    pub(super) removed: Set,
}

/// Compares two documents of one type.
pub(super) fn compare(types: &Types, place: Atom<'_>, old: &Value, new: &Value) -> Comparison {
    let mut comparison = Comparison::default();
    diff(types, place, Some(old), Some(new), &mut Vec::new(), &mut comparison);
    comparison
}

fn diff(
    types: &Types,
    place: Atom<'_>,
    old: Option<&Value>,
    new: Option<&Value>,
    path: &mut Vec<String>,
    comparison: &mut Comparison,
) {
    let Some(present) = new.or(old) else { return };
    if old == new {
        return;
    }
    let map = |value: Option<&Value>| value.and_then(Value::as_object).is_none_or(Map::is_empty);
    let list = |value: Option<&Value>| value.and_then(Value::as_array).is_none_or(Vec::is_empty);
    let leaf = match shape(place, present) {
        Shape::Leaf => true,
        // A map that is empty or null on both sides is a leaf, so that the two stay distinct.
        Shape::Map => map(old) && map(new),
        Shape::List(..) => list(old) && list(new),
    };
    if leaf {
        match (old, new) {
            (None, _) => comparison.added.insert(path),
            (_, None) => comparison.removed.insert(path),
            (Some(old), Some(new)) if old != new => comparison.modified.insert(path),
            _ => {}
        }
        return;
    }
    match shape(place, present) {
        Shape::Map => {
            let empty = Map::new();
            let old_members = old.and_then(Value::as_object).unwrap_or(&empty);
            let new_members = new.and_then(Value::as_object).unwrap_or(&empty);
            if matches!((old, new), (Some(old), Some(new)) if old.is_object() != new.is_object() && !old.is_null() && !new.is_null())
            {
                comparison.modified.insert(path);
            }
            let mut keys: Vec<&String> = old_members.keys().chain(new_members.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                path.push(fieldset::field(key));
                let inner = member(types, place, key).unwrap_or(Atom::Untyped);
                diff(types, inner, old_members.get(key), new_members.get(key), path, comparison);
                path.pop();
            }
        }
        Shape::List(element, relation) => {
            let none = Vec::new();
            let old_items = old.and_then(Value::as_array).unwrap_or(&none);
            let new_items = new.and_then(Value::as_array).unwrap_or(&none);
            let old_items = indexed(types, element, relation, old_items);
            let new_items = indexed(types, element, relation, new_items);
            let mut paths: Vec<&String> = Vec::new();
            for (here, _) in old_items.iter().chain(&new_items) {
                if !paths.contains(&here) {
                    paths.push(here);
                }
            }
            let inner = atom(types, element, None);
            for here in paths {
                let (old_same, new_same): (Vec<&Value>, Vec<&Value>) = (
                    old_items.iter().filter(|(other, _)| other == here).map(|(_, item)| *item).collect(),
                    new_items.iter().filter(|(other, _)| other == here).map(|(_, item)| *item).collect(),
                );
                path.push(here.clone());
                match (old_same.as_slice(), new_same.as_slice()) {
                    ([] | [_], [] | [_]) => {
                        diff(types, inner, old_same.first().copied(), new_same.first().copied(), path, comparison);
                    }
                    ([_, _, ..], [_, _, ..]) => {
                        if old_same != new_same {
                            comparison.modified.insert(path);
                        }
                    }
                    ([_, _, ..], rest) => {
                        diff(types, inner, None, rest.first().copied(), path, comparison);
                        comparison.removed.insert(path);
                    }
                    (rest, [_, _, ..]) => {
                        diff(types, inner, rest.first().copied(), None, path, comparison);
                        comparison.added.insert(path);
                    }
                }
                path.pop();
            }
        }
        Shape::Leaf => {}
    }
    match (old, new) {
        (None, _) => comparison.added.insert(path),
        (_, None) => comparison.removed.insert(path),
        _ => {}
    }
}

/// Merges an applied document into a live one.
pub(super) fn merge(types: &Types, place: Atom<'_>, live: Option<&Value>, applied: Option<&Value>) -> Option<Value> {
    let present = applied.or(live)?;
    let map = |value: Option<&Value>| value.and_then(Value::as_object).is_none_or(Map::is_empty);
    let list = |value: Option<&Value>| value.and_then(Value::as_array).is_none_or(Vec::is_empty);
    match shape(place, present) {
        Shape::Map if !(map(live) && map(applied)) => {
            let empty = Map::new();
            let live_members = live.and_then(Value::as_object).unwrap_or(&empty);
            let applied_members = applied.and_then(Value::as_object).unwrap_or(&empty);
            if applied.is_some_and(|applied| !applied.is_null() && !applied.is_object()) {
                return applied.cloned();
            }
            let mut merged = Map::new();
            for key in live_members.keys().chain(applied_members.keys()) {
                if merged.contains_key(key) {
                    continue;
                }
                let inner = member(types, place, key).unwrap_or(Atom::Untyped);
                if let Some(value) = merge(types, inner, live_members.get(key), applied_members.get(key)) {
                    merged.insert(key.clone(), value);
                }
            }
            Some(Value::Object(merged))
        }
        Shape::List(element, relation) if !(list(live) && list(applied)) => {
            let none = Vec::new();
            let live_items = live.and_then(Value::as_array).unwrap_or(&none);
            let applied_items = applied.and_then(Value::as_array).unwrap_or(&none);
            Some(Value::Array(merge_list(types, element, relation, live_items, applied_items)))
        }
        _ => Some(present.clone()),
    }
}

/// Merges lists by their keys: shared elements stand in the order of the applied list, elements that only the live list
/// has keep their place between them, new ones come where the applied list has them.
fn merge_list(types: &Types, element: &Type, relation: &ListType, live: &[Value], applied: &[Value]) -> Vec<Value> {
    let inner = atom(types, element, None);
    let left = indexed(types, element, relation, live);
    let right = indexed(types, element, relation, applied);
    let find = |list: &[(String, &Value)], path: &str| -> Option<Value> {
        let mut same = list.iter().filter(|(other, _)| other == path);
        let first = same.next()?;
        // Double elements of the live list are not merged with; the applied one takes their place.
        Some(if same.next().is_some() { Value::Null } else { first.1.clone() })
    };
    let in_right = |path: &str| right.iter().any(|(other, _)| other == path);
    let in_left = |path: &str| left.iter().any(|(other, _)| other == path);
    let mut shared = right.iter().map(|(path, _)| path).filter(|path| in_left(path));
    let mut next_shared = shared.next();
    let mut done: Vec<&str> = Vec::with_capacity(right.len());
    let mut merged = Vec::with_capacity(left.len().max(right.len()));
    let take = |path: &str, merged: &mut Vec<Value>| {
        let live = find(&left, path).filter(|value| !value.is_null());
        let applied = find(&right, path);
        merged.extend(merge(types, inner, live.as_ref(), applied.as_ref()));
    };
    let (mut l, mut r) = (0, 0);
    while l < left.len() || r < right.len() {
        if l < left.len() && r < right.len() {
            let path = &left[l].0;
            if *path == right[r].0 {
                done.push(path);
                take(path, &mut merged);
                l += 1;
                r += 1;
                next_shared = shared.next();
                continue;
            }
            if in_right(path) && next_shared.is_some_and(|next| next != path) {
                // Shared, but another one is wanted first.
                l += 1;
                continue;
            }
        }
        if l < left.len() {
            let (path, item) = &left[l];
            if !in_right(path) {
                merged.push((*item).clone());
                l += 1;
                continue;
            }
            if done.contains(&path.as_str()) {
                l += 1;
            }
        }
        if r < right.len() {
            let path = &right[r].0;
            done.push(path);
            take(path, &mut merged);
            r += 1;
            if next_shared == Some(path) {
                next_shared = shared.next();
            }
        }
    }
    merged
}

/// Takes the paths of a set out of a document; `None` if nothing is left.
pub(super) fn remove(types: &Types, place: Atom<'_>, value: &Value, paths: &Set) -> Option<Value> {
    match (place, value) {
        (Atom::Map { atomic: true, .. } | Atom::Struct { atomic: true, .. }, Value::Object(_)) => None,
        (Atom::Map { .. } | Atom::Struct { .. } | Atom::Untyped, Value::Object(members)) => {
            let mut rest = Map::new();
            let mut matched = false;
            for (key, inner) in members {
                let here = fieldset::field(key);
                if paths.members.contains(&here) {
                    continue;
                }
                let kept = match paths.children.get(&here).filter(|child| !child.is_empty()) {
                    Some(child) => {
                        matched = true;
                        let place = member(types, place, key).unwrap_or(Atom::Untyped);
                        remove(types, place, inner, child).unwrap_or_else(|| emptied(inner))
                    }
                    None => inner.clone(),
                };
                rest.insert(key.clone(), kept);
            }
            (!rest.is_empty() || matched).then_some(Value::Object(rest))
        }
        (Atom::List { relation: ListType::Atomic, .. } | Atom::Untyped, Value::Array(_)) => None,
        (Atom::List { element, relation }, Value::Array(items)) => {
            let mut rest = Vec::new();
            let mut matched = false;
            for item in items {
                let here = element_path(types, element, relation, item).unwrap_or_default();
                if paths.members.contains(&here) {
                    continue;
                }
                match paths.children.get(&here).filter(|child| !child.is_empty()) {
                    Some(child) => {
                        matched = true;
                        let kept = remove(types, atom(types, element, None), item, child);
                        rest.push(kept.unwrap_or_else(|| emptied(item)));
                    }
                    None => rest.push(item.clone()),
                }
            }
            (!rest.is_empty() || matched).then_some(Value::Array(rest))
        }
        (_, scalar) => Some(scalar.clone()),
    }
}

fn emptied(value: &Value) -> Value {
    match value {
        Value::Object(_) => Value::Object(Map::new()),
        Value::Array(_) => Value::Array(Vec::new()),
        _ => Value::Null,
    }
}

/// Adds the declared fields on the way to members of the set, so that removing the set removes emptied structs too.
pub(super) fn with_named_fields(types: &Types, place: Option<Atom<'_>>, set: &Set) -> Set {
    let mut result = Set { members: set.members.clone(), children: std::collections::BTreeMap::new() };
    for (element, child) in &set.children {
        let mut inner = None;
        if let (Some(place), Some(name)) = (place, element.strip_prefix("f:")) {
            if declared(place, name) {
                result.members.insert(element.clone());
            }
            if matches!(place, Atom::Struct { .. } | Atom::Map { .. }) {
                inner = member(types, place, name);
            }
        } else if let (Some(Atom::List { element: ty, .. }), true) = (place, element.starts_with("k:")) {
            inner = Some(atom(types, ty, None));
        }
        result.children.insert(element.clone(), with_named_fields(types, inner, child));
    }
    result
}
