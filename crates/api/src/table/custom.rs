//! Rows of custom kinds: `additionalPrinterColumns` with simple JSONPaths.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{Column, Row, column};
use crate::meta;

/// Columns of a custom kind: its name, then what its version declares. Without any the age is shown.
pub fn custom_columns(printer_columns: &[Value]) -> Vec<Column> {
    let mut columns = vec![column("Name", "string", 0)];
    if printer_columns.is_empty() {
        columns.push(column("Age", "date", 0));
    }
    for declared in printer_columns {
        columns.push(Column {
            name: meta::text(declared, &["name"]).to_owned(),
            type_: meta::text(declared, &["type"]).to_owned(),
            format: meta::text(declared, &["format"]).to_owned(),
            description: meta::text(declared, &["description"]).to_owned(),
            priority: i32::try_from(meta::get(declared, &["priority"]).as_i64().unwrap_or(0)).unwrap_or(0),
        });
    }
    columns
}

/// The row of a custom object. What a path does not find, or what has another type, is null; dates become ages.
pub fn custom_row(printer_columns: &[Value], object: &Value, now: Timestamp) -> Row {
    let mut cells = vec![json!(meta::name(object))];
    if printer_columns.is_empty() {
        cells.push(super::age(object, now));
    }
    for declared in printer_columns {
        let found = find(object, meta::text(declared, &["jsonPath"]));
        cells.push(cell(&found, meta::text(declared, &["type"]), now));
    }
    Row { cells, conditions: Vec::new() }
}

fn cell(found: &[&Value], type_: &str, now: Timestamp) -> Value {
    let Some(first) = found.first().filter(|value| !value.is_null()) else { return Value::Null };
    match (type_, first) {
        ("date", Value::String(at)) => match meta::parse_time(at) {
            Some(_) => json!(meta::age(at, now)),
            None => json!("<invalid>"),
        },
        ("integer", Value::Number(number)) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => json!(whole),
            (None, Some(number)) => json!(number.trunc()),
            (None, None) => Value::Null,
        },
        ("number", Value::Number(number)) => json!(number),
        ("boolean", Value::Bool(flag)) => json!(flag),
        ("string", _) => {
            let texts: Vec<String> =
                found.iter().map(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned)).collect();
            json!(texts.join(","))
        }
        _ => Value::Null,
    }
}

/// Values at a simple JSONPath: `.a.b`, `.a['b.c']`, `.a[0]`, `.a[*].b`, `.a[?(@.type=="x")].b`.
fn find<'a>(object: &'a Value, path: &str) -> Vec<&'a Value> {
    let mut found = vec![object];
    let mut rest = path.trim().trim_start_matches('$');
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('[') {
            let Some(end) = closing(after) else { return Vec::new() };
            found = found.into_iter().flat_map(|value| bracket(value, &after[..end])).collect();
            rest = &after[end + 1..];
        } else {
            rest = rest.strip_prefix('.').unwrap_or(rest);
            let (key, after) = key(rest);
            if key.is_empty() {
                return Vec::new();
            }
            found = found.into_iter().filter_map(|value| value.get(&key)).collect();
            rest = after;
        }
    }
    found
}

/// A key up to the next dot or bracket; a backslash takes the next character as it is.
fn key(text: &str) -> (String, &str) {
    let mut name = String::new();
    let mut chars = text.char_indices();
    while let Some((i, c)) = chars.next() {
        match c {
            '\\' => name.extend(chars.next().map(|(_, c)| c)),
            '.' | '[' => return (name, &text[i..]),
            c => name.push(c),
        }
    }
    (name, "")
}

/// Place of the bracket that closes, quotes aside.
fn closing(text: &str) -> Option<usize> {
    let mut quote = None;
    for (i, c) in text.char_indices() {
        match (quote, c) {
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (None, ']') => return Some(i),
            _ => {}
        }
    }
    None
}

fn bracket<'a>(value: &'a Value, inside: &str) -> Vec<&'a Value> {
    let inside = inside.trim();
    let items = || value.as_array().map(Vec::as_slice).unwrap_or_default();
    let unquoted = |text: &str| -> Option<String> {
        let text = text.trim();
        ['\'', '"'].iter().find_map(|q| text.strip_prefix(*q)?.strip_suffix(*q)).map(str::to_owned)
    };
    if let Some(key) = unquoted(inside) {
        return value.get(&key).into_iter().collect();
    }
    if inside == "*" {
        return match value {
            Value::Object(map) => map.values().collect(),
            _ => items().iter().collect(),
        };
    }
    if let Some(filter) = inside.strip_prefix("?(").and_then(|text| text.strip_suffix(')')) {
        let Some((left, right)) = filter.split_once("==") else { return Vec::new() };
        let wanted = unquoted(right).unwrap_or_else(|| right.trim().to_owned());
        let path = left.trim().trim_start_matches('@').to_owned();
        return items()
            .iter()
            .filter(|item| {
                find(item, &path)
                    .first()
                    .is_some_and(|v| v.as_str().map_or_else(|| v.to_string(), str::to_owned) == wanted)
            })
            .collect();
    }
    match inside.parse::<i64>() {
        Ok(index) if index >= 0 => usize::try_from(index).ok().and_then(|i| items().get(i)).into_iter().collect(),
        Ok(index) => {
            let back = usize::try_from(index.unsigned_abs()).unwrap_or(usize::MAX);
            items().len().checked_sub(back).and_then(|i| items().get(i)).into_iter().collect()
        }
        Err(_) => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_find_what_printer_columns_ask_for() {
        let object =
            json!({"spec": {"size": 7, "a.b": "dot", "list": [{"type": "x", "v": 1}, {"type": "y]", "v": 2}]}});
        let rows = [
            (".spec.size", vec![json!(7)]),
            (".spec.a\\.b", vec![json!("dot")]),
            (".spec['a.b']", vec![json!("dot")]),
            (".spec.list[0].v", vec![json!(1)]),
            (".spec.list[-1].v", vec![json!(2)]),
            (".spec.list[*].v", vec![json!(1), json!(2)]),
            (".spec.list[?(@.type==\"y]\")].v", vec![json!(2)]),
            (".spec.nope.x", vec![]),
            (".spec.list[", vec![]),
            ("..", vec![]),
        ];
        for (path, want) in rows {
            let got: Vec<Value> = find(&object, path).into_iter().cloned().collect();
            assert_eq!(got, want, "{path}");
        }
    }

    #[test]
    fn cells_have_the_declared_type_or_are_null() {
        let columns = [
            json!({"name": "Size", "type": "integer", "jsonPath": ".spec.size"}),
            json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}),
            json!({"name": "Gone", "type": "string", "jsonPath": ".spec.gone"}),
        ];
        let object =
            json!({"metadata": {"name": "w", "creationTimestamp": "2026-01-01T23:59:00Z"}, "spec": {"size": "x"}});
        let now = super::super::tests::now();
        assert_eq!(custom_row(&columns, &object, now).cells, [json!("w"), Value::Null, json!("60s"), Value::Null]);
        assert_eq!(custom_columns(&[]).iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["Name", "Age"]);
    }
}
