//! Create, update, patch and apply, and the pipeline they share.

use std::borrow::Cow;
use std::sync::Arc;

use http::Response;
use jiff::Timestamp;
use portolan_api::apply::{self, Manager};
use portolan_api::patch::{self, PatchType};
use portolan_api::schema::DocumentType;
use portolan_api::status::{FieldError, Status};
use portolan_api::strict::{self, Admitted};
use portolan_api::{defaulting, meta, strategy, validation};
use serde_json::{Value, json};

use super::options::{WriteOptions, revision};
use super::{Call, render, value_in, write_answer};
use crate::admission;
use crate::auth::User;
use crate::catalog::{Catalog, Entry};
use crate::convert;
use crate::crd;
use crate::negotiate;
use crate::rbac;
use crate::response::Body;
use crate::server::Inner;
use crate::services;
use crate::store::{Key, Object, Txn};

/// How often a generated name is tried before it counts as taken (apiserver/registry/rest/create.go).
const NAME_TRIES: usize = 8;

/// Largest object stored, in bytes: what etcd takes, so that nothing works here that fails in production.
const OBJECT_MAX_BYTES: usize = 1_572_864;

/// How a write accounts for the fields it sets.
#[derive(Clone, Copy, Debug)]
pub enum Tracking<'a> {
    /// What differs from the old object becomes this manager's.
    Update {
        /// The manager.
        manager: &'a str,
    },
    /// The document's managedFields are right already.
    Applied,
    /// The write is the server's own and owns nothing.
    Silent,
}

/// What a write does, apart from the document.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// Subresource written through.
    pub subresource: Option<&'a str>,
    /// Nothing will be kept.
    pub dry_run: bool,
    /// Accounting of fields.
    pub tracking: Tracking<'a>,
}

/// The state and surroundings of writes.
#[derive(Clone, Copy)]
pub struct Pipeline<'a> {
    /// The server.
    pub server: &'a Arc<Inner>,
    /// Kinds.
    pub catalog: &'a Arc<Catalog>,
    /// When.
    pub now: Timestamp,
    /// Who writes; `None` for the server itself.
    pub user: Option<&'a User>,
}

/// The type of a kind's documents.
pub fn document_type(entry: &Entry) -> Result<&DocumentType, Status> {
    entry.ty.as_ref().ok_or_else(Status::method_not_allowed)
}

