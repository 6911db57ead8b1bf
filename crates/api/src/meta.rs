//! Object metadata: syntax rules of names and labels, generated names, timestamps, and small accessors over documents.
//!
//! The rules are those of the API machinery ("Object Names and IDs", "Labels and Selectors"); every check returns the
//! texts that a field error carries, so that callers only add the field path.

mod names;
mod time;

pub use names::*;
pub use time::*;

use serde_json::{Map, Value, json};

/// Letters of generated name suffixes: no vowels, so that no words appear, and nothing that looks like another letter.
const SUFFIX_ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// Length of the random suffix of a generated name.
const SUFFIX_LEN: usize = 5;

/// Longest generated name; the base is cut so that base and suffix fit.
const MAX_GENERATED_LEN: usize = 63;

/// A name from `metadata.generateName`: the base, cut if need be, and five characters chosen by `pick(n)`, which
/// returns a number below n.
pub fn generate_name(base: &str, mut pick: impl FnMut(usize) -> usize) -> String {
    let mut end = base.len().min(MAX_GENERATED_LEN - SUFFIX_LEN);
    while !base.is_char_boundary(end) {
        end -= 1;
    }
    let mut name = base[..end].to_owned();
    for _ in 0..SUFFIX_LEN {
        let place = pick(SUFFIX_ALPHABET.len()) % SUFFIX_ALPHABET.len();
        name.push(char::from(SUFFIX_ALPHABET[place]));
    }
    name
}

/// `metadata.name`, empty if absent.
pub fn name(object: &Value) -> &str {
    text(object, &["metadata", "name"])
}

/// `metadata.namespace`, empty if absent.
pub fn namespace(object: &Value) -> &str {
    text(object, &["metadata", "namespace"])
}

/// `metadata.uid`, empty if absent.
pub fn uid(object: &Value) -> &str {
    text(object, &["metadata", "uid"])
}

/// `metadata.resourceVersion`, empty if absent.
pub fn resource_version(object: &Value) -> &str {
    text(object, &["metadata", "resourceVersion"])
}

/// Whether a deletion has been requested.
pub fn is_deleting(object: &Value) -> bool {
    !get(object, &["metadata", "deletionTimestamp"]).is_null()
}

/// A label's value.
pub fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    get(object, &["metadata", "labels"]).get(key).and_then(Value::as_str)
}

/// An annotation's value.
pub fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    get(object, &["metadata", "annotations"]).get(key).and_then(Value::as_str)
}

/// The value at a path of object keys; `null` if any step is missing.
pub fn get<'a>(object: &'a Value, path: &[&str]) -> &'a Value {
    path.iter().fold(object, |value, key| value.get(key).unwrap_or(&Value::Null))
}

/// The string at a path of object keys; empty if absent or of another type.
pub fn text<'a>(object: &'a Value, path: &[&str]) -> &'a str {
    get(object, path).as_str().unwrap_or_default()
}

/// The list at a path of object keys; empty if absent or of another type.
pub fn list<'a>(object: &'a Value, path: &[&str]) -> &'a [Value] {
    get(object, path).as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Sets the value at a path, making objects on the way; a step that is not an object is replaced by one.
pub fn set(object: &mut Value, path: &[&str], value: Value) {
    let Some((last, parents)) = path.split_last() else {
        *object = value;
        return;
    };
    let mut place = object;
    for key in parents {
        place = as_map(place).entry((*key).to_owned()).or_insert_with(|| json!({}));
    }
    as_map(place).insert((*last).to_owned(), value);
}

/// Removes the value at a path and returns it.
pub fn remove(object: &mut Value, path: &[&str]) -> Option<Value> {
    let (last, parents) = path.split_last()?;
    let mut place = object;
    for key in parents {
        place = place.get_mut(key)?;
    }
    place.as_object_mut()?.remove(*last)
}

/// Sets the value at a path, or removes it when `value` is null.
pub fn put(object: &mut Value, path: &[&str], value: Value) {
    if value.is_null() {
        remove(object, path);
    } else {
        set(object, path, value);
    }
}

fn as_map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = json!({});
    }
    value.as_object_mut().expect("just made an object")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_names_end_in_five_letters_and_fit_63() {
        let mut n = 0;
        let mut pick = |below: usize| {
            n += 1;
            n % below
        };
        assert_eq!(generate_name("web-", &mut pick), "web-cdfgh");
        let long = generate_name(&"x".repeat(100), &mut pick);
        assert_eq!(long.len(), 63);
        assert!(long.starts_with(&"x".repeat(58)));
        // A base cut inside a character must not panic.
        assert!(generate_name(&"é".repeat(40), &mut pick).len() <= 63);
    }

    #[test]
    fn paths_are_made_and_removed() {
        let mut object = json!({"spec": "x"});
        set(&mut object, &["spec", "a", "b"], json!(1));
        assert_eq!(object, json!({"spec": {"a": {"b": 1}}}));
        assert_eq!(remove(&mut object, &["spec", "a", "b"]), Some(json!(1)));
        assert_eq!(remove(&mut object, &["no", "such"]), None);
        put(&mut object, &["spec"], Value::Null);
        assert_eq!(object, json!({}));
    }
}
