//! Server-side apply and the bookkeeping of `metadata.managedFields`.
//!
//! Source: KEP-555 (server-side apply) and the recorded behaviour of the API server. Everything here is a function of
//! documents, their type and the time that the caller gives.

mod fieldset;
#[cfg(test)]
mod recorded;
mod typed;

use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

use crate::schema::{DocumentType, Types};
use crate::status::Status;
use crate::strict::{Node, Style, empty, fit, parse_json, parse_yaml, with_type_meta};
use fieldset::Set;
use typed::Atom;

/// Who writes, through which subresource, and when.
#[derive(Clone, Copy, Debug)]
pub struct Manager<'a> {
    /// `fieldManager`, or the first part of the User-Agent for writes that name none.
    pub name: &'a str,
    /// Subresource the write goes through, `None` for the object itself.
    pub subresource: Option<&'a str>,
    /// RFC 3339 time for changed entries.
    pub now: &'a str,
}

/// More entries of updates than this are merged into one.
const MAX_UPDATE_MANAGERS: usize = 10;
/// Name of the entry that takes the oldest updates.
const ANCIENT_CHANGES: &str = "ancient-changes";
/// Name of the entry for fields that were there before anything was tracked.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
/// What `kubectl apply` remembers of the last configuration it applied from the client's side.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Decodes the body of an apply PATCH (YAML, of which JSON is a part) and checks that it is about the object of the URL.
///
/// # Errors
/// 400 for what cannot be read, for another kind or version, and for another name than the URL's.
pub fn decode(ty: &DocumentType, body: &[u8], name: &str) -> Result<Value, Status> {
    let node = match parse_json(body) {
        Ok(node) => node,
        Err(_) => {
            let parsed = match std::str::from_utf8(body) {
                Ok(text) => parse_yaml(text),
                Err(_) => Err("yaml: invalid leading UTF-8 octet".to_owned()),
            };
            let wrapped = |error| format!("error decoding YAML: error converting YAML to JSON: {error}");
            parsed.map_err(|error| Status::bad_request(wrapped(error)))?.node
        }
    };
    let value = match node {
        Node::Object(_) => node.into_value(),
        Node::Null => Value::Object(Map::new()),
        other => {
            return Err(Status::bad_request(format!(
                "error decoding YAML: error unmarshaling JSON: while decoding JSON: json: cannot unmarshal {} into Go \
                 value of type map[string]interface {{}}",
                other.type_name()
            )));
        }
    };
    let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("/apiVersion"), text("/kind"));
    if api_version != ty.api_version() || kind != ty.kind() {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        return Err(Status::bad_request(format!("invalid object type: {}", type_text(group, version, kind))));
    }
    if value.pointer("/metadata/managedFields").is_some_and(|fields| !fields.is_null()) {
        return Err(Status::bad_request("metadata.managedFields must be nil"));
    }
    match text("/metadata/name") {
        "" => Err(Status::bad_request(format!(
            "the name of the object ({name} based on URL) was undeterminable: name must be provided"
        ))),
        other if other != name => Err(Status::bad_request(format!(
            "the name of the object ({other}) does not match the name on the URL ({name})"
        ))),
        _ => Ok(value),
    }
}

/// Merges an applied configuration into the live object, managedFields included.
///
/// `live` is `None` when the object is to be created. Defaults, admission and validation follow; whether a write is
/// needed then is for [`differs`] to say.
///
/// # Errors
/// 409 for conflicts with other managers unless `force`, 500 without a reason for a configuration that does not fit the
/// type.
pub fn apply(
    ty: &DocumentType,
    live: Option<&Value>,
    applied: &Value,
    manager: Manager<'_>,
    force: bool,
) -> Result<Value, Status> {
    let view = View::of(ty);
    let mut managed = live.map_or_else(Managed::default, |live| Managed::read(live).unwrap_or_default());
    let live_value = without_managed_fields(&live.cloned().unwrap_or_else(|| empty(ty)));
    let applied = without_managed_fields(applied);
    let faults = typed::validate(view.types, view.root, &applied);
    if !faults.is_empty() {
        let what = match faults.as_slice() {
            [one] => one.clone(),
            many => format!("errors:\n  {}", many.join("\n  ")),
        };
        return Err(Status::plain_error(format!(
            "failed to create typed patch object ({}): {what}",
            identity(ty, &applied)
        )));
    }
    if live.is_some() && managed.entries.is_empty() {
        let before = Manager { name: BEFORE_FIRST_APPLY, ..manager };
        view.record_update(&mut managed, &empty(ty), &live_value, before);
    }
    let outcome = match view.apply(&live_value, &applied, &managed, manager, force) {
        Err(conflicts) if manager.name == "kubectl" && view.allowed_by_last_applied(ty, &live_value, &conflicts) => {
            view.apply(&live_value, &applied, &managed, manager, true)
        }
        Err(conflicts) if manager.name == "kubectl" => Err(view.not_last_applied(ty, &live_value, conflicts)),
        outcome => outcome,
    };
    let (mut value, managed) = outcome.map_err(|conflicts| conflict_status(&conflicts))?;
    if manager.name == "kubectl" {
        refresh_last_applied(&mut value, &applied);
    }
    let fitted = fit(ty, Node::from(value), Style::Json);
    if let Some(error) = fitted.error {
        return Err(Status::plain_error(format!(
            "failed to convert new object ({}) to proper version ({}): {error}",
            identity(ty, &applied),
            ty.api_version()
        )));
    }
    let mut value = with_type_meta(ty, fitted.value);
    managed.write(&mut value);
    Ok(value)
}

