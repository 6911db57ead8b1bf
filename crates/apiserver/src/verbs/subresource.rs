//! Subresources: status, ephemeralcontainers, scale, binding, eviction, token, finalize, and those that are streams.

use std::sync::Arc;

use http::Response;
use portolan_api::meta;
use portolan_api::patch::{self, PatchType};
use portolan_api::schema::DocumentType;
use portolan_api::selector::LabelSelector;
use portolan_api::status::{FieldError, Status, success};
use portolan_api::strict::{self, Admitted};
use serde_json::{Value, json};

use super::options::{DeleteOptions, WriteOptions};
use super::write::{Change, Tracking, patch_type, scope};
use super::{Call, answer_value, read, render, value_in, write};
use crate::headers::add_warnings;
use crate::negotiate;
use crate::response::{Body, json as json_answer};
use crate::store::Object;
use crate::token::{self, Bound};

/// Carries out a request about a subresource; kind, subresource and verb are known to go together.
pub async fn run(call: Call, subresource: &str) -> Result<Response<Body>, Status> {
    match (subresource, call.verb) {
        ("status", "get") => read::get(&call),
        ("status", "update") => write::update(&call, Some("status")).await,
        ("status", "patch") => write::patch(&call, Some("status")).await,
        ("ephemeralcontainers", "get") => read::get(&call),
        ("ephemeralcontainers", "update") => write::update(&call, Some("ephemeralcontainers")).await,
        ("ephemeralcontainers", "patch") => write::patch(&call, Some("ephemeralcontainers")).await,
        ("scale", _) => scale(&call).await,
        ("binding", "create") => binding(&call).await,
        ("eviction", "create") => eviction(&call).await,
        ("token", "create") => token_request(&call).await,
        ("finalize", "update") => write::update(&call, Some("finalize")).await,
        _ => Err(Status::method_not_allowed()),
    }
}

fn builtin(group: &str, version: &str, kind: &str) -> Result<DocumentType, Status> {
    DocumentType::builtin(group, version, kind)
        .ok_or_else(|| Status::internal(format!("the type {group}/{version} {kind} is missing")))
}

/// Decodes the body as a document of another type than the resource's.
pub fn body_of(call: &Call, group: &str, version: &str, kind: &str, options: WriteOptions) -> Result<Admitted, Status> {
    let ty = builtin(group, version, kind)?;
    strict::decode(&ty, negotiate::body_format(call.content_type(), false)?, &call.body, options.validation)
}

fn live(call: &Call) -> Result<Arc<Object>, Status> {
    let snapshot = call.server.store.snapshot();
    snapshot
        .get(&call.entry.collection, &call.key())
        .cloned()
        .ok_or_else(|| Status::not_found(&call.entry.kind, call.name()))
}

/// The Scale of an object (autoscaling/v1).
fn scale_of(call: &Call, object: &Value) -> Value {
    let paths = call.server.scale_paths(&call.entry.kind);
    let number = |path: &[String]| {
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        meta::get(object, &path).as_i64().unwrap_or(0)
    };
    let mut metadata = json!({});
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        meta::put(&mut metadata, &[field], meta::get(object, &["metadata", field]).clone());
    }
    let mut spec = json!({});
    let replicas = number(&paths.spec);
    if replicas != 0 {
        // Zero is left out, as the reference implementation writes it.
        spec["replicas"] = json!(replicas);
    }
    let mut status = json!({"replicas": number(&paths.status)});
    let path: Vec<&str> = paths.selector.iter().map(String::as_str).collect();
    let selector = match meta::get(object, &path) {
        Value::String(text) => text.clone(),
        value @ Value::Object(_) if call.entry.kind.kind == "ReplicationController" => {
            LabelSelector::from_map(value).to_text()
        }
        value @ Value::Object(_) => LabelSelector::from_object(value).map(|s| s.to_text()).unwrap_or_default(),
        _ => String::new(),
    };
    if !selector.is_empty() {
        status["selector"] = json!(selector);
    }
    json!({"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": spec, "status": status})
}

