//! Sets of field paths in the form of `FieldsV1`.
//!
//! A path element is its text in FieldsV1: `f:name` for a field, `k:{...}` for a list element by its keys, `v:...` for an
//! element of a set, `i:N` for an index.

use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};

/// A set of paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Set {
    /// Elements that are themselves in the set.
    pub(super) members: BTreeSet<String>,
    /// What is in the set below an element.
    pub(super) children: BTreeMap<String, Set>,
}

/// A path element for a field.
pub(super) fn field(name: &str) -> String {
    format!("f:{name}")
}

/// A path element for an element of a set.
pub(super) fn value(value: &Value) -> String {
    format!("v:{value}")
}

/// A path element for an element of a list with keys.
pub(super) fn keys(keys: &Map<String, Value>) -> String {
    // `Map` is sorted by name, as FieldsV1 has it.
    format!("k:{}", Value::Object(keys.clone()))
}

/// An element as error messages show it: `.name`, `[name="c"]`, `[="x"]`, `[0]`.
pub(super) fn show(element: &str) -> String {
    if let Some(name) = element.strip_prefix("f:") {
        return format!(".{name}");
    }
    let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap_or(Value::Null);
    if let Some(keys) = element.strip_prefix("k:") {
        let Value::Object(keys) = parsed(keys) else { return format!("[{keys}]") };
        let keys: Vec<String> = keys.iter().map(|(name, value)| format!("{name}={value}")).collect();
        return format!("[{}]", keys.join(","));
    }
    if let Some(value) = element.strip_prefix("v:") {
        return format!("[={value}]");
    }
    format!("[{}]", element.trim_start_matches("i:"))
}

impl Set {
    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty() && self.children.values().all(Set::is_empty)
    }

    pub(super) fn insert(&mut self, path: &[String]) {
        match path {
            [] => {}
            [last] => {
                self.members.insert(last.clone());
            }
            [first, rest @ ..] => self.children.entry(first.clone()).or_default().insert(rest),
        }
    }

    pub(super) fn union(&self, other: &Set) -> Set {
        let mut result = self.clone();
        result.members.extend(other.members.iter().cloned());
        for (element, child) in &other.children {
            let merged = result.children.get(element).map_or_else(|| child.clone(), |own| own.union(child));
            result.children.insert(element.clone(), merged);
        }
        result
    }

    pub(super) fn intersection(&self, other: &Set) -> Set {
        let mut result = Set { members: &self.members & &other.members, children: BTreeMap::new() };
        for (element, child) in &self.children {
            if let Some(other) = other.children.get(element) {
                result.add_child(element, child.intersection(other));
            }
        }
        result
    }

    /// Paths of this set that the other does not hold.
    pub(super) fn difference(&self, other: &Set) -> Set {
        let mut result = Set { members: &self.members - &other.members, children: BTreeMap::new() };
        for (element, child) in &self.children {
            let rest = other.children.get(element).map_or_else(|| child.clone(), |other| child.difference(other));
            result.add_child(element, rest);
        }
        result
    }

    /// As [`Set::difference`], and what lies below a path of the other set goes too.
    pub(super) fn without_below(&self, other: &Set) -> Set {
        let mut result = Set { members: &self.members - &other.members, children: BTreeMap::new() };
        for (element, child) in &self.children {
            if other.members.contains(element) {
                continue;
            }
            let rest = other.children.get(element).map_or_else(|| child.clone(), |other| child.without_below(other));
            result.add_child(element, rest);
        }
        result
    }

    fn add_child(&mut self, element: &str, child: Set) {
        if !child.is_empty() {
            self.children.insert(element.to_owned(), child);
        }
    }

    /// Whether the set holds exactly this path.
    pub(super) fn has(&self, path: &[String]) -> bool {
        match path {
            [] => false,
            [last] => self.members.contains(last),
            [first, rest @ ..] => self.children.get(first).is_some_and(|child| child.has(rest)),
        }
    }

    /// All paths, those of one level before those below it.
    pub(super) fn paths(&self) -> Vec<Vec<String>> {
        fn walk(set: &Set, prefix: &mut Vec<String>, paths: &mut Vec<Vec<String>>) {
            for element in &set.members {
                let mut path = prefix.clone();
                path.push(element.clone());
                paths.push(path);
            }
            for (element, child) in &set.children {
                prefix.push(element.clone());
                walk(child, prefix, paths);
                prefix.pop();
            }
        }
        let mut paths = Vec::new();
        walk(self, &mut Vec::new(), &mut paths);
        paths
    }

    /// The FieldsV1 form.
    pub(super) fn to_fields(&self) -> Value {
        let mut fields = Map::new();
        for element in &self.members {
            fields.insert(element.clone(), Value::Object(Map::new()));
        }
        for (element, child) in &self.children {
            if child.is_empty() {
                continue;
            }
            let mut inner = child.to_fields();
            if let (true, Value::Object(inner)) = (self.members.contains(element), &mut inner) {
                inner.insert(".".to_owned(), Value::Object(Map::new()));
            }
            fields.insert(element.clone(), inner);
        }
        Value::Object(fields)
    }

    /// Reads the FieldsV1 form, `None` if it is malformed.
    pub(super) fn from_fields(fields: &Value) -> Option<Set> {
        let mut set = Set::default();
        for (element, inner) in fields.as_object()? {
            if element == "." {
                continue;
            }
            let element = normalized(element)?;
            let object = inner.as_object()?;
            if object.is_empty() || object.contains_key(".") {
                set.members.insert(element.clone());
            }
            let child = Set::from_fields(inner)?;
            set.add_child(&element, child);
        }
        Some(set)
    }
}