/// Records in `new`'s managedFields what a write other than apply changed. Call it after decoding and defaulting: what
/// admission adds later belongs to nobody, as in the reference implementation.
///
/// On the main resource the managedFields that `new` brings along count if they are well formed; an empty list, or a list
/// with one empty entry, ends the tracking of the object. `old` is `None` on create.
pub fn track_update(ty: &DocumentType, old: Option<&Value>, new: &mut Value, manager: Manager<'_>) {
    let view = View::of(ty);
    let stored = || old.map_or_else(Managed::default, |old| Managed::read(old).unwrap_or_default());
    let mut managed = match new.pointer("/metadata/managedFields") {
        _ if manager.subresource.is_some() => stored(),
        Some(Value::Array(entries)) if is_reset(entries) => Managed::default(),
        Some(_) => match Managed::read(new) {
            Some(managed) if !managed.entries.is_empty() => managed,
            _ => stored(),
        },
        None => stored(),
    };
    let bare = without_managed_fields(new);
    if old.is_none() || !managed.entries.is_empty() {
        let before = old.map_or_else(|| empty(ty), without_managed_fields);
        view.record_update(&mut managed, &before, &bare, manager);
    }
    *new = bare;
    managed.write(new);
}

/// Whether two versions of an object differ in anything but the times in managedFields, so that a write is needed.
pub fn differs(old: &Value, new: &Value) -> bool {
    fn timeless(value: &Value) -> Value {
        let mut entries = value.pointer("/metadata/managedFields").cloned().unwrap_or(Value::Null);
        for entry in entries.as_array_mut().into_iter().flatten() {
            if let Value::Object(entry) = entry {
                entry.remove("time");
            }
        }
        // The order of entries depends on their times.
        if let Value::Array(entries) = &mut entries {
            entries.sort_by_cached_key(Value::to_string);
        }
        entries
    }
    without_managed_fields(old) != without_managed_fields(new) || timeless(old) != timeless(new)
}

fn is_reset(entries: &[Value]) -> bool {
    match entries {
        [] => true,
        [Value::Object(only)] => only.values().all(|value| value.is_null() || value.as_str() == Some("")),
        _ => false,
    }
}

/// `group/version, Kind=kind` as Go prints it.
fn type_text(group: &str, version: &str, kind: &str) -> String {
    format!("{group}/{version}, Kind={kind}")
}

fn identity(ty: &DocumentType, value: &Value) -> String {
    let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    format!(
        "{}/{}; {}",
        text("/metadata/namespace"),
        text("/metadata/name"),
        type_text(ty.group(), ty.version(), ty.kind())
    )
}

fn without_managed_fields(value: &Value) -> Value {
    let mut value = value.clone();
    if let Some(Value::Object(metadata)) = value.get_mut("metadata") {
        metadata.remove("managedFields");
    }
    value
}

/// What identifies an entry of managedFields. The version of an Apply entry is no part of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    manager: String,
    apply: bool,
    api_version: String,
    subresource: String,
}

impl Key {
    /// The name as conflict messages show it.
    fn show(&self) -> String {
        let mut text = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            text.push_str(&format!(" with subresource {:?}", self.subresource));
        }
        if !self.apply {
            text.push_str(&format!(" using {}", self.api_version));
        }
        text
    }
}

#[derive(Clone, Debug)]
struct Entry {
    api_version: String,
    time: Option<String>,
    fields: Set,
}

/// managedFields, decoded.
#[derive(Clone, Debug, Default)]
struct Managed {
    entries: BTreeMap<Key, Entry>,
}

