//! Values of custom objects against their OpenAPI v3 schema, with the texts of the reference implementation.

use std::collections::BTreeSet;

use portolan_api::status::FieldError;
use serde_json::{Map, Value};

/// Faults of a document; metadata and type are checked elsewhere.
pub fn validate(schema: &Value, document: &Value) -> Vec<FieldError> {
    let mut faults = Vec::new();
    let Value::Object(fields) = document else { return faults };
    let mut own: Map<String, Value> = fields.clone();
    for field in ["apiVersion", "kind", "metadata"] {
        own.remove(field);
    }
    node(&mut faults, schema, &Value::Object(own), "");
    faults
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_i64() || number.is_u64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn wrong_type(faults: &mut Vec<FieldError>, path: &str, wanted: &str, value: &Value) {
    let found = type_name(value);
    if wanted == "integer" && found == "number" {
        let text = format!("Checked value must be of type integer (default format) in {path}");
        faults.push(FieldError::invalid("<nil>", "", text));
    }
    let text = format!("{path} in body must be of type {wanted}: \"{found}\"");
    faults.push(FieldError::type_invalid(path, found, text));
}

fn node(faults: &mut Vec<FieldError>, schema: &Value, value: &Value, path: &str) {
    let flag = |name: &str| schema.get(name).and_then(Value::as_bool).unwrap_or(false);
    if value.is_null() && flag("nullable") {
        return;
    }
    if flag("x-kubernetes-int-or-string") {
        if !matches!(type_name(value), "integer" | "string") {
            wrong_type(faults, path, "integer,string", value);
        }
    } else if let Some(wanted) = schema.get("type").and_then(Value::as_str) {
        let found = type_name(value);
        let whole = value.as_f64().is_some_and(|n| n.fract() == 0.0);
        let fits = found == wanted || (wanted == "number" && found == "integer") || (wanted == "integer" && whole);
        if !fits {
            return wrong_type(faults, path, wanted, value);
        }
    }
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let texts: Vec<String> =
            allowed.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        faults.push(FieldError::not_supported(path, value.clone(), &texts));
    }
    match value {
        Value::String(text) => string(faults, schema, text, path),
        Value::Number(_) => number(faults, schema, value, path),
        Value::Array(items) => array(faults, schema, items, path),
        Value::Object(fields) => object(faults, schema, fields, path),
        Value::Null | Value::Bool(_) => {}
    }
    combinations(faults, schema, value, path);
}

fn limit(schema: &Value, name: &str) -> Option<usize> {
    schema.get(name).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok())
}

fn string(faults: &mut Vec<FieldError>, schema: &Value, text: &str, path: &str) {
    // The first fault ends the checks, as in the reference implementation.
    let length = text.chars().count();
    if let Some(max) = limit(schema, "maxLength").filter(|max| length > *max) {
        return faults.push(FieldError::too_long(path, max));
    }
    if let Some(min) = limit(schema, "minLength").filter(|min| length < *min) {
        return faults.push(FieldError::invalid(
            path,
            text,
            format!("{path} in body should be at least {min} chars long"),
        ));
    }
    if let Some(pattern) = schema.get("pattern").and_then(Value::as_str) {
        // A pattern that cannot be read matches nothing; RE2 and this engine share their syntax.
        let matches = regex::Regex::new(pattern).is_ok_and(|regex| regex.is_match(text));
        if !matches {
            return faults.push(FieldError::invalid(path, text, format!("{path} in body should match '{pattern}'")));
        }
    }
    if let Some(format) = schema.get("format").and_then(Value::as_str)
        && !format_fits(format, text)
    {
        let why = format!("{path} in body must be of type {format}: {}", portolan_api::status::quoted(text));
        faults.push(FieldError::invalid(path, text, why));
    }
}

