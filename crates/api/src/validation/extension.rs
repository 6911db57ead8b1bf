//! Rules of CustomResourceDefinitions.

use serde_json::{Value, json};
use std::collections::BTreeSet;

use super::{Faults, strings};
use crate::meta;
use crate::status::FieldError;

pub(super) fn definition(faults: &mut Faults, new: &Value, old: Option<&Value>) {
    let group = meta::text(new, &["spec", "group"]);
    let plural = meta::text(new, &["spec", "names", "plural"]);
    // Neither part can change later, so the name is judged once.
    if old.is_none() && meta::name(new) != format!("{plural}.{group}") {
        faults.invalid("metadata.name", meta::name(new), "must be spec.names.plural+\".\"+spec.group");
    }
    faults.required_syntax("spec.group", group, meta::dns1123_subdomain);
    if !group.is_empty() && !group.contains('.') {
        faults.invalid("spec.group", group, "should be a domain with at least one dot");
    }
    match meta::text(new, &["spec", "scope"]) {
        "" => faults.required("spec.scope", ""),
        scope => faults.one_of("spec.scope", scope, &["Cluster", "Namespaced"]),
    }
    versions(faults, meta::list(new, &["spec", "versions"]));
    names(faults, meta::get(new, &["spec", "names"]));
    if let Some(strategy) = meta::get(new, &["spec", "conversion", "strategy"]).as_str() {
        // Webhooks are never called here, so a definition that needs one is refused rather than served wrongly.
        faults.one_of("spec.conversion.strategy", strategy, &["None"]);
    }
    stored_versions(faults, new);
}

fn versions(faults: &mut Faults, versions: &[Value]) {
    let field = "spec.versions";
    if let Some(first) = versions.first() {
        // The first name also answers for the older single-version field.
        let name = meta::text(first, &["name"]);
        faults.syntax("spec.version", name, meta::dns1035_label(name));
    }
    let mut names = BTreeSet::new();
    for (i, version) in versions.iter().enumerate() {
        let at = |part: &str| format!("{field}[{i}].{part}");
        let name = meta::text(version, &["name"]);
        faults.syntax(&at("name"), name, meta::dns1035_label(name));
        if !names.insert(name) {
            faults.add(FieldError::invalid_text(field, versions_text(versions), "must contain unique version names"));
        }
        let schema = meta::get(version, &["schema", "openAPIV3Schema"]);
        if schema.is_null() {
            faults.required(at("schema.openAPIV3Schema"), "");
        } else {
            match meta::text(schema, &["type"]) {
                "object" => {}
                "" => faults.required(at("schema.openAPIV3Schema.type"), "must not be empty at the root"),
                other => faults.invalid(at("schema.openAPIV3Schema.type"), other, "must be object at the root"),
            }
        }
        for (c, column) in meta::list(version, &["additionalPrinterColumns"]).iter().enumerate() {
            let at = |part: &str| format!("{field}[{i}].additionalPrinterColumns[{c}].{part}");
            if meta::text(column, &["name"]).is_empty() {
                faults.required(at("name"), "");
            }
            let known = ["boolean", "date", "integer", "number", "string"];
            faults.one_of(at("type"), meta::text(column, &["type"]), &known);
            if meta::text(column, &["jsonPath"]).is_empty() {
                faults.required(at("jsonPath"), "");
            }
        }
    }
    let storage = versions.iter().filter(|version| meta::get(version, &["storage"]) == true).count();
    if storage != 1 {
        let text = "must have exactly one version marked as storage version";
        faults.add(FieldError::invalid_text(field, versions_text(versions), text));
    }
}

/// Versions as the reference implementation prints them: without schemas and columns, which it keeps elsewhere.
fn versions_text(versions: &[Value]) -> String {
    let one = |version: &Value| {
        let flag = |field: &str| meta::get(version, &[field]) == true;
        format!(
            "{{\"Name\":{},\"Served\":{},\"Storage\":{},\"Deprecated\":{},\"DeprecationWarning\":{},\"Schema\":null,\
             \"Subresources\":null,\"AdditionalPrinterColumns\":null,\"SelectableFields\":null}}",
            json!(meta::text(version, &["name"])),
            flag("served"),
            flag("storage"),
            flag("deprecated"),
            meta::get(version, &["deprecationWarning"]),
        )
    };
    format!("[{}]", versions.iter().map(one).collect::<Vec<_>>().join(","))
}