impl Managed {
    /// Reads the managedFields of an object, `None` if an entry is malformed.
    fn read(object: &Value) -> Option<Managed> {
        let mut managed = Managed::default();
        let entries = object.pointer("/metadata/managedFields").and_then(Value::as_array);
        for entry in entries.into_iter().flatten() {
            let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let apply = match text("operation").as_str() {
                "Apply" => true,
                "Update" => false,
                _ => return None,
            };
            let api_version = text("apiVersion");
            if api_version.is_empty() || text("fieldsType") != "FieldsV1" {
                return None;
            }
            let fields = match entry.get("fieldsV1") {
                None | Some(Value::Null) => Set::default(),
                Some(fields) => Set::from_fields(fields)?,
            };
            let key = Key {
                manager: text("manager"),
                apply,
                api_version: if apply { String::new() } else { api_version.clone() },
                subresource: text("subresource"),
            };
            let time = entry.get("time").and_then(Value::as_str).map(str::to_owned);
            managed.entries.insert(key, Entry { api_version, time, fields });
        }
        Some(managed)
    }

    /// Writes the entries, Apply before Update, then by time and name.
    fn write(&self, object: &mut Value) {
        let mut entries: Vec<(&Key, &Entry)> = self.entries.iter().collect();
        entries.sort_by(|(a, x), (b, y)| {
            b.apply
                .cmp(&a.apply)
                .then_with(|| x.time.cmp(&y.time))
                .then_with(|| a.manager.cmp(&b.manager))
                .then_with(|| x.api_version.cmp(&y.api_version))
                .then_with(|| a.subresource.cmp(&b.subresource))
        });
        let entries: Vec<Value> = entries
            .into_iter()
            .map(|(key, entry)| {
                let mut value = json!({
                    "manager": key.manager,
                    "operation": if key.apply { "Apply" } else { "Update" },
                    "apiVersion": entry.api_version,
                    "fieldsType": "FieldsV1",
                    "fieldsV1": entry.fields.to_fields(),
                });
                if let Some(time) = &entry.time {
                    value["time"] = json!(time);
                }
                if !key.subresource.is_empty() {
                    value["subresource"] = json!(key.subresource);
                }
                value
            })
            .collect();
        if let Some(Value::Object(metadata)) = object.get_mut("metadata") {
            if entries.is_empty() {
                metadata.remove("managedFields");
            } else {
                metadata.insert("managedFields".to_owned(), Value::Array(entries));
            }
        }
    }

    /// Merges the oldest updates until there are few enough.
    fn cap(&mut self) {
        let mut updaters: Vec<(Option<String>, Key)> = self
            .entries
            .iter()
            .filter(|(key, _)| !key.apply)
            .map(|(key, entry)| (entry.time.clone(), key.clone()))
            .collect();
        let mut count = updaters.len();
        if count <= MAX_UPDATE_MANAGERS {
            return;
        }
        updaters.sort();
        // The first entry of a version stays as it is until a second one gives reason to merge.
        let mut first_of: BTreeMap<String, Key> = BTreeMap::new();
        for (_, key) in updaters {
            if count <= MAX_UPDATE_MANAGERS {
                break;
            }
            let Some(entry) = self.entries.get(&key).cloned() else { continue };
            let bucket = Key {
                manager: ANCIENT_CHANGES.to_owned(),
                apply: false,
                api_version: entry.api_version.clone(),
                subresource: String::new(),
            };
            match first_of.get(&entry.api_version).cloned() {
                None => {
                    first_of.insert(entry.api_version, key);
                }
                Some(first) => {
                    if !self.entries.contains_key(&bucket)
                        && let Some(entry) = self.entries.remove(&first)
                    {
                        self.entries.insert(bucket.clone(), entry);
                    }
                    self.entries.remove(&key);
                    if let Some(merged) = self.entries.get_mut(&bucket) {
                        merged.fields = merged.fields.union(&entry.fields);
                        merged.time = entry.time;
                    }
                    count -= 1;
                }
            }
        }
    }
}

/// One path that another manager owns with another value.
struct Conflict {
    key: Key,
    path: Vec<String>,
}

impl Conflict {
    fn path_text(&self) -> String {
        self.path.iter().map(|element| fieldset::show(element)).collect()
    }
}

