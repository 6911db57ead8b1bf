//! What the writer of a CustomResourceDefinition is told.

use portolan_api::meta;
use serde_json::Value;

/// Texts for warnings about a definition.
pub fn warnings(definition: &Value) -> Vec<String> {
    let rules = meta::list(definition, &["spec", "versions"])
        .iter()
        .any(|version| has_rules(&version["schema"]["openAPIV3Schema"]));
    if rules {
        vec!["spec.versions: x-kubernetes-validations rules are kept but not evaluated by this server".to_owned()]
    } else {
        Vec::new()
    }
}

fn has_rules(schema: &Value) -> bool {
    match schema {
        Value::Object(fields) => fields.contains_key("x-kubernetes-validations") || fields.values().any(has_rules),
        Value::Array(items) => items.iter().any(has_rules),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rules_that_are_not_evaluated_are_named() {
        let version = |schema: Value| json!({"spec": {"versions": [{"schema": {"openAPIV3Schema": schema}}]}});
        let plain = version(json!({"type": "object"}));
        assert!(warnings(&plain).is_empty());
        let ruled =
            version(json!({"type": "object", "properties": {"a": {"x-kubernetes-validations": [{"rule": "true"}]}}}));
        assert_eq!(warnings(&ruled).len(), 1);
    }
}
