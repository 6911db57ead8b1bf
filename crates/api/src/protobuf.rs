//! Decoding of `application/vnd.kubernetes.protobuf` request bodies into documents.
//!
//! One table-driven reader serves all kinds: field numbers come from the schema table. Unknown numbers are skipped, as a
//! newer client may send them. Answers are always JSON, which every client accepts.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::schema::{DocumentType, Struct, Type, Types};
use crate::status::Status;
use crate::strict::{format_micros, format_seconds, parse_json};

/// What every body begins with ("k8s" and a zero).
pub const MAGIC: [u8; 4] = [0x6b, 0x38, 0x73, 0x00];
/// Deepest nesting of messages.
const MAX_DEPTH: usize = 100;

/// Decodes an enveloped message into the JSON form of the object, `apiVersion` and `kind` included.
///
/// `expected` is the `(group, version, kind)` to assume when the envelope names none.
///
/// # Errors
/// 400 for what is no enveloped message, for an unknown kind, and for a malformed message.
pub fn decode(body: &[u8], expected: Option<(&str, &str, &str)>) -> Result<Value, Status> {
    let bad = |why: &str| {
        let kind = expected.map_or("object", |(_, _, kind)| kind);
        Status::bad_request(format!("the object provided is unrecognized (must be of type {kind}): {why}"))
    };
    let envelope = body
        .strip_prefix(&MAGIC)
        .ok_or_else(|| bad("provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]"))?;
    let (mut api_version, mut kind, mut raw, mut content_type) = (String::new(), String::new(), &[][..], String::new());
    for field in Reader::new(envelope) {
        match field.map_err(bad)? {
            (1, Wire::Bytes(type_meta)) => {
                for field in Reader::new(type_meta) {
                    match field.map_err(bad)? {
                        (1, Wire::Bytes(text)) => api_version = String::from_utf8_lossy(text).into_owned(),
                        (2, Wire::Bytes(text)) => kind = String::from_utf8_lossy(text).into_owned(),
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            (4, Wire::Bytes(text)) => content_type = String::from_utf8_lossy(text).into_owned(),
            _ => {}
        }
    }
    if let Some((group, version, expected_kind)) = expected {
        if api_version.is_empty() {
            api_version = crate::schema::join_api_version(group, version);
        }
        if kind.is_empty() {
            kind = expected_kind.to_owned();
        }
    }
    let mut value = if content_type == "application/json" {
        parse_json(raw).map_err(|error| bad(&error))?.into_value()
    } else {
        let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
        let ty = DocumentType::builtin(group, version, &kind)
            .ok_or_else(|| bad(&format!("no kind {kind:?} is registered for version {api_version:?}")))?;
        let decoder = Decoder { types: ty.types() };
        let mut members = Map::new();
        decoder.message(ty.root(), raw, 0, &mut members).map_err(bad)?;
        Value::Object(members)
    };
    if let Value::Object(members) = &mut value {
        members.insert("apiVersion".to_owned(), json!(api_version));
        members.insert("kind".to_owned(), json!(kind));
    }
    Ok(value)
}

/// A field's value on the wire.
#[derive(Clone, Copy, Debug)]
enum Wire<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// Iterates over the fields of a message.
struct Reader<'a> {
    rest: &'a [u8],
}

const MALFORMED: &str = "proto: malformed message";

impl<'a> Reader<'a> {
    fn new(rest: &'a [u8]) -> Self {
        Reader { rest }
    }

    fn varint(&mut self) -> Result<u64, &'static str> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let (&byte, rest) = self.rest.split_first().ok_or("unexpected EOF")?;
            self.rest = rest;
            if shift < 64 {
                value |= u64::from(byte & 0x7f) << shift;
            }
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("proto: integer overflow")
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], &'static str> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or("unexpected EOF")?;
        self.rest = rest;
        Ok(taken)
    }

    fn field(&mut self) -> Result<(u32, Wire<'a>), &'static str> {
        let tag = self.varint()?;
        let number = u32::try_from(tag >> 3).map_err(|_| MALFORMED)?;
        let value = match tag & 7 {
            0 => Wire::Varint(self.varint()?),
            1 => Wire::Fixed64(u64::from_le_bytes(self.take(8)?.try_into().map_err(|_| MALFORMED)?)),
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| MALFORMED)?;
                Wire::Bytes(self.take(length)?)
            }
            5 => Wire::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().map_err(|_| MALFORMED)?)),
            _ => return Err("proto: illegal wireType"),
        };
        if number == 0 { Err("proto: illegal tag 0") } else { Ok((number, value)) }
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = Result<(u32, Wire<'a>), &'static str>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}

struct Decoder<'t> {
    types: &'t Types,
}

