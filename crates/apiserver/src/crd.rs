//! Custom kinds: from stored CustomResourceDefinitions to entries of the catalog, and back to their conditions.
//!
//! A definition is first served (routing, discovery, OpenAPI) and then says so in its conditions, so that a client that
//! waits for Established never meets a 404. Conversion between versions rewrites `apiVersion` only; definitions that
//! ask for a webhook are refused. Rules in CEL (`x-kubernetes-validations`) are not evaluated; the writer of the
//! definition is warned.

mod schema;
mod warning;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use portolan_api::kinds::{Generation, Kind, NameRule, Propagation, Registry, Storage, Subresource};
use portolan_api::meta;
use portolan_api::status::Status;
use serde_json::{Value, json};

pub use schema::validate as validate_value;
pub use warning::warnings;

use crate::catalog::{Catalog, Custom};
use crate::server::{Inner, ScalePaths};
use crate::store::{Key, Snapshot, Txn};
use crate::verbs::{DeleteOptions, Pipeline};

/// Collection of definitions.
pub const COLLECTION: &str = "customresourcedefinitions.apiextensions.k8s.io";

/// Holds a definition until its objects are gone.
pub const CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";

/// How often the objects of a definition that is going away are looked at.
const CLEANUP_PERIOD: Duration = Duration::from_millis(100);

fn texts(value: &Value, path: &[&str]) -> Vec<String> {
    meta::list(value, path).iter().filter_map(|item| item.as_str().map(str::to_owned)).collect()
}

/// Fills in what the server knows of a new definition (apiextensions strategy).
pub fn prepare_create(definition: &mut Value) {
    let stored: Vec<Value> = meta::list(definition, &["spec", "versions"])
        .iter()
        .find(|version| version["storage"] == json!(true))
        .map(|version| version["name"].clone())
        .into_iter()
        .collect();
    let stored = if stored.is_empty() { Value::Null } else { Value::Array(stored) };
    definition["status"] =
        json!({"conditions": null, "acceptedNames": {"plural": "", "kind": ""}, "storedVersions": stored});
}

/// Adds the storage version of a changed definition to the versions that objects may be stored in.
pub fn prepare_update(definition: &mut Value) {
    let storage = meta::list(definition, &["spec", "versions"])
        .iter()
        .find(|version| version["storage"] == json!(true))
        .map(|version| version["name"].clone());
    let Some(storage) = storage else { return };
    let mut stored = meta::list(definition, &["status", "storedVersions"]).to_vec();
    if !stored.contains(&storage) {
        stored.push(storage);
        meta::set(definition, &["status", "storedVersions"], Value::Array(stored));
    }
}

fn condition<'a>(definition: &'a Value, name: &str) -> Option<&'a Value> {
    meta::list(definition, &["status", "conditions"]).iter().find(|c| meta::text(c, &["type"]) == name)
}

fn is_true(definition: &Value, name: &str) -> bool {
    condition(definition, name).is_some_and(|c| meta::text(c, &["status"]) == "True")
}

fn set_condition(definition: &mut Value, name: &str, status: &str, reason: &str, message: &str, now: Timestamp) {
    let mut conditions = meta::list(definition, &["status", "conditions"]).to_vec();
    let old = conditions.iter().position(|c| meta::text(c, &["type"]) == name);
    let since = old
        .filter(|i| meta::text(&conditions[*i], &["status"]) == status)
        .map_or_else(|| json!(meta::format_time(now)), |i| conditions[i]["lastTransitionTime"].clone());
    let new =
        json!({"type": name, "status": status, "lastTransitionTime": since, "reason": reason, "message": message});
    match old {
        Some(i) => conditions[i] = new,
        None => conditions.push(new),
    }
    meta::set(definition, &["status", "conditions"], Value::Array(conditions));
}

/// All names a definition takes in its group.
fn names(definition: &Value) -> BTreeSet<String> {
    let names = ["plural", "singular"].map(|field| meta::text(definition, &["spec", "names", field]).to_owned());
    names
        .into_iter()
        .chain(texts(definition, &["spec", "names", "shortNames"]))
        .filter(|name| !name.is_empty())
        .collect()
}

fn kinds_of(definition: &Value) -> BTreeSet<String> {
    ["kind", "listKind"].map(|field| meta::text(definition, &["spec", "names", field]).to_owned()).into_iter().collect()
}

/// What another served definition of the group has taken already: reason and message, if anything.
fn conflict(definition: &Value, others: &[&Value]) -> Option<(&'static str, String)> {
    let group = meta::text(definition, &["spec", "group"]);
    let same_group = others
        .iter()
        .filter(|other| meta::name(other) != meta::name(definition) && meta::text(other, &["spec", "group"]) == group);
    for other in same_group {
        if let Some(name) = names(definition).intersection(&names(other)).next() {
            return Some(("PluralConflict", format!("{} is already in use", portolan_api::status::quoted(name))));
        }
        if let Some(kind) = kinds_of(definition).intersection(&kinds_of(other)).next() {
            return Some(("KindConflict", format!("{} is already in use", portolan_api::status::quoted(kind))));
        }
    }
    None
}

