//! Reads the table of built-in types.
//!
//! The format is line based. `package ALIAS MODEL GROUP/VERSION` opens a package, `type NAME [document] [atomic]` a
//! struct; every other line is a field: name, type, protobuf number and words, separated by tabs. The name `+` inlines
//! the fields of the type. Types are written as in `*[]core/v1.Container`, `{}` standing for a map.

use std::collections::HashMap;

use super::{Field, ListType, Struct, StructId, Text, Type, Types};

struct Draft {
    id: usize,
    package: &'static str,
    lines: Vec<&'static str>,
}

/// The types of a table. The table is part of the program, so a malformed line is a defect of the build and panics;
/// a unit test reads the whole of it.
pub(super) fn parse(text: &'static str) -> Types {
    let mut types = Types::default();
    let mut ids: HashMap<(&'static str, &'static str), StructId> = HashMap::new();
    let mut drafts: Vec<Draft> = Vec::new();
    let (mut package, mut model, mut group_version) = ("", "", "");
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some(rest) = line.strip_prefix("package ") {
            let mut words = rest.split(' ');
            package = words.next().unwrap_or_default();
            model = words.next().unwrap_or_default();
            group_version = words.next().unwrap_or_default();
        } else if let Some(rest) = line.strip_prefix("type ") {
            let mut words = rest.split(' ');
            let name = words.next().unwrap_or_default();
            let mut made = Struct {
                name: format!("{model}.{name}").into(),
                fields: Vec::new(),
                by_name: Vec::new(),
                inlined: Vec::new(),
                own: Vec::new(),
                atomic: false,
                document: false,
                open: false,
                custom: false,
            };
            for word in words {
                match word {
                    "atomic" => made.atomic = true,
                    "document" => made.document = true,
                    other => panic!("unknown word {other} in the table of types"),
                }
            }
            let document = made.document;
            let id = types.push(made);
            ids.insert((package, name), id);
            if document {
                let (group, version) = group_version.split_once('/').expect("the table writes group/version");
                types.documents.insert((group.into(), version.into(), name.into()), id);
            }
            drafts.push(Draft { id: drafts.len(), package, lines: Vec::new() });
        } else if let Some(draft) = drafts.last_mut() {
            draft.lines.push(line);
        }
    }
    let lookup = |package: &'static str, name: &'static str| -> StructId {
        let key = name.rsplit_once('.').unwrap_or((package, name));
        *ids.get(&key).unwrap_or_else(|| panic!("the table of types lacks {package} {name}"))
    };
    let mut inlined_at: HashMap<usize, Vec<(usize, StructId)>> = HashMap::new();
    for draft in &drafts {
        let mut fields = Vec::with_capacity(draft.lines.len() + 2);
        if types.structs[draft.id].document {
            fields.push(Field { omit_empty: true, ..plain("kind") });
            fields.push(Field { omit_empty: true, ..plain("apiVersion") });
        }
        for line in &draft.lines {
            let mut columns = line.split('\t');
            let name = columns.next().unwrap_or_default();
            let ty = parse_type(columns.next().unwrap_or_default(), &|name| lookup(draft.package, name));
            let number = columns.next().and_then(|n| n.parse().ok()).expect("the table writes a field number");
            if name == "+" {
                let Type::Struct(id) = ty.target() else { panic!("only structs are inlined") };
                inlined_at.entry(draft.id).or_default().push((fields.len(), *id));
                types.structs[draft.id].inlined.push((number, *id));
                continue;
            }
            let mut field = Field { ty, number, ..plain(name) };
            for word in columns.next().unwrap_or_default().split(' ').filter(|word| !word.is_empty()) {
                apply_word(&mut field, word, line);
            }
            fields.push(field);
        }
        types.structs[draft.id].fields = fields;
    }
    // Splice inlined fields in where the inlined struct stands. None of them inlines others in turn in a way that
    // this order would miss: nested ones are spliced first by recursion.
    let flat: Vec<(Vec<Field>, Vec<u16>)> =
        (0..types.structs.len()).map(|at| splice(&types, &inlined_at, at)).collect();
    for (at, (fields, own)) in flat.into_iter().enumerate() {
        types.structs[at].fields = fields;
        types.structs[at].own = own;
        types.structs[at].index();
    }
    types
}