impl Decoder<'_> {
    fn message(
        &self,
        structure: &Struct,
        bytes: &[u8],
        depth: usize,
        members: &mut Map<String, Value>,
    ) -> Result<(), &'static str> {
        if depth > MAX_DEPTH {
            return Err("proto: message is nested too deeply");
        }
        for field in Reader::new(bytes) {
            let (number, wire) = field?;
            if let Some((_, id)) = structure.inlined.iter().find(|(inlined, _)| *inlined == number) {
                if let Wire::Bytes(inner) = wire {
                    self.message(self.types.get(*id), inner, depth + 1, members)?;
                }
                continue;
            }
            let own = structure.own.iter().map(|at| &structure.fields[usize::from(*at)]);
            let Some(field) = own.into_iter().find(|field| field.number == number) else { continue };
            let name = field.name.as_ref();
            match field.ty.target() {
                Type::List { element, items: false } => {
                    let list = members.entry(name).or_insert_with(|| json!([]));
                    let Value::Array(list) = list else { return Err(MALFORMED) };
                    match (element.target(), wire) {
                        // Numbers may come packed into one field.
                        (Type::Int { .. } | Type::Bool, Wire::Bytes(packed)) => {
                            let mut reader = Reader::new(packed);
                            while !reader.rest.is_empty() {
                                let number = reader.varint()?;
                                list.push(self.value(element, Wire::Varint(number), depth)?);
                            }
                        }
                        _ => list.push(self.value(element, wire, depth)?),
                    }
                }
                Type::Map(element) => {
                    let Wire::Bytes(entry) = wire else { return Err(MALFORMED) };
                    let (mut key, mut value) = (String::new(), None);
                    for field in Reader::new(entry) {
                        match field? {
                            (1, Wire::Bytes(text)) => key = String::from_utf8_lossy(text).into_owned(),
                            (2, wire) => value = Some(self.value(element, wire, depth)?),
                            _ => {}
                        }
                    }
                    let map = members.entry(name).or_insert_with(|| json!({}));
                    let Value::Object(map) = map else { return Err(MALFORMED) };
                    // Strict decoding turns a null into the zero value of the type.
                    map.insert(key, value.unwrap_or(Value::Null));
                }
                other => {
                    let value = self.value(other, wire, depth)?;
                    members.insert(name.to_owned(), value);
                }
            }
        }
        Ok(())
    }

    #[expect(clippy::cast_possible_wrap, reason = "the wire carries two's complement")]
    fn value(&self, ty: &Type, wire: Wire<'_>, depth: usize) -> Result<Value, &'static str> {
        Ok(match (ty.target(), wire) {
            (Type::Bool, Wire::Varint(number)) => Value::Bool(number != 0),
            (Type::Int { signed: true, .. }, Wire::Varint(number)) => json!(number as i64),
            (Type::Int { signed: false, .. }, Wire::Varint(number)) => json!(number),
            (Type::Int { .. }, Wire::Fixed64(number)) => json!(number as i64),
            (Type::Int { .. }, Wire::Fixed32(number)) => json!(number),
            (Type::Float, Wire::Fixed64(bits)) => json!(f64::from_bits(bits)),
            (Type::Float, Wire::Fixed32(bits)) => json!(f32::from_bits(bits)),
            (Type::String { .. }, Wire::Bytes(text)) => Value::String(String::from_utf8_lossy(text).into_owned()),
            (Type::Bytes, Wire::Bytes(bytes)) => Value::String(STANDARD.encode(bytes)),
            (Type::Struct(id), Wire::Bytes(bytes)) => {
                let mut members = Map::new();
                self.message(self.types.get(*id), bytes, depth + 1, &mut members)?;
                Value::Object(members)
            }
            (Type::Time, Wire::Bytes(bytes)) => {
                let (seconds, nanos) = timestamp(bytes)?;
                if (seconds, nanos) == (0, 0) { Value::Null } else { format_seconds(seconds).into() }
            }
            (Type::MicroTime, Wire::Bytes(bytes)) => {
                let (seconds, nanos) = timestamp(bytes)?;
                if (seconds, nanos) == (0, 0) { Value::Null } else { format_micros(seconds, nanos).into() }
            }
            (Type::Duration, Wire::Bytes(bytes)) => {
                let nanos = first_varint(bytes, 1)?;
                Value::String(go_duration(nanos as i64))
            }
            (Type::Quantity, Wire::Bytes(bytes)) => match first_bytes(bytes, 1)? {
                Some(text) => Value::String(String::from_utf8_lossy(text).into_owned()),
                None => json!("0"),
            },
            (Type::IntOrString, Wire::Bytes(bytes)) => {
                if first_varint(bytes, 1)? == 0 {
                    json!(first_varint(bytes, 2)? as i64)
                } else {
                    Value::String(String::from_utf8_lossy(first_bytes(bytes, 3)?.unwrap_or_default()).into_owned())
                }
            }
            (Type::Fields | Type::Raw | Type::Any, Wire::Bytes(bytes)) => match first_bytes(bytes, 1)? {
                None => Value::Null,
                Some(raw) if raw.starts_with(&MAGIC) => decode(raw, None).map_err(|_| MALFORMED)?,
                Some(raw) => parse_json(raw).map_err(|_| "proto: embedded JSON is malformed")?.into_value(),
            },
            (Type::SchemaOrArray(id), Wire::Bytes(bytes)) => self.union(*id, bytes, depth)?,
            (Type::SchemaOrStrings(id), Wire::Bytes(bytes)) => match first_bytes(bytes, 1)? {
                Some(_) => self.union(*id, bytes, depth)?,
                None => {
                    let mut texts = Vec::new();
                    for field in Reader::new(bytes) {
                        if let (2, Wire::Bytes(text)) = field? {
                            texts.push(Value::String(String::from_utf8_lossy(text).into_owned()));
                        }
                    }
                    Value::Array(texts)
                }
            },
            (Type::SchemaOrBool(id), Wire::Bytes(bytes)) => match first_bytes(bytes, 2)? {
                Some(schema) => self.value(&Type::Struct(*id), Wire::Bytes(schema), depth)?,
                None => Value::Bool(first_varint(bytes, 1)? != 0),
            },
            (Type::List { element, .. }, Wire::Bytes(bytes)) => {
                let mut items = Vec::new();
                for field in Reader::new(bytes) {
                    if let (1, wire) = field? {
                        items.push(self.value(element, wire, depth + 1)?);
                    }
                }
                Value::Array(items)
            }
            _ => return Err("proto: wrong wireType"),
        })
    }

    /// A schema in field 1, or a list of them in field 2.
    fn union(&self, id: crate::schema::StructId, bytes: &[u8], depth: usize) -> Result<Value, &'static str> {
        let mut list = Vec::new();
        for field in Reader::new(bytes) {
            match field? {
                (1, wire) => return self.value(&Type::Struct(id), wire, depth + 1),
                (2, wire) => list.push(self.value(&Type::Struct(id), wire, depth + 1)?),
                _ => {}
            }
        }
        Ok(Value::Array(list))
    }
}