/// The definitions that are served: the established ones, and new ones whose names are free.
fn served(snapshot: &Snapshot) -> Vec<Value> {
    let all: Vec<&Value> = snapshot.list(COLLECTION, None).map(|object| &object.value).collect();
    let established: Vec<&Value> = all.iter().copied().filter(|d| is_true(d, "Established")).collect();
    let mut served: Vec<&Value> = established.clone();
    for definition in all {
        if !is_true(definition, "Established")
            && !meta::is_deleting(definition)
            && conflict(definition, &served).is_none()
        {
            served.push(definition);
        }
    }
    served.into_iter().cloned().collect()
}

fn dotted(path: &str) -> Vec<String> {
    path.trim_start_matches('.').split('.').map(str::to_owned).collect()
}

/// The entries a definition makes: one for each served version.
fn entries(definition: &Value) -> Vec<(Kind, Custom)> {
    let names = |field: &str| meta::text(definition, &["spec", "names", field]).to_owned();
    let versions = meta::list(definition, &["spec", "versions"]);
    let storage = versions
        .iter()
        .find(|version| version["storage"] == json!(true))
        .map(|version| meta::text(version, &["name"]).to_owned())
        .unwrap_or_default();
    let group = meta::text(definition, &["spec", "group"]).to_owned();
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let mut made = Vec::new();
    for version in versions.iter().filter(|version| version["served"] == json!(true)) {
        let name = meta::text(version, &["name"]).to_owned();
        let kind_name = names("kind");
        let mut subresources = Vec::new();
        let scale = &version["subresources"]["scale"];
        let paths = scale.is_object().then(|| ScalePaths {
            spec: dotted(meta::text(scale, &["specReplicasPath"])),
            status: dotted(meta::text(scale, &["statusReplicasPath"])),
            selector: dotted(meta::text(scale, &["labelSelectorPath"])),
        });
        if paths.is_some() {
            subresources.push(Subresource {
                name: "scale".to_owned(),
                kind: "Scale".to_owned(),
                group_version: Some(("autoscaling".to_owned(), "v1".to_owned())),
                verbs: words("get patch update"),
            });
        }
        if version["subresources"]["status"].is_object() {
            subresources.push(Subresource {
                name: "status".to_owned(),
                kind: kind_name.clone(),
                group_version: None,
                verbs: words("get patch update"),
            });
        }
        let kind = Kind {
            group: group.clone(),
            version: name.clone(),
            plural: names("plural"),
            singular: names("singular"),
            kind: kind_name,
            list_kind: names("listKind"),
            namespaced: meta::text(definition, &["spec", "scope"]) == "Namespaced",
            short_names: texts(definition, &["spec", "names", "shortNames"]),
            categories: texts(definition, &["spec", "names", "categories"]),
            // The order of the reference implementation's discovery.
            verbs: words("delete deletecollection get list patch create update watch"),
            subresources,
            name_rule: NameRule::Subdomain,
            generation: Generation::Spec,
            create_on_update: false,
            unconditional_update: false,
            delete_returns_object: false,
            default_propagation: Propagation::Background,
            storage: Storage::Own,
            custom: true,
        };
        let deprecated = version["deprecated"] == json!(true);
        let warning = version["deprecationWarning"].as_str().map(str::to_owned);
        let custom = Custom {
            schema: version["schema"]["openAPIV3Schema"].clone(),
            printer_columns: meta::list(version, &["additionalPrinterColumns"]).to_vec(),
            scale: paths,
            selectable_fields: meta::list(version, &["selectableFields"])
                .iter()
                .map(|field| meta::text(field, &["jsonPath"]).trim_start_matches('.').to_owned())
                .collect(),
            storage_version: storage.clone(),
            deprecation: deprecated
                .then(|| warning.unwrap_or_else(|| format!("{group}/{name} {} is deprecated", names("kind")))),
            terminating: meta::is_deleting(definition),
        };
        made.push((kind, custom));
    }
    made
}

fn build(snapshot: &Snapshot) -> Catalog {
    let mut registry = Registry::builtin();
    let mut customs = BTreeMap::new();
    for definition in served(snapshot) {
        for (kind, custom) in entries(&definition) {
            customs.insert((kind.group.clone(), kind.version.clone(), kind.plural.clone()), Arc::new(custom));
            registry.insert(kind);
        }
    }
    Catalog::new(registry, &customs)
}

/// Builds the catalog from the stored definitions.
pub fn load(inner: &Arc<Inner>) {
    let snapshot = inner.store.snapshot();
    if snapshot.list(COLLECTION, None).next().is_some() {
        inner.catalog.store(Arc::new(build(&snapshot)));
    }
}

