//! The smallest thing that answers requests with the decisions of this crate.

use ipnet::IpNet;
use jiff::Timestamp;
use portolan_api::kinds::{Kind, Registry};
use portolan_api::patch::{self, PatchType};
use portolan_api::schema::DocumentType;
use portolan_api::selector::{FieldSelector, LabelSelector};
use portolan_api::service::{self, Changes, ServiceAllocator};
use portolan_api::status::{self, Status};
use portolan_api::strict::{self, FieldValidation};
use portolan_api::{defaulting, meta, strategy, table, validation};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// An answer: status code, body and the number of warnings.
pub type Answer = (u16, Value, usize);

pub struct Server {
    registry: Registry,
    objects: BTreeMap<(String, String, String), Value>,
    allocator: ServiceAllocator,
    revision: u64,
    seed: u64,
}

/// One request, its path taken apart.
struct Call<'a> {
    kind: Arc<Kind>,
    namespace: String,
    name: String,
    subresource: Option<String>,
    query: HashMap<String, String>,
    type_: &'a str,
    body: Value,
    as_table: bool,
}

/// What built-in admission adds to new objects, as far as the recorded cases show it.
fn admission(kind: &Kind, new: &mut Value) {
    if kind.is("", "Pod") {
        meta::set(new, &["spec", "priority"], json!(0));
        meta::set(new, &["spec", "preemptionPolicy"], json!("PreemptLowerPriority"));
        let mut tolerations = meta::list(new, &["spec", "tolerations"]).to_vec();
        for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
            tolerations
                .push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}));
        }
        meta::set(new, &["spec", "tolerations"], json!(tolerations));
    }
    if kind.is("", "Node") {
        let mut taints = meta::list(new, &["spec", "taints"]).to_vec();
        taints.push(json!({"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}));
        meta::set(new, &["spec", "taints"], json!(taints));
    }
}

/// A request body that may be text.
fn bytes(body: &Value) -> Vec<u8> {
    body.as_str().map_or_else(|| body.to_string().into_bytes(), |text| text.as_bytes().to_vec())
}

fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let raw = text.as_bytes();
    let mut i = 0;
    while i < raw.len() {
        if raw[i] == b'%' && i + 2 < raw.len() {
            let hex = std::str::from_utf8(&raw[i + 1..i + 3]).expect("ascii");
            out.push(u8::from_str_radix(hex, 16).expect("hex"));
            i += 3;
        } else {
            out.push(raw[i]);
            i += 1;
        }
    }
    String::from_utf8(out).expect("utf-8")
}

impl Server {
    pub fn new(cidrs: &[&str]) -> Server {
        let nets: Vec<IpNet> = cidrs.iter().map(|c| c.parse().expect("a network")).collect();
        let mut server = Server {
            registry: Registry::builtin(),
            objects: BTreeMap::new(),
            allocator: ServiceAllocator::new(&nets, 30000..=32767),
            revision: 1,
            seed: 1,
        };
        let mut cidr = service::service_cidr(&nets, Timestamp::now());
        server.stamp(&mut cidr, true);
        server.objects.insert(("servicecidrs".into(), String::new(), "kubernetes".into()), cidr);
        let (code, body, _) = server.call(
            "POST",
            "/api/v1/namespaces/default/services",
            "",
            "",
            service::kubernetes_service(&nets, 6443),
        );
        assert_eq!(code, 201, "{body}");
        server
    }

    /// Answers a request.
    pub fn call(&mut self, method: &str, path: &str, type_: &str, accept: &str, body: Value) -> Answer {
        let Some(call) = self.parse(path, type_, accept, body) else { return (404, Value::Null, 0) };
        let warned_always = usize::from(call.kind.is("", "Endpoints"));
        match self.dispatch(method, &call) {
            Ok((code, body, warnings)) => (code, self.shown(&call, body), warnings.max(warned_always)),
            Err(status) => (status.code, status.to_value(), warned_always),
        }
    }

    fn parse<'a>(&self, path: &str, type_: &'a str, accept: &str, body: Value) -> Option<Call<'a>> {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let mut parts = path.trim_start_matches('/').split('/');
        let (group, version) = match parts.next()? {
            "api" => ("", parts.next()?),
            "apis" => (parts.next()?, parts.next()?),
            _ => return None,
        };
        let mut rest: Vec<&str> = parts.collect();
        let mut namespace = String::new();
        if rest.len() > 2 && rest[0] == "namespaces" {
            namespace = rest[1].to_owned();
            rest.drain(..2);
        }
        let kind = self.registry.by_gvr(group, version, rest.first()?)?.clone();
        let query = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(key, value)| (key.to_owned(), unescape(value)))
            .collect();
        Some(Call {
            kind,
            namespace,
            name: rest.get(1).map(|n| (*n).to_owned()).unwrap_or_default(),
            subresource: rest.get(2).map(|s| (*s).to_owned()),
            query,
            type_,
            body,
            as_table: accept.contains("as=Table"),
        })
    }

    fn shown(&self, call: &Call<'_>, body: Value) -> Value {
        if !call.as_table || body["kind"] == "Status" {
            return body;
        }
        let items = body.get("items").and_then(Value::as_array).cloned().unwrap_or_else(|| vec![body]);
        let rows: Vec<Value> = items
            .iter()
            .map(|item| {
                let row = table::row(&call.kind, item, Timestamp::now());
                let object = json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": item["metadata"]});
                let mut shown = json!({"cells": row.cells, "object": object});
                if !row.conditions.is_empty() {
                    shown["conditions"] = json!(row.conditions);
                }
                shown
            })
            .collect();
        let columns: Vec<Value> = table::columns(&call.kind).iter().map(table::Column::to_value).collect();
        json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": "1"},
            "columnDefinitions": columns, "rows": rows})
    }

    fn key(call: &Call<'_>, name: &str) -> (String, String, String) {
        (call.kind.plural.clone(), call.namespace.clone(), name.to_owned())
    }

    fn pick(&mut self) -> impl FnMut(u64) -> u64 + use<> {
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut state = self.seed;
        move |below| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        }
    }

    fn dispatch(&mut self, method: &str, call: &Call<'_>) -> Result<Answer, Status> {
        let stored = self.objects.get(&Self::key(call, &call.name)).cloned();
        let missing = || Status::not_found(&call.kind, &call.name);
        match method {
            "GET" if call.name.is_empty() => self.list(call).map(|list| (200, list, 0)),
            "GET" => Ok((200, stored.ok_or_else(missing)?, 0)),
            "POST" => self.create(call),
            "PUT" => match stored {
                None if call.kind.create_on_update && call.subresource.is_none() => self.create(call),
                None => Err(missing()),
                Some(old) => {
                    let admitted = self.admit(call)?;
                    self.update(call, admitted, &old)
                }
            },
            "PATCH" => {
                let old = stored.ok_or_else(missing)?;
                let ty = DocumentType::of(&call.kind).expect("a type");
                let patch_type = PatchType::from_media_type(call.type_).expect("a patch");
                let body = bytes(&call.body);
                let admitted = patch::patch(&ty, patch_type, &old, &body, self.validation(call))?;
                self.update(call, admitted, &old)
            }
            "DELETE" => {
                let mut old = stored.ok_or_else(missing)?;
                let finalizers = meta::list(&old, &["metadata", "finalizers"]).len();
                if finalizers > 0 {
                    meta::set(&mut old, &["metadata", "deletionTimestamp"], json!("2026-01-01T00:00:00Z"));
                    meta::set(&mut old, &["metadata", "deletionGracePeriodSeconds"], json!(0));
                    self.objects.insert(Self::key(call, &call.name), old.clone());
                    return Ok((200, old, 0));
                }
                self.remove(call, &old);
                let answer = if call.kind.delete_returns_object {
                    old
                } else {
                    status::deleted(&call.kind, &call.name, meta::uid(&old))
                };
                Ok((200, answer, 0))
            }
            other => panic!("no such method: {other}"),
        }
    }

    fn list(&self, call: &Call<'_>) -> Result<Value, Status> {
        let text = |key: &str| call.query.get(key).map(String::as_str).unwrap_or_default();
        let fields = FieldSelector::parse(text("fieldSelector"), &call.kind, &[])?;
        let labels = LabelSelector::parse(text("labelSelector"))?;
        let items: Vec<Value> = self
            .objects
            .iter()
            .filter(|((plural, namespace, _), object)| {
                *plural == call.kind.plural
                    && (call.namespace.is_empty() || *namespace == call.namespace)
                    && fields.matches(&call.kind, object)
                    && labels.matches(object)
            })
            .map(|(_, object)| object.clone())
            .collect();
        Ok(json!({"kind": call.kind.list_kind, "apiVersion": call.kind.api_version(),
            "metadata": {"resourceVersion": "1"}, "items": items}))
    }

    fn validation(&self, call: &Call<'_>) -> FieldValidation {
        FieldValidation::parse(call.query.get("fieldValidation").map(String::as_str).unwrap_or_default())
            .expect("a known value")
    }

    fn admit(&self, call: &Call<'_>) -> Result<strict::Admitted, Status> {
        let ty = DocumentType::of(&call.kind).expect("a type");
        strict::decode(&ty, strict::Format::Json, &bytes(&call.body), self.validation(call))
    }

    fn create(&mut self, call: &Call<'_>) -> Result<Answer, Status> {
        let kind = call.kind.clone();
        let admitted = self.admit(call)?;
        let mut new = admitted.value;
        let namespace = meta::namespace(&new).to_owned();
        if kind.namespaced && !namespace.is_empty() && namespace != call.namespace {
            return Err(Status::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        if !meta::resource_version(&new).is_empty() {
            return Err(Status::plain_error("resourceVersion should not be set on objects to be created"));
        }
        if kind.namespaced {
            meta::set(&mut new, &["metadata", "namespace"], json!(call.namespace));
        }
        let base = meta::text(&new, &["metadata", "generateName"]).to_owned();
        if meta::name(&new).is_empty() && !base.is_empty() {
            let mut pick = self.pick();
            let name = meta::generate_name(&base, |n| usize::try_from(pick(n as u64)).expect("small"));
            meta::set(&mut new, &["metadata", "name"], json!(name));
        }
        let ty = DocumentType::of(&kind).expect("a type");
        defaulting::default(&ty, &mut new);
        admission(&kind, &mut new);
        let dry_run = self.dry_run(call)?;
        let changes = if kind.is("", "Service") {
            let mut pick = self.pick();
            self.allocator.plan_create(&kind, &mut new, dry_run, &mut pick)?
        } else {
            Changes::default()
        };
        strategy::prepare_create(&kind, &mut new);
        let faults = validation::validate_create(&kind, &new);
        let name = meta::name(&new).to_owned();
        if !faults.is_empty() {
            return Err(Status::invalid(&kind, &name, &faults));
        }
        if self.objects.contains_key(&Self::key(call, &name)) {
            return Err(Status::already_exists(&kind, &name));
        }
        let warnings = admitted.warnings.len() + validation::warnings(&kind, &new, None, None).len();
        self.stamp(&mut new, true);
        if !dry_run {
            self.keep(call, &new, &changes);
        }
        Ok((201, new, warnings))
    }

    fn dry_run(&self, call: &Call<'_>) -> Result<bool, Status> {
        match call.query.get("dryRun").map(String::as_str) {
            None => Ok(false),
            Some("All") => Ok(true),
            Some(other) => {
                let fault = status::FieldError::not_supported("dryRun", json!([other]), &["All"]);
                Err(Status::invalid_kind("meta.k8s.io", "CreateOptions", "", &[fault]))
            }
        }
    }

    fn stamp(&mut self, object: &mut Value, new: bool) {
        self.revision += 1;
        meta::set(object, &["metadata", "resourceVersion"], json!(self.revision.to_string()));
        if new {
            meta::set(object, &["metadata", "uid"], json!(format!("uid-{}", self.revision)));
            meta::set(object, &["metadata", "creationTimestamp"], json!(meta::format_time(Timestamp::now())));
        }
    }

    fn keep(&mut self, call: &Call<'_>, object: &Value, changes: &Changes) {
        self.allocator.commit(changes);
        let kind = &call.kind;
        let name = meta::name(object);
        if kind.is("networking.k8s.io", "IPAddress") {
            self.allocator.observe_ip_address(name);
        }
        if kind.is("networking.k8s.io", "ServiceCIDR") {
            self.allocator.observe_service_cidr(object);
        }
        for ip in &changes.release_ips {
            self.objects.remove(&("ipaddresses".into(), String::new(), ip.to_string()));
        }
        for ip in &changes.take_ips {
            let mut address = service::ip_address(*ip, meta::namespace(object), name);
            self.stamp(&mut address, true);
            self.objects.insert(("ipaddresses".into(), String::new(), ip.to_string()), address);
        }
        self.objects.insert(Self::key(call, name), object.clone());
    }

    fn remove(&mut self, call: &Call<'_>, old: &Value) {
        let name = meta::name(old);
        self.objects.remove(&Self::key(call, name));
        if call.kind.is("", "Service") {
            let changes = self.allocator.plan_delete(old);
            self.allocator.commit(&changes);
            for ip in &changes.release_ips {
                self.objects.remove(&("ipaddresses".into(), String::new(), ip.to_string()));
            }
            self.objects.remove(&("endpoints".into(), call.namespace.clone(), name.to_owned()));
        }
        if call.kind.is("networking.k8s.io", "IPAddress") {
            self.allocator.forget_ip_address(name);
        }
    }

    fn update(&mut self, call: &Call<'_>, admitted: strict::Admitted, old: &Value) -> Result<Answer, Status> {
        let kind = call.kind.clone();
        let mut new = admitted.value;
        if meta::name(&new) != call.name {
            return Err(Status::bad_request(format!(
                "the name of the object ({}) does not match the name on the URL ({})",
                meta::name(&new),
                call.name
            )));
        }
        if kind.namespaced && !["", call.namespace.as_str()].contains(&meta::namespace(&new)) {
            return Err(Status::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        let version = meta::resource_version(&new);
        if !version.is_empty() && version != meta::resource_version(old) {
            return Err(Status::stale_write(&kind, &call.name));
        }
        if !meta::uid(&new).is_empty() && meta::uid(&new) != meta::uid(old) && !call.type_.contains("patch") {
            return Err(Status::conflict(&kind, &call.name, "uid"));
        }
        let ty = DocumentType::of(&kind).expect("a type");
        defaulting::default(&ty, &mut new);
        let dry_run = self.dry_run(call)?;
        let subresource = call.subresource.as_deref();
        let changes = if kind.is("", "Service") && subresource.is_none() {
            let mut pick = self.pick();
            self.allocator.plan_update(&kind, &mut new, old, dry_run, &mut pick)?
        } else {
            Changes::default()
        };
        strategy::prepare_update(&kind, &mut new, old, subresource);
        let faults = validation::validate_update(&kind, &new, old, subresource);
        if !faults.is_empty() {
            return Err(Status::invalid(&kind, &call.name, &faults));
        }
        let warnings =
            admitted.warnings.len() + validation::warnings(&kind, &new, Some(old), call.subresource.as_deref()).len();
        self.stamp(&mut new, false);
        if !dry_run {
            self.keep(call, &new, &changes);
            if meta::is_deleting(&new) && meta::list(&new, &["metadata", "finalizers"]).is_empty() {
                self.remove(call, &new);
            }
        }
        Ok((200, new, warnings))
    }
}
