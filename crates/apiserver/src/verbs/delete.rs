//! Delete and deletecollection (semantics of registry/rest/delete.go and registry/generic/registry/store.go).

use std::sync::Arc;

use http::Response;
use jiff::Timestamp;
use portolan_api::kinds::{Generation, Kind, Propagation};
use portolan_api::meta;
use portolan_api::schema::DocumentType;
use portolan_api::status::{self, Status};
use portolan_api::strict::{self, FieldValidation};
use serde_json::{Value, json};

use super::options::{DeleteOptions, ListOptions, Policy};
use super::{Call, Pipeline, read, render, value_in, write_answer};
use crate::admission::PERMANENT_NAMESPACES;
use crate::catalog::Entry;
use crate::crd;
use crate::negotiate;
use crate::response::{Body, json};
use crate::store::{Key, Object, Txn};

const ORPHAN: &str = "orphan";
const FOREGROUND: &str = "foregroundDeletion";

/// What a deletion has come to.
pub enum Outcome {
    /// The object waits for something; its state now.
    Waiting(Arc<Object>),
    /// The object is gone; its last state.
    Gone(Arc<Object>),
}

/// What is to be done to an object that is to be deleted.
#[derive(Debug, PartialEq)]
enum Decision {
    /// Nothing; it is on its way already.
    Keep,
    /// Store this state and wait.
    Mark(Value),
    /// Remove it; this is its last state.
    Remove(Value),
}

/// Decides about one object. Pure: `old` is its state, `now` the time.
fn decide(kind: &Kind, old: &Value, options: &DeleteOptions, now: Timestamp) -> Decision {
    let mut new = old.clone();
    let deleting = meta::is_deleting(old);
    let finalizers_before = meta::list(old, &["metadata", "finalizers"]).to_vec();
    let finalizers = finalizers_after(kind, &finalizers_before, options.policy);
    let namespace = kind.is("", "Namespace");
    let grace = if kind.is("", "Pod") { pod_grace(old, options.grace_seconds) } else { 0 };
    let stored_grace = meta::get(old, &["metadata", "deletionGracePeriodSeconds"]).as_i64();

    if finalizers.is_empty() {
        meta::remove(&mut new, &["metadata", "finalizers"]);
    } else {
        meta::set(&mut new, &["metadata", "finalizers"], json!(finalizers));
    }
    let blocked = !finalizers.is_empty() || (namespace && !meta::list(old, &["spec", "finalizers"]).is_empty());

    if deleting {
        let shorter = stored_grace.is_some_and(|stored| grace < stored && kind.is("", "Pod"));
        if shorter {
            // The time moves back by as much as the period gets shorter.
            mark(kind, &mut new, old, Some(grace), now);
        }
        let finished = grace == 0 || stored_grace.unwrap_or(0) == 0;
        if !blocked && finished {
            return Decision::Remove(new);
        }
        return if new == *old { Decision::Keep } else { Decision::Mark(new) };
    }
    mark(kind, &mut new, old, (!namespace).then_some(grace), now);
    if namespace {
        meta::set(&mut new, &["status", "phase"], json!("Terminating"));
    }
    if blocked || grace > 0 { Decision::Mark(new) } else { Decision::Remove(new) }
}

/// Sets the deletion fields.
fn mark(kind: &Kind, new: &mut Value, old: &Value, grace: Option<i64>, now: Timestamp) {
    let since = meta::parse_time(meta::text(old, &["metadata", "deletionTimestamp"]));
    let before = meta::get(old, &["metadata", "deletionGracePeriodSeconds"]).as_i64().unwrap_or(0);
    let begun = since.map_or(now.as_second(), |end| end.as_second() - before);
    let end = Timestamp::from_second(begun + grace.unwrap_or(0)).unwrap_or(now);
    meta::set(new, &["metadata", "deletionTimestamp"], json!(meta::format_time(end)));
    if let Some(grace) = grace {
        meta::set(new, &["metadata", "deletionGracePeriodSeconds"], json!(grace));
    }
    let generation = meta::get(old, &["metadata", "generation"]).as_i64();
    if since.is_none() && (kind.generation != Generation::None || generation.is_some_and(|n| n > 0)) {
        meta::set(new, &["metadata", "generation"], json!(generation.unwrap_or(0) + 1));
    }
}