/// Keeps definitions and catalog in step until shutdown.
pub async fn keep(inner: Arc<Inner>) {
    let Ok(mut definitions) = inner.store.watch(COLLECTION, inner.store.snapshot().revision) else { return };
    let mut terminating = true;
    loop {
        tokio::select! {
            () = inner.shutdown.cancelled() => return,
            () = definitions.changed() => {}
            () = tokio::time::sleep(CLEANUP_PERIOD), if terminating => {}
        }
        if definitions.read().is_ok_and(|events| !events.is_empty()) {
            inner.catalog.store(Arc::new(build(&inner.store.snapshot())));
        }
        terminating = match reconcile(&inner).await {
            Ok(terminating) => terminating,
            Err(status) => {
                tracing::warn!(error = status.message, "cannot update CustomResourceDefinitions");
                true
            }
        };
    }
}

/// Brings the conditions of all definitions up to date and removes the objects of those that are going away. Says
/// whether any of them still has objects.
async fn reconcile(inner: &Arc<Inner>) -> Result<bool, Status> {
    let now = Timestamp::now();
    let catalog = inner.catalog.load_full();
    inner
        .store
        .transact(|txn| {
            let pipeline = Pipeline { server: inner, catalog: &catalog, now, user: None };
            let all: Vec<_> = txn.state().list(COLLECTION, None).cloned().collect();
            let mut terminating = false;
            for object in &all {
                let definition = &object.value;
                if meta::is_deleting(definition) {
                    terminating |= clean_up(&pipeline, txn, definition)?;
                    continue;
                }
                let mut new = definition.clone();
                let established: Vec<&Value> =
                    all.iter().map(|o| &o.value).filter(|other| is_true(other, "Established")).collect();
                match conflict(definition, &established) {
                    Some((reason, message)) => {
                        set_condition(&mut new, "NamesAccepted", "False", reason, &message, now);
                        if condition(&new, "Established").is_none() {
                            let text = "not all names are accepted";
                            set_condition(&mut new, "Established", "False", "NotAccepted", text, now);
                        }
                    }
                    None => {
                        set_condition(&mut new, "NamesAccepted", "True", "NoConflicts", "no conflicts found", now);
                        if !is_true(&new, "Established") {
                            let text = "the initial names have been accepted";
                            set_condition(&mut new, "Established", "True", "InitialNamesAccepted", text, now);
                        }
                        new["status"]["acceptedNames"] = definition["spec"]["names"].clone();
                    }
                }
                if new != *definition {
                    txn.put(COLLECTION, &Key::new("", meta::name(definition)), new);
                }
            }
            Ok(terminating)
        })
        .await
}

/// Deletes the objects of a definition, and the definition after them. Says whether some are left.
fn clean_up(pipeline: &Pipeline<'_>, txn: &mut Txn, definition: &Value) -> Result<bool, Status> {
    let group = meta::text(definition, &["spec", "group"]);
    let plural = meta::text(definition, &["spec", "names", "plural"]);
    let entry = pipeline
        .catalog
        .registry
        .iter()
        .find(|kind| kind.custom && kind.group == group && kind.plural == plural)
        .and_then(|kind| pipeline.catalog.entry(&kind.group, &kind.version, &kind.plural).cloned());
    if let Some(entry) = entry {
        let objects: Vec<_> = txn.state().list(&entry.collection, None).cloned().collect();
        let mut left = false;
        for object in objects {
            let key = Key::new(meta::namespace(&object.value), meta::name(&object.value));
            if !meta::is_deleting(&object.value) {
                pipeline.delete(txn, &entry, &key, &DeleteOptions::default())?;
            }
            left |= txn.get(&entry.collection, &key).is_some();
        }
        if left {
            return Ok(true);
        }
    }
    let key = Key::new("", meta::name(definition));
    let mut finalizers = meta::list(definition, &["metadata", "finalizers"]).to_vec();
    finalizers.retain(|f| f != CLEANUP);
    if finalizers.is_empty() {
        txn.delete(COLLECTION, &key);
    } else if finalizers.len() < meta::list(definition, &["metadata", "finalizers"]).len() {
        let mut new = definition.clone();
        meta::set(&mut new, &["metadata", "finalizers"], Value::Array(finalizers));
        txn.put(COLLECTION, &key, new);
    }
    Ok(false)
}

/// Marks a definition that is to be deleted: the finalizer that waits for its objects, and the condition.
pub fn prepare_delete(definition: &mut Value, now: Timestamp) {
    let mut finalizers = meta::list(definition, &["metadata", "finalizers"]).to_vec();
    if !meta::is_deleting(definition) && !finalizers.iter().any(|f| f == CLEANUP) {
        finalizers.push(json!(CLEANUP));
        meta::set(definition, &["metadata", "finalizers"], Value::Array(finalizers));
        let text = "CustomResource deletion is in progress";
        set_condition(definition, "Terminating", "True", "InstanceDeletionPending", text, now);
    }
}
