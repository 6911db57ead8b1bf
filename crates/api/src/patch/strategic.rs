//! Strategic merge patch: lists merge by key where the type says so, and directives in the patch (`$patch`,
//! `$retainKeys`, `$deleteFromPrimitiveList/x`, `$setElementOrder/x`) say the rest.
//!
//! Source: "Strategic Merge Patch" of the Kubernetes API conventions; the fine points, such as the place of elements that
//! an order does not name, follow recorded behaviour.

use serde_json::{Map, Value};

use crate::schema::{DocumentType, Field, Struct, Type, Types};
use crate::status::Status;
use crate::strict::go_print;

type Object = Map<String, Value>;

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_PREFIX: &str = "$deleteFromPrimitiveList/";
const ORDER_PREFIX: &str = "$setElementOrder/";

/// Merges a patch into a document of type `ty`.
pub(super) fn merge(ty: &DocumentType, current: &Value, patch: Value) -> Result<Value, Status> {
    let merger = Merger { types: ty.types() };
    let original = current.as_object().cloned().unwrap_or_default();
    let Value::Object(patch) = patch else { return Ok(Value::Object(original)) };
    merger.map(original, patch, Place::Struct(ty.root())).map(Value::Object)
}

/// What is known about the place a patch is merged at.
#[derive(Clone, Copy)]
enum Place<'t> {
    Struct(&'t Struct),
    /// A map with values of that type.
    Map(&'t Type),
    /// Nothing: maps merge, lists are replaced.
    Unknown,
}

/// How one member is merged.
struct Rule<'t> {
    inside: Place<'t>,
    merge: bool,
    key: Option<&'t str>,
}

struct Merger<'t> {
    types: &'t Types,
}

fn plain(message: impl Into<String>) -> Status {
    Status::plain_error(message)
}

fn no_merge_key(item: &Value, key: &str) -> Status {
    plain(format!("map: {} does not contain declared merge key: {key}", go_print(item)))
}

fn bad_retain_keys() -> Status {
    Status::bad_request("invalid patch format of retainKeys")
}