impl Pipeline<'_> {
    /// Stores a new object. `new` has passed decoding; defaults, admission and validation happen here.
    pub fn create(
        &self,
        txn: &mut Txn,
        entry: &Entry,
        namespace: &str,
        mut new: Value,
        change: Change<'_>,
    ) -> Result<Arc<Object>, Status> {
        let kind = &*entry.kind;
        let ty = document_type(entry)?;
        if entry.custom.as_ref().is_some_and(|custom| custom.terminating) {
            // The definition is going away, and this object would hold it up.
            return Err(Status::method_not_allowed());
        }
        let given_revision = meta::resource_version(&new).to_owned();
        if kind.namespaced {
            admission::namespace(kind, namespace, meta::name(&new), txn.state())?;
        }
        for field in ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"] {
            meta::remove(&mut new, &["metadata", field]);
        }
        let uid = uuid::Uuid::new_v4().to_string();
        convert::synchronize(kind, &mut new);
        defaulting::default(ty, &mut new);
        if let Some(user) = self.user {
            rbac::check_write(txn.state(), user, kind, &new, None)?;
        }
        let generated = self.name(txn, entry, namespace, &mut new)?;
        // What the server adds from here on belongs to no field manager.
        strategy::prepare_create(kind, &mut new);
        self.track(ty, None, &mut new, change);
        if kind.is("batch", "Job") {
            admission::job_selector(&mut new, &uid);
        }
        self.server.admission.create(kind, &mut new, txn.state())?;
        let changes = if kind.is("", "Service") {
            let plan = self.server.pools.lock().plan_create(kind, &mut new, change.dry_run, &mut services::pick)?;
            Some(plan)
        } else {
            None
        };
        strategy::prepare_create(kind, &mut new);
        let definition = kind.is("apiextensions.k8s.io", "CustomResourceDefinition");
        if definition {
            crd::prepare_create(&mut new);
        }
        let mut faults = validation::validate_create(kind, &new);
        if let Some(custom) = &entry.custom {
            faults.extend(crd::validate_value(&custom.schema, &new));
        }
        if !faults.is_empty() {
            return Err(Status::invalid(kind, meta::name(&new), &faults));
        }
        if !given_revision.is_empty() && given_revision != "0" {
            return Err(Status::plain_error("resourceVersion should not be set on objects to be created"));
        }
        let name = meta::name(&new).to_owned();
        let key = Key::new(namespace, &name);
        if let Some(present) = txn.get(&entry.collection, &key) {
            if generated {
                return Err(Status::no_unique_name(kind, &name));
            }
            let mut status = Status::already_exists(kind, &name);
            if meta::is_deleting(&present.value) {
                status.message = format!("object is being deleted: {}", status.message);
            }
            return Err(status);
        }
        admission::stamp(&mut new, &uid, self.now);
        let object = self.put(txn, entry, &key, new)?;
        if let Some(changes) = changes {
            self.addresses(txn, &changes, namespace, &name, change.dry_run)?;
        }
        Ok(object)
    }

    /// Makes sure of a name; says whether it was generated.
    fn name(&self, txn: &Txn, entry: &Entry, namespace: &str, new: &mut Value) -> Result<bool, Status> {
        let base = meta::text(new, &["metadata", "generateName"]).to_owned();
        if !meta::name(new).is_empty() {
            return Ok(false);
        }
        if base.is_empty() {
            let fault = FieldError::required("metadata.name", "name or generateName is required");
            return Err(Status::invalid(&entry.kind, "", &[fault]));
        }
        let pick = |n: usize| usize::try_from(services::pick(n as u64)).unwrap_or(0);
        for _ in 0..NAME_TRIES {
            let name = meta::generate_name(&base, pick);
            let taken = txn.get(&entry.collection, &Key::new(namespace, &name)).is_some();
            meta::set(new, &["metadata", "name"], json!(name));
            if !taken {
                break;
            }
        }
        Ok(true)
    }

    fn track(&self, ty: &DocumentType, old: Option<&Value>, new: &mut Value, change: Change<'_>) {
        match change.tracking {
            Tracking::Update { manager } => {
                let now = meta::format_time(self.now);
                let manager = Manager { name: manager, subresource: change.subresource, now: &now };
                apply::track_update(ty, old, new, manager);
            }
            Tracking::Silent => {
                if let Some(old) = old {
                    meta::put(
                        new,
                        &["metadata", "managedFields"],
                        meta::get(old, &["metadata", "managedFields"]).clone(),
                    );
                }
            }
            Tracking::Applied => {}
        }
    }

    /// Stores a document of the entry's kind.
    fn put(&self, txn: &mut Txn, entry: &Entry, key: &Key, mut value: Value) -> Result<Arc<Object>, Status> {
        if let Some(custom) = &entry.custom {
            // Versions without conversion differ in their name only.
            value["apiVersion"] = json!(format!("{}/{}", entry.kind.group, custom.storage_version));
        }
        let object = txn.put(&entry.collection, key, convert::to_storage(&entry.kind, value));
        if object.body.len() > OBJECT_MAX_BYTES {
            return Err(Status::too_large(OBJECT_MAX_BYTES));
        }
        txn.after_commit({
            let (server, object, collection) = (self.server.clone(), object.clone(), entry.collection.clone());
            move || server.pools.observe(&collection, &object.value)
        });
        Ok(object)
    }

    /// Stores and removes the IPAddress objects of a Service and changes the pools.
    fn addresses(
        &self,
        txn: &mut Txn,
        changes: &portolan_api::service::Changes,
        namespace: &str,
        name: &str,
        dry_run: bool,
    ) -> Result<(), Status> {
        if dry_run || changes.is_empty() {
            return Ok(());
        }
        for ip in &changes.release_ips {
            txn.delete(services::IP_ADDRESSES, &Key::new("", &ip.to_string()));
        }
        let kind = self.catalog.builtin_entry("networking.k8s.io", "v1", "ipaddresses").kind.clone();
        for ip in &changes.take_ips {
            let mut object = services::address_object(*ip, namespace, name);
            strategy::prepare_create(&kind, &mut object);
            admission::stamp(&mut object, &uuid::Uuid::new_v4().to_string(), self.now);
            txn.put(services::IP_ADDRESSES, &Key::new("", &ip.to_string()), object);
        }
        txn.after_commit({
            let (server, changes) = (self.server.clone(), changes.clone());
            move || server.pools.commit(&changes)
        });
        Ok(())
    }

    /// Overwrites an object. Returns its new state, which may be the old one, and whether it has gone with this write.
    pub fn update(
        &self,
        txn: &mut Txn,
        entry: &Entry,
        old: &Arc<Object>,
        mut new: Value,
        change: Change<'_>,
    ) -> Result<(Arc<Object>, bool), Status> {
        let kind = &*entry.kind;
        let ty = document_type(entry)?;
        let old_value: Cow<'_, Value> = value_in(entry, old);
        let name = meta::name(&old_value).to_owned();
        let key = Key::new(meta::namespace(&old_value), &name);
        let given = meta::resource_version(&new).to_owned();
        if !given.is_empty() && given != "0" {
            let wanted = revision(&given).map_err(Status::plain_error)?;
            if wanted != old.revision {
                return Err(Status::stale_write(kind, &name));
            }
        } else if !kind.unconditional_update {
            let fault = FieldError::invalid("metadata.resourceVersion", 0, "must be specified for an update");
            return Err(Status::invalid(kind, &name, &[fault]));
        }
        // What only the server writes is taken over from the stored object.
        for field in ["uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "resourceVersion"]
        {
            meta::put(&mut new, &["metadata", field], meta::get(&old_value, &["metadata", field]).clone());
        }
        meta::remove(&mut new, &["metadata", "selfLink"]);
        convert::synchronize(kind, &mut new);
        defaulting::default(ty, &mut new);
        if let Some(user) = self.user {
            rbac::check_write(txn.state(), user, kind, &new, Some(&old_value))?;
        }
        let changes = if kind.is("", "Service") && change.subresource.is_none() {
            let pools = self.server.pools.lock();
            Some(pools.plan_update(kind, &mut new, &old_value, change.dry_run, &mut services::pick)?)
        } else {
            None
        };
        // A binding writes spec and status at once, past the strategy; its own rules have been checked.
        let binding = change.subresource == Some("binding");
        if !binding {
            strategy::prepare_update(kind, &mut new, &old_value, change.subresource);
        }
        let definition = kind.is("apiextensions.k8s.io", "CustomResourceDefinition");
        if definition && change.subresource.is_none() {
            crd::prepare_update(&mut new);
        }
        let mut faults =
            if binding { Vec::new() } else { validation::validate_update(kind, &new, &old_value, change.subresource) };
        if let Some(custom) = &entry.custom {
            faults.extend(crd::validate_value(&custom.schema, &new));
        }
        if !faults.is_empty() {
            return Err(Status::invalid(kind, &name, &faults));
        }
        self.track(ty, Some(&old_value), &mut new, change);
        if !apply::differs(&old_value, &new) {
            return Ok((old.clone(), false));
        }
        if is_finished(kind, &new) {
            // The last finalizer is gone: the write completes the deletion. Watchers see the state before it, the
            // writer sees its own.
            let last = self.remove(txn, entry, &key, change.dry_run)?;
            let shown = Object::new(convert::to_storage(kind, new), last.revision);
            return Ok((Arc::new(shown), true));
        }
        let object = self.put(txn, entry, &key, new)?;
        if let Some(changes) = changes {
            self.addresses(txn, &changes, &key.namespace, &name, change.dry_run)?;
        }
        Ok((object, false))
    }

    /// Removes an object and what it holds of the pools.
    pub fn remove(&self, txn: &mut Txn, entry: &Entry, key: &Key, dry_run: bool) -> Result<Arc<Object>, Status> {
        let last = txn.delete(&entry.collection, key).ok_or_else(|| Status::not_found(&entry.kind, &key.name))?;
        txn.after_commit({
            let (server, object, collection) = (self.server.clone(), last.clone(), entry.collection.clone());
            move || server.pools.forget(&collection, &object.value)
        });
        if entry.kind.is("", "Service") {
            let changes = self.server.pools.lock().plan_delete(&last.value);
            self.addresses(txn, &changes, &key.namespace, &key.name, dry_run)?;
            // The Endpoints object goes with its Service, whoever made it (registry/core/service/storage).
            txn.delete("endpoints", key);
        }
        Ok(last)
    }
}