async fn scale(call: &Call) -> Result<Response<Body>, Status> {
    let representation = call.representation()?;
    let answer = |code: u16, scale: &Value| render::encoded(code, scale, representation.encoding);
    let entry = &call.entry;
    if call.verb == "get" {
        return answer(200, &scale_of(call, &value_in(entry, &*live(call)?)));
    }
    let ty = builtin("autoscaling", "v1", "Scale")?;
    let patching = if call.verb == "patch" { Some(patch_type(call)?) } else { None };
    let kind = if patching.is_some() { "PatchOptions" } else { "UpdateOptions" };
    let options = WriteOptions::parse(&call.query, kind, patching == Some(PatchType::Apply))?;
    let mut warnings = Vec::new();
    let manager = call.manager();
    let object = call
        .commit(options.dry_run, |txn| {
            let old = txn
                .get(&entry.collection, &call.key())
                .cloned()
                .ok_or_else(|| Status::not_found(&entry.kind, call.name()))?;
            let current = value_in(entry, &old);
            let shown = scale_of(call, &current);
            let Admitted { value: scale, warnings: found } = match patching {
                // An applied Scale is a merge of its one field; ownership is tracked on the object.
                Some(PatchType::Apply) => {
                    let applied = strict::decode(&ty, strict::Format::Yaml, &call.body, options.validation)?;
                    let body = applied.value.to_string();
                    patch::patch(&ty, PatchType::Merge, &shown, body.as_bytes(), options.validation)?
                }
                Some(patch_type) => patch::patch(&ty, patch_type, &shown, &call.body, options.validation)?,
                None => body_of(call, "autoscaling", "v1", "Scale", options)?,
            };
            warnings = found;
            let given = meta::name(&scale);
            if !given.is_empty() && given != call.name() {
                return Err(Status::bad_request(format!(
                    "the name of the object ({given}) does not match the name on the URL ({})",
                    call.name()
                )));
            }
            let replicas = meta::get(&scale, &["spec", "replicas"]).as_i64().unwrap_or(0);
            if replicas < 0 {
                let fault = FieldError::invalid("spec.replicas", replicas, "must be greater than or equal to 0");
                return Err(Status::invalid_kind("autoscaling", "Scale", call.name(), &[fault]));
            }
            let mut new = current.clone().into_owned();
            let path = call.server.scale_paths(&entry.kind).spec;
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            meta::set(&mut new, &path, json!(replicas));
            meta::put(
                &mut new,
                &["metadata", "resourceVersion"],
                meta::get(&scale, &["metadata", "resourceVersion"]).clone(),
            );
            if !entry.kind.unconditional_update && meta::resource_version(&new).is_empty() {
                meta::set(&mut new, &["metadata", "resourceVersion"], json!(old.revision.to_string()));
            }
            let tracking = Tracking::Update { manager: &manager };
            let change = Change { subresource: Some("scale"), dry_run: options.dry_run, tracking };
            call.pipeline().update(txn, entry, &old, new, change)
        })
        .await?
        .0;
    let mut response = answer(200, &scale_of(call, &value_in(entry, &object)))?;
    add_warnings(response.headers_mut(), &warnings);
    Ok(response)
}

/// Puts a Pod on a node. Also serves `POST .../bindings`, where the body names the Pod.
pub async fn binding(call: &Call) -> Result<Response<Body>, Status> {
    let options = WriteOptions::parse(&call.query, "CreateOptions", false)?;
    let Admitted { value: binding, warnings } = body_of(call, "", "v1", "Binding", options)?;
    let pods = call.catalog.builtin_entry("", "v1", "pods");
    let name = if call.name().is_empty() { meta::name(&binding) } else { call.name() };
    let given = meta::name(&binding);
    if !given.is_empty() && given != name {
        return Err(Status::bad_request("name in URL does not match name in Binding object"));
    }
    let target = meta::text(&binding, &["target", "name"]).to_owned();
    let mut faults = Vec::new();
    let kind = meta::text(&binding, &["target", "kind"]);
    if !matches!(kind, "" | "Node") {
        faults.push(FieldError::not_supported("target.kind", kind, &["Node", "<empty>"]));
    }
    if target.is_empty() {
        faults.push(FieldError::required("target.name", ""));
    }
    if !faults.is_empty() {
        return Err(Status::invalid_kind("", "Binding", name, &faults));
    }
    let key = crate::store::Key::new(call.namespace(), name);
    let manager = call.manager();
    call.commit(options.dry_run, |txn| {
        let old = txn.get(&pods.collection, &key).cloned().ok_or_else(|| Status::not_found(&pods.kind, name))?;
        let pod = &old.value;
        let refuse = |why: String| {
            // Upstream names this subresource in its 409.
            let mut status = Status::conflict(&pods.kind, name, &why);
            status.message = format!("Operation cannot be fulfilled on pods/binding \"{name}\": {why}");
            if let Some(details) = &mut status.details {
                details.kind = "pods/binding".to_owned();
            }
            status
        };
        let uid = meta::uid(&binding);
        if !uid.is_empty() && uid != meta::uid(pod) {
            return Err(refuse(format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                meta::uid(pod)
            )));
        }
        if meta::is_deleting(pod) {
            return Err(refuse(format!("pod {name} is being deleted, cannot be assigned to a host")));
        }
        let node = meta::text(pod, &["spec", "nodeName"]);
        if !node.is_empty() {
            return Err(refuse(format!("pod {name} is already assigned to node \"{node}\"")));
        }
        if !meta::list(pod, &["spec", "schedulingGates"]).is_empty() {
            return Err(refuse(format!("pod {name} has non-empty .spec.schedulingGates")));
        }
        let mut new = pod.clone();
        meta::set(&mut new, &["spec", "nodeName"], json!(target));
        for map in ["annotations", "labels"] {
            let added = meta::get(&binding, &["metadata", map]).as_object().cloned().unwrap_or_default();
            for (key, value) in added {
                meta::set(&mut new, &["metadata", map, key.as_str()], value);
            }
        }
        set_scheduled(&mut new, &meta::format_time(call.now));
        let tracking = Tracking::Update { manager: &manager };
        let change = Change { subresource: Some("binding"), dry_run: options.dry_run, tracking };
        call.pipeline().update(txn, &pods, &old, new, change)
    })
    .await?;
    let mut response = json_answer(201, &success(201));
    add_warnings(response.headers_mut(), &warnings);
    Ok(response)
}

