//! Bodies that nobody should send: whatever the bytes, the decoders answer or refuse, and never panic.

use serde_json::{Value, json};

use super::{FieldValidation, Format, decode};
use crate::apply::{self, Manager};
use crate::defaulting;
use crate::patch::{PatchType, patch};
use crate::schema::DocumentType;

/// A small generator of numbers (xorshift); the seed is fixed, so a failure repeats.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "labels": {"a": "b"},
        "finalizers": ["x/y"], "managedFields": [{"manager": "m", "operation": "Update", "apiVersion": "v1",
            "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {"f:containers": {"k:{\"name\":\"c\"}": {".": {}}}}}}]},
        "spec": {"containers": [{"name": "c", "image": "x", "ports": [{"containerPort": 80}], "resources": {"limits":
            {"cpu": "1500m"}}, "livenessProbe": {"httpGet": {"port": "web"}}}], "$retainKeys": ["containers"],
            "$setElementOrder/containers": [{"name": "c"}], "volumes": [{"name": "v", "$patch": "delete"}]},
        "status": {"startTime": "2024-01-01T00:00:00Z"}});
    let operations = json!([{"op": "add", "path": "/metadata/labels/x~1y", "value": {"a": [1, 2]}},
        {"op": "move", "from": "/spec/containers/0", "path": "/spec/containers/-"},
        {"op": "test", "path": "/spec/containers/-1/name", "value": null}]);
    let protobuf = [
        &crate::protobuf::MAGIC[..],
        b"\x0a\x09\x0a\x02v1\x12\x03Pod\x12\x12\x0a\x03\x0a\x01a\x12\x0b\x12\x09\x0a\x01c\x12\x01x\x32\x01\x18\x1a\x00\x22\x00",
    ]
    .concat();
    vec![
        object.to_string().into_bytes(),
        operations.to_string().into_bytes(),
        b"a: &x [1, 2]\nb: {<<: *x, c: 'd'}\n? [k]\n: v\n--- |\n text\n".to_vec(),
        protobuf,
    ]
}

#[test]
fn damaged_bodies_never_panic() {
    let ty = DocumentType::builtin("", "v1", "Pod").unwrap();
    let custom = DocumentType::custom(
        "example.com",
        "v1",
        "Pod",
        &json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true, "properties": {"spec": {"type": "object",
            "properties": {"containers": {"type": "array", "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"], "items": {"type": "object"}}}}}}),
    )
    .unwrap();
    let current = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "labels": {"a": "b"}},
        "spec": {"containers": [{"name": "c", "image": "x"}, {"name": "c", "image": "double"}]}});
    let manager = Manager { name: "m", subresource: None, now: "2024-01-01T00:00:00Z" };
    let mut chance = Chance(0x9e37_79b9_7f4a_7c15);
    let seeds = seeds();
    const PIECES: [&[u8]; 12] = [
        b"null",
        b"{}",
        b"[]",
        b"\"\"",
        b"-1",
        b"1e400",
        b"{",
        b"]",
        b"\\ud800",
        b"\xff",
        b"9223372036854775808",
        b":",
    ];
    for _ in 0..3_000 {
        let mut body = seeds[chance.below(seeds.len())].clone();
        for _ in 0..=chance.below(4) {
            let at = chance.below(body.len());
            match chance.below(4) {
                0 => body[at] = u8::try_from(chance.below(256)).unwrap(),
                1 => body.truncate(at.max(1)),
                2 => {
                    let piece = PIECES[chance.below(PIECES.len())];
                    let end = (at + chance.below(8)).min(body.len());
                    body.splice(at..end, piece.iter().copied());
                }
                _ => {
                    let other = &seeds[chance.below(seeds.len())];
                    body.extend_from_slice(&other[..chance.below(other.len())]);
                }
            }
            if body.is_empty() {
                body.push(b'{');
            }
        }
        for ty in [&ty, &custom] {
            for format in [Format::Json, Format::Yaml, Format::Protobuf] {
                if let Ok(admitted) = decode(ty, format, &body, FieldValidation::Ignore) {
                    let mut value = admitted.value;
                    defaulting::default(ty, &mut value);
                    apply::track_update(ty, Some(&current), &mut value, manager);
                }
            }
            for patch_type in [PatchType::Json, PatchType::Merge, PatchType::Strategic] {
                let _ = patch(ty, patch_type, &current, &body, FieldValidation::Warn);
            }
            if let Ok(applied) = apply::decode(ty, &body, "a") {
                let _ = apply::apply(ty, Some(&current), &applied, manager, true);
                let _ = apply::apply(ty, None, &applied, manager, false);
            }
        }
    }
}

#[test]
fn typed_form_is_stable() {
    // Decoding what decoding made changes nothing, for every built-in kind.
    for kind in crate::kinds::Registry::builtin().iter() {
        let Some(ty) = DocumentType::of(kind) else { continue };
        let mut value = ty.empty();
        let again = super::admit(&ty, value.clone(), FieldValidation::Strict).unwrap();
        assert_eq!(again.value, value, "{}", kind.kind);
        defaulting::default(&ty, &mut value);
        let mut twice = super::admit(&ty, value.clone(), FieldValidation::Strict).unwrap().value;
        assert_eq!(twice, value, "{}", kind.kind);
        defaulting::default(&ty, &mut twice);
        assert_eq!(twice, value, "{}", kind.kind);
    }
}

#[test]
fn merging_a_document_into_itself_changes_nothing() {
    let ty = DocumentType::builtin("", "v1", "Pod").unwrap();
    let body: Value = serde_json::from_slice(&seeds()[0]).unwrap();
    let value = super::admit(&ty, body, FieldValidation::Ignore).unwrap().value;
    for patch_type in [PatchType::Merge, PatchType::Strategic] {
        for body in [value.to_string(), "{}".to_owned()] {
            let patched = patch(&ty, patch_type, &value, body.as_bytes(), FieldValidation::Strict).unwrap();
            assert_eq!(patched.value, value, "{patch_type:?} {body}");
        }
    }
}