/// Seconds a Pod gets to end.
fn pod_grace(pod: &Value, wanted: Option<i64>) -> i64 {
    let unscheduled = meta::text(pod, &["spec", "nodeName"]).is_empty();
    let ended = matches!(meta::text(pod, &["status", "phase"]), "Succeeded" | "Failed");
    if unscheduled || ended {
        return 0;
    }
    let grace = wanted.or_else(|| meta::get(pod, &["spec", "terminationGracePeriodSeconds"]).as_i64()).unwrap_or(30);
    // The kubelet needs a moment at least (validation of negative values, KEP-2335 era behaviour).
    if grace < 0 { 1 } else { grace }
}

/// The finalizers after the garbage collector's have been set for the policy.
fn finalizers_after(kind: &Kind, before: &[Value], policy: Option<Policy>) -> Vec<Value> {
    let mut after: Vec<Value> = before.to_vec();
    if kind.kind == "Event" && !kind.custom {
        return after;
    }
    let has = |name: &str| before.iter().any(|f| f == name);
    let policy = policy.unwrap_or({
        // Without a policy what is there stays; the kind's own default fills in.
        if has(ORPHAN) {
            Policy::Orphan
        } else if has(FOREGROUND) {
            Policy::Foreground
        } else if kind.default_propagation == Propagation::Orphan {
            Policy::Orphan
        } else {
            Policy::Background
        }
    });
    let wanted = match policy {
        Policy::Orphan => Some(ORPHAN),
        Policy::Foreground => Some(FOREGROUND),
        Policy::Background => None,
    };
    after.retain(|f| (f != ORPHAN && f != FOREGROUND) || wanted.is_some_and(|wanted| f == wanted));
    if let Some(wanted) = wanted
        && !after.iter().any(|f| f == wanted)
    {
        after.push(json!(wanted));
    }
    after
}

fn check_preconditions(kind: &Kind, old: &Object, options: &DeleteOptions) -> Result<(), Status> {
    let name = meta::name(&old.value);
    let refuse = |why: String| {
        let message = format!("Operation cannot be fulfilled on {} \"{name}\": {why}", kind.kind);
        let mut status = Status::conflict(kind, name, "");
        status.message = message;
        if let Some(details) = &mut status.details {
            details.kind.clone_from(&kind.kind);
            details.group.clone_from(&kind.group);
        }
        status
    };
    let uid = meta::uid(&old.value);
    if let Some(wanted) = options.uid.as_deref().filter(|wanted| *wanted != uid) {
        return Err(refuse(format!(
            "the UID in the precondition ({wanted}) does not match the UID in record ({uid}). The object might have been \
             deleted and then recreated"
        )));
    }
    let revision = old.revision.to_string();
    if let Some(wanted) = options.resource_version.as_deref().filter(|wanted| *wanted != revision) {
        return Err(refuse(format!(
            "the ResourceVersion in the precondition ({wanted}) does not match the ResourceVersion in record ({revision}). \
             The object might have been modified"
        )));
    }
    Ok(())
}