fn set_scheduled(pod: &mut Value, now: &str) {
    let mut conditions = meta::list(pod, &["status", "conditions"]).to_vec();
    conditions.retain(|condition| meta::text(condition, &["type"]) != "PodScheduled");
    conditions.push(json!({
        "type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": now,
    }));
    meta::set(pod, &["status", "conditions"], Value::Array(conditions));
}

/// Deletes a Pod unless a PodDisruptionBudget forbids it.
async fn eviction(call: &Call) -> Result<Response<Body>, Status> {
    let options = WriteOptions::parse(&call.query, "CreateOptions", false)?;
    let Admitted { value: eviction, warnings } = body_of(call, "policy", "v1", "Eviction", options)?;
    let given = meta::name(&eviction);
    if !given.is_empty() && given != call.name() {
        return Err(Status::bad_request("name in URL does not match name in Eviction object"));
    }
    let mut delete = DeleteOptions::from_value(&eviction["deleteOptions"])?;
    delete.dry_run |= options.dry_run;
    let budgets = call.catalog.builtin_entry("policy", "v1", "poddisruptionbudgets");
    call.commit(delete.dry_run, |txn| {
        let pod = txn
            .get(&call.entry.collection, &call.key())
            .cloned()
            .ok_or_else(|| Status::not_found(&call.entry.kind, call.name()))?;
        let phase = meta::text(&pod.value, &["status", "phase"]);
        let unprotected = matches!(phase, "Succeeded" | "Failed" | "Pending") || meta::is_deleting(&pod.value);
        if !unprotected {
            let covering: Vec<Arc<Object>> = txn
                .state()
                .list(&budgets.collection, Some(call.namespace()))
                .filter(|budget| {
                    LabelSelector::from_object(&budget.value["spec"]["selector"])
                        .is_some_and(|selector| selector.matches(&pod.value))
                })
                .cloned()
                .collect();
            if covering.len() > 1 {
                return Err(Status::internal(
                    "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.",
                ));
            }
            if let Some(budget) = covering.first() {
                disrupt(call, txn, &budgets, budget)?;
            }
        }
        call.pipeline().delete(txn, &call.entry, &call.key(), &delete).map(|_| ())
    })
    .await?;
    let mut response = json_answer(201, &success(201));
    add_warnings(response.headers_mut(), &warnings);
    Ok(response)
}

/// Takes one disruption from a budget.
fn disrupt(
    call: &Call,
    txn: &mut crate::store::Txn,
    budgets: &crate::catalog::Entry,
    budget: &Arc<Object>,
) -> Result<(), Status> {
    let name = meta::name(&budget.value);
    let allowed = meta::get(&budget.value, &["status", "disruptionsAllowed"]).as_i64().unwrap_or(0);
    if allowed <= 0 {
        let number = |field: &str| meta::get(&budget.value, &["status", field]).as_i64().unwrap_or(0);
        let detail = format!(
            "The disruption budget {name} needs {} healthy pods and has {} currently",
            number("desiredHealthy"),
            number("currentHealthy")
        );
        let text = "Cannot evict pod as it would violate the pod's disruption budget.";
        return Err(Status::too_many_requests(text, 0).cause("DisruptionBudget", detail, ""));
    }
    let mut new = budget.value.clone();
    meta::set(&mut new, &["status", "disruptionsAllowed"], json!(allowed - 1));
    meta::set(&mut new, &["status", "disruptedPods", call.name()], json!(meta::format_time(call.now)));
    let key = crate::store::Key::new(call.namespace(), name);
    txn.put(&budgets.collection, &key, new);
    Ok(())
}