/// The versions that objects have ever been stored in must hold the one they are stored in now.
fn stored_versions(faults: &mut Faults, new: &Value) {
    let field = "status.storedVersions";
    let stored = strings(new, &["status", "storedVersions"]);
    if stored.is_empty() {
        faults.invalid(field, Value::Null, "must have at least one stored version");
        return;
    }
    let storage = meta::list(new, &["spec", "versions"])
        .iter()
        .rev()
        .find(|version| meta::get(version, &["storage"]) == true)
        .map(|version| meta::text(version, &["name"]));
    if let Some(storage) = storage.filter(|name| !stored.contains(name)) {
        faults.invalid(field, json!(stored), format!("must have the storage version {storage}"));
    }
}

fn names(faults: &mut Faults, names: &Value) {
    let at = |part: &str| format!("spec.names.{part}");
    faults.required_syntax(&at("plural"), meta::text(names, &["plural"]), meta::dns1035_label);
    faults.required_syntax(&at("singular"), meta::text(names, &["singular"]), meta::dns1035_label);
    // Kinds are CamelCase; otherwise they follow the rule of labels.
    let camel = |name: &str| -> Vec<String> {
        let texts = meta::dns1035_label(&name.to_lowercase());
        texts.into_iter().map(|text| format!("may have mixed case, but should otherwise match: {text}")).collect()
    };
    faults.required_syntax(&at("kind"), meta::text(names, &["kind"]), camel);
    faults.required_syntax(&at("listKind"), meta::text(names, &["listKind"]), camel);
    for list in ["shortNames", "categories"] {
        for (i, name) in strings(names, &[list]).into_iter().enumerate() {
            faults.syntax(&format!("{}[{i}]", at(list)), name, meta::dns1035_label(name));
        }
    }
    let (kind, list_kind) = (meta::text(names, &["kind"]), meta::text(names, &["listKind"]));
    if !kind.is_empty() && kind == list_kind {
        faults.add(FieldError::invalid(at("listKind"), list_kind, "kind and listKind may not be the same"));
    }
}

/// What stays while objects may exist.
pub(super) fn definition_update(faults: &mut Faults, new: &Value, old: &Value) {
    for path in [["spec", "group"], ["spec", "scope"]] {
        faults.unchanged(&path.join("."), meta::get(new, &path), meta::get(old, &path));
    }
    for part in ["plural", "kind"] {
        let path = ["spec", "names", part];
        faults.unchanged(&path.join("."), meta::get(new, &path), meta::get(old, &path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults_of(change: impl Fn(&mut Value)) -> Vec<String> {
        let mut definition = json!({
            "metadata": {"name": "widgets.example.com"},
            "spec": {
                "group": "example.com",
                "scope": "Namespaced",
                "names": {"plural": "widgets", "singular": "widget", "kind": "Widget", "listKind": "WidgetList"},
                "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"type": "object"}}}],
            },
            "status": {"storedVersions": ["v1"]},
        });
        change(&mut definition);
        let mut faults = Faults::default();
        self::definition(&mut faults, &definition, None);
        faults.list.iter().map(|fault| format!("{} {}", fault.field, fault.reason())).collect()
    }

    #[test]
    fn definitions_are_judged() {
        type Change = fn(&mut Value);
        let rows: [(&str, Change, &[&str]); 8] = [
            ("a_good_one", |_| {}, &[]),
            ("another_name", |d| d["metadata"]["name"] = json!("x.example.com"), &["metadata.name FieldValueInvalid"]),
            ("an_unknown_scope", |d| d["spec"]["scope"] = json!("Galaxy"), &["spec.scope FieldValueNotSupported"]),
            ("no_versions", |d| d["spec"]["versions"] = json!([]), &["spec.versions FieldValueInvalid"]),
            (
                "no_schema",
                |d| d["spec"]["versions"][0]["schema"] = json!(null),
                &["spec.versions[0].schema.openAPIV3Schema FieldValueRequired"],
            ),
            (
                "no_storage_version",
                |d| d["spec"]["versions"][0]["storage"] = json!(false),
                &["spec.versions FieldValueInvalid"],
            ),
            (
                "another_storage_version",
                |d| d["status"]["storedVersions"] = json!(["v0"]),
                &["status.storedVersions FieldValueInvalid"],
            ),
            (
                "a_webhook",
                |d| d["spec"]["conversion"] = json!({"strategy": "Webhook"}),
                &["spec.conversion.strategy FieldValueNotSupported"],
            ),
        ];
        for (name, change, want) in rows {
            assert_eq!(faults_of(change), want, "{name}");
        }
    }
}
