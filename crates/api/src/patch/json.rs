//! JSON patch, with the liberties of the library that the reference implementation uses: negative array indices count
//! from the end, and `replace` of an absent object member adds it.

use serde_json::Value;

use super::{bad_patch, rejected};
use crate::status::Status;
use crate::strict::parse_json;

/// The reference implementation refuses longer patches.
const MAX_OPERATIONS: usize = 10_000;
/// Bound on the text that `copy` operations may add.
const MAX_COPIED_BYTES: usize = 3 * 1024 * 1024;

#[derive(Debug)]
pub(super) enum Operation {
    Add { path: String, value: Value },
    Remove { path: String },
    Replace { path: String, value: Value },
    Move { path: String, from: String },
    Copy { path: String, from: String },
    Test { path: String, value: Value },
}

/// Reads the body of a JSON patch.
pub(super) fn parse(body: &[u8]) -> Result<Vec<Operation>, Status> {
    let value = parse_json(body).map_err(|error| bad_patch(&error))?.into_value();
    let Value::Array(items) = &value else {
        let kind = match value {
            Value::Object(_) => "object",
            Value::String(_) => "string",
            Value::Number(_) => "number",
            Value::Bool(_) => "bool",
            _ => return Ok(Vec::new()),
        };
        return Err(bad_patch(&format!("json: cannot unmarshal {kind} into Go value of type jsonpatch.Patch")));
    };
    if items.len() > MAX_OPERATIONS {
        let message =
            format!("The allowed maximum operations in a JSON patch is {MAX_OPERATIONS}, got {}", items.len());
        return Err(Status::new(413, "RequestEntityTooLarge", message));
    }
    read(&value).map_err(|_| rejected())
}

/// Reads operations; an unknown one or a missing member is an error of the whole patch.
pub(super) fn read(operations: &Value) -> Result<Vec<Operation>, String> {
    let items = operations.as_array().ok_or("a JSON patch is a list of operations")?;
    items.iter().map(read_one).collect()
}

fn read_one(item: &Value) -> Result<Operation, String> {
    let text = |key: &str| {
        let value = item.get(key).and_then(Value::as_str).map(str::to_owned);
        value.ok_or_else(|| format!("operation missing {key} field"))
    };
    let value = || item.get("value").cloned().unwrap_or(Value::Null);
    Ok(match text("op")?.as_str() {
        "add" => Operation::Add { path: text("path")?, value: value() },
        "remove" => Operation::Remove { path: text("path")? },
        "replace" => Operation::Replace { path: text("path")?, value: value() },
        "move" => Operation::Move { path: text("path")?, from: text("from")? },
        "copy" => Operation::Copy { path: text("path")?, from: text("from")? },
        "test" => Operation::Test { path: text("path")?, value: value() },
        other => return Err(format!("Unexpected kind: {other}")),
    })
}

/// Applies the operations in order to a copy of the document.
pub(super) fn apply(operations: &[Operation], current: &Value) -> Result<Value, String> {
    let mut document = current.clone();
    let mut copied = 0;
    for operation in operations {
        match operation {
            Operation::Add { path, value } => add(&mut document, path, value.clone())?,
            Operation::Remove { path } => {
                remove(&mut document, path)?;
            }
            Operation::Replace { path, value } if path.is_empty() => {
                if !value.is_object() && !value.is_array() {
                    return Err("replace operation value must be object or array".to_owned());
                }
                document = value.clone();
            }
            Operation::Replace { path, value } => {
                let (container, key) = container(&mut document, path)?;
                match container {
                    Value::Object(members) => {
                        members.insert(key, value.clone());
                    }
                    Value::Array(items) => {
                        let at = index(&key, items.len())?;
                        items[at] = value.clone();
                    }
                    _ => return Err(format!("doc is missing key: {path}")),
                }
            }
            Operation::Move { path, from } => {
                let value = remove(&mut document, from)?;
                add(&mut document, path, value)?;
            }
            Operation::Copy { path, from } => {
                let value = get(&mut document, from)?.ok_or_else(|| format!("doc is missing from path: {from}"))?;
                copied += value.to_string().len();
                if copied > MAX_COPIED_BYTES {
                    return Err("unable to complete the copy, the accumulated size increase is too large".to_owned());
                }
                add(&mut document, path, value)?;
            }
            Operation::Test { path, value } => {
                let found = if path.is_empty() { Some(document.clone()) } else { get(&mut document, path)? };
                if found.unwrap_or(Value::Null) != *value {
                    return Err(format!("testing value {path} failed"));
                }
            }
        }
    }
    Ok(document)
}

fn unescape(part: &str) -> String {
    part.replace("~1", "/").replace("~0", "~")
}

/// Index of an existing element.
fn index(key: &str, length: usize) -> Result<usize, String> {
    let error = || format!("Unable to access invalid index: {key}");
    let at: i64 = key.parse().map_err(|_| error())?;
    let length = i64::try_from(length).map_err(|_| error())?;
    let at = if at < 0 { at + length } else { at };
    if (0..length).contains(&at) { usize::try_from(at).map_err(|_| error()) } else { Err(error()) }
}

/// The value that holds the last part of a path, and that part.
fn container<'d>(document: &'d mut Value, path: &str) -> Result<(&'d mut Value, String), String> {
    let missing = || format!("doc is missing path: {path}");
    let rest = path.strip_prefix('/').ok_or_else(missing)?;
    let mut parts: Vec<String> = rest.split('/').map(unescape).collect();
    let last = parts.pop().ok_or_else(missing)?;
    let mut at = document;
    for part in parts {
        at = match at {
            Value::Object(members) => members.get_mut(&part).ok_or_else(missing)?,
            Value::Array(items) => {
                let position = index(&part, items.len())?;
                &mut items[position]
            }
            _ => return Err(missing()),
        };
    }
    if !at.is_object() && !at.is_array() {
        return Err(missing());
    }
    Ok((at, last))
}