/// Issues a token for a ServiceAccount (authentication.k8s.io/v1 TokenRequest).
async fn token_request(call: &Call) -> Result<Response<Body>, Status> {
    let options = WriteOptions::parse(&call.query, "CreateOptions", false)?;
    let Admitted { value: mut request, warnings } =
        body_of(call, "authentication.k8s.io", "v1", "TokenRequest", options)?;
    scope(call, &mut request)?;
    let account = live(call)?;
    let account = &account.value;
    let tokens = &call.server.authenticator.tokens;
    let mut audiences: Vec<String> = meta::list(&request, &["spec", "audiences"])
        .iter()
        .filter_map(|audience| audience.as_str().map(str::to_owned))
        .collect();
    if audiences.is_empty() {
        audiences.push(tokens.audience().to_owned());
    }
    let seconds = meta::get(&request, &["spec", "expirationSeconds"]).as_i64().unwrap_or(token::DEFAULT_SECONDS);
    let mut faults = Vec::new();
    if seconds < token::MIN_SECONDS {
        faults.push(FieldError::invalid(
            "spec.expirationSeconds",
            seconds,
            "may not specify a duration less than 10 minutes",
        ));
    }
    if seconds > 1 << 32 {
        faults.push(FieldError::invalid(
            "spec.expirationSeconds",
            seconds,
            "may not specify a duration larger than 2^32 seconds",
        ));
    }
    if !faults.is_empty() {
        return Err(Status::invalid_kind("authentication.k8s.io", "TokenRequest", call.name(), &faults));
    }
    let seconds = seconds.min(token::MAX_SECONDS);
    let bound = bound_object(call, &request["spec"]["boundObjectRef"])?;
    let now = call.now.as_second();
    let token = tokens.issue(account, &audiences, bound.as_ref(), now, seconds)?;
    let end = jiff::Timestamp::from_second(now + seconds).unwrap_or(call.now);
    meta::set(&mut request, &["spec", "audiences"], json!(audiences));
    meta::set(&mut request, &["spec", "expirationSeconds"], json!(seconds));
    request["status"] = json!({"token": token, "expirationTimestamp": meta::format_time(end)});
    for field in ["name", "namespace"] {
        meta::set(&mut request, &["metadata", field], account["metadata"][field].clone());
    }
    meta::set(&mut request, &["metadata", "creationTimestamp"], json!(meta::format_time(call.now)));
    answer_value(call, 201, &request, &warnings)
}

fn bound_object(call: &Call, reference: &Value) -> Result<Option<Bound>, Status> {
    if reference.is_null() {
        return Ok(None);
    }
    let text = |field: &str| meta::text(reference, &[field]);
    let (resource, namespace) = match (text("apiVersion"), text("kind")) {
        ("v1", "Pod") => ("pods", call.namespace()),
        ("v1", "Secret") => ("secrets", call.namespace()),
        ("v1", "Node") => ("nodes", ""),
        (api_version, kind) => {
            let text = format!("cannot bind token to object of type {api_version}, Kind={kind}");
            return Err(Status::bad_request(text));
        }
    };
    let snapshot = call.server.store.snapshot();
    let entry = call.catalog.builtin_entry("", "v1", resource);
    let object = snapshot
        .get(resource, &crate::store::Key::new(namespace, text("name")))
        .ok_or_else(|| Status::not_found(&entry.kind, text("name")))?;
    let uid = meta::uid(&object.value);
    if !text("uid").is_empty() && text("uid") != uid {
        let why = format!(
            "the UID in the bound object reference ({}) does not match the UID in record. The object might have been \
             deleted and then recreated",
            text("uid")
        );
        return Err(Status::conflict(&entry.kind, text("name"), why));
    }
    if resource == "pods" {
        let account = meta::text(&object.value, &["spec", "serviceAccountName"]);
        if account != call.name() {
            return Err(Status::bad_request(format!(
                "cannot bind token for serviceaccount \"{}\" to pod running with different serviceaccount name.",
                call.name()
            )));
        }
    }
    Ok(Some(Bound { kind: text("kind").to_owned(), name: text("name").to_owned(), uid: uid.to_owned() }))
}
