//! Documents nobody would write: recorded bodies with parts replaced, dropped and moved must get errors, never a panic.
//!
//! Decoding would refuse many of them; the decisions behind it have to stand on their own, because objects may have
//! been stored by an older version or edited by hand.

use jiff::Timestamp;
use portolan_api::kinds::Registry;
use portolan_api::selector::{FieldSelector, LabelSelector};
use portolan_api::service::ServiceAllocator;
use portolan_api::{strategy, table, validation};
use serde_json::{Value, json};
use std::path::PathBuf;

/// A small generator with a printed seed, so that a failure can be run again.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n.max(1)
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[usize::try_from(self.below(items.len() as u64)).expect("small")]
    }
}

fn odd_value(random: &mut Random) -> Value {
    let odd = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(65536),
        json!(u64::MAX),
        json!(1.5e300),
        json!(""),
        json!("None"),
        json!("é*%\u{0}.."),
        json!("x".repeat(300)),
        json!("::ffff:1.2.3.4"),
        json!("10.96.0.0/33"),
        json!([]),
        json!([null, [], {}]),
        json!({}),
        json!({"": {"a": []}}),
    ];
    random.pick(&odd).clone()
}

/// Replaces or removes one random part.
fn spoil(value: &mut Value, random: &mut Random) {
    match value {
        Value::Object(map) if !map.is_empty() && random.below(5) > 0 => {
            let keys: Vec<String> = map.keys().cloned().collect();
            let key = random.pick(&keys);
            if random.below(8) == 0 {
                map.remove(key);
            } else {
                spoil(&mut map[key], random);
            }
        }
        Value::Array(list) if !list.is_empty() && random.below(5) > 0 => {
            let index = usize::try_from(random.below(list.len() as u64)).expect("small");
            if random.below(8) == 0 {
                let copy = list[index].clone();
                list.push(copy);
            } else {
                spoil(&mut list[index], random);
            }
        }
        other => *other = odd_value(random),
    }
}

#[test]
fn spoiled_documents_never_panic() {
    let registry = Registry::builtin();
    let allocator = ServiceAllocator::new(&["10.96.0.0/12".parse().expect("a network")], 30000..=32767);
    let seed = 20_260_101;
    println!("seed {seed}");
    let mut random = Random(seed);
    let mut bodies = Vec::new();
    for file in ["services", "services-dualstack", "api-objects", "api-tables", "endpoints", "servicecidr"] {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../../conformance/golden/{file}.jsonl"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        for line in text.lines() {
            let case: Value = serde_json::from_str(line).expect("a case");
            for step in case["steps"].as_array().expect("steps") {
                for body in [&step["body"], &step["expect"]["body"]] {
                    if body.get("apiVersion").is_some() && body["kind"] != "Status" {
                        bodies.push(body.clone());
                    }
                }
            }
        }
    }
    let mut tried = 0;
    for body in &bodies {
        let (Some(api_version), Some(name)) = (body["apiVersion"].as_str(), body["kind"].as_str()) else { continue };
        let Some(kind) = registry.by_type_meta(api_version, name) else { continue };
        for _ in 0..20 {
            let (mut new, mut old) = (body.clone(), body.clone());
            for _ in 0..=random.below(3) {
                spoil(&mut new, &mut random);
            }
            if random.below(2) == 0 {
                spoil(&mut old, &mut random);
            }
            let mut created = new.clone();
            strategy::prepare_create(kind, &mut created);
            validation::validate_create(kind, &created);
            validation::warnings(kind, &new, Some(&old), None);
            table::row(kind, &new, Timestamp::UNIX_EPOCH);
            if kind.is("", "Service") {
                let mut pick = |n: u64| n / 2;
                let _ = allocator.plan_create(kind, &mut created, false, &mut pick);
                let mut changed = new.clone();
                let _ = allocator.plan_update(kind, &mut changed, &old, false, &mut pick);
                allocator.plan_delete(&old);
            }
            for subresource in [None, Some("status")] {
                let mut changed = new.clone();
                strategy::prepare_update(kind, &mut changed, &old, subresource);
                validation::validate_update(kind, &changed, &old, subresource);
            }
            tried += 1;
        }
    }
    assert!(tried > 10_000, "only {tried} documents tried");
}

#[test]
fn any_text_is_a_selector_or_an_error() {
    let registry = Registry::builtin();
    let pod = registry.by_gvr("", "v1", "pods").expect("built in");
    let mut random = Random(7);
    let parts =
        ["a", "=", "!", "in", "notin", "(", ")", ",", "<", ">", " ", "é", "\\", "metadata.name", "\u{a0}", "=="];
    for _ in 0..20_000 {
        let text: String = (0..random.below(9)).map(|_| *random.pick(&parts)).collect();
        let _ = LabelSelector::parse(&text);
        let _ = FieldSelector::parse(&text, pod, &[]);
    }
}