/// Whether an object that is being deleted has nothing left to wait for.
pub fn is_finished(kind: &portolan_api::kinds::Kind, object: &Value) -> bool {
    meta::is_deleting(object)
        && meta::list(object, &["metadata", "finalizers"]).is_empty()
        && meta::get(object, &["metadata", "deletionGracePeriodSeconds"]).as_i64().unwrap_or(0) == 0
        && (!kind.is("", "Namespace") || meta::list(object, &["spec", "finalizers"]).is_empty())
}

/// Fits the namespace of a document to that of the URL.
pub fn scope(call: &Call, new: &mut Value) -> Result<(), Status> {
    if !call.entry.kind.namespaced {
        meta::remove(new, &["metadata", "namespace"]);
        return Ok(());
    }
    check_scope(call, new)?;
    meta::set(new, &["metadata", "namespace"], json!(call.namespace()));
    Ok(())
}

/// Refuses a document of another namespace than the URL's.
fn check_scope(call: &Call, new: &Value) -> Result<(), Status> {
    let given = meta::namespace(new);
    if call.entry.kind.namespaced && !given.is_empty() && given != call.namespace() {
        return Err(Status::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    Ok(())
}

/// Removes owner references that occur twice, with the warning of the reference implementation.
fn unique_owners(new: &mut Value, warnings: &mut Vec<String>) {
    let references = meta::list(new, &["metadata", "ownerReferences"]);
    let mut kept: Vec<Value> = Vec::with_capacity(references.len());
    let mut twice: Vec<&str> = Vec::new();
    for reference in references {
        if kept.contains(reference) {
            twice.push(meta::text(reference, &["uid"]));
        } else {
            kept.push(reference.clone());
        }
    }
    if twice.is_empty() {
        return;
    }
    twice.sort_unstable();
    twice.dedup();
    warnings.push(format!(
        ".metadata.ownerReferences contains duplicate entries; API server dedups owner references in 1.20+, and may reject \
         such requests as early as 1.24; please fix your requests; duplicate UID(s) observed: {}",
        twice.join(", ")
    ));
    meta::set(new, &["metadata", "ownerReferences"], Value::Array(kept));
}

/// Checks that a document names the object of the URL.
fn named(call: &Call, new: &mut Value) -> Result<(), Status> {
    let given = meta::name(new).to_owned();
    if given.is_empty() {
        return Err(Status::bad_request("name must be provided"));
    }
    if given != call.name() {
        return Err(Status::bad_request(format!(
            "the name of the object ({given}) does not match the name on the URL ({})",
            call.name()
        )));
    }
    Ok(())
}

/// Decodes the body as a document of the call's kind.
fn decoded(call: &Call, options: WriteOptions) -> Result<Admitted, Status> {
    let ty = document_type(&call.entry)?;
    let format = negotiate::body_format(call.content_type(), call.entry.kind.custom)?;
    if call.entry.kind.custom {
        check_custom_kind(call, format)?;
    }
    strict::decode(ty, format, &call.body, options.validation)
}

/// Most bytes of a body that an error about it shows.
const SHOWN_BYTES: usize = 30;

/// Custom objects must say their kind, and another one is a fault of the field.
fn check_custom_kind(call: &Call, format: strict::Format) -> Result<(), Status> {
    let value: Option<Value> = match format {
        strict::Format::Json => serde_json::from_slice(&call.body).ok(),
        strict::Format::Yaml => serde_saphyr::from_slice(&call.body).ok(),
        strict::Format::Protobuf => None,
    };
    // What cannot be read is the decoder's to say.
    let Some(Value::Object(fields)) = value else { return Ok(()) };
    let kind = &call.entry.kind;
    match fields.get("kind").and_then(Value::as_str).unwrap_or_default() {
        "" => {
            let body = String::from_utf8_lossy(&call.body);
            let shown: String = body.chars().take(SHOWN_BYTES).collect();
            let dots = if shown.len() < body.len() { " ..." } else { "" };
            Err(Status::bad_request(format!(
                "the object provided is unrecognized (must be of type {}): Object 'Kind' is missing in '{body}' ({shown}{dots})",
                kind.kind
            )))
        }
        given if given != kind.kind => {
            let name = fields.get("metadata").map(|metadata| meta::text(metadata, &["name"])).unwrap_or_default();
            let fault = FieldError::invalid("kind", given, format!("must be {}", kind.kind));
            Err(Status::invalid_kind(&kind.group, given, name, &[fault]))
        }
        _ => Ok(()),
    }
}

/// Waits a little for the `default` ServiceAccount of a namespace: a Pod often comes right after its namespace, before
/// the controller has made the account (upstream's plugin does the same).
pub async fn wait_for_account(call: &Call, pod: &Value) {
    let account = meta::text(pod, &["spec", "serviceAccountName"]);
    if !call.server.admission.service_accounts() || !matches!(account, "" | "default") {
        return;
    }
    let key = Key::new(call.namespace(), "default");
    let missing = |snapshot: &crate::store::Snapshot| snapshot.get("serviceaccounts", &key).is_none();
    let snapshot = call.server.store.snapshot();
    if !missing(&snapshot) || snapshot.get("namespaces", &Key::new("", call.namespace())).is_none() {
        return;
    }
    let Ok(mut watcher) = call.server.store.watch("serviceaccounts", snapshot.revision) else { return };
    let limit = std::time::Duration::from_secs(1);
    let _ = tokio::time::timeout(limit, async {
        while missing(&call.server.store.snapshot()) {
            watcher.changed().await;
            if watcher.read().is_err() {
                return;
            }
        }
    })
    .await;
}

/// `POST` to a collection.
pub async fn create(call: &Call) -> Result<Response<Body>, Status> {
    call.representation()?;
    let options = WriteOptions::parse(&call.query, "CreateOptions", false)?;
    let Admitted { value: mut new, mut warnings } = decoded(call, options)?;
    scope(call, &mut new)?;
    unique_owners(&mut new, &mut warnings);
    if call.entry.kind.is("", "Pod") {
        wait_for_account(call, &new).await;
    }
    let manager = call.manager();
    let change =
        Change { subresource: None, dry_run: options.dry_run, tracking: Tracking::Update { manager: &manager } };
    let kind = &call.entry.kind;
    warnings.extend(validation::warnings(kind, &new, None, None));
    if kind.is("apiextensions.k8s.io", "CustomResourceDefinition") {
        warnings.extend(crd::warnings(&new));
    }
    let object = call
        .commit(options.dry_run, |txn| call.pipeline().create(txn, &call.entry, call.namespace(), new, change))
        .await?;
    created(call, &object, &warnings, options.dry_run)
}

/// The answer to a write that has made an object.
pub fn created(call: &Call, object: &Object, warnings: &[String], dry_run: bool) -> Result<Response<Body>, Status> {
    if dry_run {
        // Nothing has been stored, so there is no revision to show.
        let mut value = value_in(&call.entry, object).into_owned();
        meta::remove(&mut value, &["metadata", "resourceVersion"]);
        return write_answer(call, 201, &value, warnings);
    }
    let mut response = render::object(call, 201, object)?;
    crate::headers::add_warnings(response.headers_mut(), warnings);
    Ok(response)
}

fn updated(call: &Call, object: &Object, warnings: &[String]) -> Result<Response<Body>, Status> {
    let mut response = render::object(call, 200, object)?;
    crate::headers::add_warnings(response.headers_mut(), warnings);
    Ok(response)
}

enum Written {
    Made(Arc<Object>),
    Changed(Arc<Object>),
}

/// `PUT` of an object or of its `/status`.
pub async fn update(call: &Call, subresource: Option<&str>) -> Result<Response<Body>, Status> {
    call.representation()?;
    let options = WriteOptions::parse(&call.query, "UpdateOptions", false)?;
    let Admitted { value: mut new, mut warnings } = decoded(call, options)?;
    named(call, &mut new)?;
    scope(call, &mut new)?;
    unique_owners(&mut new, &mut warnings);
    let entry = &call.entry;
    let kind = &entry.kind;
    let manager = call.manager();
    let change = Change { subresource, dry_run: options.dry_run, tracking: Tracking::Update { manager: &manager } };
    let key = call.key();
    let mut more = Vec::new();
    let written = call
        .commit(options.dry_run, |txn| {
            let pipeline = call.pipeline();
            let Some(old) = txn.get(&entry.collection, &key).cloned() else {
                if subresource.is_none() && kind.create_on_update {
                    more = validation::warnings(kind, &new, None, None);
                    meta::remove(&mut new, &["metadata", "resourceVersion"]);
                    return pipeline.create(txn, entry, call.namespace(), new, change).map(Written::Made);
                }
                return Err(Status::not_found(kind, call.name()));
            };
            let given = meta::uid(&new);
            if !given.is_empty() && given != meta::uid(&old.value) {
                return Err(uid_conflict(call, given, meta::uid(&old.value)));
            }
            more = validation::warnings(kind, &new, Some(&value_in(entry, &old)), subresource);
            pipeline.update(txn, entry, &old, new, change).map(|(object, _)| Written::Changed(object))
        })
        .await?;
    warnings.append(&mut more);
    match written {
        Written::Made(object) => created(call, &object, &warnings, options.dry_run),
        Written::Changed(object) => updated(call, &object, &warnings),
    }
}

/// The 409 of a PUT with another uid, in the words of the reference implementation's storage.
fn uid_conflict(call: &Call, given: &str, stored: &str) -> Status {
    let kind = &call.entry.kind;
    let group = if kind.group.contains('.') { format!("{}/", kind.group) } else { String::new() };
    let namespace = if call.namespace().is_empty() { String::new() } else { format!("{}/", call.namespace()) };
    let path = format!("/registry/{group}{}/{namespace}{}", kind.plural, call.name());
    let why = format!(
        "StorageError: invalid object, Code: 4, Key: {path}, ResourceVersion: 0, AdditionalErrorMsg: Precondition failed: \
         UID in precondition: {given}, UID in object meta: {stored}"
    );
    Status::conflict(kind, call.name(), why)
}

/// Media types of patches, as errors list them.
const PATCH_TYPES: &[&str] = &[
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/apply-patch+yaml",
    "application/strategic-merge-patch+json",
];

/// The kind of patch a request sends.
pub fn patch_type(call: &Call) -> Result<PatchType, Status> {
    let custom = call.entry.kind.custom;
    let accepted = if custom { &PATCH_TYPES[..3] } else { PATCH_TYPES };
    match PatchType::from_media_type(negotiate::media_type(call.content_type())) {
        Some(PatchType::Strategic) if custom => Err(Status::unsupported_media_type(accepted)),
        Some(patch_type) => Ok(patch_type),
        None => Err(Status::unsupported_media_type(accepted)),
    }
}

/// `PATCH` of an object or of its `/status`.
pub async fn patch(call: &Call, subresource: Option<&str>) -> Result<Response<Body>, Status> {
    call.representation()?;
    let patch_type = patch_type(call)?;
    let options = WriteOptions::parse(&call.query, "PatchOptions", patch_type == PatchType::Apply)?;
    if patch_type == PatchType::Apply {
        return apply_patch(call, subresource, options).await;
    }
    let entry = &call.entry;
    let kind = &entry.kind;
    let ty = document_type(entry)?;
    let manager = call.manager();
    let change = Change { subresource, dry_run: options.dry_run, tracking: Tracking::Update { manager: &manager } };
    let mut warnings = Vec::new();
    let object = call
        .commit(options.dry_run, |txn| {
            let old =
                txn.get(&entry.collection, &call.key()).cloned().ok_or_else(|| Status::not_found(kind, call.name()))?;
            let current = value_in(entry, &old);
            let Admitted { value: mut new, warnings: found } =
                patch::patch(ty, patch_type, &current, &call.body, options.validation)?;
            warnings = found;
            same_object(call, &current, &mut new)?;
            unique_owners(&mut new, &mut warnings);
            warnings.extend(validation::warnings(kind, &new, Some(&current), subresource));
            call.pipeline().update(txn, entry, &old, new, change)
        })
        .await?
        .0;
    updated(call, &object, &warnings)
}

/// A patch may not turn the object into another one.
fn same_object(call: &Call, current: &Value, new: &mut Value) -> Result<(), Status> {
    let given = meta::name(new);
    if given != call.name() {
        return Err(Status::bad_request(format!(
            "the name of the object ({given}) does not match the name on the URL ({})",
            call.name()
        )));
    }
    scope(call, new)?;
    let (given, stored) = (meta::uid(new), meta::uid(current));
    if !given.is_empty() && given != stored {
        let fault = FieldError::invalid("metadata.uid", given, "field is immutable");
        return Err(Status::invalid(&call.entry.kind, call.name(), &[fault.clone(), fault]));
    }
    Ok(())
}

async fn apply_patch(call: &Call, subresource: Option<&str>, options: WriteOptions) -> Result<Response<Body>, Status> {
    let entry = &call.entry;
    let kind = &entry.kind;
    let ty = document_type(entry)?;
    let applied = apply::decode(ty, &call.body, call.name())?;
    let mut warnings = Vec::new();
    check_scope(call, &applied)?;
    let manager = call.manager();
    let force = call.query.flag("force");
    let now = meta::format_time(call.now);
    let change = Change { subresource, dry_run: options.dry_run, tracking: Tracking::Applied };
    if kind.is("", "Pod") && subresource.is_none() {
        wait_for_account(call, &applied).await;
    }
    let mut more = Vec::new();
    let written = call
        .commit(options.dry_run, |txn| {
            let pipeline = call.pipeline();
            let manager = Manager { name: &manager, subresource, now: &now };
            let live = txn.get(&entry.collection, &call.key()).cloned();
            match live {
                None if subresource.is_some() => Err(Status::not_found(kind, call.name())),
                None => {
                    if !meta::uid(&applied).is_empty() {
                        let why = "uid mismatch: the provided object specified uid";
                        return Err(Status::conflict(
                            kind,
                            call.name(),
                            format!("{why} {}, and no existing object was found", meta::uid(&applied)),
                        ));
                    }
                    let mut new = apply::apply(ty, None, &applied, manager, force)?;
                    scope(call, &mut new)?;
                    meta::remove(&mut new, &["metadata", "resourceVersion"]);
                    more = validation::warnings(kind, &new, None, None);
                    pipeline.create(txn, entry, call.namespace(), new, change).map(Written::Made)
                }
                Some(old) => {
                    let current = value_in(entry, &old);
                    let given = meta::resource_version(&applied);
                    if !given.is_empty() && given != old.revision.to_string() {
                        return Err(Status::stale_write(kind, call.name()));
                    }
                    let mut new = apply::apply(ty, Some(&current), &applied, manager, force)?;
                    same_object(call, &current, &mut new)?;
                    more = validation::warnings(kind, &new, Some(&current), subresource);
                    pipeline.update(txn, entry, &old, new, change).map(|(object, _)| Written::Changed(object))
                }
            }
        })
        .await?;
    warnings.append(&mut more);
    match written {
        Written::Made(object) => created(call, &object, &warnings, options.dry_run),
        Written::Changed(object) => updated(call, &object, &warnings),
    }
}
