//! What is known about the fields of a document: names, types, list keys, patch strategies, protobuf numbers.
//!
//! Built-in types come from one table, `schema/types.txt`, which `xtask/schema/generate.py` writes from the published
//! modules of the Kubernetes API; it holds structure only. Types of custom resources are compiled from the schema in
//! their CustomResourceDefinition. Strict decoding, defaulting, protobuf, strategic merge patches, server-side apply and
//! OpenAPI all read this one description.

mod custom;
mod table;

use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::kinds::Kind;

pub use custom::SchemaError;

type Text = Cow<'static, str>;

/// The type of one kind of document in one API version. Cheap to clone.
#[derive(Clone)]
pub struct DocumentType {
    types: Arc<Types>,
    root: StructId,
    group: Text,
    version: Text,
    kind: Text,
}

impl fmt::Debug for DocumentType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DocumentType({}, Kind={})", self.api_version(), self.kind)
    }
}

impl DocumentType {
    /// The type of a built-in kind, `None` if the table has no such kind.
    ///
    /// Options kinds (DeleteOptions, PatchOptions, ...) belong to every group, as upstream registers them.
    pub fn builtin(group: &str, version: &str, kind: &str) -> Option<DocumentType> {
        let types = Types::builtin();
        let root = types.document(group, version, kind).or_else(|| {
            let options = kind.ends_with("Options") || matches!(kind, "WatchEvent" | "Status");
            types.document("meta.k8s.io", "v1", kind).filter(|_| options)
        })?;
        Some(DocumentType {
            types: types.clone(),
            root,
            group: group.to_owned().into(),
            version: version.to_owned().into(),
            kind: kind.to_owned().into(),
        })
    }

    /// As [`DocumentType::builtin`] for an entry of the registry.
    pub fn of(kind: &Kind) -> Option<DocumentType> {
        DocumentType::builtin(&kind.group, &kind.version, &kind.kind)
    }

    /// The type that a version of a CustomResourceDefinition declares with its `openAPIV3Schema`.
    ///
    /// # Errors
    /// The schema is not structural in a way that matters here (no usable `type`, `items` missing).
    pub fn custom(group: &str, version: &str, kind: &str, schema: &Value) -> Result<DocumentType, SchemaError> {
        let (types, root) = custom::compile(kind, schema)?;
        Ok(DocumentType {
            types: Arc::new(types),
            root,
            group: group.to_owned().into(),
            version: version.to_owned().into(),
            kind: kind.to_owned().into(),
        })
    }

    /// API group, empty for the core group.
    pub fn group(&self) -> &str {
        &self.group
    }

    /// Version within the group.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Kind name.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// `group/version`, or the version alone in the core group.
    pub fn api_version(&self) -> String {
        join_api_version(&self.group, &self.version)
    }

    /// Whether the type comes from a CustomResourceDefinition.
    pub fn is_custom(&self) -> bool {
        self.types.get(self.root).custom
    }

    /// The document with nothing set, in typed form: what decoding an empty body gives. For built-in kinds it holds the
    /// fields that are always written, such as `status: {"replicas": 0}` of a ReplicaSet.
    pub fn empty(&self) -> Value {
        crate::strict::empty(self)
    }

    pub(crate) fn types(&self) -> &Types {
        &self.types
    }

    pub(crate) fn root(&self) -> &Struct {
        self.types.get(self.root)
    }
}

/// `group/version`, or the version alone in the core group.
pub(crate) fn join_api_version(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

/// Position of a struct in [`Types`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StructId(u32);

/// A set of struct types that refer to each other by [`StructId`].
#[derive(Debug, Default)]
pub(crate) struct Types {
    /// Types that come first in the numbering; the built-in ones for custom resources.
    base: Option<Arc<Types>>,
    structs: Vec<Struct>,
    documents: HashMap<(Text, Text, Text), StructId>,
}

impl Types {
    /// The built-in types; the table is read on first use, which takes about a millisecond.
    pub(crate) fn builtin() -> &'static Arc<Types> {
        static TYPES: OnceLock<Arc<Types>> = OnceLock::new();
        TYPES.get_or_init(|| Arc::new(table::parse(include_str!("schema/types.txt"))))
    }

    fn base_len(&self) -> usize {
        self.base.as_ref().map_or(0, |base| base.structs.len())
    }

    pub(crate) fn get(&self, id: StructId) -> &Struct {
        let at = id.0 as usize;
        match &self.base {
            Some(base) if at < base.structs.len() => base.get(id),
            _ => &self.structs[at - self.base_len()],
        }
    }

    fn push(&mut self, value: Struct) -> StructId {
        let id = StructId(u32::try_from(self.base_len() + self.structs.len()).expect("fewer types than u32 can count"));
        self.structs.push(value);
        id
    }

    pub(crate) fn document(&self, group: &str, version: &str, kind: &str) -> Option<StructId> {
        let key = (group.to_owned().into(), version.to_owned().into(), kind.to_owned().into());
        self.documents.get(&key).copied()
    }

    /// All documents as `(group, version, kind)` with their type.
    pub(crate) fn documents(&self) -> impl Iterator<Item = (&str, &str, &str, StructId)> {
        self.documents.iter().map(|((group, version, kind), id)| (group.as_ref(), version.as_ref(), kind.as_ref(), *id))
    }
}