impl<'t> Merger<'t> {
    fn place(&self, ty: &'t Type) -> Place<'t> {
        match ty.target() {
            Type::Struct(id) => Place::Struct(self.types.get(*id)),
            Type::Map(element) => Place::Map(element),
            Type::List { element, .. } => self.place(element),
            Type::SchemaOrArray(id) | Type::SchemaOrBool(id) | Type::SchemaOrStrings(id) => {
                Place::Struct(self.types.get(*id))
            }
            _ => Place::Unknown,
        }
    }

    fn rule(&self, place: Place<'t>, key: &str) -> Rule<'t> {
        match place {
            Place::Struct(structure) => match structure.field(key) {
                Some(Field { ty, patch_merge, merge_key, .. }) => {
                    Rule { inside: self.place(ty), merge: *patch_merge, key: merge_key.as_deref() }
                }
                None => Rule { inside: Place::Unknown, merge: false, key: None },
            },
            Place::Map(element) => Rule { inside: self.place(element), merge: false, key: None },
            Place::Unknown => Rule { inside: Place::Unknown, merge: false, key: None },
        }
    }

    fn map(&self, mut original: Object, mut patch: Object, place: Place<'t>) -> Result<Object, Status> {
        if let Some(directive) = patch.get(DIRECTIVE) {
            return match directive.as_str() {
                Some("replace") => {
                    patch.remove(DIRECTIVE);
                    Ok(patch)
                }
                Some("delete") => Ok(Object::new()),
                _ => {
                    let directive = go_print(directive);
                    Err(plain(format!("unknown patch type: {directive} in map: {}", go_print(&Value::Object(patch)))))
                }
            };
        }
        retain_keys(&mut original, &mut patch)?;
        self.ordered_lists(&mut original, &mut patch, place)?;
        for (key, value) in patch {
            let (key, deletes) = match key.strip_prefix(DELETE_PREFIX) {
                Some(rest) => (rest.to_owned(), true),
                None => (key, false),
            };
            if value.is_null() {
                original.remove(&key);
                continue;
            }
            let Some(present) = original.get(&key) else {
                if !deletes {
                    insert_new(&mut original, key, value);
                }
                continue;
            };
            match (present, value) {
                (Value::Object(_), Value::Object(patch)) => {
                    let rule = self.rule(place, &key);
                    let Some(Value::Object(inner)) = original.remove(&key) else { continue };
                    original.insert(key, Value::Object(self.map(inner, patch, rule.inside)?));
                }
                (Value::Array(_), Value::Array(patch)) => {
                    let rule = self.rule(place, &key);
                    let Some(Value::Array(inner)) = original.remove(&key) else { continue };
                    let merged = self.list(inner, patch, &rule, deletes)?;
                    original.insert(key, Value::Array(merged));
                }
                (present, value) if deletes => {
                    let message =
                        format!("expected a list for {key}, got {} and {}", go_print(present), go_print(&value));
                    return Err(plain(message));
                }
                (present, value) => {
                    if std::mem::discriminant(present) == std::mem::discriminant(&value) {
                        original.insert(key, value);
                    } else {
                        insert_new(&mut original, key, value);
                    }
                }
            }
        }
        Ok(original)
    }

    /// Handles the lists whose order the patch gives, and takes them out of the patch.
    fn ordered_lists(&self, original: &mut Object, patch: &mut Object, place: Place<'t>) -> Result<(), Status> {
        let orders: Vec<String> = patch.keys().filter(|key| key.starts_with(ORDER_PREFIX)).cloned().collect();
        for directive in orders {
            let key = directive[ORDER_PREFIX.len()..].to_owned();
            let order = match patch.remove(&directive) {
                Some(Value::Array(order)) => order,
                other => {
                    let shown = go_print(&other.unwrap_or(Value::Null));
                    return Err(plain(format!("expected a list for {directive}, but received {shown}")));
                }
            };
            let rule = self.rule(place, &key);
            let list_of = |value: Option<&Value>| match value {
                None => Ok(None),
                Some(Value::Array(items)) => Ok(Some(items.clone())),
                Some(other) => Err(plain(format!("expected a list for {key}, but received {}", go_print(other)))),
            };
            let current = list_of(original.get(&key))?;
            let added = list_of(patch.get(&key).filter(|value| !value.is_null()))?;
            if patch.get(&key).is_some_and(Value::is_null) {
                continue;
            }
            check_order(added.as_deref().unwrap_or_default(), &order, rule.key)?;
            let merged = match (&current, &added) {
                (None, None) => continue,
                (Some(current), None) => current.clone(),
                (None, Some(added)) => match without_directives(Value::Array(added.clone())) {
                    Some(Value::Array(items)) => items,
                    _ => continue,
                },
                (Some(current), Some(added)) => self.list(current.clone(), added.clone(), &rule, false)?,
            };
            let (named, others) = partition(merged, &order, rule.key)?;
            let server_order = current.unwrap_or_default();
            original.insert(key.clone(), Value::Array(interleave(named, others, &order, &server_order, rule.key)));
            patch.remove(&key);
        }
        Ok(())
    }

    fn list(
        &self,
        original: Vec<Value>,
        patch: Vec<Value>,
        rule: &Rule<'t>,
        deletes: bool,
    ) -> Result<Vec<Value>, Status> {
        if !rule.merge && !deletes {
            return Ok(patch);
        }
        if original.is_empty() && patch.is_empty() {
            return Ok(original);
        }
        if !element_type(&original, &patch)? {
            if deletes {
                return Ok(original.into_iter().filter(|item| !patch.contains(item)).collect());
            }
            let mut merged: Vec<Value> = Vec::with_capacity(original.len() + patch.len());
            for item in original.iter().chain(&patch) {
                if !merged.contains(item) {
                    merged.push(item.clone());
                }
            }
            let (named, others) = partition(merged, &patch, None)?;
            return Ok(interleave(named, others, &patch, &original, None));
        }
        let Some(key) = rule.key else {
            return Err(plain("cannot merge lists without merge key for the list"));
        };
        let (original, patch) = special_elements(original, patch, key)?;
        let mut merged = original.clone();
        for item in &patch {
            let wanted = item.get(key).ok_or_else(|| no_merge_key(item, key))?;
            match merged.iter().position(|present| present.get(key) == Some(wanted)) {
                Some(at) => {
                    let present = std::mem::take(&mut merged[at]);
                    let (Value::Object(present), Value::Object(item)) = (present, item.clone()) else { continue };
                    merged[at] = Value::Object(self.map(present, item, rule.inside)?);
                }
                None => merged.push(item.clone()),
            }
        }
        let (named, others) = partition(merged, &patch, Some(key))?;
        Ok(interleave(named, others, &patch, &original, Some(key)))
    }
}

/// `$retainKeys`: members of the original that the list does not name go.
fn retain_keys(original: &mut Object, patch: &mut Object) -> Result<(), Status> {
    let Some(keys) = patch.remove(RETAIN_KEYS) else { return Ok(()) };
    let Value::Array(keys) = keys else { return Err(bad_retain_keys()) };
    let named = |name: &str| keys.iter().any(|key| key.as_str() == Some(name));
    for (name, value) in &*patch {
        if value.is_null() || name.starts_with(DELETE_PREFIX) || name.starts_with(ORDER_PREFIX) {
            continue;
        }
        if !named(name) {
            return Err(bad_retain_keys());
        }
    }
    original.retain(|name, _| named(name));
    Ok(())
}

/// Takes a value for which the original has nothing to merge with: nulls and directives in it mean nothing.
fn insert_new(original: &mut Object, key: String, mut value: Value) {
    discard_nulls(&mut value);
    match without_directives(value) {
        Some(value) => {
            original.insert(key, value);
        }
        None => {
            original.remove(&key);
        }
    }
}

fn discard_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(discard_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(discard_nulls),
        _ => {}
    }
}

fn without_directives(value: Value) -> Option<Value> {
    match value {
        Value::Object(members) if members.contains_key(DIRECTIVE) => None,
        Value::Object(members) => {
            let members = members.into_iter().filter_map(|(key, value)| Some((key, without_directives(value)?)));
            Some(Value::Object(members.collect()))
        }
        Value::Array(items) => Some(Value::Array(items.into_iter().filter_map(without_directives).collect())),
        other => Some(other),
    }
}

/// Whether the elements of both lists are maps; they must all be of one type.
fn element_type(original: &[Value], patch: &[Value]) -> Result<bool, Status> {
    let type_of = |value: &Value| match value {
        Value::Null => 0,
        Value::Bool(_) => 1,
        Value::Number(number) if number.is_f64() => 2,
        Value::Number(_) => 3,
        Value::String(_) => 4,
        Value::Array(_) => 5,
        Value::Object(_) => 6,
    };
    let mut all = original.iter().chain(patch).map(type_of);
    let first = all.next().unwrap_or(0);
    if first == 5 {
        return Err(plain("lists of lists are not supported"));
    }
    if first == 0 || all.any(|other| other != first) {
        let lists = Value::Array(vec![Value::Array(original.to_vec()), Value::Array(patch.to_vec())]);
        return Err(plain(format!("list element types are not identical: {}", go_print(&lists))));
    }
    Ok(first == 6)
}

/// Carries out `$patch` elements of a list of maps and takes them out of the patch.
fn special_elements(
    mut original: Vec<Value>,
    patch: Vec<Value>,
    key: &str,
) -> Result<(Vec<Value>, Vec<Value>), Status> {
    let mut rest = Vec::with_capacity(patch.len());
    let mut replace = false;
    for item in patch {
        match item.get(DIRECTIVE) {
            None => rest.push(item),
            Some(directive) => match directive.as_str() {
                Some("delete") => {
                    let wanted = item.get(key).ok_or_else(|| no_merge_key(&item, key))?;
                    original.retain(|present| present.get(key) != Some(wanted));
                }
                Some("replace") => replace = true,
                Some("merge") => return Err(plain("merging lists cannot yet be specified in the patch")),
                _ => {
                    let message = format!("unknown patch type: {} in map: {}", go_print(directive), go_print(&item));
                    return Err(plain(message));
                }
            },
        }
    }
    Ok(if replace { (rest, Vec::new()) } else { (original, rest) })
}

/// Whether two elements are the same one: by their key if they are maps.
fn same(a: &Value, b: &Value, key: Option<&str>) -> bool {
    match key {
        Some(key) => a.get(key).is_some() && a.get(key) == b.get(key),
        None => a == b,
    }
}

/// The elements that a list names, and the others.
fn partition(items: Vec<Value>, by: &[Value], key: Option<&str>) -> Result<(Vec<Value>, Vec<Value>), Status> {
    if let Some(key) = key {
        for item in &items {
            if !item.is_object() {
                return Err(plain(format!("expected a map, but received {}", go_print(item))));
            }
            if item.get(key).is_none() {
                return Err(no_merge_key(item, key));
            }
        }
    }
    Ok(items.into_iter().partition(|item| by.iter().any(|other| same(item, other, key))))
}

/// Puts the elements of the patch into the order given and lets the others keep their place beside their neighbours.
fn interleave(
    mut named: Vec<Value>,
    mut others: Vec<Value>,
    order: &[Value],
    server_order: &[Value],
    key: Option<&str>,
) -> Vec<Value> {
    let place = |list: &[Value], item: &Value| list.iter().position(|other| same(item, other, key));
    named.sort_by_key(|item| place(order, item));
    others.sort_by_key(|item| place(server_order, item));
    let mut merged = Vec::with_capacity(named.len() + others.len());
    let mut named = named.into_iter().peekable();
    let mut others = others.into_iter().peekable();
    loop {
        let take_other = match (others.peek(), named.peek()) {
            (None, None) => return merged,
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (Some(other), Some(item)) => match (place(server_order, other), place(server_order, item)) {
                (Some(left), Some(right)) => left < right,
                _ => false,
            },
        };
        merged.extend(if take_other { others.next() } else { named.next() });
    }
}

/// Every element of the patch must stand in the order list, in the same sequence.
fn check_order(patch: &[Value], order: &[Value], key: Option<&str>) -> Result<(), Status> {
    if patch.is_empty() || order.is_empty() {
        return Ok(());
    }
    let mut places = order.iter();
    for item in patch.iter().filter(|item| item.get(DIRECTIVE).is_none()) {
        if let Some(key) = key
            && item.get(key).is_none()
        {
            return Err(no_merge_key(item, key));
        }
        if !places.any(|place| same(item, place, key)) {
            let shown = |list: &[Value]| go_print(&Value::Array(list.to_vec()));
            return Err(plain(format!(
                "The order in patch list:\n{}\n doesn't match $setElementOrder list:\n{}\n",
                shown(patch),
                shown(order)
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn merged(group: &str, kind: &str, current: Value, patch: Value) -> Result<Value, Status> {
        merge(&DocumentType::builtin(group, "v1", kind).unwrap(), &current, patch)
    }

    fn pod(spec: Value, patch: Value) -> Value {
        let value = merged("", "Pod", json!({ "spec": spec }), json!({ "spec": patch })).unwrap();
        value["spec"].clone()
    }

    #[test]
    fn lists_merge_by_key() {
        let containers =
            json!({"containers": [{"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "1"}]});
        for (note, patch, result) in [
            (
                "found by name",
                json!({"containers": [{"name": "b", "image": "2"}]}),
                json!([{"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "2"}]),
            ),
            (
                "a new one comes first, as it has no neighbours",
                json!({"containers": [{"name": "c", "image": "3"}]}),
                json!([{"name": "c", "image": "3"}, {"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "1"}]),
            ),
            (
                "deleted",
                json!({"containers": [{"$patch": "delete", "name": "a"}]}),
                json!([{"name": "b", "image": "1"}]),
            ),
            ("replaced", json!({"containers": [{"$patch": "replace"}, {"name": "z"}]}), json!([{"name": "z"}])),
            (
                "args are replaced",
                json!({"containers": [{"name": "a", "args": ["y"]}]}),
                json!([{"name": "a", "image": "1", "args": ["y"]}, {"name": "b", "image": "1"}]),
            ),
            (
                "ordered",
                json!({"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}),
                json!([{"name": "b", "image": "1"}, {"name": "a", "image": "1", "args": ["x"]}]),
            ),
            (
                "an unnamed one keeps its place before its neighbour",
                json!({"$setElementOrder/containers": [{"name": "e"}, {"name": "b"}], "containers": [{"name": "e"}]}),
                json!([{"name": "e"}, {"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "1"}]),
            ),
        ] {
            assert_eq!(pod(containers.clone(), patch)["containers"], result, "{note}");
        }
    }

    #[test]
    fn primitive_sets() {
        let finalizers = |patch: Value| {
            let current = json!({"metadata": {"finalizers": ["a", "b"]}});
            merged("", "ConfigMap", current, json!({ "metadata": patch })).unwrap()["metadata"]["finalizers"].clone()
        };
        assert_eq!(finalizers(json!({"finalizers": ["c", "a"]})), json!(["c", "a", "b"]));
        assert_eq!(finalizers(json!({"$deleteFromPrimitiveList/finalizers": ["a"]})), json!(["b"]));
        assert_eq!(
            finalizers(json!({"$setElementOrder/finalizers": ["d", "a"], "finalizers": ["d"],
                "$deleteFromPrimitiveList/finalizers": ["b"]})),
            json!(["d", "a"]),
        );
        assert_eq!(finalizers(json!({"finalizers": null})), Value::Null);
    }

    #[test]
    fn retained_keys() {
        let volumes = json!({"volumes": [{"name": "v", "emptyDir": {}}]});
        let patch =
            json!({"volumes": [{"name": "v", "configMap": {"name": "c"}, "$retainKeys": ["name", "configMap"]}]});
        assert_eq!(pod(volumes, patch), json!({"volumes": [{"name": "v", "configMap": {"name": "c"}}]}));
        let strategy = json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {}}}});
        for patch in [json!({"$retainKeys": ["rollingUpdate"], "type": "Recreate"}), json!({"$retainKeys": "type"})] {
            let error =
                merged("apps", "Deployment", strategy.clone(), json!({"spec": {"strategy": patch}})).unwrap_err();
            assert_eq!((error.code, error.message.as_str()), (400, "invalid patch format of retainKeys"));
        }
    }

    #[test]
    fn maps() {
        let current = json!({"metadata": {"labels": {"a": "b"}}});
        let labels = |patch: Value| {
            merged("", "ConfigMap", current.clone(), json!({"metadata": {"labels": patch}}))
                .map(|v| v["metadata"]["labels"].clone())
        };
        assert_eq!(labels(json!({"c": "d"})), Ok(json!({"a": "b", "c": "d"})));
        assert_eq!(labels(json!({"a": null})), Ok(json!({})));
        assert_eq!(labels(json!({"$patch": "delete"})), Ok(json!({})));
        assert_eq!(labels(json!({"$patch": "replace", "x": "y"})), Ok(json!({"x": "y"})));
        assert_eq!(
            labels(json!({"$patch": "merge", "e": "f"})).unwrap_err().message,
            "unknown patch type: merge in map: map[$patch:merge e:f]",
        );
    }

    #[test]
    fn contradictions_have_the_known_texts() {
        let current = json!({"spec": {"containers": [{"name": "c"}, {"name": "d"}]}});
        let text = |patch: Value| merged("", "Pod", current.clone(), json!({ "spec": patch })).unwrap_err().message;
        assert_eq!(
            text(json!({"containers": [{"image": "x:1"}]})),
            "map: map[image:x:1] does not contain declared merge key: name",
        );
        assert_eq!(
            text(json!({"containers": ["c"]})),
            "list element types are not identical: [[map[name:c] map[name:d]] [c]]",
        );
        assert_eq!(
            text(
                json!({"$setElementOrder/containers": [{"name": "c"}], "containers": [{"image": "x:1", "name": "d"}]})
            ),
            "The order in patch list:\n[map[image:x:1 name:d]]\n doesn't match $setElementOrder list:\n[map[name:c]]\n",
        );
        assert_eq!(
            text(json!({"containers": [{"$patch": "frob", "name": "c"}]})),
            "unknown patch type: frob in map: map[$patch:frob name:c]",
        );
    }
}
