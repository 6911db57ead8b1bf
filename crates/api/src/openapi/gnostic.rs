//! OpenAPI v2 as the protobuf message that kubectl before 1.29 downloads.
//!
//! Field numbers are those of `openapi.v2` in the gnostic models (OpenAPIv2.proto). Extensions travel as YAML, for which
//! JSON will do.

use serde_json::{Map, Value};

/// A protobuf message being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(u8::try_from(value & 0x7f).unwrap_or(0) | 0x80);
            value >>= 7;
        }
        self.0.push(u8::try_from(value).unwrap_or(0));
    }

    fn bytes(&mut self, number: u64, content: &[u8]) {
        self.varint(number << 3 | 2);
        self.varint(content.len() as u64);
        self.0.extend_from_slice(content);
    }

    /// A text field; absent and empty ones are left out.
    fn text(&mut self, number: u64, value: Option<&Value>) {
        if let Some(text) = value.and_then(Value::as_str)
            && !text.is_empty()
        {
            self.bytes(number, text.as_bytes());
        }
    }

    fn texts(&mut self, number: u64, value: Option<&Value>) {
        for text in value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
            self.bytes(number, text.as_bytes());
        }
    }

    fn flag(&mut self, number: u64, value: Option<&Value>) {
        if value.and_then(Value::as_bool) == Some(true) {
            self.varint(number << 3);
            self.varint(1);
        }
    }

    fn message(&mut self, number: u64, message: Message) {
        self.bytes(number, &message.0);
    }

    /// A `NamedX` entry: name in field 1, value in field 2.
    fn named(&mut self, number: u64, name: &str, value: Message) {
        let mut entry = Message::default();
        entry.bytes(1, name.as_bytes());
        entry.message(2, value);
        self.message(number, entry);
    }

    fn extensions(&mut self, number: u64, members: &Map<String, Value>) {
        for (name, value) in members.iter().filter(|(name, _)| name.starts_with("x-")) {
            self.named(number, name, any(value));
        }
    }
}

/// An `Any` with the value as YAML.
fn any(value: &Value) -> Message {
    let mut message = Message::default();
    message.bytes(2, format!("{value}\n").as_bytes());
    message
}

pub(super) fn document(document: &Value) -> Vec<u8> {
    let mut message = Message::default();
    message.text(1, document.get("swagger"));
    if let Some(info) = document.get("info") {
        let mut inner = Message::default();
        inner.text(1, info.get("title"));
        inner.text(2, info.get("version"));
        message.message(2, inner);
    }
    if let Some(Value::Object(paths)) = document.get("paths") {
        let mut inner = Message::default();
        for (name, item) in paths {
            inner.named(2, name, path_item(item));
        }
        message.message(8, inner);
    }
    if let Some(Value::Object(definitions)) = document.get("definitions") {
        let mut inner = Message::default();
        for (name, definition) in definitions {
            inner.named(1, name, schema(definition));
        }
        message.message(9, inner);
    }
    message.0
}

fn path_item(item: &Value) -> Message {
    let mut message = Message::default();
    for (method, number) in [("get", 2), ("put", 3), ("post", 4), ("delete", 5), ("patch", 8)] {
        if let Some(Value::Object(members)) = item.get(method) {
            message.message(number, operation(members));
        }
    }
    parameters(&mut message, 9, item.get("parameters"));
    message
}

fn operation(members: &Map<String, Value>) -> Message {
    let mut message = Message::default();
    message.text(3, members.get("description"));
    message.text(5, members.get("operationId"));
    message.texts(6, members.get("produces"));
    message.texts(7, members.get("consumes"));
    parameters(&mut message, 8, members.get("parameters"));
    if let Some(Value::Object(responses)) = members.get("responses") {
        let mut inner = Message::default();
        for (code, response) in responses {
            let mut answer = Message::default();
            answer.text(1, response.get("description"));
            if let Some(content) = response.get("schema") {
                let mut item = Message::default();
                item.message(1, schema(content));
                answer.message(2, item);
            }
            let mut value = Message::default();
            value.message(1, answer);
            inner.named(1, code, value);
        }
        message.message(9, inner);
    }
    message.extensions(13, members);
    message
}