/// Whether a text has a format; formats that are not known here are not checked, as upstream ignores unknown ones.
fn format_fits(format: &str, text: &str) -> bool {
    match format {
        "date-time" | "datetime" => text.parse::<jiff::Timestamp>().is_ok(),
        "date" => text.parse::<jiff::civil::Date>().is_ok(),
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "cidr" => text.parse::<ipnet::IpNet>().is_ok(),
        "uuid" | "uuid3" | "uuid4" | "uuid5" => uuid::Uuid::parse_str(text).is_ok(),
        "uri" => text.parse::<http::Uri>().is_ok_and(|uri| uri.scheme().is_some()),
        "byte" => {
            use base64::Engine as _;
            base64::engine::general_purpose::STANDARD.decode(text).is_ok()
        }
        "hostname" => portolan_api::meta::dns1123_subdomain(&text.to_lowercase()).is_empty(),
        _ => true,
    }
}

fn number(faults: &mut Vec<FieldError>, schema: &Value, value: &Value, path: &str) {
    let Some(n) = value.as_f64() else { return };
    let flag = |name: &str| schema.get(name).and_then(Value::as_bool).unwrap_or(false);
    let mut say = |text: String| faults.push(FieldError::invalid(path, value.clone(), text));
    if let Some(max) = schema.get("maximum") {
        let bound = max.as_f64().unwrap_or(f64::MAX);
        if flag("exclusiveMaximum") && n >= bound {
            say(format!("{path} in body should be less than {max}"));
        } else if n > bound {
            say(format!("{path} in body should be less than or equal to {max}"));
        }
    }
    if let Some(min) = schema.get("minimum") {
        let bound = min.as_f64().unwrap_or(f64::MIN);
        if flag("exclusiveMinimum") && n <= bound {
            say(format!("{path} in body should be greater than {min}"));
        } else if n < bound {
            say(format!("{path} in body should be greater than or equal to {min}"));
        }
    }
    if let Some(factor) = schema.get("multipleOf")
        && factor.as_f64().is_some_and(|f| f != 0.0 && (n / f).fract() != 0.0)
    {
        say(format!("{path} in body should be a multiple of {factor}"));
    }
}

fn array(faults: &mut Vec<FieldError>, schema: &Value, items: &[Value], path: &str) {
    if let Some(item_schema) = schema.get("items") {
        for (i, item) in items.iter().enumerate() {
            node(faults, item_schema, item, &format!("{path}[{i}]"));
        }
    }
    if let Some(min) = limit(schema, "minItems").filter(|min| items.len() < *min) {
        faults.push(FieldError::invalid(path, items.len(), format!("{path} in body should have at least {min} items")));
    }
    if let Some(max) = limit(schema, "maxItems").filter(|max| items.len() > *max) {
        faults.push(FieldError::too_many(path, items.len(), max));
    }
    match schema.get("x-kubernetes-list-type").and_then(Value::as_str) {
        Some("set") => duplicates(faults, items.iter().cloned(), path),
        Some("map") => {
            let keys: BTreeSet<&str> = portolan_api::meta::list(schema, &["x-kubernetes-list-map-keys"])
                .iter()
                .filter_map(Value::as_str)
                .collect();
            let key_of = |item: &Value| {
                let picked = keys.iter().filter_map(|key| item.get(*key).map(|v| ((*key).to_owned(), v.clone())));
                Value::Object(picked.collect())
            };
            duplicates(faults, items.iter().map(key_of), path);
        }
        _ => {}
    }
}

fn duplicates(faults: &mut Vec<FieldError>, keys: impl Iterator<Item = Value>, path: &str) {
    let mut seen: BTreeSet<String> = BTreeSet::new();
    for (i, key) in keys.enumerate() {
        if !seen.insert(key.to_string()) {
            faults.push(FieldError::duplicate(format!("{path}[{i}]"), key));
        }
    }
}