/// A type with named fields.
#[derive(Debug)]
pub(crate) struct Struct {
    /// Name in OpenAPI documents, such as `io.k8s.api.core.v1.Container`.
    pub(crate) name: Text,
    /// Fields in their order of declaration, those of inlined structs spliced in.
    pub(crate) fields: Vec<Field>,
    /// Positions in `fields`, sorted by field name.
    by_name: Vec<u16>,
    /// Inlined structs: protobuf number and type. Their fields are a submessage in protobuf only.
    pub(crate) inlined: Vec<(u32, StructId)>,
    /// Number of `fields` that come from inlined structs is not needed in JSON; protobuf looks at these own fields.
    pub(crate) own: Vec<u16>,
    /// Owned as one value by server-side apply.
    pub(crate) atomic: bool,
    /// Has `apiVersion` and `kind`.
    pub(crate) document: bool,
    /// Keeps fields it does not declare (`x-kubernetes-preserve-unknown-fields`).
    pub(crate) open: bool,
    /// Belongs to a custom resource: values of a wrong type are left to validation.
    pub(crate) custom: bool,
}

impl Struct {
    pub(crate) fn field(&self, name: &str) -> Option<&Field> {
        let at = self.by_name.binary_search_by(|at| self.fields[usize::from(*at)].name.as_ref().cmp(name)).ok()?;
        Some(&self.fields[usize::from(self.by_name[at])])
    }

    /// Last part of the name, which is also the name of the Go type.
    pub(crate) fn short_name(&self) -> &str {
        self.name.rsplit('.').next().unwrap_or(&self.name)
    }

    /// Name as Go prints it in errors, such as `v1.ServicePort`.
    pub(crate) fn go_name(&self) -> &str {
        match self.name.rmatch_indices('.').nth(1) {
            Some((at, _)) => &self.name[at + 1..],
            None => &self.name,
        }
    }

    fn index(&mut self) {
        let mut by_name: Vec<u16> = (0..u16::try_from(self.fields.len()).expect("fewer fields than 65536")).collect();
        by_name.sort_by(|a, b| self.fields[usize::from(*a)].name.cmp(&self.fields[usize::from(*b)].name));
        self.by_name = by_name;
    }
}

/// One field of a struct.
#[derive(Clone, Debug)]
pub(crate) struct Field {
    /// JSON name.
    pub(crate) name: Text,
    pub(crate) ty: Type,
    /// Protobuf field number, 0 if the field has none.
    pub(crate) number: u32,
    /// Left out of JSON when it has its zero value (structs without a pointer are never zero).
    pub(crate) omit_empty: bool,
    /// Left out of JSON when it has its zero value, structs included.
    pub(crate) omit_zero: bool,
    /// Required in OpenAPI.
    pub(crate) required: bool,
    /// `null` is a value of its own.
    pub(crate) nullable: bool,
    /// How server-side apply sees a list.
    pub(crate) list: ListType,
    /// Maps and structs: owned as one value by server-side apply.
    pub(crate) atomic: bool,
    /// Strategic merge patch merges the list instead of replacing it.
    pub(crate) patch_merge: bool,
    /// Strategic merge patch honours `$retainKeys`.
    pub(crate) retain_keys: bool,
    /// Key by which a strategic merge patch finds list elements; `None` for lists of scalars.
    pub(crate) merge_key: Option<Text>,
    /// Declared default, used for keys of list elements and in OpenAPI.
    pub(crate) default: Option<Value>,
}

/// How server-side apply sees a list (`x-kubernetes-list-type`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ListType {
    /// One value.
    Atomic,
    /// Scalars, each owned for itself.
    Set,
    /// Objects, each found by the named keys.
    Map(Vec<Text>),
}

/// The type of a value.
#[derive(Clone, Debug)]
pub(crate) enum Type {
    /// A string; the Go name if it is a named type, and the values of an enumeration.
    String { go: Option<Text>, values: Vec<Text> },
    /// `true` or `false`.
    Bool,
    /// An integer with so many bits, such as `int32`.
    Int { bits: u8, signed: bool },
    /// A floating point number.
    Float,
    /// Bytes, base64 in JSON.
    Bytes,
    /// RFC 3339, whole seconds.
    Time,
    /// RFC 3339 with microseconds.
    MicroTime,
    /// Go duration text.
    Duration,
    /// Resource quantity.
    Quantity,
    /// A number or a string.
    IntOrString,
    /// `managedFields[].fieldsV1`.
    Fields,
    /// An embedded object (protobuf: its JSON text in a RawExtension).
    Raw,
    /// Any JSON (protobuf: its text).
    Any,
    /// A JSONSchemaProps or a list of them.
    SchemaOrArray(StructId),
    /// A JSONSchemaProps or a boolean.
    SchemaOrBool(StructId),
    /// A JSONSchemaProps or a list of strings.
    SchemaOrStrings(StructId),
    /// A list; `items`: a message with one repeated field in protobuf.
    List { element: Box<Type>, items: bool },
    /// An object with free keys.
    Map(Box<Type>),
    /// A struct.
    Struct(StructId),
    /// A pointer: absent is different from zero.
    Pointer(Box<Type>),
}