fn parameters(message: &mut Message, number: u64, list: Option<&Value>) {
    for parameter in list.and_then(Value::as_array).into_iter().flatten() {
        let place = parameter.get("in").and_then(Value::as_str).unwrap_or_default();
        let mut inner = Message::default();
        if place == "body" {
            let mut body = Message::default();
            body.text(1, parameter.get("description"));
            body.text(2, parameter.get("name"));
            body.text(3, parameter.get("in"));
            body.flag(4, parameter.get("required"));
            if let Some(content) = parameter.get("schema") {
                body.message(5, schema(content));
            }
            inner.message(1, body);
        } else {
            let mut sub = Message::default();
            sub.flag(1, parameter.get("required"));
            sub.text(2, parameter.get("in"));
            sub.text(3, parameter.get("description"));
            sub.text(4, parameter.get("name"));
            // Query parameters have one field more before the type.
            let (shift, kind) = if place == "query" { (1, 3) } else { (0, 4) };
            sub.text(5 + shift, parameter.get("type"));
            sub.flag(19 + shift, parameter.get("uniqueItems"));
            let mut non_body = Message::default();
            non_body.message(kind, sub);
            inner.message(2, non_body);
        }
        let mut item = Message::default();
        item.message(1, inner);
        message.message(number, item);
    }
}

fn schema(value: &Value) -> Message {
    let mut message = Message::default();
    let Value::Object(members) = value else { return message };
    message.text(1, members.get("$ref"));
    message.text(2, members.get("format"));
    message.text(3, members.get("title"));
    message.text(4, members.get("description"));
    if let Some(default) = members.get("default") {
        message.message(5, any(default));
    }
    message.texts(19, members.get("required"));
    for value in members.get("enum").and_then(Value::as_array).into_iter().flatten() {
        message.message(20, any(value));
    }
    match members.get("additionalProperties") {
        Some(Value::Bool(allowed)) => {
            let mut item = Message::default();
            item.flag(2, Some(&Value::Bool(*allowed)));
            message.message(21, item);
        }
        Some(inner @ Value::Object(_)) => {
            let mut item = Message::default();
            item.message(1, schema(inner));
            message.message(21, item);
        }
        _ => {}
    }
    // Version 2 has no null: a field that may be null has no type there.
    let nullable = members.get("nullable").and_then(Value::as_bool) == Some(true);
    if let (false, Some(Value::String(ty))) = (nullable, members.get("type")) {
        let mut item = Message::default();
        item.bytes(1, ty.as_bytes());
        message.message(22, item);
    }
    if let Some(items @ Value::Object(_)) = members.get("items") {
        let mut item = Message::default();
        item.message(1, schema(items));
        message.message(23, item);
    }
    for part in members.get("allOf").and_then(Value::as_array).into_iter().flatten() {
        message.message(24, schema(part));
    }
    if let Some(Value::Object(properties)) = members.get("properties") {
        let mut inner = Message::default();
        for (name, property) in properties {
            inner.named(1, name, schema(property));
        }
        message.message(25, inner);
    }
    message.extensions(31, members);
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_small_document_in_bytes() {
        let bytes = document(&json!({"swagger": "2.0", "info": {"title": "t", "version": "v"},
            "definitions": {"a": {"type": "object", "x-k": [1]}}}));
        let expected: Vec<u8> = [
            &b"\x0a\x032.0"[..],
            &b"\x12\x06\x0a\x01t\x12\x01v"[..],
            // definitions, one entry, its name, its schema
            &b"\x4a\x22\x0a\x20\x0a\x01a\x12\x1b"[..],
            &b"\xb2\x01\x08\x0a\x06object"[..],
            &b"\xfa\x01\x0d\x0a\x03x-k\x12\x06\x12\x04[1]\n"[..],
        ]
        .concat();
        assert_eq!(bytes, expected);
    }
}