fn object(faults: &mut Vec<FieldError>, schema: &Value, fields: &Map<String, Value>, path: &str) {
    if let Some(min) = limit(schema, "minProperties").filter(|min| fields.len() < *min) {
        let why = format!("{path} in body should have at least {min} properties");
        faults.push(FieldError::invalid(path, fields.len(), why));
    }
    if let Some(max) = limit(schema, "maxProperties").filter(|max| fields.len() > *max) {
        faults.push(FieldError::too_many(path, fields.len(), max));
    }
    for name in portolan_api::meta::list(schema, &["required"]).iter().filter_map(Value::as_str) {
        if !fields.contains_key(name) {
            faults.push(FieldError::required(join(path, name), ""));
        }
    }
    let properties = schema.get("properties").and_then(Value::as_object);
    for (key, value) in fields {
        if let Some(known) = properties.and_then(|properties| properties.get(key)) {
            node(faults, known, value, &join(path, key));
        } else if let Some(other) = schema.get("additionalProperties").filter(|other| other.is_object()) {
            node(faults, other, value, &join(path, key));
        }
    }
    let embedded = schema.get("x-kubernetes-embedded-resource").and_then(Value::as_bool).unwrap_or(false);
    if embedded {
        for name in ["apiVersion", "kind"] {
            if fields.get(name).and_then(Value::as_str).unwrap_or_default().is_empty() {
                faults.push(FieldError::required(join(path, name), "must not be empty"));
            }
        }
    }
}

fn combinations(faults: &mut Vec<FieldError>, schema: &Value, value: &Value, path: &str) {
    let schemas = |name: &str| schema.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let passes = |schema: &Value| {
        let mut found = Vec::new();
        node(&mut found, schema, value, path);
        found.is_empty()
    };
    let mut say = |text: String| faults.push(FieldError::invalid(path, value.clone(), text));
    let any = schemas("anyOf");
    if !any.is_empty() && !any.iter().any(passes) {
        say(format!("{path} in body must validate at least one schema (anyOf)"));
    }
    let one = schemas("oneOf");
    if !one.is_empty() {
        match one.iter().filter(|schema| passes(schema)).count() {
            1 => {}
            0 => say(format!("{path} in body must validate one and only one schema (oneOf). Found none valid")),
            n => say(format!(
                "{path} in body must validate one and only one schema (oneOf). Found {n} valid alternatives"
            )),
        }
    }
    let all = schemas("allOf");
    if !all.iter().all(passes) {
        say(format!("{path} in body must validate all the schemas (allOf)"));
    }
    if schema.get("not").is_some_and(passes) {
        say(format!("{path} in body must not validate the schema (not)"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_meet_their_schema_or_say_why() {
        let schema = json!({"type": "object", "required": ["spec"], "properties": {"spec": {"type": "object",
        "required": ["size"], "properties": {
            "size": {"type": "integer", "minimum": 1, "maximum": 10},
            "name": {"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 4},
            "set": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
            "either": {"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"},
        }}}});
        let rows = [
            (json!({"spec": {"size": 1}}), vec![]),
            (json!({}), vec!["spec: Required value"]),
            (
                json!({"spec": {"size": 11}}),
                vec!["spec.size: Invalid value: 11: spec.size in body should be less than or equal to 10"],
            ),
            (
                json!({"spec": {"size": "x"}}),
                vec!["spec.size: Invalid value: \"string\": spec.size in body must be of type integer: \"string\""],
            ),
            (
                json!({"spec": {"size": 1, "name": "A1"}}),
                vec!["spec.name: Invalid value: \"A1\": spec.name in body should match '^[a-z]+$'"],
            ),
            (json!({"spec": {"size": 1, "set": ["a", "a"]}}), vec!["spec.set[1]: Duplicate value: \"a\""]),
            (json!({"spec": {"size": 1, "either": {"a": 1}}}), vec![]),
            (
                json!({"spec": {"size": 1, "either": {}}}),
                vec![
                    "spec.either: Invalid value: {}: spec.either in body must validate one and only one schema (oneOf). Found none valid",
                ],
            ),
        ];
        for (value, want) in rows {
            let got: Vec<String> = validate(&schema, &value).iter().map(ToString::to_string).collect();
            assert_eq!(got, want, "{value}");
        }
    }
}