fn add(document: &mut Value, path: &str, value: Value) -> Result<(), String> {
    let (container, key) = container(document, path)?;
    match container {
        Value::Object(members) => {
            members.insert(key, value);
        }
        Value::Array(items) if key == "-" => items.push(value),
        Value::Array(items) => {
            let at = index(&key, items.len() + 1)?;
            items.insert(at, value);
        }
        _ => return Err(format!("doc is missing path: {path}")),
    }
    Ok(())
}

fn remove(document: &mut Value, path: &str) -> Result<Value, String> {
    let (container, key) = container(document, path)?;
    match container {
        Value::Object(members) => {
            members.remove(&key).ok_or_else(|| format!("Unable to remove nonexistent key: {key}"))
        }
        Value::Array(items) => {
            let at = index(&key, items.len())?;
            Ok(items.remove(at))
        }
        _ => Err(format!("doc is missing path: {path}")),
    }
}

fn get(document: &mut Value, path: &str) -> Result<Option<Value>, String> {
    let (container, key) = container(document, path)?;
    match container {
        Value::Object(members) => Ok(members.get(&key).cloned()),
        Value::Array(items) => {
            let at = index(&key, items.len())?;
            Ok(Some(items[at].clone()))
        }
        _ => Err(format!("doc is missing path: {path}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(document: Value, patch: Value) -> Result<Value, String> {
        apply(&read(&patch)?, &document)
    }

    #[test]
    fn examples_of_rfc_6902() {
        for (document, patch, result) in [
            (
                json!({"foo": "bar"}),
                json!([{"op": "add", "path": "/baz", "value": "qux"}]),
                json!({"baz": "qux", "foo": "bar"}),
            ),
            (
                json!({"foo": ["bar", "baz"]}),
                json!([{"op": "add", "path": "/foo/1", "value": "qux"}]),
                json!({"foo": ["bar", "qux", "baz"]}),
            ),
            (json!({"baz": "qux", "foo": "bar"}), json!([{"op": "remove", "path": "/baz"}]), json!({"foo": "bar"})),
            (
                json!({"foo": ["bar", "qux", "baz"]}),
                json!([{"op": "remove", "path": "/foo/1"}]),
                json!({"foo": ["bar", "baz"]}),
            ),
            (
                json!({"baz": "qux", "foo": "bar"}),
                json!([{"op": "replace", "path": "/baz", "value": "boo"}]),
                json!({"baz": "boo", "foo": "bar"}),
            ),
            (
                json!({"foo": {"bar": "baz", "waldo": "fred"}, "qux": {"corge": "grault"}}),
                json!([{"op": "move", "from": "/foo/waldo", "path": "/qux/thud"}]),
                json!({"foo": {"bar": "baz"}, "qux": {"corge": "grault", "thud": "fred"}}),
            ),
            (
                json!({"foo": ["all", "grass", "cows", "eat"]}),
                json!([{"op": "move", "from": "/foo/1", "path": "/foo/3"}]),
                json!({"foo": ["all", "cows", "eat", "grass"]}),
            ),
            (
                json!({"baz": "qux", "foo": ["a", 2, "c"]}),
                json!([{"op": "test", "path": "/baz", "value": "qux"}, {"op": "test", "path": "/foo/1", "value": 2}]),
                json!({"baz": "qux", "foo": ["a", 2, "c"]}),
            ),
            (
                json!({"foo": "bar"}),
                json!([{"op": "add", "path": "/child", "value": {"grandchild": {}}}]),
                json!({"foo": "bar", "child": {"grandchild": {}}}),
            ),
            (
                json!({"/": 9, "~1": 10}),
                json!([{"op": "test", "path": "/~01", "value": 10}]),
                json!({"/": 9, "~1": 10}),
            ),
            (
                json!({"foo": ["bar"]}),
                json!([{"op": "add", "path": "/foo/-", "value": ["abc", "def"]}]),
                json!({"foo": ["bar", ["abc", "def"]]}),
            ),
        ] {
            assert_eq!(run(document, patch.clone()), Ok(result), "{patch}");
        }
        for (document, patch) in [
            (json!({"baz": "qux"}), json!([{"op": "test", "path": "/baz", "value": "bar"}])),
            (json!({"foo": "bar"}), json!([{"op": "add", "path": "/baz/bat", "value": "qux"}])),
            (json!({"/": 9, "~1": 10}), json!([{"op": "test", "path": "/~01", "value": "10"}])),
            (json!({"a": [1]}), json!([{"op": "add", "path": "/a/3", "value": 1}])),
            (json!({"a": [1]}), json!([{"op": "remove", "path": "/a/1"}])),
            (json!({"a": 1}), json!([{"op": "remove", "path": "/b"}])),
            (json!({"a": 1}), json!([{"op": "frob", "path": "/a"}])),
            (json!({"a": 1}), json!([{"op": "add", "value": 1}])),
        ] {
            assert!(run(document, patch.clone()).is_err(), "{patch}");
        }
    }

    #[test]
    fn liberties_of_the_reference() {
        assert_eq!(
            run(json!({"a": [1, 2]}), json!([{"op": "replace", "path": "/a/-1", "value": 3}])),
            Ok(json!({"a": [1, 3]})),
        );
        assert_eq!(run(json!({}), json!([{"op": "replace", "path": "/a", "value": 3}])), Ok(json!({"a": 3})));
        assert_eq!(run(json!({"a": {}}), json!([{"op": "test", "path": "/a/z", "value": null}])), Ok(json!({"a": {}})));
    }
}