/// A path element in its canonical text.
fn normalized(element: &str) -> Option<String> {
    let (kind, rest) = element.split_once(':')?;
    match kind {
        "f" => Some(element.to_owned()),
        "i" => rest.parse::<usize>().ok().map(|index| format!("i:{index}")),
        "v" => serde_json::from_str::<Value>(rest).ok().map(|parsed| value(&parsed)),
        "k" => match serde_json::from_str::<Value>(rest).ok()? {
            Value::Object(parsed) => Some(keys(&parsed)),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn fields_round_trip() {
        let fields = json!({"f:metadata": {"f:labels": {".": {}, "f:a": {}}, "f:finalizers": {".": {}, "v:\"x\"": {}}},
            "f:spec": {"f:containers": {"k:{\"name\":\"c\"}": {".": {}, "f:image": {}}}, "f:replicas": {}}});
        let set = Set::from_fields(&fields).unwrap();
        assert_eq!(set.to_fields(), fields);
        assert_eq!(set.paths().len(), 7);
        assert!(Set::from_fields(&json!({"x:y": {}})).is_none());
        assert!(Set::from_fields(&json!({"f:y": 1})).is_none());
    }

    #[test]
    fn set_algebra() {
        let set = |value: Value| Set::from_fields(&value).unwrap();
        let a = set(json!({"f:a": {".": {}, "f:x": {}}, "f:b": {}}));
        let b = set(json!({"f:a": {}, "f:c": {}}));
        assert_eq!(a.union(&b).to_fields(), json!({"f:a": {".": {}, "f:x": {}}, "f:b": {}, "f:c": {}}));
        assert_eq!(a.difference(&b).to_fields(), json!({"f:a": {"f:x": {}}, "f:b": {}}));
        assert_eq!(a.without_below(&b).to_fields(), json!({"f:b": {}}));
        assert_eq!(a.intersection(&b).to_fields(), json!({"f:a": {}}));
        assert_eq!(a.difference(&b).union(&a.intersection(&b)), a);
    }

    #[test]
    fn elements_show_as_in_messages() {
        for (element, shown) in [
            ("f:spec", ".spec"),
            ("k:{\"containerPort\":80,\"protocol\":\"TCP\"}", "[containerPort=80,protocol=\"TCP\"]"),
            ("v:\"x\"", "[=\"x\"]"),
            ("i:3", "[3]"),
        ] {
            assert_eq!(show(element), shown);
        }
    }
}