impl Type {
    /// The type behind pointers.
    pub(crate) fn target(&self) -> &Type {
        match self {
            Type::Pointer(inner) => inner.target(),
            other => other,
        }
    }

    /// The type as Go prints it in decoding errors.
    pub(crate) fn go_name(&self, types: &Types) -> String {
        match self {
            Type::String { go: Some(name), .. } => name.clone().into_owned(),
            Type::String { go: None, .. } => "string".to_owned(),
            Type::Bool => "bool".to_owned(),
            Type::Int { bits, signed } => {
                let sign = if *signed { "" } else { "u" };
                if *bits == 0 { format!("{sign}int") } else { format!("{sign}int{bits}") }
            }
            Type::Float => "float64".to_owned(),
            Type::Bytes => "[]uint8".to_owned(),
            Type::Time => "v1.Time".to_owned(),
            Type::MicroTime => "v1.MicroTime".to_owned(),
            Type::Duration => "v1.Duration".to_owned(),
            Type::Quantity => "resource.Quantity".to_owned(),
            Type::IntOrString => "intstr.IntOrString".to_owned(),
            Type::Fields => "v1.FieldsV1".to_owned(),
            Type::Raw => "runtime.RawExtension".to_owned(),
            Type::Any => "v1.JSON".to_owned(),
            Type::SchemaOrArray(_) => "v1.JSONSchemaPropsOrArray".to_owned(),
            Type::SchemaOrBool(_) => "v1.JSONSchemaPropsOrBool".to_owned(),
            Type::SchemaOrStrings(_) => "v1.JSONSchemaPropsOrStringArray".to_owned(),
            Type::List { element, .. } => format!("[]{}", element.go_name(types)),
            Type::Map(element) => format!("map[string]{}", element.go_name(types)),
            Type::Struct(id) => types.get(*id).go_name().to_owned(),
            Type::Pointer(inner) => format!("*{}", inner.go_name(types)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(kind: (&str, &str, &str), path: &[&str]) -> Field {
        let types = Types::builtin();
        let mut at = types.document(kind.0, kind.1, kind.2).expect("kind");
        for (depth, name) in path.iter().enumerate() {
            let field = types.get(at).field(name).unwrap_or_else(|| panic!("{name}"));
            if depth + 1 == path.len() {
                return field.clone();
            }
            let mut ty = field.ty.target();
            while let Type::List { element, .. } | Type::Map(element) = ty {
                ty = element.target();
            }
            let Type::Struct(id) = ty else { panic!("{name} is no struct") };
            at = *id;
        }
        unreachable!()
    }

    #[test]
    fn every_registered_kind_has_a_type() {
        for kind in crate::kinds::Registry::builtin().iter() {
            assert!(DocumentType::of(kind).is_some(), "{}/{}", kind.group, kind.kind);
        }
    }

    #[test]
    fn table_has_the_facts_that_patches_and_apply_need() {
        let ports = path(("apps", "v1", "Deployment"), &["spec", "template", "spec", "containers", "ports"]);
        assert_eq!(ports.list, ListType::Map(vec!["containerPort".into(), "protocol".into()]));
        assert!(ports.patch_merge);
        assert_eq!(ports.merge_key.as_deref(), Some("containerPort"));
        let volumes = path(("", "v1", "Pod"), &["spec", "volumes"]);
        assert!(volumes.patch_merge && volumes.retain_keys);
        let strategy = path(("apps", "v1", "Deployment"), &["spec", "strategy"]);
        assert!(strategy.retain_keys && !strategy.patch_merge);
        let finalizers = path(("", "v1", "ConfigMap"), &["metadata", "finalizers"]);
        assert_eq!(finalizers.list, ListType::Set);
        assert!(finalizers.patch_merge && finalizers.merge_key.is_none());
        assert!(path(("", "v1", "Service"), &["spec", "selector"]).atomic);
        assert_eq!(path(("", "v1", "Service"), &["spec", "ports", "protocol"]).default, Some(Value::from("TCP")),);
        assert_eq!(path(("discovery.k8s.io", "v1", "EndpointSlice"), &["endpoints"]).list, ListType::Atomic);
    }

    #[test]
    fn inlined_fields_are_spliced_in_json_and_grouped_in_protobuf() {
        let types = Types::builtin();
        let probe = path(("", "v1", "Pod"), &["spec", "containers", "livenessProbe"]);
        let Type::Struct(id) = probe.ty.target() else { panic!() };
        let probe = types.get(*id);
        assert!(probe.field("httpGet").is_some() && probe.field("periodSeconds").is_some());
        assert_eq!(probe.inlined.len(), 1);
        assert!(probe.own.iter().all(|at| probe.fields[usize::from(*at)].name != "httpGet"));
    }
}