impl Pipeline<'_> {
    /// Deletes one object, or marks it.
    pub fn delete(&self, txn: &mut Txn, entry: &Entry, key: &Key, options: &DeleteOptions) -> Result<Outcome, Status> {
        let kind = &entry.kind;
        let old = txn.get(&entry.collection, key).cloned().ok_or_else(|| Status::not_found(kind, &key.name))?;
        check_preconditions(kind, &old, options)?;
        if kind.is("", "Namespace") && PERMANENT_NAMESPACES.contains(&&*key.name) {
            return Err(Status::forbidden(kind, &key.name, "this namespace may not be deleted"));
        }
        let mut current = old.value.clone();
        if kind.is("apiextensions.k8s.io", "CustomResourceDefinition") {
            crd::prepare_delete(&mut current, self.now);
        }
        match decide(kind, &current, options, self.now) {
            Decision::Keep => Ok(Outcome::Waiting(old)),
            Decision::Mark(value) => {
                let object = txn.put(&entry.collection, key, value);
                txn.after_commit({
                    let (server, object, collection) = (self.server.clone(), object.clone(), entry.collection.clone());
                    move || server.pools.observe(&collection, &object.value)
                });
                Ok(Outcome::Waiting(object))
            }
            Decision::Remove(last) => {
                // The removal event shows the deletion fields of a Pod, as upstream's last state does.
                let removed = self.remove(txn, entry, key, options.dry_run)?;
                let shown = Object::new(last, removed.revision);
                Ok(Outcome::Gone(Arc::new(shown)))
            }
        }
    }
}

fn options(call: &Call) -> Result<DeleteOptions, Status> {
    if call.body.is_empty() {
        return DeleteOptions::from_query(&call.query);
    }
    // Options belong to every group's versions and to meta.k8s.io; unknown fields are ignored.
    let format = negotiate::body_format(call.content_type(), false)?;
    let ty = DocumentType::builtin("meta.k8s.io", "v1", "DeleteOptions")
        .ok_or_else(|| Status::internal("the type DeleteOptions is missing"))?;
    let value = match format {
        strict::Format::Protobuf => {
            portolan_api::protobuf::decode(&call.body, Some(("meta.k8s.io", "v1", "DeleteOptions")))?
        }
        strict::Format::Json | strict::Format::Yaml => {
            let value: Value = match format {
                strict::Format::Json => serde_json::from_slice(&call.body).ok(),
                _ => serde_saphyr::from_slice(&call.body).ok(),
            }
            .unwrap_or(Value::Null);
            match value {
                Value::Object(mut fields) => {
                    fields.insert("apiVersion".to_owned(), json!(ty.api_version()));
                    fields.insert("kind".to_owned(), json!("DeleteOptions"));
                    strict::admit(&ty, Value::Object(fields), FieldValidation::Ignore)?.value
                }
                // Unreadable: the decoder's own words.
                _ => strict::decode(&ty, format, &call.body, FieldValidation::Ignore)?.value,
            }
        }
    };
    DeleteOptions::from_value(&value)
}

/// `DELETE` of one object.
pub async fn delete(call: &Call) -> Result<Response<Body>, Status> {
    call.representation()?;
    let options = options(call)?;
    let entry = &call.entry;
    let outcome = call.commit(options.dry_run, |txn| call.pipeline().delete(txn, entry, &call.key(), &options)).await?;
    match outcome {
        Outcome::Waiting(object) => {
            // 202 only for the old way of asking for dependents to be deleted in the background.
            let code = if options.orphan_false { 202 } else { 200 };
            render::object(call, code, &object)
        }
        Outcome::Gone(object) if entry.kind.delete_returns_object => {
            write_answer(call, 200, &value_in(entry, &object), &[])
        }
        Outcome::Gone(object) => Ok(json(200, &status::deleted(&entry.kind, call.name(), meta::uid(&object.value)))),
    }
}

/// `DELETE` of a collection: the answer lists what it found.
pub async fn delete_collection(call: &Call) -> Result<Response<Body>, Status> {
    call.representation()?;
    let options = options(call)?;
    let entry = &call.entry;
    let list = ListOptions::parse(&call.query, &entry.kind, call.selectable_fields(), None)?;
    let read::Page { objects, revision, .. } = read::page(call, &list).await?;
    call.commit(options.dry_run, |txn| {
        for object in &objects {
            let key = Key::new(meta::namespace(&object.value), meta::name(&object.value));
            match call.pipeline().delete(txn, entry, &key, &options) {
                Ok(_) => {}
                // Somebody else was faster.
                Err(status) if status.code == 404 => {}
                Err(status) => return Err(status),
            }
        }
        Ok(())
    })
    .await?;
    render::list(call, &objects, render::list_metadata(revision, None, None))
}