fn first_varint(bytes: &[u8], wanted: u32) -> Result<u64, &'static str> {
    for field in Reader::new(bytes) {
        if let (number, Wire::Varint(value)) = field?
            && number == wanted
        {
            return Ok(value);
        }
    }
    Ok(0)
}

fn first_bytes(bytes: &[u8], wanted: u32) -> Result<Option<&[u8]>, &'static str> {
    for field in Reader::new(bytes) {
        if let (number, Wire::Bytes(value)) = field?
            && number == wanted
        {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

#[expect(clippy::cast_possible_wrap, reason = "the wire carries two's complement")]
fn timestamp(bytes: &[u8]) -> Result<(i64, u32), &'static str> {
    let nanos = u32::try_from(first_varint(bytes, 2)?).map_err(|_| MALFORMED)?;
    Ok((first_varint(bytes, 1)? as i64, nanos))
}

/// A duration as Go prints it, such as `1m30s`.
fn go_duration(nanos: i64) -> String {
    if nanos == 0 {
        return "0s".to_owned();
    }
    let sign = if nanos < 0 { "-" } else { "" };
    let total = nanos.unsigned_abs();
    let fraction = |value: u64, unit: u64, name: &str| {
        let rest = value % unit;
        let digits = unit.ilog10() as usize;
        let text = format!("{rest:0digits$}");
        let text = text.trim_end_matches('0');
        let dot = if text.is_empty() { "" } else { "." };
        format!("{}{dot}{text}{name}", value / unit)
    };
    let text = match total {
        0..1_000 => format!("{total}ns"),
        1_000..1_000_000 => fraction(total, 1_000, "µs"),
        1_000_000..1_000_000_000 => fraction(total, 1_000_000, "ms"),
        _ => {
            let seconds = total / 1_000_000_000;
            let rest = fraction(total % 60_000_000_000, 1_000_000_000, "s");
            match (seconds / 3600, seconds / 60 % 60) {
                (0, 0) => rest,
                (0, minutes) => format!("{minutes}m{rest}"),
                (hours, minutes) => format!("{hours}h{minutes}m{rest}"),
            }
        }
    };
    format!("{sign}{text}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::strict::{FieldValidation, Format};

    /// A length-delimited field.
    fn bytes(number: u8, content: &[u8]) -> Vec<u8> {
        let mut field = vec![number << 3 | 2];
        let mut length = content.len();
        while length >= 0x80 {
            field.push(u8::try_from(length & 0x7f).unwrap() | 0x80);
            length >>= 7;
        }
        field.push(u8::try_from(length).unwrap());
        field.extend_from_slice(content);
        field
    }

    fn varint(number: u8, value: u8) -> Vec<u8> {
        vec![number << 3, value]
    }

    fn envelope(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let type_meta = [bytes(1, api_version.as_bytes()), bytes(2, kind.as_bytes())].concat();
        [MAGIC.to_vec(), bytes(1, &type_meta), bytes(2, raw), bytes(3, b""), bytes(4, b"")].concat()
    }

    #[test]
    fn a_deployment_decodes_as_its_json() {
        let port = [bytes(1, b"web"), varint(3, 80), bytes(4, b"TCP")].concat();
        let probe_handler = bytes(2, &[bytes(1, b"/"), bytes(2, &[varint(1, 1), bytes(3, b"web")].concat())].concat());
        let probe = [bytes(1, &probe_handler), varint(4, 7)].concat();
        let limits = bytes(1, &[bytes(1, b"cpu"), bytes(2, &bytes(1, b"500m"))].concat());
        let container =
            [bytes(1, b"c"), bytes(2, b"app:1"), bytes(6, &port), bytes(8, &limits), bytes(10, &probe)].concat();
        let secret = bytes(2, &bytes(6, &bytes(1, b"s")));
        let volume = [bytes(1, b"v"), secret].concat();
        let template = bytes(2, &[bytes(1, &volume), bytes(2, &container)].concat());
        let selector = bytes(1, &[bytes(1, b"app"), bytes(2, b"web")].concat());
        let spec = [varint(1, 2), bytes(2, &selector), bytes(3, &template)].concat();
        let time = [varint(1, 60)].concat();
        let metadata = [bytes(1, b"web"), bytes(8, &time)].concat();
        let body =
            envelope("apps/v1", "Deployment", &[bytes(1, &metadata), bytes(2, &spec), vec![0xf8, 0x01, 1]].concat());
        let value = decode(&body, None).unwrap();
        assert_eq!(
            value,
            json!({"apiVersion": "apps/v1", "kind": "Deployment",
                "metadata": {"name": "web", "creationTimestamp": "1970-01-01T00:01:00Z"},
                "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": {"spec": {
                    "volumes": [{"name": "v", "secret": {"secretName": "s"}}],
                    "containers": [{"name": "c", "image": "app:1",
                        "ports": [{"name": "web", "containerPort": 80, "protocol": "TCP"}],
                        "resources": {"limits": {"cpu": "500m"}},
                        "livenessProbe": {"httpGet": {"path": "/", "port": "web"}, "periodSeconds": 7}}]}}}}),
        );
        let ty = DocumentType::builtin("apps", "v1", "Deployment").unwrap();
        let strict = crate::strict::decode(&ty, Format::Protobuf, &body, FieldValidation::Strict).unwrap();
        let same = crate::strict::admit(&ty, value, FieldValidation::Strict).unwrap();
        assert_eq!(strict.value, same.value);
    }

    #[test]
    fn damaged_bodies_are_errors() {
        let body = envelope("v1", "ConfigMap", &bytes(1, &bytes(1, b"name")));
        assert!(decode(&body, None).is_ok());
        for cut in 5..body.len() - 1 {
            // Any prefix is an error or a shorter message, never a panic.
            let _ = decode(&body[..cut], Some(("", "v1", "ConfigMap")));
        }
        assert_eq!(decode(b"{}", Some(("", "v1", "ConfigMap"))).unwrap_err().code, 400);
        assert_eq!(decode(&envelope("v1", "Nope", b""), None).unwrap_err().code, 400);
        assert_eq!(decode(&envelope("v1", "ConfigMap", &[0x0a, 0x05, 1]), None).unwrap_err().code, 400);
        let deep = (0..300).fold(Vec::new(), |inner, _| bytes(2, &inner));
        assert!(decode(&[&MAGIC[..], &deep].concat(), None).is_err());
    }

    #[test]
    fn every_field_of_the_table_has_its_own_number() {
        let types = Types::builtin();
        for (group, version, kind, id) in types.documents() {
            let structure = types.get(id);
            let mut numbers: Vec<u32> =
                structure.own.iter().map(|at| structure.fields[usize::from(*at)].number).collect();
            numbers.extend(structure.inlined.iter().map(|(number, _)| *number));
            numbers.retain(|number| *number != 0);
            let count = numbers.len();
            numbers.sort_unstable();
            numbers.dedup();
            assert_eq!(numbers.len(), count, "{group}/{version} {kind}");
        }
    }

    #[test]
    fn durations_print_as_in_go() {
        for (nanos, text) in [
            (0, "0s"),
            (1_500_000_000, "1.5s"),
            (90_000_000_000, "1m30s"),
            (3_600_000_000_000, "1h0m0s"),
            (1_500_000, "1.5ms"),
        ] {
            assert_eq!(go_duration(nanos), text);
        }
    }
}