fn conflict_status(conflicts: &[Conflict]) -> Status {
    let message = match conflicts {
        [one] => format!("Apply failed with 1 conflict: conflict with {}: {}", one.key.show(), one.path_text()),
        many => {
            let mut lines = Vec::new();
            let mut last = None;
            for conflict in many {
                if last != Some(&conflict.key) {
                    lines.push(format!("conflicts with {}:", conflict.key.show()));
                    last = Some(&conflict.key);
                }
                lines.push(format!("- {}", conflict.path_text()));
            }
            format!("Apply failed with {} conflicts: {}", many.len(), lines.join("\n"))
        }
    };
    let mut status = Status::new(409, "Conflict", message);
    for conflict in conflicts {
        let text = format!("conflict with {}", conflict.key.show());
        status = status.cause("FieldManagerConflict", text, &conflict.path_text());
    }
    status
}

/// A type as server-side apply sees it.
struct View<'t> {
    types: &'t Types,
    root: Atom<'t>,
    api_version: String,
    has_status: bool,
    kind: (String, String),
}

impl<'t> View<'t> {
    fn of(ty: &'t DocumentType) -> View<'t> {
        View {
            types: ty.types(),
            root: Atom::Struct { structure: ty.root(), atomic: false },
            api_version: ty.api_version(),
            has_status: ty.root().field("status").is_some(),
            kind: (ty.group().to_owned(), ty.kind().to_owned()),
        }
    }

    /// Fields that the server resets on writes through a subresource, so that nobody comes to own them there.
    fn reset_fields(&self, subresource: Option<&str>) -> Set {
        let mut set = Set::default();
        let path = |names: &[&str]| -> Vec<String> { names.iter().map(|name| fieldset::field(name)).collect() };
        match subresource {
            None if self.has_status => set.insert(&path(&["status"])),
            Some("status") => {
                set.insert(&path(&["spec"]));
                match (self.kind.0.as_str(), self.kind.1.as_str()) {
                    ("", "Pod") => {
                        set.insert(&path(&["metadata", "deletionTimestamp"]));
                        set.insert(&path(&["metadata", "ownerReferences"]));
                    }
                    ("apps", "Deployment") => set.insert(&path(&["metadata", "labels"])),
                    _ => {}
                }
            }
            _ => {}
        }
        set
    }

    /// Fields whose owners are not recorded.
    fn unowned() -> Set {
        let mut set = Set::default();
        for name in ["apiVersion", "kind", "metadata"] {
            set.insert(&[fieldset::field(name)]);
        }
        for name in [
            "name",
            "namespace",
            "creationTimestamp",
            "selfLink",
            "uid",
            "clusterName",
            "generation",
            "managedFields",
            "resourceVersion",
        ] {
            set.insert(&[fieldset::field("metadata"), fieldset::field(name)]);
        }
        set
    }

    /// Takes changed fields from the other entries and gives them to an Update entry of the manager.
    fn record_update(&self, managed: &mut Managed, old: &Value, new: &Value, manager: Manager<'_>) {
        let reset = self.reset_fields(manager.subresource);
        let comparison = typed::compare(self.types, self.root, old, new);
        let added = comparison.added.without_below(&reset);
        let modified = comparison.modified.without_below(&reset);
        let removed = comparison.removed.without_below(&reset);
        let changed = added.union(&modified);
        for entry in managed.entries.values_mut() {
            entry.fields = entry.fields.difference(&changed).difference(&removed);
        }
        managed.entries.retain(|_, entry| !entry.fields.is_empty());
        let owned = changed.difference(&View::unowned());
        if !owned.is_empty() {
            let name = if manager.name.is_empty() { "unknown" } else { manager.name };
            let key = Key {
                manager: name.to_owned(),
                apply: false,
                api_version: self.api_version.clone(),
                subresource: manager.subresource.unwrap_or_default().to_owned(),
            };
            let entry = managed.entries.entry(key).or_insert_with(|| Entry {
                api_version: self.api_version.clone(),
                time: None,
                fields: Set::default(),
            });
            entry.fields = entry.fields.union(&owned);
            entry.time = Some(manager.now.to_owned());
        }
        managed.cap();
    }

    /// Merges, prunes what the manager no longer applies, and settles ownership.
    fn apply(
        &self,
        live: &Value,
        applied: &Value,
        managed: &Managed,
        manager: Manager<'_>,
        force: bool,
    ) -> Result<(Value, Managed), Vec<Conflict>> {
        let mut managed = managed.clone();
        let key = Key {
            manager: manager.name.to_owned(),
            apply: true,
            api_version: String::new(),
            subresource: manager.subresource.unwrap_or_default().to_owned(),
        };
        let reset = self.reset_fields(manager.subresource);
        let merged = typed::merge(self.types, self.root, Some(live), Some(applied)).unwrap_or(Value::Null);
        let last = managed.entries.get(&key).cloned();
        let set = typed::field_set(self.types, self.root, applied).without_below(&reset);
        let time = last.as_ref().and_then(|entry| entry.time.clone());
        managed.entries.insert(key.clone(), Entry { api_version: self.api_version.clone(), time, fields: set });
        let result = match &last {
            Some(last) if !last.fields.is_empty() => self.prune(&merged, &managed, &last.fields),
            _ => merged,
        };
        let comparison = typed::compare(self.types, self.root, live, &result);
        let added = comparison.added.without_below(&reset);
        let modified = comparison.modified.without_below(&reset);
        let removed = comparison.removed.without_below(&reset);
        let changed = added.union(&modified);
        let mut conflicts = Vec::new();
        for (other, entry) in managed.entries.iter().filter(|(other, _)| **other != key) {
            let taken = entry.fields.intersection(&changed);
            conflicts.extend(taken.paths().into_iter().map(|path| Conflict { key: other.clone(), path }));
        }
        if !conflicts.is_empty() && !force {
            return Err(conflicts);
        }
        for (_, entry) in managed.entries.iter_mut().filter(|(other, _)| **other != key) {
            entry.fields = entry.fields.difference(&changed).difference(&removed);
        }
        if let Some(entry) = managed.entries.get_mut(&key) {
            entry.fields = entry.fields.difference(&View::unowned());
            if result != *live {
                entry.time = Some(manager.now.to_owned());
            }
        }
        managed.entries.retain(|_, entry| !entry.fields.is_empty());
        Ok((result, managed))
    }

    /// Removes what the manager applied last time and nobody owns now.
    fn prune(&self, merged: &Value, managed: &Managed, last: &Set) -> Value {
        let named = |set: &Set| typed::with_named_fields(self.types, Some(self.root), set);
        let held = |value: &Value| named(&typed::field_set(self.types, self.root, value));
        let without = |paths: &Set| typed::remove(self.types, self.root, merged, paths).unwrap_or(Value::Null);
        let mut pruned = without(&named(last));
        // What somebody owns comes back.
        let owned = managed.entries.values().fold(Set::default(), |all, entry| all.union(&entry.fields));
        let merged_set = held(merged);
        pruned = without(&merged_set.difference(&held(&pruned).union(&named(&owned))));
        // So does what was removed along with an owner but was not the manager's.
        without(&merged_set.difference(&held(&pruned)).intersection(&named(last)))
    }

    /// Paths that client-side apply set last and that are still as it set them.
    fn last_applied(&self, ty: &DocumentType, live: &Value) -> Option<Set> {
        let text = live.get("metadata")?.get("annotations")?.get(LAST_APPLIED)?.as_str()?;
        let last: Value = serde_json::from_str(text).ok()?;
        if last.get("apiVersion").and_then(Value::as_str) != Some(ty.api_version().as_str())
            || !typed::validate(self.types, self.root, &last).is_empty()
        {
            return None;
        }
        let comparison = typed::compare(self.types, self.root, &last, live);
        let set = typed::field_set(self.types, self.root, &last);
        Some(set.difference(&comparison.modified).difference(&comparison.added).difference(&comparison.removed))
    }

    /// Whether all conflicts are about fields that kubectl's own client-side apply set.
    fn allowed_by_last_applied(&self, ty: &DocumentType, live: &Value, conflicts: &[Conflict]) -> bool {
        let Some(allowed) = self.last_applied(ty, live) else { return false };
        conflicts.iter().all(|conflict| allowed.has(&conflict.path))
    }

    fn not_last_applied(&self, ty: &DocumentType, live: &Value, mut conflicts: Vec<Conflict>) -> Vec<Conflict> {
        if let Some(allowed) = self.last_applied(ty, live) {
            conflicts.retain(|conflict| !allowed.has(&conflict.path));
        }
        conflicts
    }
}

/// Keeps the annotation of client-side apply in step when kubectl applies from the server's side.
fn refresh_last_applied(value: &mut Value, applied: &Value) {
    let Some(Value::Object(annotations)) = value.get_mut("metadata").and_then(|meta| meta.get_mut("annotations"))
    else {
        return;
    };
    let Some(Value::String(text)) = annotations.get_mut(LAST_APPLIED) else { return };
    if text.is_empty() {
        return;
    }
    let mut applied = applied.clone();
    if let Some(Value::Object(own)) = applied.get_mut("metadata").and_then(|meta| meta.get_mut("annotations")) {
        own.remove(LAST_APPLIED);
    }
    *text = format!("{applied}\n");
}