#[cfg(test)]
mod tests {
    use super::*;
    use portolan_api::kinds::Registry;

    fn decision(api_version: &str, kind: &str, object: Value, options: DeleteOptions) -> &'static str {
        let registry = Registry::builtin();
        let kind = registry.by_type_meta(api_version, kind).expect("built in");
        match decide(kind, &object, &options, Timestamp::UNIX_EPOCH) {
            Decision::Keep => "keep",
            Decision::Mark(_) => "mark",
            Decision::Remove(_) => "remove",
        }
    }

    #[test]
    fn what_a_deletion_comes_to() {
        let plain = DeleteOptions::default;
        let policy = |policy| DeleteOptions { policy: Some(policy), ..DeleteOptions::default() };
        let grace = |seconds| DeleteOptions { grace_seconds: Some(seconds), ..DeleteOptions::default() };
        let running = json!({"metadata": {}, "spec": {"nodeName": "n"}, "status": {"phase": "Running"}});
        let ended = json!({"metadata": {}, "spec": {"nodeName": "n"}, "status": {"phase": "Failed"}});
        let ending = json!({"metadata": {"deletionTimestamp": "1970-01-01T00:00:30Z", "deletionGracePeriodSeconds": 30},
            "spec": {"nodeName": "n"}});
        let held = json!({"metadata": {"finalizers": ["a/b"]}});
        let rows = [
            ("a_plain_object_goes", "v1", "ConfigMap", json!({"metadata": {}}), plain(), "remove"),
            ("a_finalizer_holds_it", "v1", "ConfigMap", held.clone(), plain(), "mark"),
            ("foreground_holds_it", "v1", "ConfigMap", json!({"metadata": {}}), policy(Policy::Foreground), "mark"),
            ("a_job_orphans_by_default", "batch/v1", "Job", json!({"metadata": {}}), plain(), "mark"),
            ("a_job_in_background", "batch/v1", "Job", json!({"metadata": {}}), policy(Policy::Background), "remove"),
            ("a_running_pod_gets_time", "v1", "Pod", running.clone(), plain(), "mark"),
            ("a_running_pod_by_force", "v1", "Pod", running, grace(0), "remove"),
            ("an_ended_pod_goes", "v1", "Pod", ended, plain(), "remove"),
            ("an_unscheduled_pod_goes", "v1", "Pod", json!({"metadata": {}}), plain(), "remove"),
            ("a_longer_period_changes_nothing", "v1", "Pod", ending.clone(), grace(50), "keep"),
            ("a_shorter_period_counts", "v1", "Pod", ending.clone(), grace(5), "mark"),
            ("zero_ends_it", "v1", "Pod", ending, grace(0), "remove"),
            (
                "a_namespace_waits_for_its_content",
                "v1",
                "Namespace",
                json!({"metadata": {}, "spec": {"finalizers": ["kubernetes"]}}),
                plain(),
                "mark",
            ),
        ];
        for (name, api_version, kind, object, options, want) in rows {
            assert_eq!(decision(api_version, kind, object, options), want, "{name}");
        }
    }

    #[test]
    fn a_shorter_period_moves_the_end_back() {
        let registry = Registry::builtin();
        let kind = registry.by_type_meta("v1", "Pod").expect("built in");
        let pod = json!({"metadata": {"generation": 2, "deletionTimestamp": "1970-01-01T00:00:30Z",
            "deletionGracePeriodSeconds": 30}, "spec": {"nodeName": "n"}});
        let options = DeleteOptions { grace_seconds: Some(5), ..DeleteOptions::default() };
        let Decision::Mark(new) = decide(kind, &pod, &options, Timestamp::UNIX_EPOCH) else { panic!("not marked") };
        assert_eq!(new["metadata"]["deletionTimestamp"], "1970-01-01T00:00:05Z");
        assert_eq!(new["metadata"]["generation"], 2);
    }
}