fn splice(types: &Types, inlined_at: &HashMap<usize, Vec<(usize, StructId)>>, at: usize) -> (Vec<Field>, Vec<u16>) {
    let own_fields = &types.structs[at].fields;
    let inlined = inlined_at.get(&at).map(Vec::as_slice).unwrap_or_default();
    let mut fields: Vec<Field> = Vec::with_capacity(own_fields.len());
    let mut own = Vec::with_capacity(own_fields.len());
    for position in 0..=own_fields.len() {
        for (_, id) in inlined.iter().filter(|(place, _)| *place == position) {
            fields.extend(splice(types, inlined_at, id.0 as usize).0);
        }
        if let Some(field) = own_fields.get(position) {
            own.push(u16::try_from(fields.len()).expect("fewer fields than 65536"));
            fields.push(field.clone());
        }
    }
    (fields, own)
}

fn plain(name: &'static str) -> Field {
    Field {
        name: name.into(),
        ty: Type::String { go: None, values: Vec::new() },
        number: 0,
        omit_empty: false,
        omit_zero: false,
        required: false,
        nullable: false,
        list: ListType::Atomic,
        atomic: false,
        patch_merge: false,
        retain_keys: false,
        merge_key: None,
        default: None,
    }
}

fn apply_word(field: &mut Field, word: &'static str, line: &str) {
    let (key, value) = word.split_once('=').unwrap_or((word, ""));
    match key {
        "omit" => field.omit_empty = true,
        "omitzero" => field.omit_zero = true,
        "required" => field.required = true,
        "nullable" => field.nullable = true,
        "atomic" => field.atomic = true,
        "set" => field.list = ListType::Set,
        "keys" => field.list = ListType::Map(value.split(',').map(Text::from).collect()),
        "patch" => {
            for strategy in value.split(',') {
                match strategy {
                    "merge" => field.patch_merge = true,
                    "retainKeys" => field.retain_keys = true,
                    "replace" => {}
                    other => panic!("unknown patch strategy {other} in {line}"),
                }
            }
        }
        "mergekey" => field.merge_key = Some(value.into()),
        "default" => field.default = Some(serde_json::from_str(value).expect("the table writes defaults as JSON")),
        other => panic!("unknown word {other} in {line}"),
    }
}

fn parse_type(text: &'static str, lookup: &dyn Fn(&'static str) -> StructId) -> Type {
    if let Some(rest) = text.strip_prefix('*') {
        return Type::Pointer(Box::new(parse_type(rest, lookup)));
    }
    if let Some(rest) = text.strip_prefix("items[]") {
        return Type::List { element: Box::new(parse_type(rest, lookup)), items: true };
    }
    if let Some(rest) = text.strip_prefix("[]") {
        return Type::List { element: Box::new(parse_type(rest, lookup)), items: false };
    }
    if let Some(rest) = text.strip_prefix("{}") {
        return Type::Map(Box::new(parse_type(rest, lookup)));
    }
    if let Some(rest) = text.strip_prefix("string<") {
        let (go, values) = rest.trim_end_matches('>').split_once(':').unwrap_or((rest.trim_end_matches('>'), ""));
        let values = if values.is_empty() { Vec::new() } else { values.split(',').map(Text::from).collect() };
        return Type::String { go: Some(go.into()), values };
    }
    // Named integers keep only their width.
    let base = text.split('<').next().unwrap_or(text);
    match base {
        "string" => Type::String { go: None, values: Vec::new() },
        "bool" => Type::Bool,
        "int" => Type::Int { bits: 0, signed: true },
        "int32" | "rune" => Type::Int { bits: 32, signed: true },
        "int64" => Type::Int { bits: 64, signed: true },
        "uint8" | "byte" => Type::Int { bits: 8, signed: false },
        "uint16" => Type::Int { bits: 16, signed: false },
        "uint32" => Type::Int { bits: 32, signed: false },
        "uint64" => Type::Int { bits: 64, signed: false },
        "float64" => Type::Float,
        "bytes" => Type::Bytes,
        "time" => Type::Time,
        "microtime" => Type::MicroTime,
        "duration" => Type::Duration,
        "quantity" => Type::Quantity,
        "intorstring" => Type::IntOrString,
        "fields" => Type::Fields,
        "raw" => Type::Raw,
        "any" => Type::Any,
        "orarray" => Type::SchemaOrArray(lookup("JSONSchemaProps")),
        "orbool" => Type::SchemaOrBool(lookup("JSONSchemaProps")),
        "orstrings" => Type::SchemaOrStrings(lookup("JSONSchemaProps")),
        name => Type::Struct(lookup(if base.len() == text.len() { name } else { text })),
    }
}
